"""Part 5: every family on enwik8 for the same minutes: bits per byte of the whole test part."""
import gzip
import time
from pathlib import Path

import numpy as np
from sprout_lab.configs import read_settings
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import ByteTokenizer, fingerprint, save_tokenizer
from sprout_lab.data.tokens import TokenFile, TokenWriter
from sprout_lab.evaluation.benchmarks import Row
from sprout_lab.evaluation.evaluator import Evaluator, carries_state, load_model
from sprout_lab.families import configure, families, make_trainer
from sprout_lab.runs import Run
from sprout_lab.trainers.callbacks import Callback

from .report import Report, Settings

SPLITS = {"train": (0.0, 0.9), "val": (0.9, 0.95), "test": (0.95, 1.0)}
PUBLISHED = ("published (Al-Rfou et al., 2018): 1.11 with 12 layers and 44 M parameters, "
             "1.06 with 64 layers and 235 M, both at a context of 512")


def read_bytes(path: Path) -> bytes:
    opened = gzip.open(path) if path.suffix == ".gz" else open(path, "rb")
    with opened as file: return file.read()


def text_for(settings: Settings) -> np.ndarray:
    "The text as bytes; at toy size the beginning of an embedded corpus stands for it."
    if not settings.quick: return np.frombuffer(read_bytes(settings.enwik8), np.uint8)
    embedded = next(iter(load_corpus("shakespeare").documents("train")))[:20_000]
    return np.frombuffer(embedded.encode(), np.uint8)


def prepared(settings: Settings) -> Path:
    "The three parts of the text as token files of bytes, made once."
    folder = settings.runs / ("enwik8-data-quick" if settings.quick else "enwik8-data")
    if all((folder / f"{name}.bin").exists() for name in SPLITS): return folder
    folder.mkdir(parents=True, exist_ok=True)
    ids, tokenizer = text_for(settings), ByteTokenizer()
    save_tokenizer(tokenizer, folder / "tokenizer")
    for name, (begin, end) in SPLITS.items():
        part = ids[int(begin * len(ids)):int(end * len(ids))]
        with TokenWriter(folder / f"{name}.bin", 256, fingerprint(tokenizer),
                         f"enwik8 {name}") as writer:
            writer.write(part, num_bytes=len(part), num_documents=1)
    return folder


class Pace(Callback):
    "Seconds of a step, the first ones left out."
    def __init__(self, skipped: int = 5):
        self.skipped, self.begun, self.seconds = skipped, 0.0, 0.0

    def on_step(self, trainer):
        if trainer.step == self.skipped: self.begun = time.perf_counter()
        elif trainer.step > self.skipped:
            self.seconds = (time.perf_counter() - self.begun) / (trainer.step - self.skipped)


def size_of(settings: Settings) -> str: return "nano" if settings.quick else "small"


def flags_for(settings: Settings, data: Path, output: Path) -> dict:
    flags = {"data_dir": str(data), "output_dir": str(output), "device": settings.device,
             "tensorboard": False, "objective": "causal"}
    if not settings.quick: return {**flags, "mixed_precision": "bf16", "compile": True}
    return {**flags, "batch_size": 2, "sequence_length": 32, "eval_batches": 1, "warmup_steps": 1}


def steps_in(minutes: float, family, settings: Settings, data: Path, folder: Path) -> int:
    """How many steps fit into so many minutes, from the pace of a few; the schedule then ends
    with the time."""
    pace = Pace()
    flags = {**flags_for(settings, data, folder), "max_steps": 25, "eval_interval": 1000,
             "save_interval": 1000, "warmup_steps": 5}
    run = configure(family.name, flags, size=size_of(settings), log=_silent)
    make_trainer(run, log=_silent, extra_callbacks=[pace]).train()
    return max(10, int(0.95 * 60 * minutes / pace.seconds))


def _silent(*words) -> None: pass


def train(family, settings: Settings, data: Path) -> Run:
    "The family's run, trained for its minutes; one that was cut off goes on."
    run = Run(settings.runs / "enwik8" / (family.name + ("-quick" if settings.quick else "")))
    flags = {**flags_for(settings, data, run.folder), "resume_from": "auto"}
    if run.exists(): config = configure(family.name, flags, log=_silent)
    else:
        minutes = 0.01 if settings.quick else settings.minutes
        probe = settings.runs / "enwik8" / f"{family.name}-pace-{time.time_ns()}"
        steps = 4 if settings.quick else steps_in(minutes, family, settings, data, probe)
        flags |= {"max_steps": steps, "eval_interval": max(2, steps // 10),
                  "save_interval": max(2, steps // 5), "max_minutes": 1.2 * max(minutes, 1.0)}
        config = configure(family.name, flags, size=size_of(settings), log=_silent)
    make_trainer(config, log=_silent).train()
    return run


def scores(run: Run, settings: Settings, test) -> list[tuple[str, float]]:
    """(context, bits per byte) of the run's best model on the whole test part: in windows as
    trained, and with more."""
    model = load_model(run.folder).to(settings.device)
    length = read_settings(run.config)["sequence_length"]
    usual = {"sequence_length": length, "batch_size": 64,
             "max_batches": 1 if settings.quick else None,
             "mixed_precision": "no" if settings.device == "cpu" else "bf16"}
    more = {"stateful": True} if carries_state(model) else {"stride": max(1, length // 2)}
    told = []
    for extra in ({}, more):
        evaluator = Evaluator(model, ByteTokenizer(), {**usual, **extra})
        bits = evaluator.evaluate(test)["bits_per_byte"]
        told.append((evaluator.results["context"], bits))
    return told


def run(report: Report, settings: Settings) -> None:
    if settings.enwik8 is None and not settings.quick:
        return report.absent("enwik8",
                             "no text was given (--enwik8 PATH, or $SPROUT_LAB_DATA/enwik8)")
    data = prepared(settings)
    test = TokenFile.open(data / "test.bin")
    for family in families.values():
        if "causal" not in family.objectives: continue
        with report.attempt(f"{family.name}, {settings.minutes:g} minutes"):
            begun = time.perf_counter()
            trained = train(family, settings, data)
            spent = (time.perf_counter() - begun) / 60
            for context, bits in scores(trained, settings, test):
                note = f"{context}; {spent:.1f} minutes in this run of the command; {PUBLISHED}"
                report.add(Row("enwik8", f"{family.name}, {context}", "ours", "", "bits per byte",
                               bits, note=note))
