"""Part 6: a run that was killed and resumed equals one that was not, to the bit; and what that
costs."""
import os
import shutil
import signal
import time
from pathlib import Path

from sprout_lab.evaluation.benchmarks import Row, compare
from sprout_lab.families import configure, families, make_trainer
from sprout_lab.runs import Run

from .enwik8 import Pace, _silent, prepared
from .report import Report, Settings, context_for


def train(folder: Path, family: str, settings: Settings, deterministic: bool, steps: int) -> None:
    "Train a small run on the embedded corpus; its seconds per step go beside it."
    import torch
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(deterministic)
    flags = {"output_dir": str(folder), "resume_from": "auto", "max_steps": steps,
             "warmup_steps": 1, "save_interval": steps // 4, "eval_interval": steps,
             "eval_batches": 1, "log_interval": 1, "keep_checkpoints": 8,
             "device": settings.device, "tensorboard": False}
    if settings.quick:
        flags |= {"batch_size": 2, "sequence_length": 32, "data_dir": str(prepared(settings))}
    pace = Pace(skipped=max(1, steps // 8))
    trainer = make_trainer(configure(family, flags, size="nano", log=_silent), log=_silent,
                           extra_callbacks=[pace])
    trainer.train()
    folder.with_suffix(".pace").write_text(str(pace.seconds))


def finished(*arguments, kill_after: Path | None = None) -> None:
    """Run `train` in a process of its own; with `kill_after` it is killed as soon as that
    checkpoint is whole."""
    settings = arguments[2]
    process = context_for(settings.device).Process(target=train, args=arguments)
    process.start()
    while process.is_alive():
        if kill_after is not None and kill_after.exists():
            os.kill(process.pid, signal.SIGKILL)
            break
        time.sleep(0.005)
    process.join()
    if kill_after is None and process.exitcode:
        raise RuntimeError(f"training ended with {process.exitcode}")


def differing(one: Path, other: Path) -> list[str]:
    "Names of the tensors that differ between two checkpoints' weights and optimizers."
    import torch
    from safetensors.torch import load_file
    names = []
    for file in ("model.safetensors", "optimizer.safetensors"):
        a, b = load_file(one / file), load_file(other / file)
        names += sorted(set(a) ^ set(b))
        names += [name for name in set(a) & set(b) if not torch.equal(a[name], b[name])]
    return names


def measure_family(report: Report, settings: Settings, family) -> None:
    folder = settings.runs / "resume" / family.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    steps = 8 if settings.quick else 80
    shared = (family.name, settings)
    whole, killed, usual = folder / "whole", folder / "killed", folder / "usual"
    finished(whole, *shared, True, steps)
    finished(killed, *shared, True, steps, kill_after=Run(killed).step_folder(steps // 2))
    reached = max(Run(killed).steps(), default=0)
    finished(killed, *shared, True, steps)
    names = differing(Run(whole).step_folder(steps), Run(killed).step_folder(steps))
    note = f"killed after step {reached} of {steps}" + (f"; {', '.join(names[:3])}" if names
            else "")
    report.add(Row("resume", f"{family.name} nano, tensors that differ after a kill", "resumed",
                   "", "tensors", len(names), target="<= 0", note=note))
    finished(usual, *shared, False, steps)
    pace = {name: [float(path.with_suffix(".pace").read_text())]
            for name, path in (("deterministic", whole), ("usual", usual))}
    report.add(compare("resume", f"{family.name} nano, cost of deterministic kernels", pace,
                       "deterministic", "usual", cost=True))


def run(report: Report, settings: Settings) -> None:
    for family in list(families.values())[:1 if settings.quick else None]:
        with report.attempt(family.name): measure_family(report, settings, family)
