"""What thoughts are worth: ablations, specialisation, upcycling, creativity, adapters.

    python studies/mot_study.py                       (every part, about fifteen CPU minutes)
    python studies/mot_study.py --only upcycling      (one part; the others in the file stay)

Small models on bytes of Tiny Shakespeare and the tales, half and half, one CPU thread. What is
compared in a part sees the same batches in the same order and has the same optimizer and schedule.
"Equal active parameters" means that a token passes through as many weights: the dense Transformer's
feed-forward network is as wide as the two chosen branches together. Writes studies/mot_study.json.

- ablations: the mixture, each auxiliary loss left out, a plain top-k mixture of experts (no noise,
  no combiner, the balance loss alone), a router frozen at its random start, the dense Transformer.
  For each mixture also the mutual information, in bits, between a byte's first branch and its kind.
- upcycling: a dense Transformer, trained on as it is, and as a mixture of copies of its networks
  for as many multiplications.
- creativity: diversity and quality of what the mixture and the dense Transformer write.
- cold: strong noise at a low temperature, for the mixture.
- adapters: a mixture trained on Shakespeare, fine-tuned on the tales by LoRA and in full; and a
  ternary model (the SLM), whose adapter stays beside its weights or is added to them and so passes
  through the quantiser."""
import argparse
import json
import math
import os
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from sprout_lab.configs import TrainingConfig
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.evaluation import diversity
from sprout_lab.kernels.bitlinear import quantize_weight
from sprout_lab.metrics import evaluation_mode
from sprout_lab.models import mot
from sprout_lab.models.mot import MoTConfig, MoTForCausalLM, upcycle
from sprout_lab.models.slm import SimplifiedSLMForCausalLM, SLMConfig
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM
from sprout_lab.trainers.optimizers import build_optimizer, learning_rate_at
from sprout_lab.trainers.thoughts import branch_use, dead_branches

RESULT = Path(__file__).with_suffix(".json")
STEPS, BATCH, LENGTH = 150, 8, 128
WIDTH = dict(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
             max_position_embeddings=512)
THOUGHTS = dict(num_thoughts=8, thoughts_per_token=2, intermediate_size=64)
TRAINING = dict(optimizer="muon", learning_rate=0.02, min_learning_rate=0.0, scheduler="linear",
                warmup_steps=20)
SETTINGS = {"steps": STEPS, "batch_size": BATCH, "sequence_length": LENGTH, **WIDTH, **THOUGHTS,
            **TRAINING}


class Corpus:
    "Bytes of both books, and batches of windows drawn from them in turn."

    def __init__(self, names=("shakespeare", "tales")):
        self.names = names
        read = lambda name, split: "".join(load_corpus(name).documents(split)).encode()
        self.train, self.held_out = ([np.frombuffer(read(name, split), np.uint8) for name in names]
                                     for split in ("train", "validation"))

    def batch(self, seed: int, step: int) -> torch.Tensor:
        rng = np.random.default_rng([seed, step])
        rows = []
        for row in range(BATCH):
            book = self.train[row % len(self.train)]
            start = rng.integers(len(book) - LENGTH)
            rows.append(book[start:start + LENGTH])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def windows(self, book: int, count: int = 96) -> torch.Tensor:
        "Evenly spaced held-out windows of one book."
        text = self.held_out[book]
        starts = np.linspace(0, len(text) - LENGTH, count).astype(int)
        return torch.from_numpy(np.stack([text[s:s + LENGTH] for s in starts]).astype(np.int64))


def train(model, corpus: Corpus, seed: int, steps: int = STEPS, **changes) -> float:
    "Train in place; returns CPU seconds."
    settings = TrainingConfig(**{**TRAINING, **changes})
    optimizer, begin = build_optimizer(model, settings), time.process_time()
    model.train()
    torch.manual_seed(seed)
    for step in range(steps):
        for group in optimizer.param_groups: group["lr"] = learning_rate_at(step, settings, steps)
        ids = corpus.batch(seed, step)
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return round(time.process_time() - begin, 1)


