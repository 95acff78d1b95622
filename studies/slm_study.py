"""Flat SLM, HNetBit and Transformer at equal parameters and equal tokens; and what moves HNetBit's
router, and what its target costs.

    OMP_NUM_THREADS=1 python studies/slm_study.py --output studies/slm_study.json
        (about 25 CPU minutes on one core, three seeds in all parts)
    OMP_NUM_THREADS=1 python studies/slm_study.py --only router targets --seeds 1

All runs see the same text (Tiny Shakespeare as bytes), the same batches for a seed, the same number
of steps, and are scored on the same windows: all held-out
text, once. The parts, in this order:

- `rates`: every family tries the same optimizers and learning rates in a short run, with a seed
  that no other part uses. The best is what the other parts use.
- `families`: the three families, every seed, `--steps` steps.
- `router`: what moves the router to a target of 5 bytes, one thing changed at a time; short runs.
- `targets`: HNetBit against its ratio target; short runs. The target of 5 is the run of `router`.

The result file is written after every run and read at the start: a run with the same settings is
not made again."""
import argparse
import json
import math
import os
import tempfile
import time
from pathlib import Path

import torch

from sprout_lab.configs import DataConfig
from sprout_lab.data.batches import Windows
from sprout_lab.data.prepare import load_data
from sprout_lab.families import configure, make_trainer
from sprout_lab.models.hnet import chunk_statistics
from sprout_lab.trainers.callbacks import Callback

# about 1.12 M parameters each; HNetBit's inner width is 132 where the preset has 128, to be as
# large as the others
SHAPES = {
    "slm": {"hidden_size": 128, "num_hidden_layers": 4},
    "hnet": {"d_model": [96, 132], "num_blocks": [[1, 0, 1], [3]], "target_chunk_size": 4.0,
             "ratio_loss_weight": 0.3},
    "transformer": {"hidden_size": 128, "num_hidden_layers": 5, "num_attention_heads": 4,
                    "max_position_embeddings": 2048},
}
SETTINGS = {"sequence_length": 256, "batch_size": 8, "weight_decay": 0.05, "warmup_ratio": 0.1,
            "scheduler": "linear", "min_learning_rate": 0.0, "log_interval": 25, "device": "cpu"}
RATES = [("adamw", 0.002), ("adamw", 0.005), ("muon", 0.01), ("muon", 0.02), ("muon", 0.04)]
SHORT, RATE_SEED = 120, 100     # steps of the parts rates, router and targets
ROUTER = {   # at a target of 5 bytes
    "weight 0.03": {}, "weight 0.1": {"ratio_loss_weight": 0.1},
    "weight 0.3": {"ratio_loss_weight": 0.3},
    "weight rising from 0 to 0.3": {"ratio_loss_weight": 0.3, "rising": True},
}
TARGETS = (2, 3, 5, 8)
PARTS = ("rates", "families", "router", "targets")


def measure(family: str, flags: dict, seed: int, data) -> dict:
    "Train one model, score it on all held-out text; CPU seconds are the training's."
    with tempfile.TemporaryDirectory() as folder:
        settings = {key: value for key, value in flags.items() if key != "rising"}
        trainer = make_trainer(configure(family,
                                         {**settings, "seed": seed, "output_dir": f"{folder}/run"}),
                               data=data, callbacks=[Rising()] if "rising" in flags else [])
        model, cuts = trainer.model, []
        if family == "hnet":
            hook = model.backbone.routing.register_forward_hook(lambda module, given,
                                                                found: cuts.append(found.mask.float().mean().item()))
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        scores = trainer.evaluate()
        result = {"bits_per_byte": scores["bits_per_byte"], "accuracy": scores["accuracy"],
                  "cpu_seconds": round(seconds, 1),
                  "parameters": sum(p.numel() for p in model.parameters())}
        if family == "hnet":
            hook.remove()
            cuts, every = cuts[:trainer.step], max(1, trainer.step // 20)
            result["curve"] = {"step": list(range(every, trainer.step + 1, every)),
                               "bytes_per_chunk": [round(every / sum(cuts[at - every:at]), 3)
                                                   for at in range(every, trainer.step + 1, every)]}
            result |= cut_statistics(model, data.validation) | router_gradients(model,
                                                                                trainer.batches)
    return result


def cut_statistics(model, held_out, length: int = 2048, windows: int = 16) -> dict:
    """Where the model cuts held-out text, the share of bytes that are white space or begin a word
    (`edges`), and the share of multiplications that are inside."""
    ids = torch.cat([batch["input_ids"]
                     for batch in Windows(held_out, length, windows, max_batches=1)])
    found = chunk_statistics(model, ids)
    space = torch.isin(ids, torch.tensor(list(b" \n\t\r")))
    edges = (space[:, 1:] | space[:, :-1]).double().mean().item()
    inner = sum(p.numel() for p in model.backbone.inner.parameters() if p.dim() == 2)
    outer = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2
                and ".inner." not in name and "embed_tokens" not in name)
    inside = inner / found["bytes_per_chunk"]
    return {**found, "edges": edges, "share_inside": inside / (inside + outer),
            "multiplications_per_byte": round(inside + outer)}


