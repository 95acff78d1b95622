"""Search where it pays: three tasks, all methods at equal tokens evaluated; whether the posterior is
right; whether a value head makes it cheaper.

    OMP_NUM_THREADS=1 python studies/search_study.py --output studies/search_study.json
        (about 20 CPU minutes on one core)
    OMP_NUM_THREADS=1 python studies/search_study.py --only posterior

The models are small Transformers that are trained here, in about a minute each. The parts:

- `lines`: a line of verse after a line of Shakespeare (bytes, held-out prompts): of 40 characters,
  ending in the two letters that the line before ended in. A regular expression can say that, so
  drawing under a mask (`llguidance`) is in the comparison: it always has the form, at what log p?
- `sums`: five numbers whose sum is asked for, by a model trained on such sums; a checker knows how far
  they are off. A mask holds the form, five numbers with plus signs, and not the sum.
- `forecast`: series of two rhythms and noise, continued under the spectral reward.
- `posterior`: a vocabulary of four tokens, where every text can be weighed: total variation between
  the samples of a search and π*, with the sum-instead-of-mean backup of a public prototype.
- `amortised`: a value head for each task, trained on other prompts: a quarter of the tokens with it
  against all of them without.

How a tree is grown (children, widening, λ) was first set by hand; `--tune` tries a few others on the
last ten prompts of a task, with two seeds of their own. `forecast` was changed to the best of them; what
is reported is always on the first ten prompts, with five other seeds.

Error bars: the standard error over prompts of the mean over seeds."""
import argparse
import itertools
import json
import math
import re
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.decoding.forecasts import SeriesTokenizer, Spectral, standardized
from sprout_lab.decoding.masks import regex_mask
from sprout_lab.decoding.search import METHODS, search
from sprout_lab.decoding.value_heads import explained, harvest, train_value_head
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM

PARTS = ("lines", "sums", "forecast", "posterior", "amortised")
GRID = (0.125, 0.25, 0.5, 1.0)     # shares of the budget at which the best so far is noted
SEARCH = dict(batch_size=4, rollouts=10**9)
TREES = dict(expansion_k=4, widening=0.3)
MASKED = "best_of_n, masked"
TUNING = ((4, 0.3, 1), (1, 0.3, 1), (1, 0.5, 1), (1, 0.3, 5), (1, 0.15, 5), (2, 0.0, 5))
# children of a node, widening, λ in multiples of the task's `scale`


def trained(windows, vocab_size: int, steps: int, length: int, hidden_size: int = 64,
            seed: int = 0):
    "A Transformer of two layers; `windows(generator)` gives ids `(batch, length + 1)`."
    torch.manual_seed(seed)
    config = TransformerConfig(vocab_size=vocab_size, hidden_size=hidden_size, num_hidden_layers=2,
                               num_attention_heads=4, max_position_embeddings=length + 64,
                               eos_token_id=None)
    model, generator = TransformerForCausalLM(config), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05, betas=(0.9, 0.98))
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / 30)
            group["lr"] = 3e-3 * warm * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        ids = torch.as_tensor(windows(generator))
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"  trained: {float(loss.detach()):.3f} nats per token", flush=True)
    return model.eval()


def _ending(line: str) -> str: return "".join(c for c in line if c.isalpha())[-2:].lower()


