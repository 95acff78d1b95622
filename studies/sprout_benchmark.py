"""A SPROUT tree's training step against a plain restatement of the public prototype: tokens per CPU second, side by side in one run, and peak memory.

    python studies/sprout_benchmark.py [--hidden_size 512] [--vocab_size 259] [--rounds 5]

Both have five nodes in the shape [-1, 0, 0, 1, 1], the same width and heads, feed-forward networks with as many parameters, 32 × 128 tokens, dropout as given,
float32, AdamW. The two alternate step by step in one process; the ratio of the medians of their CPU time is printed. Peak memory is that of a process of its
own for each side, less what the process held before its model was made. OMP_NUM_THREADS=1 is best.

The prototype as restated here: the score of a child is `sigmoid(gate(attention(query=x, key=key, value=key)))` over a single key, averaged over batch and
sequence; one path for the whole batch, one host sync per child; torch's own MultiheadAttention, post-norm. It is given all of its five nodes from the
start, and the optimizer knows them."""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn

from sprout_lab.models.sprout import SproutConfig, SproutForMaskedLM

TREE, BATCH, LENGTH = [-1, 0, 0, 1, 1], 32, 128


class PrototypeNode(nn.Module):
    def __init__(self, d, heads, dropout, has_key):
        super().__init__()
        self.attention = nn.MultiheadAttention(d, heads, dropout=dropout, batch_first=True)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.ffn = nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * d, d), nn.Dropout(dropout))
        self.router, self.gate = nn.MultiheadAttention(d, heads, batch_first=True), nn.Linear(d, 1)
        self.key = nn.Parameter(torch.randn(1, 1, d)) if has_key else None

    def forward(self, x):
        x = self.norm1(x + self.attention(x, x, x)[0])
        return self.norm2(x + self.ffn(x))


class Prototype(nn.Module):
    def __init__(self, vocab_size, d, heads, dropout):
        super().__init__()
        self.embedding, self.positions = nn.Embedding(vocab_size, d), nn.Embedding(512, d)
        self.nodes = nn.ModuleList(PrototypeNode(d, heads, dropout, parent >= 0) for parent in TREE)
        self.head = nn.Sequential(nn.LayerNorm(d), nn.Linear(d, d), nn.GELU(), nn.LayerNorm(d), nn.Linear(d, vocab_size))

    def forward(self, input_ids, labels):
        x = self.embedding(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        node_id = 0
        while True:
            node = self.nodes[node_id]
            x = node(x)
            scores = {}
            for child in (i for i, parent in enumerate(TREE) if parent == node_id):
                key = self.nodes[child].key.expand(len(x), -1, -1)
                score = torch.sigmoid(node.gate(node.router(x, key, key)[0])).mean()
                scores[child] = (score.item(), score)
            if not scores: break
            node_id = max(scores, key=lambda c: scores[c][0]) if node_id else 1   # the path that has grandchildren
            x = x * scores[node_id][1] + x * (1 - scores[node_id][1])
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


def make(side, options):
    "(step function) of one side, on data of its own making."
    torch.manual_seed(0)
    if side == "prototype": model = Prototype(options.vocab_size, options.hidden_size, options.num_heads, options.dropout)
    else:
        model = SproutForMaskedLM(SproutConfig(vocab_size=options.vocab_size, hidden_size=options.hidden_size, num_attention_heads=options.num_heads, dropout=options.dropout, tree=TREE, max_nodes=5))
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(options.vocab_size, (BATCH, LENGTH))
    labels = ids.masked_fill(torch.rand(ids.shape) > 0.15, -100)
    def step():
        loss = model(input_ids=ids, labels=labels)
        (loss if side == "prototype" else loss.loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def memory(name: str) -> int:
    "A line of /proc/self/status, in KiB."
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))


def peak(side, options) -> float:
    "Peak memory of a process of its own that makes one side and takes three steps, in MiB above what it held before."
    command = [sys.executable, __file__, "--side", side, *(f"--{k}={v}" for k, v in vars(options).items() if k != "side")]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--num_heads", type=int, default=4)
    parser.add_argument("--vocab_size", type=int, default=259)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=("prototype", "sprout"))
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    if options.side:
        Path("/proc/self/clear_refs").write_text("5")   # the peak begins anew (Linux)
        before = memory("VmRSS")
        step = make(options.side, options)
        for _ in range(3): step()
        print((memory("VmHWM") - before) / 1024)
        sys.exit()
    steps, times = {side: make(side, options) for side in ("prototype", "sprout")}, {"prototype": [], "sprout": []}
    for number in range(options.rounds + 1):
        for side, step in steps.items():
            begin = time.process_time()
            step()
            if number: times[side].append(time.process_time() - begin)   # the first round warms up
    middle = {side: statistics.median(seen) for side, seen in times.items()}
    ratios = [p / s for p, s in zip(times["prototype"], times["sprout"])]
    result = {"hidden_size": options.hidden_size, "vocab_size": options.vocab_size, "dropout": options.dropout, "tokens_per_cpu_second": {side: round(BATCH * LENGTH / t) for side, t in middle.items()},
              "ratio": round(middle["prototype"] / middle["sprout"], 2), "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)], "peak_memory_mib": {side: round(peak(side, options)) for side in steps}}
    print(json.dumps(result))
