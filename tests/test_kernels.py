"""The kernels against their float64 definitions, at odd sizes; Triton interpreted and compiled; building without a compiler, twice at once, and into a cache that cannot be written."""
import os
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sprout_lab.configs import ConfigError
from sprout_lab.kernels import build
from sprout_lab.kernels.bitlinear import bit_linear, integer_matmul, quantize_activations, quantize_weight
from sprout_lab.kernels.normgate import norm_gate, silu_gate
from sprout_lab.kernels.scan import dechunk_scan, gated_scan
from sprout_lab.kernels.ternary import TernaryWeight, pack_ternary, ternary_linear, ternary_matmul, unpack_ternary

LENGTHS, WIDTHS, BACKENDS = (1, 2, 63, 257), (1, 48, 384), ("torch", "c")
root = Path(__file__).resolve().parent.parent


def close(a, b, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def compare(function, inputs, backend, dtype=torch.float32, rtol=1e-4, seed=1):
    "Outputs and gradients of `function(*inputs, backend)` against the float64 reference, relative to each tensor's size."
    results = []
    for which, kind in ((backend, dtype), ("reference", torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        outputs = function(*leaves, which)
        generator = torch.Generator().manual_seed(seed)
        loss = sum((o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64)).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    for got, want in zip(*results):
        close(got, want, rtol=rtol, atol=rtol * max(1.0, want.abs().max().item()))


def scan_inputs(T, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f, i, h0 = torch.rand(2, T, D, generator=generator), torch.randn(2, T, D, generator=generator), torch.randn(2, D, generator=generator)
    shut = torch.rand(2, T, D, generator=generator)
    f[shut < 0.2], f[shut > 0.8] = 0.0, 1.0    # gates exactly shut and exactly open
    return f, i, h0, torch.rand(2, T, generator=generator) < 0.2


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scan_gradients(T, D, backend):
    f, i, h0, reset = scan_inputs(T, D)
    compare(lambda f, i, h0, b: gated_scan(f, i, h0, reset, b), (f, i, h0), backend, rtol=2e-4)
    compare(lambda f, i, b: gated_scan(f, i, None, None, b), (f, i), backend, rtol=2e-4)


def test_scan_is_the_same_number_in_c_torch_and_definition():
    f, i, h0, reset = scan_inputs(63, 48)
    want = gated_scan(f, i, h0, reset, "reference")[0]
    for backend in BACKENDS: assert torch.equal(gated_scan(f, i, h0, reset, backend)[0], want)


def test_scan_reset_stops_infinities_and_gradients():
    f, i, h0, _ = scan_inputs(8, 3)
    reset = torch.zeros(2, 8, dtype=torch.bool)
    reset[:, 4] = True
    i[:, 1] = float("inf")
    for backend in BACKENDS: assert gated_scan(f, i, h0, reset, backend)[0][:, 4:].isfinite().all()


def test_scan_edges():
    f, i, h0, _ = scan_inputs(4, 3)
    h, last = gated_scan(f[:, :0], i[:, :0], h0)
    assert h.shape == (2, 0, 3) and torch.equal(last, h0)
    with pytest.raises(ValueError, match="one shape"): gated_scan(f, i[:, :2])
    half, _ = gated_scan(f.bfloat16(), i.bfloat16())
    assert half.dtype == torch.float32
    bent = f.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(gated_scan(bent, i)[0], gated_scan(f, i)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_dechunk_gradients(backend):
    generator = torch.Generator().manual_seed(0)
    z, e0, p = torch.randn(2, 63, 48, generator=generator), torch.randn(2, 48, generator=generator), torch.rand(2, 63, generator=generator)
    reset = torch.rand(2, 63, generator=generator) < 0.1
    compare(lambda z, p, e0, b: dechunk_scan(z, p, e0, reset, b), (z, p, e0), backend, rtol=2e-4)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_gate_gradients(T, D, backend):
    generator = torch.Generator().manual_seed(0)
    g, h, w = torch.randn(T, D, generator=generator) + 0.1, 3 * torch.randn(T, D, generator=generator), torch.rand(D, generator=generator) + 0.5
    compare(lambda g, h, w, b: (norm_gate(g, h, w, 1e-2, b),), (g, h, w), backend, rtol=5e-4)
    compare(lambda x, b: (silu_gate(x, b),), (torch.cat((g, h), -1),), backend, rtol=5e-4)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integer", (False, True))
def test_bit_linear_gradients(T, D, backend, integer):
    generator = torch.Generator().manual_seed(T + D)
    x, weight, gain = torch.randn(T, D, generator=generator) + 0.1, 0.02 * torch.randn(24, D, generator=generator), torch.rand(D, generator=generator) + 0.5
    # a code may fall to the other side of a rounding border than in float64: one step of 1/127 in one input
    compare(lambda x, w, n, b: (bit_linear(x, w, n, 1e-2, b, integer),), (x, weight, gain), backend, rtol=5e-3)


def test_integer_products_are_exact():
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 1, 1), (1, 48, 24), (3, 300, 5), (17, 384, 100), (600, 257, 33)):
        x = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
        codes = torch.randint(-1, 2, (outputs, inputs), generator=generator, dtype=torch.int8)
        want = (x.double() @ codes.double().t()).to(torch.int32)
        assert torch.equal(integer_matmul(x, codes), want)
        packed = pack_ternary(codes)
        assert packed.numel() == outputs * 64 * -(-inputs // 256) and torch.equal(unpack_ternary(packed, inputs), codes)
        for backend in ("auto", "c", "torch", "reference"): assert torch.equal(ternary_matmul(x, packed, backend), want)


def test_one_row_has_the_numbers_of_a_batch():
    torch.manual_seed(0)
    x, weight, gain = torch.randn(300, 96), 0.02 * torch.randn(40, 96), torch.rand(96)
    with torch.no_grad():
        together = bit_linear(x, weight, gain)
        assert torch.equal(bit_linear(x, weight, gain, integer=False), together)
        stored = TernaryWeight.of(weight)
        for rows in (1, 7, 8, 9, 300): assert torch.equal(ternary_linear(x[:rows], stored, gain), together[:rows])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_bad_row_stays_bad(backend):
    x = torch.randn(3, 48)
    x[1, 5] = float("nan")
    x[2, 5] = float("inf")
    y = bit_linear(x, torch.randn(8, 48), torch.ones(48), backend=backend)
    assert y[0].isfinite().all() and y[1].isnan().all() and not y[2].isfinite().any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_codes_and_scales(backend):
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, -1.0]])
    codes, scale = quantize_activations(x, torch.ones(4), backend=backend)
    assert codes[0].tolist() == [0, 0, 0, 0] and codes[1].tolist() == [127, -127, 127, -127] and scale.shape == (2, 1)
    codes, scale = quantize_weight(torch.tensor([[0.0, 0.4, -2.0, 1.6]]), backend)
    assert codes.tolist() == [[0, 0, -1, 1]] and scale.item() == 1.0
    assert quantize_weight(torch.zeros(2, 2), backend)[0].abs().sum() == 0


def test_threads_do_not_change_numbers():
    f, i, h0, reset = scan_inputs(257, 384)
    g, before = torch.randn_like(f), torch.get_num_threads()
    def run():
        leaves = [x.clone().requires_grad_() for x in (f, i)]
        h, _ = gated_scan(*leaves, h0, reset, "c")
        return [h, *torch.autograd.grad(h, leaves, g)]
    try:
        torch.set_num_threads(1); one = run()
        torch.set_num_threads(2); two = run()
    finally: torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, two))


