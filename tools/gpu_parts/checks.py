"""Part 1: the tests that need a GPU; every kernel against its reference; no access out of
bounds."""
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sprout_lab.evaluation.benchmarks import Row
from sprout_lab.kernels.bitlinear import bit_linear
from sprout_lab.kernels.build import has_triton
from sprout_lab.kernels.normgate import norm_gate, silu_gate
from sprout_lab.kernels.scan import gated_scan
from sprout_lab.kernels.ternary import pack_ternary, ternary_matmul

from .report import Report, Settings, root

SHAPES = ((1, 1, 1), (2, 7, 17), (3, 65, 64), (2, 130, 129), (1, 513, 260), (2, 2048, 96))
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
# the rounding of one activation can go the other way, and then its whole product differs
QUANTISED = {torch.float32: 2e-2, torch.bfloat16: 5e-2}


def _scan_inputs(random: Callable, batch: int, length: int, width: int) -> list[torch.Tensor]:
    return [random(batch, length, width).sigmoid(), random(batch, length, width),
            random(batch, width)]


def _gate_inputs(random: Callable, batch: int, length: int, width: int) -> list[torch.Tensor]:
    shape = batch * length, width
    return [random(*shape), random(*shape), random(width) + 1]


def _silu_inputs(random: Callable, batch: int, length: int, width: int) -> list[torch.Tensor]:
    return [random(batch * length, 2 * width)]


def _linear_inputs(random: Callable, batch: int, length: int, width: int) -> list[torch.Tensor]:
    return [random(batch * length, width), 0.02 * random(24, width), random(width) + 1]


# name → (function of (backend, *inputs), how inputs are made, tolerances by dtype)
KERNELS = {"scan": (lambda backend, f, i, h0: gated_scan(f, i, h0, backend=backend)[0],
                    _scan_inputs, TOLERANCES), "norm_gate": (lambda backend, g, h, w: norm_gate(g,
        h, w, 1e-2, backend), _gate_inputs, TOLERANCES),
           "silu_gate": (lambda backend, x: silu_gate(x, backend), _silu_inputs, TOLERANCES),
           "bit_linear": (lambda backend, x, w, gain: bit_linear(x, w, gain, 1e-2, backend),
                          _linear_inputs, QUANTISED),}


def _distance(value: torch.Tensor, expected: torch.Tensor) -> float:
    "The relative error in the Frobenius norm, in float64."
    value, expected = value.double(), expected.double()
    return ((value - expected).norm() / expected.norm().clamp(min=1e-12)).item()


