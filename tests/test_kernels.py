"""The kernels against their float64 definitions, at odd sizes and on odd values."""
import pytest
import torch

from sprout_lab.configs import ConfigError
from sprout_lab.kernels.bitlinear import (bit_linear, integer_matmul, quantize_activations,
                                          quantize_weight)
from sprout_lab.kernels.normgate import norm_gate, silu_gate
from sprout_lab.kernels.scan import dechunk_scan, gated_scan
from sprout_lab.kernels.ternary import (TernaryWeight, pack_ternary, ternary_linear, ternary_matmul,
                                        unpack_ternary)

LENGTHS, WIDTHS, BACKENDS = (1, 2, 63, 257), (1, 48, 384), ("torch", "c")


def close(a, b, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(a.double(), b.double(), rtol=rtol, atol=atol)


def compare(function, inputs, backend, dtype=torch.float32, rtol=1e-4, seed=1):
    """Outputs and gradients of `function(*inputs, backend)` against float64's, by each tensor's
    size."""
    results = []
    for which, kind in ((backend, dtype), ("reference", torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        outputs = function(*leaves, which)
        generator, loss = torch.Generator().manual_seed(seed), 0
        for output in outputs:
            weights = torch.randn(output.shape, generator=generator, dtype=torch.float64)
            loss = loss + (output.double() * weights.to(output.device)).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([*outputs, *grads])
    for got, want in zip(*results):
        close(got, want, rtol=rtol, atol=rtol * max(1.0, want.abs().max().item()))


def scan_inputs(T, D, seed=0):
    generator = torch.Generator().manual_seed(seed)
    f, i = torch.rand(2, T, D, generator=generator), torch.randn(2, T, D, generator=generator)
    h0, shut = torch.randn(2, D, generator=generator), torch.rand(2, T, D, generator=generator)
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
    z, e0 = torch.randn(2, 63, 48, generator=generator), torch.randn(2, 48, generator=generator)
    p, reset = torch.rand(2, 63, generator=generator), torch.rand(2, 63, generator=generator) < 0.1
    compare(lambda z, p, e0, b: dechunk_scan(z, p, e0, reset, b), (z, p, e0), backend, rtol=2e-4)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_gate_gradients(T, D, backend):
    generator = torch.Generator().manual_seed(0)
    g, h = torch.randn(T, D, generator=generator) + 0.1, 3 * torch.randn(T, D, generator=generator)
    w = torch.rand(D, generator=generator) + 0.5
    compare(lambda g, h, w, b: (norm_gate(g, h, w, 1e-2, b),), (g, h, w), backend, rtol=5e-4)
    compare(lambda x, b: (silu_gate(x, b),), (torch.cat((g, h), -1),), backend, rtol=5e-4)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("D", WIDTHS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("integer", (False, True))
def test_bit_linear_gradients(T, D, backend, integer):
    generator = torch.Generator().manual_seed(T + D)
    x, weight = torch.randn(T, D, generator=generator) + 0.1, 0.02 * torch.randn(24, D,
                                                                                 generator=generator)
    gain = torch.rand(D, generator=generator) + 0.5
    def layer(x, w, n, backend): return (bit_linear(x, w, n, 1e-2, backend, integer),)
    # a code may fall to the other side of a rounding border than in float64: one step of 1/127 in
    # one input
    compare(layer, (x, weight, gain), backend, rtol=5e-3)


def test_integer_products_are_exact():
    generator = torch.Generator().manual_seed(0)
    for rows, inputs, outputs in ((1, 1, 1), (1, 48, 24), (3, 300, 5), (17, 384, 100),
                                  (600, 257, 33)):
        x = torch.randint(-128, 128, (rows, inputs), generator=generator, dtype=torch.int8)
        codes = torch.randint(-1, 2, (outputs, inputs), generator=generator, dtype=torch.int8)
        want = (x.double() @ codes.double().t()).to(torch.int32)
        assert torch.equal(integer_matmul(x, codes), want)
        packed = pack_ternary(codes)
        assert packed.numel() == outputs * 64 * -(-inputs // 256)
        assert torch.equal(unpack_ternary(packed, inputs), codes)
        for backend in ("auto", "c", "torch", "reference"):
            assert torch.equal(ternary_matmul(x, packed, backend), want)


def test_one_row_has_the_numbers_of_a_batch():
    torch.manual_seed(0)
    x, weight, gain = torch.randn(300, 96), 0.02 * torch.randn(40, 96), torch.rand(96)
    with torch.no_grad():
        together = bit_linear(x, weight, gain)
        assert torch.equal(bit_linear(x, weight, gain, integer=False), together)
        stored = TernaryWeight.of(weight)
        for rows in (1, 7, 8, 9, 300):
            assert torch.equal(ternary_linear(x[:rows], stored, gain), together[:rows])


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
    assert codes.tolist() == [[0, 0, 0, 0], [127, -127, 127, -127]] and scale.shape == (2, 1)
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
    with pytest.raises(ConfigError, match="choose from auto, reference, torch, c, triton"):
        gated_scan(f, f, backend="cuda")
    with pytest.raises(ConfigError, match="move them to a GPU|not installed"):
        gated_scan(f, f, backend="triton")


def test_kernels_under_compile():
    """The kernels are operators that `torch.compile` can trace around (traced here, not
    code-generated)."""
    f, i, _, _ = scan_inputs(9, 48)
    w, n = 0.02 * torch.randn(24, 48), torch.ones(48)
    def layer(f, i): return bit_linear(norm_gate(i, gated_scan(f, i)[0], n), w, n)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, backend="aot_eager")(f, i), layer(f, i))