def test_backend_errors():
    f = torch.rand(1, 2, 3)
    with pytest.raises(ConfigError, match="choose from auto, reference, torch, c, triton"): gated_scan(f, f, backend="cuda")
    with pytest.raises(ConfigError, match="move them to a GPU|not installed"): gated_scan(f, f, backend="triton")


# ---- building -----------------------------------------------------------------------------------------------------------------------------

PROBE = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import torch
    from sprout_lab.kernels.scan import gated_scan
    from sprout_lab.kernels.bitlinear import bit_linear
    from sprout_lab.kernels.normgate import norm_gate, silu_gate
    from sprout_lab.kernels.ternary import TernaryWeight, ternary_linear
    torch.manual_seed(0)
    f, i, w, n = torch.rand(2, 9, 48), torch.randn(2, 9, 48), 0.02 * torch.randn(24, 48), torch.ones(48)
    h = gated_scan(f, i)[0]
    y = bit_linear(norm_gate(i, h, n), w, n)
    with torch.no_grad(): z = ternary_linear(i[:1, :1], TernaryWeight.of(w), n)
print("numbers", f"{h.double().sum():.4f} {y.double().abs().sum():.2f} {z.double().abs().sum():.3f}")
print("said", sum("kernels run in plain torch" in str(w.message) for w in caught), len([w for w in caught if w.category is RuntimeWarning]))
"""


def probe(**environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), **environment}
    return subprocess.Popen([sys.executable, "-c", PROBE], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return dict(line.split(" ", 1) for line in out.strip().splitlines())


def test_building(tmp_path):
    "Two processes at once, no compiler, and caches that cannot be used: the same numbers from all."
    here, empty = tmp_path / "cache", tmp_path / "empty"
    empty.mkdir()
    read_only = tmp_path / "read_only"
    (read_only / "kernels").mkdir(parents=True)
    (read_only / "kernels").chmod(0o500)
    a_file = tmp_path / "a_file"
    a_file.write_text("not a folder")
    everyone = tmp_path / "everyone"
    (everyone / "kernels").mkdir(parents=True)
    (everyone / "kernels").chmod(0o777)
    started = {"first": probe(SPROUT_LAB_CACHE=str(here)), "second": probe(SPROUT_LAB_CACHE=str(here))}
    answers = {name: answer(process) for name, process in started.items()}
    assert not list((here / "kernels").glob(".building-*")), "a half-built library was left behind"
    for library in (here / "kernels").glob("*.so"):
        assert not library.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        library.write_bytes(b"torn")           # a damaged one is built again
    started = {"torn": probe(SPROUT_LAB_CACHE=str(here)), "no compiler": probe(SPROUT_LAB_CACHE=str(tmp_path / "none"), PATH=str(empty), CC="")}
    answers |= {name: answer(process) for name, process in started.items()}
    root_user = hasattr(os, "geteuid") and os.geteuid() == 0   # whom a folder's permissions do not stop
    started = {"not writable": probe(SPROUT_LAB_CACHE=str(a_file if root_user else read_only)), "everyone's": probe(SPROUT_LAB_CACHE=str(everyone))}
    answers |= {name: answer(process) for name, process in started.items()}
    numbers = {a["numbers"] for a in answers.values()}
    assert len(numbers) == 1, answers
    if build.compiler() is not None:
        assert answers.pop("no compiler")["said"] == "1 1"
        assert all(a["said"] == "0 0" for a in answers.values()), answers
        assert not list((everyone / "kernels").iterdir()), "nothing may be written to, or loaded from, a folder that others can write"


# ---- Triton -------------------------------------------------------------------------------------------------------------------------------

INTERPRETED = """
import torch
from sprout_lab.kernels import scan
from sprout_lab.kernels.scan import dechunk_scan, gated_scan
from sprout_lab.kernels.bitlinear import bit_linear
from sprout_lab.kernels.normgate import norm_gate, silu_gate
from sprout_lab.kernels.ternary import pack_ternary, ternary_matmul