def bits_per_byte(model, corpus: Corpus) -> dict[str, float]:
    "Held-out bits per byte of each book."
    scores = {}
    with evaluation_mode(model):
        for book, name in enumerate(corpus.names):
            losses = [model(input_ids=ids, labels=ids).loss.item()
                      for ids in corpus.windows(book).split(16)]
            scores[name] = sum(losses) / len(losses) / math.log(2)
    return scores


# kinds of a byte, each a function of the text around it ------------------------------------------

def kinds_of(text: bytes) -> dict[str, list]:
    "For each byte of a text: its case, its place in its word, whether it is punctuation."
    case, place, punctuation, position = [], [], [], 0
    for value in text:
        letter = chr(value)
        position = position + 1 if letter.isalpha() else 0
        case.append("upper" if letter.isupper() else "lower" if letter.islower() else "none")
        place.append(min(position, 6))
        mark = "white" if letter.isspace() else "letter" if letter.isalpha() else "mark"
        punctuation.append(mark)
    return {"case": case, "place in word": place, "punctuation": punctuation}


def information(a, b) -> float:
    "Mutual information of two discrete sequences, in bits (plug-in estimate)."
    _, a = np.unique(np.asarray(a), return_inverse=True)
    _, b = np.unique(np.asarray(b), return_inverse=True)
    joint = np.zeros((a.max() + 1, b.max() + 1))
    np.add.at(joint, (a, b), 1)
    joint /= joint.sum()
    expected = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    there = joint > 0
    return float((joint[there] * np.log2(joint[there] / expected[there])).sum())


def specialisation(model, corpus: Corpus) -> dict[str, float]:
    "Mutual information of a byte's first branch and its kinds, a mean over layers, and by chance."
    first, kinds = [[] for _ in model.model.layers], {}
    for book, name in enumerate(corpus.names):
        windows = corpus.windows(book, 48)
        with torch.no_grad():
            thoughts = model(input_ids=windows, use_cache=False, output_thoughts=True).thoughts
        for layer, chosen in enumerate(thoughts): first[layer] += chosen[..., 0].flatten().tolist()
        for window in windows.tolist():
            for kind, values in kinds_of(bytes(window)).items():
                kinds.setdefault(kind, []).extend(values)
        kinds.setdefault("book", []).extend([name] * windows.numel())
    mean = lambda values: statistics.fmean(information(branch, values) for branch in first)
    shuffled = list(kinds["place in word"])
    np.random.default_rng(0).shuffle(shuffled)
    return {**{kind: mean(values) for kind, values in kinds.items()}, "chance": mean(shuffled)}


# the models --------------------------------------------------------------------------------------

VARIANTS = {
    "mixture": {}, "no diversity loss": {"diversity_weight": 0.0},
    "no entropy reward": {"entropy_weight": 0.0}, "no balance loss": {"balance_weight": 0.0},
    "plain top-k experts": {"diversity_weight": 0.0, "entropy_weight": 0.0, "noise_scale": 0.0},
    "random router": {}, "dense, equal active": None}


def build(variant: str, seed: int):
    "A fresh model of a variant."
    torch.manual_seed(seed)
    changes = VARIANTS[variant]
    if changes is None:
        wide = THOUGHTS["thoughts_per_token"] * THOUGHTS["intermediate_size"]
        return TransformerForCausalLM(TransformerConfig(**WIDTH, intermediate_size=wide))
    model = MoTForCausalLM(MoTConfig(**WIDTH, **THOUGHTS, **changes))
    for layer in model.model.layers:
        if variant == "plain top-k experts": layer.mlp.combiner.requires_grad_(False)
        if variant == "random router": layer.mlp.router.requires_grad_(False)
    return model


