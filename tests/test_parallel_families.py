"""Every family in the ways that its entry admits: two and four processes give the losses of one,
go on from each other's checkpoints, and end with a clear line when one of them is killed."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from sprout_lab.configs import ConfigError
from sprout_lab.families import configure, families, make_trainer, register
from sprout_lab.runs import Run, damage, read_log
from sprout_lab.trainers.parallel import check_parallel

SMALL = {"max_steps": 20, "log_interval": 1, "eval_interval": 10, "save_interval": 10,
         "eval_batches": 2, "final_eval_batches": 2, "sample_tokens": 0, "tensorboard": False,
         "sequence_length": 32, "batch_size": 8, "warmup_steps": 4, "device": "cpu",
         "optimizer": "adamw",
         # small: a ternary weight near a threshold turns the last digit of a float into a step
         "learning_rate": 1e-4}
NARROW = {"hidden_size": 32, "num_attention_heads": 4}
# without what every process draws for itself: a SPROUT's dropout, the noise of thoughts
FIXED_TREE = {**NARROW, "growth": "none", "tree": [-1, 0, 0], "dropout": 0.0}
SHAPES = {"transformer": {**NARROW, "num_hidden_layers": 2},
          "slm": {"hidden_size": 32, "num_hidden_layers": 2},
          "hnet": {"d_model": [32, 48], "num_blocks": [[1, 0, 1], [1]]},
          "sprout": FIXED_TREE, "sprout causal": {**FIXED_TREE, "objective": "causal"},
          "mot": {**NARROW, "num_hidden_layers": 2, "intermediate_size": 32, "creativity": 0.0},
          "tslm": {**NARROW, "num_hidden_layers": 1, "encoder_num_layers": 1}}


def family_of(name): return name.partition(" ")[0]


WAYS = [(name, mode) for name in SHAPES for mode in families[family_of(name)].parallel]
# the Transformer's other ways are tests/test_parallel.py
DATA_AND_MORE = [*((name, "data") for name in SHAPES), ("slm", "sharded")]

WORKER = """
import json, sys, torch.distributed as dist
from sprout_lab.families import configure, make_trainer
for family, flags in json.loads(sys.argv[1]):
    make_trainer(configure(family, flags, log=lambda w: None), log=lambda w: None).train()
dist.destroy_process_group()
"""


def settings(name, folder, **flags):
    small = {**SMALL, **SHAPES[name], "output_dir": str(folder), **flags}
    if name == "tslm": del small["sequence_length"], small["sample_tokens"]   # it reads questions
    return small


def alone(name, folder, **flags):
    run = configure(family_of(name), settings(name, folder, **flags), log=lambda words: None)
    return make_trainer(run, log=lambda words: None).train()


COMMAND = "from sprout_lab.cli import main; main()"


def start(folder, processes, code, *words):
    "The processes of a job that runs `code`."
    script = folder / "job.py"
    script.write_text(code)
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
         str(processes), str(script), *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})


def together(folder, processes, *jobs):
    "Trainings, (family, flags) each, one after the other in the same processes."
    process = start(folder, processes, WORKER, json.dumps(jobs))
    errors = process.communicate(timeout=300)[1]
    assert process.returncode == 0, errors[-3000:]


def losses(folder): return read_log(Run(folder).training_log)["loss"][:20]


@pytest.mark.parametrize("processes, ways", [
    (2, DATA_AND_MORE), pytest.param(2, WAYS, marks=pytest.mark.slow),
    pytest.param(4, WAYS, marks=pytest.mark.slow)], ids=["2", "2-every-way", "4-every-way"])
def test_the_first_twenty_losses_are_those_of_one_process(tmp_path, processes, ways):
    "Slow in every way, and with four processes on two cores."
    folder = tmp_path / "several"
    together(tmp_path, processes,
             *((family_of(name), settings(name, folder / f"{name}-{mode}", parallel=mode))
               for name, mode in ways))
    one = {name: losses(alone(name, tmp_path / name).folder) for name in SHAPES}
    for name, mode in ways:
        found = losses(folder / f"{name}-{mode}")
        assert len(found) == 20
        apart = max(abs(a - b) for a, b in zip(one[name], found))
        assert apart < 1e-5, (name, mode, apart)


@pytest.mark.slow
def test_one_goes_on_where_two_or_four_stopped(tmp_path):
    "Slow: every family in every way, twice."
    first, second = [], []
    for name, mode in WAYS:
        part = settings(name, tmp_path / f"{name}-{mode}", parallel=mode, lr_decay_steps=20)
        first.append((family_of(name), {**part, "max_steps": 10}))
        second.append((family_of(name), {**part, "max_steps": 14, "resume_from": "auto"}))
    together(tmp_path, 4, *first)
    together(tmp_path, 2, *second)
    for name, mode in WAYS:
        whole = alone(name, tmp_path / f"{name}-{mode}-whole")
        folder = tmp_path / f"{name}-{mode}"
        alone(name, folder, resume_from="auto", parallel="data")
        apart = max(abs(a - b) for a, b in zip(losses(whole.folder), losses(folder)))
        assert apart < 1e-4, (name, mode, apart)


@pytest.mark.slow
def test_a_killed_process_ends_the_job_and_leaves_a_checkpoint(tmp_path):
    """Slow, and a race: where the launcher's signal comes before the broken connection is seen,
    the launcher's own words are all there is."""
    flags = settings("slm", tmp_path / "run", parallel="sharded", max_steps=100_000,
                     save_interval=2)
    words = [w for name, value in flags.items() if not isinstance(value, bool)
             for w in (f"--{name}", value)]
    process = start(tmp_path, 2, COMMAND, "train", "slm", "--no_tensorboard", *words)
    try:
        while process.poll() is None and len(list((tmp_path / "run").rglob("step_*"))) < 2:
            time.sleep(0.05)
        found = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
        os.kill(int(found.stdout.split()[-1]), signal.SIGKILL)
        out, errors = process.communicate(timeout=120)
    finally: process.kill()
    assert process.returncode != 0
    lines = [line for line in errors.splitlines() if line.startswith("sprout-lab: ")]
    assert len(lines) >= 1 and "another process of this job is gone" in lines[0], errors[-2000:]
    assert "--resume_from auto" in lines[0]
    newest = Run(tmp_path / "run").steps()[-1]
    last = [s for s in Run(tmp_path / "run").steps()
            if damage(Run(tmp_path / "run").step_folder(s)) is None]
    assert last and newest - last[-1] <= 4
    run = alone("slm", tmp_path / "run", resume_from="auto", max_steps=last[-1] + 2,
                parallel="data")
    assert Run(run.folder).steps()[-1] == last[-1] + 2


def test_the_plan_is_the_one_of_the_entry():
    before = families["mot"]
    plan = {**before.parallel_plan, "not_tensor": "this entry says so"}
    try:
        register(replace(before, parallel_plan=plan))
        with pytest.raises(ConfigError, match="this entry says so"):
            check_parallel(before.build(vocab_size=259), "tensor", 2)
    finally: register(before)
    assert before.parallel == ("data", "sharded")


def test_what_a_family_does_not_admit_is_said():
    model = families["slm"].build(vocab_size=259)
    with pytest.raises(ConfigError, match="scaled by a mean over the whole matrix"):
        check_parallel(model, "tensor", 2)