def router_gradients(model, batches, count: int = 4) -> dict:
    """Norm of the gradient of the router's matrices, from the next byte's loss and from the
    weighted ratio loss, and both shares of boundaries, hard and soft: means over a few batches
    after the last one."""
    weights, rows = [model.backbone.routing.q_proj.weight, model.backbone.routing.k_proj.weight], []
    norm = lambda loss: math.sqrt(sum(g.double().square().sum().item()
                                      for g in torch.autograd.grad(loss, weights,
                                                                   retain_graph=True)))
    model.train()
    for index in range(count):
        output = model(**batches.batch(1_000_000 + index))
        rows.append((norm(output.loss - output.aux_loss), norm(output.aux_loss),
                     output.boundary_mask[0].float().mean().item(),
                     output.boundary_prob[0].mean().item()))
    return {name: sum(values) / count for name,
            values in zip(("gradient_next_byte", "gradient_ratio", "share_of_boundaries",
                           "mean_probability"), zip(*rows))}


def summary(runs: list[dict]) -> str:
    "Mean ± standard deviation of a few measures over runs."
    words = []
    for name, form in (("bits_per_byte", "{:.3f} ± {:.3f} bits per byte"),
                       ("bytes_per_chunk", "{:.2f} ± {:.2f} bytes per chunk"),
                       ("cpu_seconds", "{:.0f} ± {:.0f} CPU s")):
        values = [run[name] for run in runs if name in run]
        if not values: continue
        mean = sum(values) / len(values)
        spread = math.sqrt(sum((v - mean) ** 2 for v in values) / max(1, len(values) - 1))
        words.append(form.format(mean, spread) if len(values) > 1
                     else form.split(" ±")[0].format(mean) + form.rsplit("}", 1)[1])
    return ", ".join(words) + f", {len(runs)} seed{'s' if len(runs) > 1 else ''}"


class Rising(Callback):
    """Lets the weight of the ratio loss grow linearly from 0, so that the next byte decides first
    where to cut."""
    def on_start(self, trainer):
        self.weight, trainer.model.config.ratio_loss_weight = trainer.model.config.ratio_loss_weight, 0.0
    def on_step(self, trainer):
        trainer.model.config.ratio_loss_weight = self.weight * trainer.step / trainer.total_steps


class Study:
    "A result file and what is still missing in it."

    def __init__(self, path: Path, data):
        self.path, self.data = path, data
        self.content = json.loads(path.read_text()) if path.exists() else {}

    def run(self, part: str, name: str, family: str, flags: dict, seed: int) -> dict:
        "The result of a run, from the file when it is there."
        runs = self.content.setdefault(part, {}).setdefault(name, [])
        for made in runs:
            if made["seed"] == seed and made["settings"] == flags: return made
        runs[:] = [made for made in runs if made["settings"] == flags]
        known = [made for other in self.content.values() for all_runs in other.values()
                 for made in all_runs
                 if (made["family"], made["seed"], made["settings"]) == (family, seed, flags)]
        runs.append(known[0] if known
                    else {"family": family, "seed": seed, **measure(family, flags, seed, self.data),
                          "settings": flags})
        self.write()
        print(f"{part:<9} {name:<28} seed {seed:<3} {summary(runs[-1:])}", flush=True)
        return runs[-1]

    def write(self):
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)

    def rate(self, family: str) -> dict:
        "The optimizer and learning rate that did best in part `rates`."
        tried = {name: runs[0] for name,
                 runs in self.content["rates"].items() if runs[0]["family"] == family}
        best = min(tried.values(), key=lambda run: run["bits_per_byte"])["settings"]
        return {"optimizer": best["optimizer"], "learning_rate": best["learning_rate"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".json"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    study, seeds = Study(options.output, load_data(DataConfig())), range(options.seeds)
    flags = lambda family, **more: {**SETTINGS, **SHAPES[family], "max_steps": options.steps,
                                    **more}
    if "rates" in options.only:
        for optimizer, rate in RATES:
            for family in SHAPES:
                study.run("rates", f"{family}, {optimizer} {rate:g}", family,
                          flags(family, optimizer=optimizer, learning_rate=rate,
                                max_steps=min(SHORT, options.steps)), RATE_SEED)
        for family in SHAPES: print(family, study.rate(family), flush=True)
    if "families" in options.only:
        for seed in seeds:
            for family in SHAPES:
                study.run("families", family, family, flags(family, **study.rate(family)), seed)
    short = lambda **more: flags("hnet",
                                 **{**study.rate("hnet"), "target_chunk_size": 5.0,
                                    "ratio_loss_weight": 0.3,
                                    "max_steps": min(SHORT, options.steps), **more})
    if "router" in options.only:
        for seed in seeds:
            for name, change in ROUTER.items():
                study.run("router", name, "hnet", short(**{"ratio_loss_weight": 0.03, **change}),
                          seed)
    if "targets" in options.only:
        for seed in seeds:
            for target in TARGETS:
                study.run("targets", f"{target}", "hnet", short(target_chunk_size=float(target)),
                          seed)
    for part in options.only:
        for name, runs in study.content.get(part, {}).items():
            print(f"{part:<9} {name:<28} {summary(runs)}")


if __name__ == "__main__": main()