def ablations(corpus: Corpus, seeds: int) -> dict:
    runs = {name: [] for name in VARIANTS}
    for seed in range(seeds):   # seed by seed, so that a busy hour is shared by all
        for name in VARIANTS:
            model = build(name, seed)
            seconds = train(model, corpus, seed)
            run = {"seed": seed, "cpu_seconds": seconds,
                   "bits_per_byte": bits_per_byte(model, corpus),
                   "parameters": sum(p.numel() for p in model.parameters())}
            if hasattr(model, "creative"):
                use = branch_use(model, [corpus.windows(book, 32) for book in (0, 1)])
                run |= {**use, "dead": dead_branches(use["load"]),
                        "information": specialisation(model, corpus)}
            runs[name].append(run)
            print(f"seed {seed}  {name:<22} {run['bits_per_byte']}  {seconds} s", flush=True)
    return runs


def upcycling(corpus: Corpus, seeds: int) -> dict:
    "Multiplications of a step grow with the active weights; so the mixture gets fewer steps."
    more, runs = STEPS // 2, {"trained on": [], "upcycled": [], "before": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        plain = TransformerForCausalLM(TransformerConfig(**WIDTH, intermediate_size=128))
        train(plain, corpus, seed)
        mixture = upcycle(plain, num_thoughts=8)
        runs["before"].append({"seed": seed, "bits_per_byte": bits_per_byte(plain, corpus)})
        weights = sum(p.numel() for name, p in plain.named_parameters() if "embed" not in name)
        extra = sum(p.numel() for layer in plain.model.layers for p in layer.mlp.parameters())
        fewer = round(more * weights / (weights + extra))
        for name, model, steps in (("trained on", plain, more), ("upcycled", mixture, fewer)):
            seconds = train(model, corpus, seed + 100, steps, learning_rate=0.01)
            runs[name].append({"seed": seed, "steps": steps, "cpu_seconds": seconds,
                               "bits_per_byte": bits_per_byte(model, corpus)})
            print(f"seed {seed}  {name:<12} {runs[name][-1]['bits_per_byte']} {steps} steps")
    return runs


# creativity --------------------------------------------------------------------------------------

PROMPTS = ["Once upon a time ", "The little girl ", "In the morning "]


@contextmanager
def noise(kind: str, model, level: float):
    "The model thinking with noise of another kind within the block; 'noise' is its own."
    before = mot.disturbed, mot.ThoughtRouter.forward, mot.fused_thoughts_run
    mot.fused_thoughts_run = lambda x, weight: False     # the loops in C have one kind of noise
    place, kept = iter(range(10**9)), {}

    def at_place(wanted):   # a branch is disturbed twice: at its input, and in its latent state
        def disturb(x, amount=None, generator=None):
            odd = next(place) % 2
            return before[0](x, amount if odd == wanted else None, generator)
        return disturb

    def per_trajectory(x, amount=None, generator=None):
        "The same direction for all tokens, drawn once for each width."
        if amount is None: return x
        width = x.shape[1]
        if width not in kept: kept[width] = torch.randn(1, width, generator=generator)
        return x + amount * x.square().mean(-1, keepdim=True).sqrt() * kept[width]

    def drawn(router, x):
        "Branches drawn without replacement from the router's probabilities at a temperature."
        scores = torch.nn.functional.linear(x, router.score.weight)
        probs = scores.softmax(-1)
        gumbel = -torch.empty_like(scores).exponential_().log()
        chosen = (scores + level * gumbel).topk(router.thoughts_per_token, -1).indices
        weights = probs.gather(-1, chosen)
        return probs, chosen, weights / weights.sum(-1, keepdim=True)

    if kind == "at the input": mot.disturbed = at_place(0)
    elif kind == "in the latent state": mot.disturbed = at_place(1)
    elif kind == "per trajectory": mot.disturbed = per_trajectory
    elif kind == "drawn branches": mot.ThoughtRouter.forward = drawn
    try:
        asked = 0.0 if kind == "drawn branches" else level
        with model.creative(asked, seed=0): yield
    finally: mot.disturbed, mot.ThoughtRouter.forward, mot.fused_thoughts_run = before


