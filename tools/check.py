"""Everything that CI runs, in order: notebooks, library and README in step; names; notebooks as
tests; tests. What is out of step stops it; notebooks and tests run to their end, so that one run
names all that fails. What failed among others is run once more by itself: a machine short of
processors is no fault of the code, but it is said."""
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

root = Path(__file__).resolve().parent.parent
bin = Path(sys.executable).parent
os.environ["PATH"] = f"{bin}{os.pathsep}{os.environ['PATH']}"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")


def run(title: str, *command: str, cwd: Path = root) -> None:
    print(f"== {title}", flush=True)
    started = time.time()
    if subprocess.run(command, cwd=cwd).returncode:
        sys.exit(f"failed: {title} ({' '.join(map(str, command))})")
    print(f"   {time.time() - started:.0f} s", flush=True)


def notebooks(processes: str) -> list[str]:
    "Run the notebooks of the library; returns the titles of what failed twice."
    print("== notebooks", flush=True)
    started = time.time()
    everything = ["nbdev-test", "--n-workers", processes, "--skip-folder-re", "^guides$"]
    ran = subprocess.run(everything, cwd=root, stderr=subprocess.PIPE, text=True)
    print(ran.stderr, end="", flush=True)
    _, listed, names = ran.stderr.partition("nbdev Tests Failed On The Following Notebooks:")
    failed = [path for name in re.findall(r"^\t(\S+\.ipynb)$", names, re.MULTILINE)
              for path in (root / "nbs").rglob(name) if "guides" not in path.parts]
    twice = []
    for path in failed:
        print(f"== {path.relative_to(root)} once more, by itself", flush=True)
        if subprocess.run(["nbdev-test", path], cwd=root).returncode: twice.append(path.name)
    if ran.returncode and not (listed and failed): twice.append("notebooks")
    print(f"   {time.time() - started:.0f} s", flush=True)
    return twice


def tests(processes: str, *flags: str) -> list[str]:
    "Run the tests; returns the title where one of them failed twice."
    print("== tests", flush=True)
    started = time.time()
    pytest = [sys.executable, "-m", "pytest", *flags]
    code = subprocess.run([*pytest, "-n", processes, "--dist", "loadfile"], cwd=root).returncode
    if code == 1:                                   # tests failed; any other code is not theirs
        print("== the tests that failed, once more, one after another", flush=True)
        code = subprocess.run([*pytest, "--last-failed", "--last-failed-no-failures", "none"],
                              cwd=root).returncode
    print(f"   {time.time() - started:.0f} s", flush=True)
    return ["tests"] if code else []


def in_step() -> None:
    "Clean and export a copy of what git sees; nothing may change."
    print("== notebooks, library and README are in step", flush=True)
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=root,
                            capture_output=True, text=True, check=True).stdout.split("\n")
    parts = ("nbs/", "colab/", "sprout_lab/", "tools/", "settings.ini", "pyproject.toml",
             "setup.py", "README.md")
    files = [f for f in listed if f.startswith(parts) and (root / f).is_file()]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for f in files:
            (copy / f).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / f, copy / f)
        for command in (["nbdev-clean"], ["nbdev-export"], [sys.executable, "tools/readme.py"]):
            subprocess.run(command, cwd=copy, check=True,
                           env={**os.environ, "PYTHONPATH": str(copy)})
        changed = [f for f in files if (root / f).read_bytes() != (copy / f).read_bytes()]
        new = [p.relative_to(copy).as_posix()
               for p in copy.rglob("*.py") if p.relative_to(copy).as_posix() not in files]
    if changed or new:
        sys.exit(f"not in step (run `make export` and commit): {', '.join(changed + new)}")


if __name__ == "__main__":
    started = time.time()
    in_step()
    run("Colab notebooks are in step with the register", sys.executable, "tools/colab.py",
        "--check")
    names = "F401,F811,F821,F822"
    run("no undefined and no unused names", "ruff", "check", "--quiet", "--select", names,
        "sprout_lab", "tools", "tests", "studies")
    run("a page can be read", sys.executable, "tools/measure.py")
    # a process per core, each with one thread; more than four only crowd each other's memory
    processes = str(min(os.cpu_count() or 1, 4))
    failed = notebooks(processes) + tests(processes, *sys.argv[1:])
    if failed: sys.exit(f"failed: {', '.join(failed)}")
    print(f"== all of it in {(time.time() - started) / 60:.1f} minutes", flush=True)
