"""Nobody waits before a still screen: no help loads torch once one command had to, and every
command says its first word at once."""
import json
import os
import resource
import subprocess
import sys

import pytest

# every command's help, as text; and whether torch came with it
HELPS = """
import contextlib, io, json, sys
import click
from sprout_lab.cli import cli, main

def paths(group, path):
    yield path
    for name in group.list_commands(None):
        command = group.get_command(None, name)
        if isinstance(command, click.Group): yield from paths(command, [*path, name])
        else: yield [*path, name]

def said(path):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit): main([*path, "--help"])
    return out.getvalue()

helps = {" ".join(path): said(path) for path in paths(cli, [])}
print(json.dumps([helps, [name for name in ("torch", "transformers") if name in sys.modules]]))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict:
    "With a cache of its own, which the first command fills; the terminal is wide enough."
    return {**os.environ, "SPROUT_LAB_CACHE": str(tmp_path_factory.mktemp("cache")),
            "COLUMNS": "100"}


def helps(environment) -> tuple[dict, list, str]:
    done = subprocess.run([sys.executable, "-c", HELPS], env=environment, capture_output=True,
                          text=True, check=True)
    return *json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def first(environment): return helps(environment)


def test_the_first_start_says_that_it_loads(first):
    said, loaded, told = first
    assert loaded == ["torch", "transformers"]
    assert told == "loading PyTorch and the models …\n", "once"
    assert len(said) > 35 and all("Usage" in text for text in said.values())
    assert "--hidden_size" in said["train transformer"]


def test_from_then_on_no_help_loads_torch_and_all_say_the_same(first, environment):
    said, loaded, told = helps(environment)
    assert loaded == [] and told == ""
    assert said == first[0]


QUICK = ["--help", "train --help", "train transformer --help", "generate --help", "guide",
         "guide transformer", "families", "runs list", "completion bash",
         "train transformer --banana 1", "train transfromer", "generate", "generate nowhere",
         "draw nowhere", "evaluate --model_path nowhere"]
LOUD = ["doctor", "train transformer --dry_run", "draw .", "generate . --prompt a",
        "scripts/train_mot.py --num_thoughts 2"]


COMMAND = "from sprout_lab.cli import main; main()"


def cpu_seconds(line: str, environment) -> tuple[float, str]:
    "What a command took of the CPU, and what it said on both channels."
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", COMMAND, *line.split()], env=environment,
                          capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert "Traceback" not in done.stderr
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
            done.stdout + done.stderr)


@pytest.mark.parametrize("line", QUICK)
def test_what_needs_no_model_ends_at_once(line, first, environment):
    took, said = cpu_seconds(line, environment)
    assert said and took < 2, took   # a fifth of that on one core; torch alone is three


@pytest.fixture(scope="module")
def without_torch(environment, tmp_path_factory) -> dict:
    "As if the import of torch never ended: it leaves the process."
    folder = tmp_path_factory.mktemp("in_place_of")
    (folder / "torch.py").write_text("raise SystemExit('torch is asked for')")
    return {**environment,
            "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.parametrize("line", LOUD)
def test_what_needs_one_says_so_before_it_is_loaded(line, first, without_torch):
    done = subprocess.run([sys.executable, "-c", COMMAND, *line.split()], env=without_torch,
                          capture_output=True, text=True)
    assert done.stderr.splitlines()[-2:] == ["loading PyTorch and the models …",
                                             "torch is asked for"]
    assert done.stdout.startswith("sprout-lab ") if line == "doctor" else not done.stdout


def test_quiet_says_nothing_of_it(first, without_torch):
    for line in ("train transformer --quiet", "draw . --quiet"):
        done = subprocess.run([sys.executable, "-c", COMMAND, *line.split()], env=without_torch,
                              capture_output=True, text=True)
        assert done.stderr == "torch is asked for\n"