KINDS = ("at the input", "in the latent state", "per trajectory", "drawn branches")


def find_judge():
    "stories15M where it is at hand, else a Transformer trained here, four times as wide."
    folder = Path(os.environ.get("SPROUT_LAB_DATA", ".")) / "stories15M"
    if (folder / "stories15M.bin").exists():
        from sprout_lab.models.importing import import_llama2c
        from sprout_lab.data.tokenizers import load_tokenizer
        model = import_llama2c(folder / "stories15M.bin", folder / "tokenizer.bin")
        return "stories15M", (model, load_tokenizer(str(folder / "tokenizer.bin")))
    judge = TransformerForCausalLM(TransformerConfig(**{**WIDTH, "hidden_size": 256}))
    train(judge, Corpus(("tales",)), 7, 2 * STEPS)
    return "a Transformer of the lab, 256 wide", (judge, ByteTokenizer())


def creativity(corpus: Corpus, seeds: int) -> dict:
    tales, tokenizer, points = Corpus(("tales",)), ByteTokenizer(), []
    judge_name, judge = find_judge()
    asked = dict(prompts=PROMPTS, judge=judge, samples=4, length=100)
    mean = lambda scores: statistics.fmean(scores.values())
    scores = []
    for seed in range(seeds):
        models = {}
        for name in ("mixture", "dense, equal active"):
            models[name] = build(name, seed)
            train(models[name], tales, seed, 2 * STEPS)
            scores.append({"model": name, "seed": seed,
                           "bits_per_byte": mean(bits_per_byte(models[name], tales))})
        for name, model in models.items():
            for point in diversity.diversity_front(model, tokenizer, seeds=(seed,), **asked):
                points.append({"model": name, **asdict(point)})
        for kind in KINDS:
            for level in ((0.5, 1.0, 2.0) if kind == "drawn branches" else (1.0, 2.0, 4.0)):
                torch.manual_seed(seed)
                with noise(kind, models["mixture"], level):
                    texts = diversity.sample_at(models["mixture"], tokenizer, PROMPTS,
                                                "temperature", 0.8, 4, 100, seed)
                point = diversity.diversity_of(texts, f"creativity {kind}", level, judge, seed)
                points.append({"model": "mixture", **asdict(point)})
        print(f"seed {seed}: {len(points)} points", flush=True)
    return {"judge": judge_name, "models": scores, "points": points}


def cold(corpus: Corpus, seeds: int) -> dict:
    "Strong noise at a low temperature, against the same low temperatures without."
    tales, tokenizer, points = Corpus(("tales",)), ByteTokenizer(), []
    judge_name, judge = find_judge()
    asked = [("none", temperature, 0.0) for temperature in (0.4, 0.5, 0.6, 0.7)]
    asked += [(kind, 0.4, level) for kind in ("at both places", "in the latent state")
              for level in (4.0, 8.0, 16.0)]
    for seed in range(seeds):
        mixture = build("mixture", seed)
        train(mixture, tales, seed, 2 * STEPS)
        for kind, temperature, level in asked:
            with noise(kind, mixture, level):
                texts = diversity.sample_at(mixture, tokenizer, PROMPTS, "temperature",
                                            temperature, 4, 100, seed)
            setting = (f"noise {kind}, at temperature {temperature}" if level else "temperature")
            point = diversity.diversity_of(texts, setting, level or temperature, judge, seed)
            points.append({"model": "mixture", **asdict(point)})
        print(f"seed {seed}: {len(points)} points", flush=True)
    return {"judge": judge_name, "points": points}


