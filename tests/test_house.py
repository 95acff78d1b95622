"""The house itself: floors, metadata in step, light imports, nothing that does not belong in git.
"""
import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

root = Path(__file__).parent.parent
try: import tomllib
except ImportError: import tomli as tomllib

FLOORS = {"configs": 0, "runs": 0, "progress": 0, "training_guides": 0,
          "flag_cache": 0, "kernels": 1,
          "remote": 1, "cloud": 4,
          "visualizers": 1, "models": 2,
          "data": 2, "metrics": 1, "trainers": 3, "evaluation": 3, "decoding": 3, "objectives": 3,
          "pictures": 4, "curriculum": 4, "ablations": 4,
          "families": 4, "serving": 4, "panels": 5, "laboratory": 5, "cli": 6}


def modules():
    return {p.relative_to(root / "sprout_lab").with_suffix("").as_posix(): p
            for p in sorted((root / "sprout_lab").rglob("*.py"))
            if p.name not in ("__init__.py", "_modidx.py")}


def imports(path: Path, name: str) -> set[str]:
    """Modules of the library that a file imports, as paths such as models/config, wherever in the
    file."""
    found, package = set(), name.split("/")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[:len(package) - (node.level - 1)]
                found.add("/".join([*base, *(node.module or "").split(".")]).strip("/"))
            elif (node.module or "").startswith("sprout_lab."):
                found.add("/".join(node.module.split(".")[1:]))
    return {f for f in found if f}


def test_every_module_has_a_floor_and_imports_only_downwards():
    for name, path in modules().items():
        here = FLOORS[name.split("/")[0]]
        for other in imports(path, name):
            assert FLOORS[other.split("/")[0]] <= here, (f"{name} (floor {here}) imports {other} "
                                                         f"from above")


def test_no_circles():
    graph = {name: imports(path, name) & set(modules()) for name, path in modules().items()}
    done, on_the_way = set(), []

    def visit(name):
        assert name not in on_the_way, " → ".join([*on_the_way, name])
        if name in done: return
        on_the_way.append(name)
        for other in graph[name]: visit(other)
        on_the_way.pop()
        done.add(name)
    for name in graph: visit(name)


def test_settings_pyproject_and_version_are_in_step():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini")
    ini = ini["DEFAULT"]
    project = tomllib.loads((root / "pyproject.toml").read_text())
    version = re.search(r'__version__ = "(.+)"', (root / "sprout_lab/__init__.py").read_text())[1]
    assert ini["version"] == version
    assert project["project"]["name"] == ini["lib_name"]
    assert project["project"]["requires-python"] == f">={ini['min_python']}"
    assert (project["tool"]["nbdev"]["lib_path"] == ini["lib_path"]
            and project["tool"]["nbdev"]["nbs_path"] == ini["nbs_path"])
    pins = {line.split("==")[0].lower(): line.split("==")[1]
            for line in (root / "constraints.txt").read_text().split() if "==" in line}
    assert pins["torch"] and pins["nbdev"] == re.search(r"nbdev==([\d.]+)",
                                                        ini["dev_requirements"])[1]
    for line in [*ini["requirements"].split("\n"), *ini["dev_requirements"].split("\n")]:
        name = re.split(r"[<>=;\s]", line.strip())[0].lower()
        if name:
            pinned = {pin.replace("_", "-") for pin in pins}
            assert name.replace("_", "-") in pinned, f"{name} is not pinned in constraints.txt"


def test_the_address_stands_in_settings_alone():
    ini = configparser.ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini")
    address = f"github.com/{ini['DEFAULT']['user']}/"
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True,
                             text=True).stdout.split()
    hand_written = [f for f in tracked if f.endswith((".py", ".toml", ".cfg")) or f == "Makefile"]
    for f in hand_written:
        assert address not in (root / f).read_text(errors="ignore"), (f"{f} names the "
                                                                      f"repository's address; it "
                                                                      f"stands in settings.ini")


@pytest.mark.parametrize("statement", ["import sprout_lab", "import sprout_lab.configs",
                                       "import sprout_lab.runs", "import sprout_lab.cli"])
def test_light_imports(statement):
    heavy = subprocess.run([sys.executable, "-c", f"{statement}\nimport sys\nprint([m for m in "
                                                  f"('torch', 'transformers', 'numpy', "
                                                  f"'matplotlib', 'datasets') if m in "
                                                  f"sys.modules])"],
                           capture_output=True, text=True, check=True, cwd=root)
    assert heavy.stdout.strip() == "[]"


def test_help_loads_no_torch():
    code = ("import sys\nfrom sprout_lab.cli import main\ntry: main(['--help'])\nexcept "
            "SystemExit: pass\nsys.exit('torch' in sys.modules)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert shown.returncode == 0 and "train" in shown.stdout


def test_nothing_large_and_no_weights_in_git():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True,
                             text=True).stdout.split("\0")
    for f in filter(None, tracked):
        if not (root / f).exists(): continue
        assert (root / f).stat().st_size < 2_000_000, f
        assert not f.endswith((".safetensors", ".pt", ".bin", ".ckpt",
                               ".npy")) and not f.startswith("runs/"), f


def test_nothing_unpickles_or_trusts_code():
    forbidden = re.compile(r"weights_only\s*=\s*False|pickle\.load|yaml\.load\(|0\.0\.0\.0"
                           r"|allow_pickle\s*=\s*True|trust_remote_code\s*=\s*True")
    for name, path in modules().items():
        assert not forbidden.search(path.read_text()), name
