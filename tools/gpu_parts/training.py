"""Part 3: tokens per second and model FLOPs utilisation of every family, beside nanoGPT and
Hugging Face's Llama."""
import numpy as np
import torch
import torch.nn.functional as F
from sprout_lab.configs import TrainingConfig
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.evaluation.benchmarks import Row, compare, training_step
from sprout_lab.evaluation.recurrent_benchmarks import plain_torch
from sprout_lab.evaluation.transformer_benchmarks import (build_nanogpt, load_nanogpt,
                                                          nanogpt_optimizer)
from sprout_lab.families import families
from sprout_lab.models.importing import export_llama
from sprout_lab.models.transformer import TransformerConfig
from sprout_lab.objectives import get_objective, objective_of
from sprout_lab.trainers.optimizers import build_optimizer
from torch.utils.flop_counter import FlopCounterMode

from .report import Report, Settings, compiled, race

SIZES = {"small": (32, 512), "base": (16, 1024)}        # sequences × tokens
QUICK = {"nano": (2, 32)}
COMPILED, EAGER = "ours, compiled", "ours"


def matmul_peak(settings: Settings, report: Report) -> float:
    """Floating-point operations per second of a large matrix product in bf16, the best of some
    sizes."""
    best = 0.0
    for n in (64,) if settings.quick else (4096, 8192):
        a, b = (torch.randn(n, n, device=settings.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = race(report, {"product": lambda: a @ b}, settings, kernel=True)["product"]
        best = max(best, 2 * n**3 / min(seconds))
    return best


def batch_for(model, sequences: int, length: int, device: str) -> dict:
    "A batch of random bytes, as the model's objective makes them."
    tokens = np.random.default_rng(0).integers(32, 127,
                                               4 * sequences * (length + 1)).astype(np.uint8)
    masked = ByteTokenizer(masked=True) if model.config.vocab_size >= 259 else ByteTokenizer()
    batches = objective_of(model).batches(model.config, tokens, masked, length, sequences)
    return {name: tensor.to(device) for name, tensor in batches.batch(0).items()}


def model_flops(model, batch: dict, settings: Settings) -> float:
    """Operations of a forward and a backward pass, counted at one sequence by
    torch.utils.flop_counter (matrix products and attention, the whole square of it), times the
    number of sequences."""
    one = {name: tensor[:1] for name, tensor in batch.items()}
    with plain_torch(), FlopCounterMode(display=False) as counter: model(**one).loss.backward()
    model.zero_grad(set_to_none=True)
    return counter.get_total_flops() * len(batch["input_ids"])


def own_step(model, batch: dict, settings: Settings, forward=None):
    "A training step of a model of ours; `forward`: the compiled one."
    call = model if forward is None else forward
    loss = lambda _: call(**batch).loss
    return training_step(model, build_optimizer(model, TrainingConfig()), loss, True,
                         settings.device)


def peer_steps(model, batch: dict, settings: Settings, nanogpt) -> dict:
    "Training steps of the peers in the shape of a Transformer of ours, compiled."
    x, y = batch["input_ids"], batch["shift_labels"]              # [sequences, length]
    llama = export_llama(model).train().to(settings.device)
    llama_forward = compiled(llama, settings)
    def llama_loss(_):
        logits = llama_forward(input_ids=x, use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), y.flatten())
    optimizer = build_optimizer(llama, TrainingConfig())
    steps = {"HF Llama, compiled": training_step(llama, optimizer, llama_loss, True,
                                                 settings.device)}
    if nanogpt is None: return steps
    c = model.config
    gpt = build_nanogpt(nanogpt, layers=c.num_hidden_layers, heads=c.num_attention_heads,
                        width=c.hidden_size, context=x.shape[1], vocabulary=c.vocab_size)
    gpt = gpt.train().to(settings.device)
    forward, optimizer = compiled(gpt, settings), nanogpt_optimizer(gpt, settings.device)
    loss = lambda _: forward(x, y)[1]
    return {**steps, "nanoGPT, compiled": training_step(gpt, optimizer, loss, True,
            settings.device)}


def measure_family(report: Report, settings: Settings, family, size: str, peak: float,
                   nanogpt) -> None:
    sequences, length = (QUICK if settings.quick else SIZES)[size]
    torch.manual_seed(0)
    model = family.build(size).train().to(settings.device)
    batch = batch_for(model, sequences, length, settings.device)
    flops = model_flops(model, batch, settings)
    is_transformer = type(model.config) is TransformerConfig    # a peer has its shape
    steps = {EAGER: own_step(model, batch, settings)}
    if is_transformer or not settings.quick:
        steps[COMPILED] = own_step(model, batch, settings, compiled(model, settings))
    if is_transformer: steps |= peer_steps(model, batch, settings, nanogpt)
    seconds = race(report, steps, settings)
    where = f"{family.name} {size}, {sequences}×{length}, bf16"
    tokens = dict(amount=sequences * length, unit="tokens/s")
    if not seconds.get(COMPILED): report.absent(f"{where}, compiled", "was not measured")
    else: report.add(compare("training", where, seconds, COMPILED, EAGER, **tokens))
    if is_transformer and seconds.get(COMPILED):
        peers = {"HF Llama, compiled": None}
        if nanogpt is not None: peers["nanoGPT, compiled"] = ">= 1.0"
        for peer, target in peers.items():
            report.add(compare("training", where, seconds, COMPILED, peer, target=target,
                               **tokens))
    side = min(seconds, key=lambda name: min(seconds[name]) if name in (EAGER, COMPILED) else 1e9)
    rates = sorted(flops / s for s in seconds[side])
    value, ratios = rates[len(rates) // 2], [rate / peak for rate in rates]
    report.add(Row("training", f"{where}: share of the matrix-multiply peak", side, "peak",
                   "TFLOP/s", value / 1e12, peak / 1e12, value / peak, ratios[0], ratios[-1],
                   ">= 0.4" if is_transformer and size == "base" else None, len(rates),
                   "operations counted by torch.utils.flop_counter at one sequence"))


def run(report: Report, settings: Settings) -> None:
    peak = matmul_peak(settings, report)
    report.add(Row("training", "matrix product, bf16", "torch", "", "TFLOP/s", peak / 1e12))
    nanogpt = None
    with report.attempt("nanoGPT"): nanogpt = load_nanogpt(settings.peers.get("nanogpt"))
    if nanogpt is None: report.absent("nanoGPT", "no clone was loaded (--peer nanogpt=DIR)")
    for size in QUICK if settings.quick else SIZES:
        for family in families.values():
            if get_objective(family.objective).counted != "tokens":
                report.absent(f"{family.name} {size}", "is not trained on a file of tokens")
                continue
            with report.attempt(f"{family.name} {size}"):
                measure_family(report, settings, family, size, peak, nanogpt)
