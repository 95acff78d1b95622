"""What a part is told, what it writes down while it runs, and how sides are timed on a device."""
import contextlib
import importlib.metadata
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

root = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("torch", "triton", "transformers", "accelerate", "safetensors", "numpy",
            "flash-linear-attention")


@dataclass(frozen=True)
class Settings:
    """`device`: cuda or cpu. `quick`: toy sizes that only walk through. `output`: folder of the
    reports. `runs`: folder of trained runs, which go on where they were cut off. `peers`: name →
    folder. `enwik8`: path of the text, plain or gzip. `minutes`: of training on it, for each
    family. `limits`: part → seconds, over the part's own."""
    device: str = "cuda"
    quick: bool = False
    output: Path = root / "studies" / "gpu"
    runs: Path = root / "runs" / "gpu"
    peers: dict = field(default_factory=dict)
    enwik8: Path | None = None
    minutes: float = 5.0
    limits: dict = field(default_factory=dict)


def one_line(error: BaseException) -> str:
    "An error in one line, with out of memory said first."
    import torch
    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)): return f"out of memory: {text}"
    return f"{type(error).__name__}: {text}"


def _driver() -> str | None:
    "The GPU driver's version, as nvidia-smi says it."
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
        return shown.stdout.split("\n")[0].strip()


def _commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True,
                               text=True, timeout=30, check=True)
        return shown.stdout.strip()
    return os.environ.get("SPROUT_LAB_COMMIT")


def machine_facts(device: str) -> dict:
    """Device, driver, versions, commit and command: what a number belongs to. Call it in a
    process of its own."""
    import torch
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    facts = {"device": f"{platform.processor() or platform.machine()} CPU",
             "threads": torch.get_num_threads()}
    if device == "cuda":
        if not torch.cuda.is_available(): raise RuntimeError("torch sees no CUDA device here")
        gpu = torch.cuda.get_device_properties(0)
        facts = {"device": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1),
                 "capability": f"sm_{gpu.major}{gpu.minor}", "driver": _driver(),
                 "cuda": torch.version.cuda}
    return {**facts, "python": platform.python_version(), **versions, "commit": _commit(),
            "command": " ".join(["python", *sys.argv])}


def folder_name(facts: dict, quick: bool) -> str:
    "Reports of different devices never share a folder; neither do toy sizes with real ones."
    words = "".join(c if c.isalnum() else "-" for c in facts["device"].lower()).strip("-")
    return words + ("-quick" if quick else "")


class Report:
    """A part's file, written again whenever something was measured, so that what is cut off has
    left its results. The rows have the form of all benchmarks
    (`sprout_lab.evaluation.benchmarks.Row`)."""

    def __init__(self, path: Path, name: str, machine: dict, quick: bool, limit: float):
        self.path, self.name = path, name
        self.content = {"date": time.strftime("%Y-%m-%d", time.gmtime()), "machine": machine,
                        "quick": quick, "limit_s": limit, "seconds": None, "state": "running",
                        "faults": [], "absent": {}, "rows": []}

    def write(self) -> None:
        "Write the file beside and rename it into place."
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"benchmark": "gpu", "parts": {self.name: self.content}}, indent=1)
        beside = self.path.with_suffix(f".{os.getpid()}")
        beside.write_text(text + "\n", encoding="utf-8")
        os.replace(beside, self.path)

    def read(self) -> "Report":
        "Take over what another process wrote."
        self.content = json.loads(self.path.read_text(encoding="utf-8"))["parts"][self.name]
        return self

    def add(self, *rows) -> None:
        for row in rows:
            self.content["rows"].append(row.to_json())
            if row.value is None:
                self.content["absent"].setdefault(row.against, "was not measured")
        self.write()

    def absent(self, name: str, why: str) -> None:
        "Something that could not be measured here, and why."
        self.content["absent"][name] = why
        self.write()

    def fault(self, where: str, error: BaseException | str) -> None:
        said = error if isinstance(error, str) else one_line(error)
        self.content["faults"].append(f"{where}: {said}")
        print(f"  {self.name}: {where}: {said}", flush=True)
        self.write()

    @contextlib.contextmanager
    def attempt(self, what: str):
        "One thing of a part: an error in it is written down, and the part goes on."
        print(f"  {self.name}: {what}", flush=True)
        try: yield
        except Exception as error: self.fault(what, error)
        finally: free_memory()


def free_memory() -> None:
    "Give back what the last thing held on the device."
    import gc

    import torch
    gc.collect()
    if torch.cuda.is_initialized(): torch.cuda.empty_cache()


def context_for(device: str):
    """How further processes begin: a process that may have touched a GPU cannot be forked, so
    there they are spawned; elsewhere forking saves importing everything again."""
    return multiprocessing.get_context("spawn" if device == "cuda" else "fork")


def race(report: Report, sides: dict[str, Callable], settings: Settings, rounds: int = 5,
         kernel: bool = False) -> dict[str, list[float]]:
    """Seconds of each side in each round, sides in turn. A side that fails is left out, and
    named.

    On a GPU a `kernel` is timed by `triton.testing.do_bench`, which clears its cache; anything
    else by the clock between two synchronisations."""
    rounds = 1 if settings.quick else rounds
    seconds: dict[str, list[float]] = {}
    for name, run in sides.items():
        try: run(), run()                                   # warmed up, compiled
        except Exception as error: report.fault(name, error)
        else: seconds[name] = []
    for turn in range(rounds):
        for name in list(seconds)[::-1 if turn % 2 else 1]:
            seconds[name].append(_timed(sides[name], settings.device, kernel))
    return seconds


def _timed(run: Callable, device: str, kernel: bool) -> float:
    import torch
    if device == "cuda" and kernel:
        from triton.testing import do_bench
        return do_bench(run, warmup=25, rep=100, return_mode="median") / 1000
    if device == "cuda": torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter() - start


def compiled(function: Callable, settings: Settings) -> Callable:
    "`torch.compile`; at toy size without a compiler, which would take longer than all the rest."
    import torch
    return torch.compile(function, backend="eager" if settings.quick else "inductor")