def check(function, inputs, rtol=2e-4):
    results = []
    for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        outputs = function(*leaves, backend)
        torch.manual_seed(1)
        loss = sum((o.double() * torch.randn(o.shape, dtype=torch.float64)).sum() for o in outputs)
        results.append([*outputs, *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)])
    for got, want in zip(*results): torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=rtol * max(1, want.abs().max().item()))

torch.manual_seed(0)
for T, D in ((1, 1), (2, 5), (7, 48)):
    f, i, h0, reset = torch.rand(2, T, D), torch.randn(2, T, D), torch.randn(2, D), torch.rand(2, T) < 0.3
    f[:, :, :1], f[:, :, -1:] = 0, 1
    check(lambda f, i, h0, b: gated_scan(f, i, h0, reset, b), (f, i, h0))
    check(lambda f, i, b: gated_scan(f, i, None, None, b), (f, i))
    check(lambda g, h, w, b: (norm_gate(g, h, w, 1e-2, b),), (f + 0.1, i, torch.rand(D) + 0.5))
    check(lambda x, b: (silu_gate(x, b),), (torch.cat((f, i), -1),))
    check(lambda x, w, n, b: (bit_linear(x, w, n, 1e-2, b),), (i + 0.1, torch.randn(3, D), torch.rand(D) + 0.5), rtol=5e-3)