def _passed_through(function: Callable, backend: str, inputs: list[torch.Tensor],
                    gradient: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    "The output and the gradients of all inputs."
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    output = function(backend, *inputs)
    if gradient is None: gradient = torch.ones_like(output)
    return output, *torch.autograd.grad(output, inputs, gradient.to(output.dtype))


def _strided(tensor: torch.Tensor) -> torch.Tensor:
    "The same values, every second element of a longer last dimension."
    spread = torch.stack((tensor, torch.zeros_like(tensor)), -1).flatten(-2)
    return spread[..., ::2]


def kernel_errors(name: str, settings: Settings, dtype: torch.dtype,
                  noncontiguous: bool) -> list[float]:
    """The largest relative errors over all shapes against the reference in float64: of the
    kernel's output, of its gradients, and of the reference in float32."""
    function, inputs_of, _ = KERNELS[name]
    generator = torch.Generator(settings.device).manual_seed(0)
    def random(*shape): return torch.randn(*shape, generator=generator, device=settings.device)
    worst = [0.0, 0.0, 0.0]
    for shape in SHAPES[:3] if settings.quick else SHAPES:
        inputs = [tensor.to(dtype) for tensor in inputs_of(random, *shape)]
        exact = _passed_through(function, "reference", [t.double() for t in inputs], None)
        gradient = torch.ones_like(exact[0])
        given = [_strided(tensor) for tensor in inputs] if noncontiguous else inputs
        found = _passed_through(function, "auto", given, gradient)
        plain = _passed_through(function, "reference", [t.float() for t in inputs], gradient)
        errors = (_distance(found[0], exact[0]), max(map(_distance, found[1:], exact[1:])),
                  max(map(_distance, plain, exact)))
        worst = [max(pair) for pair in zip(worst, errors)]
    return worst


def against_references(report: Report, settings: Settings) -> None:
    "Every kernel, forward and backward, at odd sizes, contiguous and not, in float32 and bf16."
    backend = "triton" if settings.device == "cuda" and has_triton() else "ours"
    for name, (_, _, tolerances) in KERNELS.items():
        for dtype, tolerance in tolerances.items():
            for noncontiguous in (False, True):
                how = f"{name}, {str(dtype)[6:]}{', not contiguous' if noncontiguous else ''}"
                with report.attempt(how):
                    forward, backward, plain = kernel_errors(name, settings, dtype, noncontiguous)
                    row = dict(unit="relative error", other=plain, target=f"<= {tolerance:g}")
                    other = "reference in float32"
                    report.add(Row("checks", f"{how}, forward", backend, other, value=forward,
                                   **row), Row("checks", f"{how}, backward", backend, other,
                                               value=backward, **row))
    with report.attempt("ternary_matmul"): report.add(_ternary(settings, backend))


def _ternary(settings: Settings, backend: str) -> Row:
    "Sums of integers are exact: how many differ."
    generator, wrong = torch.Generator().manual_seed(0), 0
    for rows, width, outputs in ((1, 4, 1), (3, 68, 17), (17, 516, 65)):
        codes = torch.randint(-127, 128, (rows, width), generator=generator, dtype=torch.int8)
        weight = torch.randint(-1, 2, (outputs, width), generator=generator, dtype=torch.int8)
        expected = codes.long() @ weight.long().t()
        packed = pack_ternary(weight.to(settings.device))
        found = ternary_matmul(codes.to(settings.device), packed)
        wrong += int((found.cpu().long() != expected).sum())
    return Row("checks", "ternary_matmul, sums that differ", backend, "", "sums", wrong,
               target="<= 0")


def cuda_tests(report: Report, settings: Settings) -> None:
    "The tests marked `cuda`, through pytest."
    if importlib.util.find_spec("pytest") is None:
        return report.absent("pytest",
                             "is not installed here; the tests marked cuda were not run")
    command = [sys.executable, "-m", "pytest", "-q", "-m", "cuda", "--cuda", "-p",
               "no:cacheprovider", "tests/test_triton.py" if settings.quick else "tests"]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True)
    found = re.findall(r"(\d+) (passed|failed|error|skipped)", shown.stdout)
    counts = {word: int(number) for number, word in found}
    failed = counts.get("failed", 0) + counts.get("error", 0)
    if shown.returncode not in (0, 5) and not failed: failed = 1      # pytest itself broke
    if not failed and not counts.get("passed"):
        return report.absent("tests marked cuda", "were all skipped: they need a GPU")
    note = ", ".join(f"{number} {word}" for word, number in counts.items()) or shown.stdout[-200:]
    report.add(Row("checks", "tests marked cuda, failures", "pytest", "", "tests", failed,
                   target="<= 0", note=note))
    if failed: report.fault("pytest -m cuda", " ".join(shown.stdout.split()[-60:]))


def sanitizer(report: Report, settings: Settings) -> None:
    "All kernels once under compute-sanitizer, which sees every access out of bounds."
    program = shutil.which("compute-sanitizer")
    if program is None: return report.absent("compute-sanitizer", "is not on this machine")
    if settings.device != "cuda": return report.absent("compute-sanitizer", "needs a GPU")
    code = ("import torch\n" "from gpu_parts.checks import KERNELS, kernel_errors\n"
            "from gpu_parts.report import Settings\n"
            "for name in KERNELS: kernel_errors(name, Settings(quick=True), torch.float32, "
            "False)\n")
    command = [program, "--error-exitcode", "9", sys.executable, "-c", code]
    path = os.pathsep.join([str(Path(__file__).parent.parent), str(root),
                            os.environ.get("PYTHONPATH", "")])
    shown = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": path},
                           capture_output=True, text=True)
    said = re.search(r"ERROR SUMMARY: (\d+)", shown.stdout)
    if said is None: raise RuntimeError((shown.stdout + shown.stderr)[-300:])
    report.add(Row("checks", "accesses out of bounds", "compute-sanitizer", "", "errors",
                   int(said[1]), target="<= 0"))


def run(report: Report, settings: Settings) -> None:
    against_references(report, settings)
    with report.attempt("tests marked cuda"): cuda_tests(report, settings)
    with report.attempt("compute-sanitizer"): sanitizer(report, settings)
