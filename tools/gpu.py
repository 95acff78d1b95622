"""One command on a GPU: checks, kernels, training and decoding speed, enwik8, resume.

python tools/gpu.py                          all parts, in order of value, with the machine's own
Python python tools/gpu.py --only kernels training  some of them python tools/gpu.py --device cpu
--quick     every part at toy size, without a GPU

Each part runs in a process of its own, within its own time limit, and writes one JSON file below
studies/gpu/DEVICE/ while it goes: what is cut off has left its results, and a fault in one part
(an exception, a time limit, out of memory) is named there and does not stop the next. Nothing is
downloaded."""
import argparse
import importlib.util
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

root = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "transformers", "accelerate", "safetensors", "tokenizers", "tiktoken", "numpy",
          "yaml", "regex", "matplotlib", "tqdm", "filelock")
USEFUL = {"triton": "kernels for a GPU", "pytest": "the tests marked cuda",
          "fla": "a peer of the scan"}
LIMITS = {"checks": 240, "kernels": 300, "training": 600, "decoding": 300, "enwik8": 3600,
          "resume": 300}


def missing(names) -> list[str]:
    "Modules that are not here, found without importing any."
    return [name for name in names if importlib.util.find_spec(name) is None]


def missing_line(names: list[str]) -> str:
    "What to do about packages that are not here, on a machine that may have no network."
    version = ".".join(platform.python_version_tuple()[:2])
    install = ("python -m pip install --target build/packages --only-binary=:all: "
               f"--python-version {version} {' '.join(names)}")
    return (f"missing: {', '.join(names)}; on a machine with a package index: {install}; "
            "then bring that folder here and say --packages build/packages")


class Parser(argparse.ArgumentParser):
    "Mistakes are one line."
    def error(self, message): sys.exit(f"tools/gpu.py: {message} (see --help)")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = Parser(description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="toy sizes: walk through every part")
    parser.add_argument("--only", nargs="*", choices=LIMITS, default=list(LIMITS), metavar="PART",
                        help=", ".join(LIMITS))
    parser.add_argument("--output", type=Path, default=root / "studies" / "gpu", metavar="DIR")
    parser.add_argument("--runs", type=Path, default=root / "runs" / "gpu", metavar="DIR",
                        help="trained runs, which go on where they were cut off")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=DIR",
                        help="nanogpt=DIR")
    parser.add_argument("--enwik8", type=Path, metavar="FILE",
                        help="the text [$SPROUT_LAB_DATA/enwik8/enwik8.gz]")
    parser.add_argument("--minutes", type=float, default=5.0,
                        help="of enwik8, for each family [5]")
    parser.add_argument("--limit", action="append", default=[], metavar="PART=SECONDS")
    parser.add_argument("--packages", type=Path, metavar="DIR",
                        help="a folder of further packages")
    return parser.parse_args(arguments)


def pairs(given: list[str], known=None) -> dict[str, str]:
    "NAME=VALUE, several times, as a dict; a mistake ends the command in one line."
    values = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or (known is not None and name not in known):
            sys.exit(f"{pair}: NAME=VALUE is needed"
                     + (f", of {', '.join(known)}" if known else ""))
        values[name] = value
    return values


def settings_from(given: argparse.Namespace):
    "The parts' settings from the command's flags."
    from gpu_parts.report import Settings
    text = given.enwik8
    if text is None and os.environ.get("SPROUT_LAB_DATA"):
        text = Path(os.environ["SPROUT_LAB_DATA"], "enwik8", "enwik8.gz")
    if text is not None and not text.exists(): text = None
    limits = {name: float(seconds) for name, seconds in pairs(given.limit, LIMITS).items()}
    return Settings(device=given.device, quick=given.quick, output=given.output, runs=given.runs,
                    peers=pairs(given.peer, ("nanogpt",)), enwik8=text, minutes=given.minutes,
                    limits=limits)


