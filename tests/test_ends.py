"""The ends of what settings.ini promises: the lowest versions under the oldest Python, and the newest that the package
index has. Each end is an environment of its own, in which every family trains, resumes, writes, is evaluated and is
exported. The lowest end also shows that the lower bounds can be met together."""
import json
import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow       # gigabytes from the package index: ten minutes
root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters=["="])
ini.read(root / "settings.ini", encoding="utf-8")
REQUIREMENTS = [line.strip()
                for line in ini["DEFAULT"]["requirements"].splitlines() if line.strip()]


def lowest(requirement: str) -> str:
    "`name>=1.2,<3` → `name==1.2`."
    found = re.fullmatch(r"([\w.-]+)>=([\w.]+)(,<[\w.]+)?", requirement)
    assert found, f"{requirement}: has no lower bound"
    return f"{found[1]}=={found[2]}"


def interpreter_of(version: str) -> str | None:
    "A Python of this version that starts: on the path, or beside it as pyenv keeps them."
    kept = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"))
    for path in (shutil.which(f"python{version}"), *kept):
        if path and not subprocess.run([path, "-c", "import venv"], capture_output=True).returncode:
            return str(path)
    return None


def environment(folder: Path, python: str, requirements: list[str]) -> Path:
    "The interpreter of a new environment."
    subprocess.run([python, "-m", "venv", str(folder)], check=True)
    interpreter = folder / "bin" / "python"
    command = [interpreter, "-m", "pip", "install", "--quiet", "--no-cache-dir", *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No matching distribution" in done.stderr and "Could not fetch URL" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr[-3000:]
    return interpreter


def exercise(interpreter: Path) -> dict:
    "What the families do there."
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [interpreter, "tests/every_family.py"]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    print(report)
    return report


def test_every_requirement_has_a_lower_bound():
    assert all(lowest(requirement) for requirement in REQUIREMENTS)


def test_the_lowest_end(tmp_path):
    oldest = interpreter_of(ini["DEFAULT"]["min_python"])
    if not oldest: pytest.skip(f"needs Python {ini['DEFAULT']['min_python']}")
    report = exercise(environment(tmp_path / "env", oldest, [lowest(one) for one in REQUIREMENTS]))
    assert report["python"].startswith(ini["DEFAULT"]["min_python"] + ".")
    assert report["done"] and not report["failed"]


def test_the_newest_end(tmp_path):
    newest = interpreter_of("3.13") or interpreter_of("3.12") or sys.executable
    report = exercise(environment(tmp_path / "env", newest, ["--upgrade", *REQUIREMENTS]))
    assert report["done"] and not report["failed"]
