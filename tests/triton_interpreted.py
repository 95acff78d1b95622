"""Run with TRITON_INTERPRET=1: the Triton kernels, interpreted on a CPU, against the float64
definitions."""
import torch

from sprout_lab.kernels import scan
from sprout_lab.kernels.bitlinear import bit_linear
from sprout_lab.kernels.normgate import norm_gate, silu_gate
from sprout_lab.kernels.scan import dechunk_scan, gated_scan
from sprout_lab.kernels.ternary import pack_ternary, ternary_matmul


def results(function, inputs, backend, dtype):
    "Outputs and gradients."
    leaves = [x.to(dtype).requires_grad_() for x in inputs]
    outputs = function(*leaves, backend)
    torch.manual_seed(1)
    loss = sum((o.double() * torch.randn(o.shape, dtype=torch.float64)).sum() for o in outputs)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return [*outputs, *gradients]


def check(function, inputs, rtol=2e-4):
    triton = results(function, inputs, "triton", torch.float32)
    exact = results(function, inputs, "reference", torch.float64)
    for got, want in zip(triton, exact):
        atol = rtol * max(1, want.abs().max().item())
        torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


def check_scan(f, i, h0, reset):
    check(lambda f, i, h0, backend: gated_scan(f, i, h0, reset, backend), (f, i, h0))
    check(lambda f, i, backend: gated_scan(f, i, None, None, backend), (f, i))


torch.manual_seed(0)
for T, D in ((1, 1), (2, 5), (7, 48)):
    f, i, h0, reset = torch.rand(2, T, D), torch.randn(2, T,
                                                       D), torch.randn(2, D), torch.rand(2, T) < 0.3
    f[:, :, :1], f[:, :, -1:] = 0, 1
    gain, weight = torch.rand(D) + 0.5, torch.randn(3, D)
    check_scan(f, i, h0, reset)
    check(lambda g, h, w, backend: (norm_gate(g, h, w, 1e-2, backend),), (f + 0.1, i, gain))
    check(lambda x, backend: (silu_gate(x, backend),), (torch.cat((f, i), -1),))
    check(lambda x, w, n, backend: (bit_linear(x, w, n, 1e-2, backend),), (i + 0.1, weight, gain),
          5e-3)

# chunks of three steps
scan._chunking = lambda batch, length, width, device: (16, 3, -(-length // 3))
for T in (2, 3, 7):
    f, i, h0 = torch.rand(2, T, 20), torch.randn(2, T, 20), torch.randn(2, 20)
    f[0, :, :1], f[0, :, -1:] = 0, 1
    check_scan(f, i, h0, torch.rand(2, T) < 0.3)
z, p = torch.randn(1, 5, 6), torch.rand(1, 5)
check(lambda z, p, backend: dechunk_scan(z, p, None, None, backend), (z, p))

codes = torch.randint(-1, 2, (19, 270), dtype=torch.int8)
x = torch.randint(-128, 128, (2, 270), dtype=torch.int8)
packed = pack_ternary(codes)
assert torch.equal(ternary_matmul(x, packed, "triton"), ternary_matmul(x, packed, "reference"))
print("interpreted")