class Lines:
    "A line of 40 characters that ends as the line before."
    scale, times, trees = 20.0, 1, TREES
    budget, new, settings = 16 * 48, 48, {"stop": ["\n"]}

    def __init__(self, steps: int):
        self.tokenizer = ByteTokenizer()
        corpus = load_corpus("shakespeare")
        text = np.frombuffer("".join(corpus.documents("train")).encode(), np.uint8)
        held_out = "".join(corpus.documents("validation")).split("\n")

        def windows(generator):
            starts = generator.integers(0, len(text) - 97, 24)
            return np.stack([text[s:s + 97] for s in starts]).astype(int)
        self.model = trained(windows, 256, steps, 128)
        lines = [line for line in held_out if 30 <= len(line) <= 46 and line[-1] in ".,;:!?"]
        self.prompts = [line + "\n" for line in lines[::max(1, len(lines) // 40)]]

    def reward(self, prompt: str):
        wanted = _ending(prompt)

        def rhyme_and_length(_, text):
            same = [a == b for a, b in zip(wanted[::-1], _ending(text)[::-1])]
            rhyme = 0.5 * (same[:1] == [True]) + 0.5 * (same == [True, True])
            return 0.5 * rhyme + 0.5 * max(0.0, 1 - abs(len(text) - 40) / 20)
        return rhyme_and_length

    def mask(self, prompt: str):
        "Lines that the reward cannot be better for."
        end = re.escape(_ending(prompt))
        return regex_mask(self.tokenizer, rf"[ -~]{{38}}{end}|[ -~]{{37}}{end}[.,;:!?]")


class Sums:
    "Five numbers with a sum that is given."
    scale, times, trees = 20.0, 1, TREES
    budget, new, settings = 24 * 16, 16, {"stop": ["\n"]}

    def __init__(self, steps: int):
        self.tokenizer, random = ByteTokenizer(), np.random.default_rng(1)

        def line(generator):
            numbers = generator.integers(1, 30, 5)
            return f"{numbers.sum()}=" + "+".join(map(str, numbers)) + "\n"

        def windows(generator):
            text = "".join(line(generator) for _ in range(24 * 6)).encode()
            return np.frombuffer(text[:24 * 65], np.uint8).reshape(24, 65).astype(int)
        self.model = trained(windows, 256, steps, 96)
        self.prompts = [f"\n{total}=" for total in random.permutation(np.arange(40, 110))[:40]]

    def reward(self, prompt: str):
        total = int(prompt.strip("\n="))

        def checker(_, text):
            parts = text.split("+")
            if len(parts) != 5 or not all(p.isascii() and p.isdigit() for p in parts): return 0.0
            return 1.0 / (1 + abs(sum(map(int, parts)) - total) / 5)
        return checker

    def mask(self, prompt: str):
        "Five numbers."
        return regex_mask(self.tokenizer, r"[1-9][0-9]?(\+[1-9][0-9]?){4}")


class Forecast:
    "Series of two rhythms, continued so that their spectrum stays."
    scale, times, trees = 10.0, 5, dict(expansion_k=2, widening=0.0)   # the best of TUNING
    budget, new, settings = 24 * 32, 32, {}

    def __init__(self, steps: int):
        self.tokenizer, random = SeriesTokenizer(levels=32), np.random.default_rng(1)

        def windows(generator):
            return np.stack([self.tokenizer.encode(self.series(generator, 97)) for _ in range(24)])
        self.model = trained(windows, 32, steps, 128)
        self.prompts = [self.tokenizer.encode(self.series(random, 64)) for _ in range(40)]

    @staticmethod
    def series(generator, length: int):
        steps, periods = np.arange(length), generator.uniform(4, 24, 2)
        phases = generator.uniform(0, 2 * np.pi, 2)
        waves = sum(np.sin(2 * np.pi * steps / p + phase) for p, phase in zip(periods, phases))
        return standardized(waves + 0.3 * generator.normal(size=length))

    def reward(self, prompt):
        context = self.tokenizer.decode(prompt)
        return Spectral(context, metric="l1log", parse=lambda series: series)

    mask = None   # a spectrum is no grammar


TASKS = {"sums": Sums, "forecast": Forecast, "lines": Lines}
STEPS = {"sums": 900, "forecast": 600, "lines": 600}


def once(task, prompt, method: str, seed: int, budget: int, **more):
    "One search of a task."
    if method == MASKED: method, more = "best_of_n", {**more, "mask": task.mask(prompt)}
    return search(task.model, task.tokenizer, prompt, task.reward(prompt), method=method, seed=seed,
                  token_budget=budget, max_new_tokens=task.new,
                  **{"lam": task.scale * task.times, **SEARCH, **task.trees, **task.settings, **more})


def at_shares(found, budget: int) -> list[tuple[float, float]]:
    "(reward, log p) of the best at each share of the budget; what came first, before that."
    curve = []
    for share in GRID:
        known = [entry for entry in found.history if entry[0] <= share * budget]
        curve.append((known or found.history)[-1 if known else 0][1:])
    return curve


def summary(values: np.ndarray) -> dict:
    "Mean and standard error over prompts of `values (prompts, seeds, …)`, averaged over seeds."
    by_prompt = values.mean(1)
    error = by_prompt.std(0, ddof=1) / math.sqrt(len(by_prompt))
    return {"mean": np.round(by_prompt.mean(0), 5).tolist(), "error": np.round(error, 5).tolist()}


def compared(task, prompts: int, seeds: int) -> dict:
    "All methods over the first prompts, and their differences to best-of-n."
    rewards, result = {}, {"budget": task.budget, "grid": GRID, "prompts": prompts, "seeds": seeds,
                           "methods": {}}
    methods = [method for method in METHODS if method != "s-adt"]   # without a head it is dts
    if task.mask is not None and find_spec("llguidance"): methods.append(MASKED)
    for method in methods:
        begun, curves, tokens = time.process_time(), [], []
        for prompt in task.prompts[:prompts]:
            only_one = method in ("greedy", "beam")
            found = [once(task, prompt, method, seed, task.budget)
                     for seed in range(1 if only_one else seeds)]
            curves.append([at_shares(one, task.budget) for one in found])
            tokens += [one.cost.tokens_evaluated for one in found]
        values = np.array(curves)                            # (prompts, seeds, grid, 2)
        rewards[method] = values[:, :, -1, 0].mean(1)
        result["methods"][method] = {
            "reward": summary(values[..., 0]), "logprob": summary(values[..., 1]),
            "tokens": float(np.mean(tokens)), "cpu_seconds": time.process_time() - begun}
        print(f"  {method:18} {rewards[method].mean():.4f}", flush=True)
    for method, reward in rewards.items():
        gain = reward - rewards["best_of_n"]
        error = gain.std(ddof=1) / math.sqrt(len(gain))
        result["methods"][method]["over_best_of_n"] = [float(gain.mean()), float(error)]
    return result


def tuned(task, seeds: int = 2) -> dict:
    "The mean reward of dts on the last ten prompts, for each way to grow a tree."
    found = {}
    for children, widening, times in TUNING:
        settings = dict(expansion_k=children, widening=widening, lam=times * task.scale)
        name = f"{children} children, widening {widening:g}, λ {settings['lam']:g}"
        rewards = [once(task, prompt, "dts", 11 + seed, task.budget, **settings).reward
                   for prompt in task.prompts[-10:] for seed in range(seeds)]
        found[name] = round(float(np.mean(rewards)), 4)
        print(f"  {name:40} {found[name]:.4f}", flush=True)
    return found


def exact_posterior(model, prompt, length: int, reward, lam: float) -> dict:
    "π* over all texts of a vocabulary of four."
    texts = list(itertools.product(range(4), repeat=length))
    ids = torch.tensor([list(prompt) + list(text) for text in texts])
    with torch.no_grad(): log_probs = model(ids).logits.double().log_softmax(-1)
    start = len(prompt) - 1
    scores = sum(log_probs[range(len(texts)), start + i, ids[:, start + 1 + i]]
                 for i in range(length)).numpy()
    scores = scores + lam * np.array([reward(None, list(text)) for text in texts])
    odds = np.exp(scores - scores.max())
    return dict(zip(texts, odds / odds.sum()))


def posterior_part(seeds: int) -> dict:
    "Total variation to π* against rollouts, by backup and expansion."
    def reward(prompt, ids): return float(sum(ids) % 5 == 0) + 0.2 * (ids[0] == 2)
    whole = dict(method="dts", expand="topk", expansion_k=4)
    sides = {"dts, all children": whole, "the same, sum for a mean": {**whole, "backup": "sum"},
             "dts, drawn children": dict(method="dts", widening=0.7),
             "best of n": dict(method="best_of_n")}
    counts, curves = [10, 30, 100, 300, 1000, 3000], {name: [] for name in sides}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = TransformerForCausalLM(TransformerConfig(
            vocab_size=4, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16, eos_token_id=None)).eval()
        with torch.no_grad():
            for p in model.parameters(): p.add_(0.2 * torch.randn_like(p))
        exact = exact_posterior(model, [1, 2], 4, reward, lam=3.0)
        for name, settings in sides.items():
            row = []
            for count in counts:
                found = search(model, None, [1, 2], reward, max_new_tokens=4, lam=3.0, seed=seed,
                               rollouts=count, **settings)
                samples = dict(found.samples)
                row.append(0.5 * sum(abs(samples.get(text, 0.0) - share)
                                     for text, share in exact.items()))
            curves[name].append(row)
        print(f"  seed {seed}", {name: round(rows[-1][-1], 3) for name, rows in curves.items()},
              flush=True)
    return {"rollouts": counts, "seeds": seeds,
            "curves": {name: {"mean": np.mean(rows, 0).tolist(),
                              "error": (np.std(rows, 0, ddof=1) / math.sqrt(seeds)).tolist()}
                       for name, rows in curves.items()}}


def amortised(task, prompts: int, seeds: int, training: int = 20) -> dict:
    "A head trained on the last prompts; held-out ones with and without it."
    def ids(prompt):
        return list(prompt) if not isinstance(prompt, str) else task.tokenizer.encode(prompt)

    def harvested(some):
        return [harvest(task.model, ids(prompt),
                        once(task, prompt, "dts", 100, task.budget, **settings))
                for prompt in some]
    # four candidates for the head, and the trees that the first study had
    settings = dict(**TREES, lam=task.scale)
    pairs = harvested(task.prompts[-training:])
    head, held_out = train_value_head(pairs), task.prompts[:prompts]
    sides = {"dts": ("dts", 1.0, None), "dts, a quarter": ("dts", 0.25, None),
             "s-adt with the head, a quarter": ("s-adt", 0.25, head),
             "s-adt with the head": ("s-adt", 1.0, head)}
    result = {"explained_training": explained(head, pairs),
              "explained_held_out": explained(head, harvested(held_out)), "sides": {}}
    for name, (method, share, own) in sides.items():
        rewards = np.array([[once(task, prompt, method, seed, int(share * task.budget),
                                  value_head=own, **settings).reward for seed in range(seeds)]
                            for prompt in held_out])
        result["sides"][name] = {**summary(rewards), "share": share}
        print(f"  {name:32} {rewards.mean():.4f}", flush=True)
    return result


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", default="studies/search_study.json")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--tune", action="store_true", help="choose how trees are grown, and end")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    path, begun = Path(options.output), time.process_time()
    results = json.loads(path.read_text()) if path.exists() else {}

    def write(name, content):
        results[name] = {**content, "cpu_seconds": round(time.process_time() - begun, 1)}
        path.write_text(json.dumps(results, indent=1) + "\n")
    if "posterior" in options.only and not options.tune: write("posterior", posterior_part(options.seeds))
    for name, kind in TASKS.items():
        if name not in options.only and "amortised" not in options.only: continue
        print(name, flush=True)
        task = kind(STEPS[name])
        if options.tune:
            write("tuning", {**results.get("tuning", {}), name: tuned(task)})
            continue
        if name in options.only: write(name, compared(task, options.prompts, options.seeds))
        if "amortised" in options.only:
            content = amortised(task, options.prompts, min(options.seeds, 3))
            write("amortised", {**results.get("amortised", {}), name: content})


if __name__ == "__main__": main()
