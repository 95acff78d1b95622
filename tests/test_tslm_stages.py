"""Stages of the time-series curriculum, each in a process of its own, by its command; killed in the
middle and called again, they end where the ones that were never killed end, bit for bit."""
import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from sprout_lab.curriculum import is_complete
from sprout_lab.runs import Run, read_log

# Imports torch once and forks a process for every line: words of a command, and the number of the
# batch at which the process ends itself as a lost machine would, without a word.
SERVER = """
import json, os, signal, sys
import sprout_lab.curriculum, torch
from sprout_lab.cli import main
from sprout_lab.data.series import SeriesBatches
torch.set_num_threads(1)
plain = SeriesBatches.batch
for line in sys.stdin:
    words, last = json.loads(line)
    def batch(self, index):
        if index == last: os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, index)
    child = os.fork()
    if child == 0:
        SeriesBatches.batch = batch
        log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1); os.dup2(log, 2)
        main(words)
    print(os.waitpid(child, 0)[1], flush=True)
"""
SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
         "encoder_hidden_size": 16, "encoder_num_layers": 1, "encoder_num_heads": 2,
         "encoder_intermediate_size": 32, "batch_size": 2, "dropout": 0.1, "eval_batches": 1,
         "final_eval_batches": 1, "sample_tokens": 0, "save_interval": 4, "eval_interval": 6,
         "log_interval": 2, "device": "cpu"}
STEPS = {"stage1_mcq": 14, "stage2_captioning": 1, "stage3_cot": 11}
KILLED = {"stage1_mcq": 9, "stage3_cot": 6}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    "A function that runs a command in a process of its own and gives its `os.waitpid` status."
    log = tmp_path_factory.mktemp("log") / "output.txt"
    server = subprocess.Popen([sys.executable, "-c", SERVER, str(log)], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    def run(words: list[str], last: int | None = None) -> tuple[int, str]:
        before = log.stat().st_size if log.exists() else 0
        server.stdin.write(json.dumps([words, last]) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return status, log.read_text()[before:]
    yield run
    server.stdin.close()
    server.wait(timeout=60)


def command(stage: str, root) -> list[str]:
    flags = [f"--{name}={value}" for name, value in SHAPE.items()]
    return ["curriculum", "--stage", stage, "--root", str(root), *flags, "--no_tensorboard",
            f"--max_steps={STEPS[stage]}"]


@pytest.mark.slow   # half a minute of CPU: eight processes, and two thousand answers judged
def test_stages_killed_and_called_again_equal_those_never_killed(processes, tmp_path):
    lost, whole = tmp_path / "lost", tmp_path / "whole"
    for stage in STEPS:
        if stage in KILLED:
            status, _ = processes(command(stage, lost), KILLED[stage])
            assert os.WTERMSIG(status) == signal.SIGKILL and not is_complete(lost / stage)
        for root in (lost, whole):
            status, said = processes(command(stage, root))
            assert status == 0 and ("accuracy" in said or "facts right" in said), said
        one, two = Run(lost / stage), Run(whole / stage)
        for name in ("model", "optimizer"):
            a, b = (load_file(run.step_folder(STEPS[stage]) / f"{name}.safetensors")
                    for run in (one, two))
            assert a.keys() == b.keys() and all(a[key].equal(b[key]) for key in a), (stage, name)
        logs = [read_log(run.training_log) for run in (one, two)]
        assert logs[0]["step"] and all(logs[0][k] == logs[1][k] for k in ("step", "loss"))
        answers = [json.loads((run.results / "answers.json").read_text()) for run in (one, two)]
        assert answers[0] == answers[1] and answers[0]["count"]
    status, said = processes(command("stage3_cot", lost))
    assert status == 0 and "is complete" in said
