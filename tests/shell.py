"""The command line in this process, for the tests of the training guides."""
import contextlib
import io
import shlex

import pytest

from sprout_lab.cli import main


def shell(line: str) -> str:
    "Run a command line that must succeed; what it printed."
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(shlex.split(line)); code = 0
        except SystemExit as left: code = left.code
    assert code in (0, None), f"{line}\n{err.getvalue()}"
    return out.getvalue()


def refused(line: str) -> str:
    "Run a command line that must fail, in one line and with exit code 2; that line."
    err = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as left:
        main(shlex.split(line))
    assert left.value.code == 2 and err.getvalue().count("\n") == 1, err.getvalue()
    return err.getvalue()
