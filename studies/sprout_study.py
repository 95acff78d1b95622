"""A growing tree against plain encoders and the blind router, on masked bytes of Shakespeare.

    python studies/sprout_study.py            (three seeds, about five minutes on one idle CPU core)

All see the same batches with the same gaps, use the same optimizer and schedule, and are scored on
the same gaps in held-out text. "Path" is how many blocks a text passes (compute), "nodes" how many
there are (parameters). The tree and the blind router grow during the run, so they compute a little
less than their last shape says; CPU seconds are in the result. An encoder with as many parameters
as the tree costs 5/3 of its compute per step, so it is given 3/5 of the steps, with a schedule of
that length. Writes studies/sprout_study.json: nats per hidden byte and accuracy per variant and
seed, with the settings."""
import argparse
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch

from sprout_lab.configs import TrainingConfig
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.masking import MaskedBatches, MaskedWindows
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.metrics import evaluate_model
from sprout_lab.models.sprout import SproutConfig, SproutForMaskedLM
from sprout_lab.trainers.growth import make_policy
from sprout_lab.trainers.optimizers import build_optimizer, learning_rate_at

STEPS, BATCH, LENGTH = 300, 16, 128
SHAPE = dict(hidden_size=64, num_attention_heads=4, max_depth=2, max_nodes=5,
             growth_warmup=STEPS // 10, growth_interval=STEPS // 15)
CHAIN = dict(router="open", growth="none", max_depth=4)
VARIANTS = {   # name → (configuration, share of the steps)
    "tree": ({}, 1.0),
    "blind router": (dict(router="blind", routing="batch"), 1.0),
    "encoder, 3 blocks (same compute)": (dict(**CHAIN, tree=[-1, 0, 1]), 1.0),
    "encoder, 5 blocks (same parameters, same compute)":
        (dict(**CHAIN, tree=[-1, 0, 1, 2, 3]), 0.6),
    "one block": (dict(growth="none"), 1.0),
}
TRAINING = dict(optimizer="muon", learning_rate=0.01, min_learning_rate=0.0, scheduler="linear",
                warmup_steps=30)
RESULT = Path(__file__).with_suffix(".json")


def train_one(model, batches, steps: int) -> float:
    "Train, growing as the model's configuration says; returns the CPU seconds."
    config, training = model.config, TrainingConfig(**TRAINING)
    policy, optimizer = make_policy(config.growth), build_optimizer(model, training)
    begin = time.process_time()
    for step in range(steps):
        for group in optimizer.param_groups: group["lr"] = learning_rate_at(step, training, steps)
        model(**batches.batch(step)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        since = step + 1 - config.growth_warmup
        if since >= 0 and since % config.growth_interval == 0:
            policy.grow(model, step=step + 1, optimizer=optimizer)
    return time.process_time() - begin


def run(settings: dict, share: float, seed: int, train, held_out) -> dict:
    "Train one model for a share of the steps and score it."
    tokenizer, steps = ByteTokenizer(masked=True), round(STEPS * share)
    torch.manual_seed(seed)
    model = SproutForMaskedLM(SproutConfig(**{**SHAPE, **settings})).train()
    batches = MaskedBatches(train, tokenizer, BATCH, LENGTH, seed=seed)
    seconds = train_one(model, batches, steps)
    windows = MaskedWindows(held_out, tokenizer, LENGTH, 32)
    scores = evaluate_model(model, windows, None, shift=False)
    statistics = model.tree.get_statistics()
    return {"seed": seed, "loss": scores["loss"], "accuracy": scores["accuracy"],
            "cpu_seconds": round(seconds, 1), "steps": steps, "tree": model.config.parents,
            "parameters": sum(p.numel() for p in model.parameters()), "usage": statistics["usage"],
            "routing_entropy": statistics["routing_entropy"]}


def told(name: str, one: dict) -> str:
    "A run in a line."
    return (f"seed {one['seed']}  {name:<50} {one['loss']:.4f} nats  {one['accuracy']:.2%}  "
            f"{one['parameters']:,} parameters  {one['cpu_seconds']:.0f} s  {one['tree']}")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    corpus = load_corpus("shakespeare")
    train, held_out = (np.frombuffer("".join(corpus.documents(split)).encode(), np.uint8)
                       for split in ("train", "validation"))
    results = {name: [] for name in VARIANTS}
    for seed in range(seeds):   # seed by seed, so that a busy hour is shared by all variants
        for name, (settings, share) in VARIANTS.items():
            results[name].append(run(settings, share, seed, train, held_out))
            print(told(name, results[name][-1]), flush=True)
    summary = {}
    for name, runs in results.items():
        losses = [one["loss"] for one in runs]
        mean = sum(losses) / len(losses)
        spread = math.sqrt(sum((x - mean) ** 2 for x in losses) / max(1, len(losses) - 1))
        summary[name] = {"mean": mean, "standard_deviation": spread, "runs": runs}
        print(f"{name:<50} {mean:.4f} ± {spread:.4f}")
    settings = {"steps": STEPS, "batch_size": BATCH, "sequence_length": LENGTH, **SHAPE, **TRAINING}
    RESULT.write_text(json.dumps({
        "corpus": "shakespeare", "measure": "nats per hidden byte, held-out", "settings": settings,
        "torch": torch.__version__, "variants": summary}, indent=1) + "\n")


if __name__ == "__main__": main()
