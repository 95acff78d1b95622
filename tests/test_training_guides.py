"""The account of the training guides: nothing left out, every test there, every command understood.
"""
import re
import resource
import shlex
import subprocess
from pathlib import Path

import click
import pytest
from shell import refused, shell

from sprout_lab.cli import cli
from sprout_lab.training_guides import HOW, guide_names, guide_steps, load_guide

root = Path(__file__).parent.parent
GUIDES = guide_names()
ROWS = [(name, row) for name in GUIDES for row in load_guide(name).rows]
# places for a name of one's own, which a dry run cannot fill
PLACE = re.compile(r"\b(FILE|DIR|NAME|BUCKET|PATH|N)\b|\.json|\.txt|outputs/|data/|\./|tinystories")


@pytest.mark.parametrize("name", GUIDES)
def test_every_line_is_accounted_for(name):
    guide = load_guide(name)
    assert guide.unaccounted() == []
    assert all(row.how in HOW for row in guide.rows)
    assert guide.steps, "a guide has a way through it"


@pytest.mark.parametrize("name", GUIDES)
def test_what_works_has_a_test_and_what_is_missing_a_reason(name):
    for row in load_guide(name).rows:
        assert row.tests or row.how == "absent", f"{name}:{row.lines}: no test"
        assert row.how != "absent" or row.note, f"{name}:{row.lines}: why is it not offered?"
        for test in row.tests:
            file, _, function = test.partition("::")
            path = root / file if file.startswith("nbs/") else root / "tests" / file
            assert path.is_file(), f"{name}:{row.lines}: {path.name} is not there"
            if not function: continue
            there = re.search(rf"^def {function}\(", path.read_text(), re.M)
            assert there, f"{name}:{row.lines}: {file} has no {function}"


def understood(words: list[str]) -> None:
    "Let click read the words of a command, without running it."
    command, context, rest = cli, None, ["sprout-lab", *words]
    while True:
        name, *rest = rest
        if context is not None: name, command, rest = command.resolve_command(context,
                                                                              [name, *rest])
        context = command.make_context(name, list(rest), parent=context)
        if not isinstance(command, click.Group): return
        rest = [*context._protected_args, *context.args]


COMMANDS = sorted({row.here for _, row in ROWS if row.here.startswith("sprout-lab ")})


def test_every_command_is_understood():
    assert len(COMMANDS) > 50
    for command in COMMANDS:
        if "--help" in command: continue
        try: understood(shlex.split(command)[1:])
        except click.ClickException as error: pytest.fail(f"{command}: {error.format_message()}")


def test_every_training_that_names_no_file_resolves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        if not command.startswith("sprout-lab train ") or PLACE.search(command): continue
        if "--help" in command: continue
        assert "batch_size" in shell(f"{command[11:]} --dry_run"), command


@pytest.mark.parametrize("name", GUIDES)
def test_steps_are_printed_whole_and_one_by_one(name):
    guide = load_guide(name)
    said = shell(f"guide {name}")
    assert all(step.command in said for step in guide.steps)
    assert shell(f"guide {name} 1").strip() == guide_steps(guide, 1)
    for step in guide.steps: understood(shlex.split(step.command)[1:])


def test_without_a_name_and_with_a_wrong_one():
    said = shell("guide")
    assert all(load_guide(name).title in said for name in GUIDES)
    assert "did you mean 'transformer'" in refused("guide transfromer")
    assert "has steps 1 to" in refused("guide transformer 99")


@pytest.mark.slow   # minutes: the steps of every guide, for real
@pytest.mark.parametrize("name", GUIDES)
def test_the_steps_run_and_take_about_as_long_as_they_say(name, tmp_path, monkeypatch):
    "In seconds of the processor, which other work on the machine does not lengthen much."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for number, step in enumerate(load_guide(name).steps, 1):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(step.command, shell=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"{name} {number}: {took:.0f} s, said {step.seconds} s")
        assert done.returncode == 0, f"{step.command}: {done.stderr[-500:]}"
        assert took < 3 * step.seconds + 20


def test_a_step_that_was_not_measured_says_so():
    for name in GUIDES:
        for number, step in enumerate(load_guide(name).steps, 1):
            said = guide_steps(load_guide(name), number)
            assert ("estimated" in said.splitlines()[0]) is not step.measured
