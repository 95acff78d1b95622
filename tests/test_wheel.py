"""What is installed from a wheel: the library with its data, one command, and nothing of the
workshop."""
import configparser
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "(the wheel, what was said while it was built), from a copy of what git sees."
    pytest.importorskip("setuptools")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root,
                            capture_output=True, text=True,
                            check=True).stdout.split()
    wanted = ("sprout_lab/", "setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE",
              "MANIFEST.in")
    for name in listed:
        if not name.startswith(wanted) or not (root / name).is_file(): continue
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((root / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation",
               "-w", str(target), "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return next(target.glob("*.whl")), done.stdout + done.stderr


def test_its_data_are_declared(built):
    wheel, said = built
    assert ("absent from the `packages` configuration" not in said
            and "PackageDataWarning" not in said)
    names = zipfile.ZipFile(wheel).namelist()
    here = {path.relative_to(root).as_posix() for path in (root / "sprout_lab").rglob("*")
            if path.suffix in (".yaml", ".xz", ".py") and "__pycache__" not in path.parts}
    assert here <= set(names), sorted(here - set(names))[:5]
    assert not [name
                for name in names if "__pycache__" in name or name.startswith(("tests", "nbs"))]


def test_it_installs_one_command(built):
    wheel, _ = built
    entries = configparser.ConfigParser()
    archive = zipfile.ZipFile(wheel)
    name = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
    entries.read_string(archive.read(name).decode())
    assert dict(entries["console_scripts"]) == {"sprout-lab": "sprout_lab.cli:main"}
