"""Killed at each single file operation of a run, and resumed: equal to the run that was never killed, and `best` is
the best. Every other kill also tears the file that was last written, as a power cut may."""
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_forged import SHAPES, small_run

from sprout_lab.runs import Run, read_log

LAST = 4
FLAGS = {"save_interval": 1, "eval_interval": 1, "log_interval": 1, "resume_from": "auto",
         "order": "shuffle"}
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod",
           "os.truncate")
TIMES = ("tokens_per_second", "elapsed_seconds")


class Counter:
    """An audit hook that counts what changes files below a folder, and kills its process at the
    operation `stop`."""

    def __init__(self, folder: Path, stop: int | None, tear: bool):
        self.below, self.stop, self.tear, self.count = str(folder), stop, tear, 0
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if event == "open":
            _, mode, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
        elif event not in CHANGES: return
        if not any(str(one).startswith(self.below) for one in arguments[:2]): return
        self.count += 1
        if self.count == self.stop:
            self.stop = None                     # tearing a file is no operation of the run
            if self.tear: torn(Path(self.below))
            os.kill(os.getpid(), signal.SIGKILL)


def torn(folder: Path) -> None:
    """Cut the youngest file of an unfinished save in half: one that a rename has not yet made part
    of the run."""
    unfinished = [path for path in folder.glob("checkpoints/.*.writing/*") if path.is_file()]
    if not unfinished: return
    youngest = max(unfinished, key=lambda path: path.stat().st_mtime_ns)
    os.truncate(youngest, youngest.stat().st_size // 2)


def trained(family: str, optimizer: str, folder: Path, stop: int | None = None,
            tear: bool = False) -> int | None:
    "Train in a forked process. The number of file operations, or None where it was killed at one."
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        silence = os.open(os.devnull, os.O_RDWR)
        os.dup2(silence, 1)
        try:
            counter = Counter(folder, stop, tear)
            small_run(family, folder, optimizer=optimizer, **FLAGS)
            os.write(write, str(counter.count).encode())
        except BaseException as error:
            os.write(write, f"{type(error).__name__}: {error}"[:900].encode())
        os._exit(0)
    os.close(write)
    said = os.read(read, 1000).decode()
    os.close(read)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status): return None
    assert said.isdigit(), said
    return int(said)


def difference(whole: Run, killed: Run) -> str:
    "What differs between two runs; empty where nothing does."
    for name in ("model", "optimizer"):
        a, b = (load_file(run.step_folder(LAST) / f"{name}.safetensors") for run in (whole, killed))
        if a.keys() != b.keys(): return f"{name}: other tensors"
        for key in a:
            if not a[key].equal(b[key]): return f"{name}: {key}"
    for path in ("training_log", "eval_log"):
        a, b = (read_log(getattr(run, path)) for run in (whole, killed))
        for column in a:
            if column not in TIMES and a[column] != b[column]: return f"{path}: {column}"
    for link in ("best", "latest"):
        a, b = ((run.checkpoints / link).resolve().name for run in (whole, killed))
        if a != b: return f"{link} is {b}, not {a}"
    return ""


def killed_at(stops, family: str, optimizer: str, folder: Path) -> tuple[int, list[str]]:
    "(kills, what differs afterwards) of runs killed at each of the operations `stops(count)`."
    whole, killed, kills, problems = Run(folder / "whole"), Run(folder / "killed"), 0, []
    # forks inherit what it imports and compiles
    small_run(family, folder / "first", optimizer=optimizer, **FLAGS)
    count = trained(family, optimizer, whole.folder)
    assert count > 40
    for stop in stops(count):
        shutil.rmtree(killed.folder, ignore_errors=True)
        if trained(family, optimizer, killed.folder, stop, tear=stop % 2 == 0) is None: kills += 1
        assert trained(family, optimizer, killed.folder) is not None
        if problem := difference(whole, killed):
            problems.append(f"killed at operation {stop} of {count}: {problem}")
    return kills, problems


def test_kills_within_a_run(tmp_path):
    kills, problems = killed_at(lambda count: range(7, count, count // 5), "transformer", "adamw",
                                tmp_path)
    assert kills >= 5 and not problems, "\n".join(problems)


@pytest.mark.slow   # every operation: some minutes for each
@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
@pytest.mark.parametrize("family", SHAPES)
def test_kills_at_every_file_operation(family, optimizer, tmp_path):
    began = time.monotonic()
    kills, problems = killed_at(lambda count: range(1, count + 1), family, optimizer, tmp_path)
    print(f"{family}, {optimizer}: {kills} kills in {time.monotonic() - began:.0f} s, "
          f"{len(problems)} runs differ")
    assert kills and not problems, "\n".join(problems)
