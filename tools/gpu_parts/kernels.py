"""Part 2: the kernels timed, against the copy bandwidth of the same run, torch.compile and
flash-linear-attention."""
from functools import partial

import torch
import torch.nn.functional as F
from sprout_lab.evaluation.benchmarks import compare
from sprout_lab.kernels.bitlinear import bit_linear, bit_linear_reference
from sprout_lab.kernels.build import has_triton
from sprout_lab.kernels.normgate import (norm_gate, norm_gate_reference, silu_gate,
                                         silu_gate_reference)
from sprout_lab.kernels.scan import gated_scan, scan_reference
from sprout_lab.kernels.ternary import pack_ternary, ternary_matmul

from .report import Report, Settings, compiled, race


class Bench:
    "What the measurements of this part share: device, sizes, a source of numbers."
    def __init__(self, report: Report, settings: Settings):
        self.report, self.settings = report, settings
        self.generator = torch.Generator(settings.device).manual_seed(0)
        self.ours = "triton" if settings.device == "cuda" and has_triton() else "ours"

    def random(self, *shape, dtype=torch.float32) -> torch.Tensor:
        values = torch.randn(*shape, generator=self.generator, device=self.settings.device)
        return values.to(dtype)

    def size(self, usual, quick): return quick if self.settings.quick else usual

    def race(self, sides: dict) -> dict:
        return race(self.report, sides, self.settings, kernel=True)

    def add(self, what: str, seconds: dict, against: str, **options) -> None:
        if not seconds.get(self.ours): return   # ours failed, which the race has written down
        self.report.add(compare("kernels", what, seconds, self.ours, against, **options))

    def share(self, what: str, run, moved: int, target: str | None = None) -> None:
        "A row of the bandwidth of `run`, which moves so many bytes, over that of a copy."
        x = self.random(self.size(2**26, 2**16))
        y, copied = torch.empty_like(x), 2 * x.numel() * x.element_size()
        seconds = self.race({self.ours: run, "copy": lambda: y.copy_(x)})
        amount = {self.ours: moved / 1e9, "copy": copied / 1e9}
        self.add(f"{what}: share of the copy's bandwidth", seconds, "copy", amount=amount,
                 unit="GB/s", target=target)


def backward_of(function, inputs: list[torch.Tensor]):
    "A function that runs the backward pass alone of `function` at `inputs`."
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(*inputs)
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)


def both_of(function, inputs: list[torch.Tensor]):
    "A function that runs forward and backward of `function` at `inputs`."
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    def run():
        output = function(*inputs)
        torch.autograd.grad(output.sum(), inputs)
    return run


def ours_scan(f, i): return gated_scan(f, i)[0]


def scans(bench: Bench) -> None:
    "The gated recurrence: bandwidth forward and backward, in float32 and bf16."
    shape = bench.size((8, 4096, 1024), (2, 64, 32))
    words = "×".join(map(str, shape))
    for dtype in (torch.float32, torch.bfloat16):
        f, i = bench.random(*shape).sigmoid().to(dtype), bench.random(*shape, dtype=dtype)
        array = f.numel() * f.element_size()
        kind = f"{words}, {str(dtype)[6:]}"
        with torch.no_grad():                                # reads f and i, writes h
            bench.share(f"scan forward, {kind}", partial(ours_scan, f, i), 3 * array, ">= 0.8")
        backward = backward_of(ours_scan, [f, i])            # reads f, h and g, writes df and di
        bench.share(f"scan backward, {kind}", backward, 5 * array, ">= 0.8")


def scan_peers(bench: Bench) -> None:
    "The scan beside flash-linear-attention's fused HGRN, and beside the compiled loop."
    f, i = (bench.random(*bench.size((8, 4096, 1024), (2, 64, 32))) for _ in range(2))
    f = f.sigmoid()
    sides = {bench.ours: both_of(ours_scan, [f, i])}
    try: from fla.ops.hgrn import fused_recurrent_hgrn
    except Exception as error:
        why = f"cannot be imported ({type(error).__name__})"
        bench.report.absent("flash-linear-attention", why)
    else: sides["fla"] = both_of(lambda f, i: fused_recurrent_hgrn(i, f)[0], [f.log(), i])
    seconds = bench.race(sides)
    if seconds.get("fla"):
        bench.add("scan forward + backward", seconds, "fla", target=">= 1.0", unit="calls/s")
    # a loop of thousands of steps would be compiled for an hour; a short one says as much
    f, i = (bench.random(*bench.size((8, 128, 1024), (2, 8, 32))) for _ in range(2))
    loop = compiled(lambda f, i: scan_reference(f, i)[0], bench.settings)
    sides = {bench.ours: both_of(ours_scan, [f.sigmoid(), i]),
             "compiled": both_of(loop, [f.sigmoid(), i])}
    bench.add("scan of 128 steps, forward + backward", bench.race(sides), "compiled",
              unit="calls/s")


def gates(bench: Bench) -> None:
    "Norm and gate, SiLU and gate: bandwidth, and beside their compiled references."
    rows, width = bench.size((32768, 1024), (64, 32))
    wide, one = bench.random(rows, 2 * width), bench.random(width) + 1
    cases = {"norm_gate": (norm_gate, norm_gate_reference, [*wide.chunk(2, -1), one]),
             "silu_gate": (silu_gate, silu_gate_reference, [wide])}
    for name, (ours, reference, inputs) in cases.items():
        inputs = [tensor.contiguous() for tensor in inputs]
        moved = 3 * rows * width * 4
        with torch.no_grad(): bench.share(f"{name} forward", partial(ours, *inputs), moved)
        peer = compiled(reference, bench.settings)
        seconds = bench.race({bench.ours: both_of(ours, inputs),
                              "compiled": both_of(peer, inputs)})
        bench.add(f"{name}, forward + backward", seconds, "compiled", target=">= 1.0",
                  unit="calls/s")


def linears(bench: Bench) -> None:
    "BitLinear in training, beside its compiled reference and a plain linear layer in bf16."
    rows, width, outputs = bench.size((16384, 1024, 2816), (32, 64, 48))
    x, weight = bench.random(rows, width), 0.02 * bench.random(outputs, width)
    inputs = [x, weight, bench.random(width) + 1]
    peer = compiled(bit_linear_reference, bench.settings)
    low = [x.bfloat16(), weight.bfloat16()]
    sides = {bench.ours: both_of(bit_linear, inputs), "compiled": both_of(peer, inputs),
             "plain bf16": both_of(F.linear, low)}
    seconds, what = bench.race(sides), f"bit_linear {rows}×{width}→{outputs}, forward + backward"
    bench.add(what, seconds, "compiled", target=">= 1.0", unit="calls/s")
    bench.add(f"{what}, cost", seconds, "plain bf16", cost=True)


def ternary(bench: Bench) -> None:
    "A row through a packed ternary matrix, beside a bf16 one."
    width, outputs = bench.size((2048, 8192), (64, 48))
    signs = bench.random(outputs, width).sign().to(torch.int8)
    packed, codes = pack_ternary(signs), (20 * bench.random(1, width)).to(torch.int8)
    weight, x = signs.bfloat16(), codes.bfloat16()
    sides = {bench.ours: lambda: ternary_matmul(codes, packed),
             "bf16": lambda: F.linear(x, weight)}
    bench.add(f"ternary_matmul 1×{width}→{outputs}", bench.race(sides), "bf16", target=">= 1.0",
              unit="calls/s")


def run(report: Report, settings: Settings) -> None:
    bench = Bench(report, settings)
    for what in (scans, scan_peers, gates, linears, ternary):
        with report.attempt(what.__name__): what(bench)
