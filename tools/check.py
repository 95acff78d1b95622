"""Everything that CI runs, in order: notebooks, library and README in step; names; notebooks as
tests; tests. Stops at the first failure."""
import os
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
    run("notebooks", "nbdev-test", "--n-workers", processes, "--skip-folder-re", "^guides$")
    run("tests", sys.executable, "-m", "pytest", "-n", processes, "--dist", "loadfile",
        *sys.argv[1:])
    print(f"== all of it in {(time.time() - started) / 60:.1f} minutes", flush=True)