def low_rank(model):
    "The model wrapped with a fresh adapter in its attention, or where its family has it."
    from sprout_lab.trainers.adapters import AdapterConfig, add_adapter
    mixture = isinstance(model, MoTForCausalLM)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] if mixture else []
    return add_adapter(model, AdapterConfig(target_modules=targets))


def trained_weights(model) -> int: return sum(p.numel() for p in model.parameters()
                                              if p.requires_grad)


def adapters(corpus: Corpus, seeds: int) -> dict:
    runs, ternary = [], []
    for seed in range(seeds):
        runs.append(adapter_run(seed, corpus))
        ternary.append(ternary_adapter(seed, corpus))
        print(json.dumps([runs[-1], ternary[-1]]), flush=True)
    return {"runs": runs, "ternary": ternary}


def adapter_run(seed: int, corpus: Corpus) -> dict:
    "A mixture that learned Shakespeare learns the tales: by LoRA, and with all of its weights."
    tales, base = Corpus(("tales",)), build("mixture", seed)
    train(base, Corpus(("shakespeare",)), seed, 2 * STEPS)
    full = build("mixture", seed)
    full.load_state_dict(base.state_dict())
    before, wrapped = bits_per_byte(base, corpus), low_rank(base)
    share = trained_weights(wrapped)
    seconds = train(wrapped, tales, seed, STEPS // 2, optimizer="adamw", learning_rate=3e-3)
    after = bits_per_byte(wrapped.merge_and_unload(), corpus)
    slow = train(full, tales, seed, STEPS // 2, optimizer="adamw", learning_rate=1e-3)
    return {"seed": seed, "before": before, "after LoRA": after,
            "after training all": bits_per_byte(full, corpus), "trained weights": share,
            "all weights": trained_weights(full), "cpu_seconds": {"LoRA": seconds, "all": slow}}


def ternary_adapter(seed: int, corpus: Corpus) -> dict:
    "Bits per byte with the adapter beside the ternary weights, and added to them; what flipped."
    torch.manual_seed(seed)
    base = SimplifiedSLMForCausalLM(SLMConfig(vocab_size=256, hidden_size=64,
                                              num_hidden_layers=2))
    train(base, Corpus(("shakespeare",)), seed, 2 * STEPS)
    found, wrapped = {"seed": seed, "before": bits_per_byte(base, corpus)}, low_rank(base)
    train(wrapped, Corpus(("tales",)), seed, STEPS // 2, optimizer="adamw", learning_rate=3e-3)
    found["beside"] = bits_per_byte(wrapped, corpus)
    changed = total = 0
    moved, wanted = 0.0, 0.0
    with torch.no_grad():
        layers = [module for module in wrapped.modules() if hasattr(module, "lora_A")]
        for layer in layers:
            weight, delta = layer.get_base_layer().weight, layer.get_delta_weight("default")
            old = quantize_weight(weight)
            new = quantize_weight(weight + delta)
            weight.add_(delta)
            changed, total = changed + int((old[0] != new[0]).sum()), total + weight.numel()
            step = new[0] * new[1] - old[0] * old[1]     # what the quantiser lets through
            moved += float((step * delta).sum())
            wanted += float(delta.square().sum())
        with wrapped.disable_adapter(): found["merged"] = bits_per_byte(wrapped, corpus)
    return {**found, "codes_changed": changed / total, "passed_on": moved / wanted}


PARTS = {"ablations": ablations, "upcycling": upcycling, "creativity": creativity, "cold": cold,
         "adapters": adapters}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=list(PARTS), action="append")
    parser.add_argument("--seeds", type=int, default=3)
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    corpus = Corpus()
    for name in asked.only or PARTS:
        found = PARTS[name](corpus, asked.seeds)
        content = json.loads(RESULT.read_text()) if RESULT.exists() else {"parts": {}}
        content["parts"][name] = found
        content |= {"settings": SETTINGS, "torch": torch.__version__}
        RESULT.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__": main()