scan._chunking = lambda batch, length, width, device: (16, 3, -(-length // 3))   # chunks of three steps
for T in (2, 3, 7):
    f, i, h0, reset = torch.rand(2, T, 20), torch.randn(2, T, 20), torch.randn(2, 20), torch.rand(2, T) < 0.3
    f[0, :, :1], f[0, :, -1:] = 0, 1
    check(lambda f, i, h0, b: gated_scan(f, i, h0, reset, b), (f, i, h0))
    check(lambda f, i, b: gated_scan(f, i, None, None, b), (f, i))
z, p = torch.randn(1, 5, 6), torch.rand(1, 5)
check(lambda z, p, b: dechunk_scan(z, p, None, None, b), (z, p))
codes, x = torch.randint(-1, 2, (19, 270), dtype=torch.int8), torch.randint(-128, 128, (2, 270), dtype=torch.int8)
assert torch.equal(ternary_matmul(x, pack_ternary(codes), "triton"), ternary_matmul(x, pack_ternary(codes), "reference"))
print("interpreted")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from sprout_lab.kernels import bitlinear, normgate, scan, ternary

def kernels():
    p, i8, u8, n, x = "*fp32", "*i8", "*u8", "i32", "fp32"
    flags = lambda *names: {name: "constexpr" for name in names}
    s = dict(f=p, i=p, h0=p, reset=u8, h=p, T=n, D=n, CHUNK=n)
    yield scan._scan_kernel, {**s, **flags("HAS_H0", "HAS_RESET", "BLOCK")}, dict(HAS_H0=True, HAS_RESET=True, BLOCK=128), 4
    yield scan._backward_kernel, {**dict(f=p, h=p, h0=p, reset=u8, g=p, u=p, df=p, di=p, du=p, T=n, D=n, CHUNK=n), **flags("HAS_H0", "HAS_RESET", "BLOCK")}, dict(HAS_H0=True, HAS_RESET=True, BLOCK=128), 4
    for reverse in (False, True):
        yield scan._chunk_kernel, {**dict(f=p, i=p, reset=u8, A=p, E=p, T=n, D=n, CHUNK=n), **flags("REVERSE", "HAS_RESET", "BLOCK")}, dict(REVERSE=reverse, HAS_RESET=True, BLOCK=128), 4
    for block, warps in ((4096, 16),):   # the largest need the most shared memory
        yield bitlinear._quantize_rows_kernel, {**dict(x=p, w=p, codes=i8, scale=p, rstd=p, D=n, eps=x), **flags("BLOCK")}, dict(BLOCK=block), warps
        yield bitlinear._norm_backward_kernel, {**dict(x=p, w=p, rstd=p, g=p, c=p, dx=p, dw=p, ROWS=n, D=n), **flags("BLOCK")}, dict(BLOCK=block), warps
        yield normgate._forward_kernel, {**dict(g=p, h=p, w=p, y=p, rstd=p, D=n, eps=x), **flags("BLOCK")}, dict(BLOCK=block), warps
        yield normgate._backward_kernel, {**dict(g=p, h=p, w=p, rstd=p, dy=p, dg=p, dh=p, dw=p, ROWS=n, D=n), **flags("BLOCK")}, dict(BLOCK=block), warps
    yield normgate._silu_gate_kernel, {**dict(x=p, y=p, M=n), **flags("BLOCK")}, dict(BLOCK=512), 4
    yield normgate._silu_gate_backward_kernel, {**dict(x=p, dy=p, dx=p, M=n), **flags("BLOCK")}, dict(BLOCK=512), 4
    yield ternary._ternary_kernel, {**dict(x=i8, packed=u8, y="*i32", D=n, O=n, SIZE=n), **flags("BLOCK_O")}, dict(BLOCK_O=16), 4

shared = {75: 64, 80: 163, 90: 227}   # KiB per block
for kernel, signature, constants, warps in kernels():
    for capability, most in shared.items():
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32), options=dict(num_warps=warps))
        assert made.metadata.shared <= most * 1024, (kernel.__name__, capability, made.metadata.shared)
        assert ".entry" in made.asm["ptx"]
print("compiled")
"""


def triton_script(code, **environment):
    environment = {k: v for k, v in {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **environment}.items() if v is not None}
    script = Path(os.environ["SPROUT_LAB_CACHE"]) / f"script{abs(hash(code))}.py"
    script.write_text(textwrap.dedent(code))
    return subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=300)


def test_triton_interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    done = triton_script(INTERPRETED, TRITON_INTERPRET="1")
    assert done.returncode == 0 and "interpreted" in done.stdout, done.stderr[-3000:]


def test_triton_compiles_for_each_generation(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = triton_script(COMPILED, TRITON_INTERPRET=None, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


@pytest.mark.cuda
def test_triton_on_a_gpu():
    for T in (*LENGTHS, 2048):
        for D in WIDTHS:
            f, i, h0, reset = (t.cuda() for t in scan_inputs(T, D))
            compare(lambda f, i, h0, b: gated_scan(f, i, h0, reset, b), (f, i, h0), "triton", rtol=5e-4)
            g, w = i[0] + 0.1, torch.rand(D, device="cuda") + 0.5
            compare(lambda g, h, w, b: (norm_gate(g, h, w, 1e-2, b),), (g, f[0], w), "triton", rtol=1e-3)
            compare(lambda x, b: (silu_gate(x, b),), (torch.cat((g, f[0]), -1),), "triton", rtol=1e-3)
            compare(lambda x, m, w, b: (bit_linear(x, m, w, 1e-2, b),), (g, 0.02 * torch.randn(24, D, device="cuda"), w), "triton", rtol=5e-3)


def test_kernels_under_compile():
    "The kernels are operators that `torch.compile` can trace around (traced here, not code-generated)."
    f, i, _, _ = scan_inputs(9, 48)
    w, n = 0.02 * torch.randn(24, 48), torch.ones(48)
    def layer(f, i): return bit_linear(norm_gate(i, gated_scan(f, i)[0], n), w, n)
    with torch.no_grad(): torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(f, i), layer(f, i))
