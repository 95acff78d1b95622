"""Killed at any moment and resumed equals never killed, bit for bit."""
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from sprout_lab.runs import Run, read_log

STEPS = 120
FLAGS = ["--hidden_size", "32", "--num_layers", "2", "--num_heads", "2", "--dropout", "0.1",
         "--sequence_length", "32", "--batch_size", "4", "--gradient_accumulation_steps", "2",
         "--order", "shuffle", "--max_steps", str(STEPS), "--save_interval", "5", "--eval_interval",
         "10", "--eval_batches", "2", "--log_interval", "3", "--warmup_steps", "10",
         "--no_tensorboard", "--sample_tokens", "0", "--device", "cpu", "--resume_from", "auto"]

# A small server: it imports torch once, then forks a trainer for every line that it reads. The
# trainer is a process of its own, and is killed as one.
SERVER = """
import os, sys
import sprout_lab.families, sprout_lab.trainers.callbacks, sprout_lab.visualizers.curves, torch
from sprout_lab.cli import main
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    child = os.fork()
    if child == 0:
        log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1); os.dup2(log, 2)
        main(line.split())
    print(child, flush=True)
    _, status = os.waitpid(child, 0)
    print(status, flush=True)
"""


class Forks:
    "Runs the command line in forked processes."

    def __init__(self, log: Path):
        self.log = log
        self.process = subprocess.Popen([sys.executable, "-c", SERVER, str(log)],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert self.process.stdout.readline() == "ready\n"

    def run(self, words: list[str], kill_after: float | None = None) -> int:
        "Exit status as `os.waitpid` gives it; with `kill_after`, SIGKILL after so many seconds."
        self.process.stdin.write(" ".join(words) + "\n")
        self.process.stdin.flush()
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            try: os.kill(child, signal.SIGKILL)
            except ProcessLookupError: pass
        return int(self.process.stdout.readline())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = Forks(tmp_path_factory.mktemp("log") / "output.txt")
    yield server
    server.close()


def same_run(one: Run, two: Run):
    "Every weight, every moment and every logged number is equal."
    for name in ("model", "optimizer"):
        a, b = (load_file(run.step_folder(STEPS) / f"{name}.safetensors") for run in (one, two))
        assert a.keys() == b.keys()
        for key in a: assert a[key].equal(b[key]), key
    for path in ("training_log", "eval_log"):
        a, b = (read_log(getattr(run, path)) for run in (one, two))
        for column in a:
            if column not in ("tokens_per_second", "elapsed_seconds"):
                assert a[column] == b[column], (path, column)


def test_25_kills(forks, tmp_path):
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    started = time.monotonic()
    assert forks.run(["train", "transformer", *FLAGS, "--output_dir",
                      str(whole.folder)]) == 0, forks.log.read_text()[-2000:]
    length = time.monotonic() - started
    moments = random.Random(0)
    kills = 0
    while kills < 25:
        # the run is started anew from its last checkpoint each time, and killed somewhere in what
        # is left of it
        status = forks.run(["train", "transformer", *FLAGS, "--output_dir", str(killed.folder)],
                           kill_after=moments.uniform(0.02, 0.35) * length)
        if os.WIFSIGNALED(status): kills += 1
        else:
            assert status == 0, forks.log.read_text()[-2000:]
            same_run(whole, killed)
            import shutil
            shutil.rmtree(killed.folder)   # it reached the end between two kills: begin another
    assert forks.run(["train", "transformer", *FLAGS, "--output_dir",
                      str(killed.folder)]) == 0, forks.log.read_text()[-2000:]
    same_run(whole, killed)