def in_a_process(function: Callable, *arguments, limit: float | None = None,
                 device: str = "cpu") -> str | None:
    """Run a function in a process that leads a group of its own, and wait. Returns what went
    wrong in a few words, or None. On its time limit the whole group is killed."""
    from gpu_parts.report import context_for
    process = context_for(device).Process(target=_leading, args=(function, arguments))
    process.start()
    process.join(limit)
    if process.is_alive():
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return f"cut off after its limit of {limit:g} s"
    if process.exitcode == 0: return None
    if process.exitcode > 0: return f"ended with {process.exitcode}"
    if process.exitcode != -signal.SIGKILL: return f"killed by signal {-process.exitcode}"
    return "killed by signal 9, as happens where memory runs out"


def _leading(function: Callable, arguments) -> None:
    os.setsid()
    function(*arguments)


def _guarded(function: Callable, report, settings) -> None:
    "A part; an error that it does not catch itself is written down."
    try: function(report, settings)
    except Exception as error:
        report.fault("the whole part", error)
        sys.exit(1)


def run_part(name: str, function: Callable, settings, machine: dict) -> dict:
    "Run one part within its limit; returns its report, which is also its file."
    from gpu_parts.report import Report, folder_name
    limit = settings.limits.get(name, LIMITS.get(name, 300))
    path = settings.output / folder_name(machine, settings.quick) / f"{name}.json"
    report = Report(path, name, machine, settings.quick, limit)
    report.write()
    begun = time.monotonic()
    ended = in_a_process(_guarded, function, report, settings, limit=limit,
                         device=settings.device)
    content = report.read().content
    content["seconds"] = round(time.monotonic() - begun, 1)
    if ended and not (ended == "ended with 1" and content["faults"]):
        report.fault("the whole part", ended)
    content["state"] = "faults" if content["faults"] else "done"
    report.write()
    return content


def run_parts(parts: dict[str, Callable], settings, machine: dict) -> dict[str, dict]:
    "All parts, one after the other, whatever becomes of each."
    reports = {}
    for name, function in parts.items():
        print(f"{name} ...", flush=True)
        reports[name] = run_part(name, function, settings, machine)
        print(f"{name}: {reports[name]['state']} in {reports[name]['seconds']:.0f} s", flush=True)
    return reports


def tell(reports: dict[str, dict]) -> None:
    "All rows as one table, what was not there, and every fault."
    from sprout_lab.evaluation.benchmarks import Row, bench_table
    rows = [Row.from_json(row) for report in reports.values() for row in report["rows"]]
    print(bench_table(rows))
    for name, report in reports.items():
        for what, why in report["absent"].items(): print(f"{name}: {what}: absent ({why})")
        for fault in report["faults"]: print(f"{name}: FAULT: {fault}")


def _probe(path: Path, device: str) -> None:
    import json

    from gpu_parts.report import machine_facts
    try: facts = machine_facts(device)
    except RuntimeError as error: print(error, file=sys.stderr)
    else: path.write_text(json.dumps(facts))


def probed(device: str) -> dict:
    """The machine's facts, found in a process of its own: this one must not touch the device
    before it forks."""
    import json
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "facts.json")
        in_a_process(_probe, path, device, limit=120)
        return json.loads(path.read_text()) if path.exists() else {}


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    sys.path.insert(0, str(root))
    if given.packages: sys.path.append(str(given.packages.resolve()))
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("MPLBACKEND", "agg")
    print(f"python {platform.python_version()}; " + "; ".join(
        f"{name} missing ({use})" for name, use in USEFUL.items() if missing([name])), flush=True)
    if lacking := missing(NEEDED):
        print(missing_line(lacking), file=sys.stderr)
        return 2
    settings = settings_from(given)
    machine = probed(given.device)
    if not machine:
        print("no GPU can be used here; `make gpu DEVICE=cpu QUICK=1` walks through all parts at "
              "toy size", file=sys.stderr)
        return 2
    print(f"{machine['device']}, torch {machine['torch']}", flush=True)
    # imported once here, for all parts that are forked from this process
    from gpu_parts import checks, decoding, enwik8, kernels, resume, training
    parts = {"checks": checks.run, "kernels": kernels.run, "training": training.run,
             "decoding": decoding.run, "enwik8": enwik8.run, "resume": resume.run}
    reports = run_parts({name: parts[name] for name in given.only}, settings, machine)
    tell(reports)
    return 1 if any(report["faults"] for report in reports.values()) else 0


if __name__ == "__main__": sys.exit(main())
