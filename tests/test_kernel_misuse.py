"""Kernels beside their definitions, over random shapes, dtypes, layouts and mistakes.

Each call has a process of its own, and what it is given ends at an unreadable page. It gives the definition's
numbers or refuses in one line; it refuses what the definition refuses, and takes what is right however it is
laid out or broadcast."""
import os
import subprocess
import sys
import warnings
from contextlib import suppress

import pytest
import torch
from guarded import guarded, in_child
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from sprout_lab.configs import ConfigError
from sprout_lab.kernels import build
from sprout_lab.kernels.bitlinear import (bit_linear, bit_linear_reference, integer_matmul,
                                          quantize_activations, quantize_weight, rescale)
from sprout_lab.kernels.decode import DECODE_C, DecodeLayer, DecodeStep, decode_step, decode_step_reference
from sprout_lab.kernels.elementwise import (rms_norm, rms_norm_reference, rotary, rotary_reference,
                                            swiglu,
                                            swiglu_reference)
from sprout_lab.kernels.normgate import norm_gate, norm_gate_reference, silu_gate, silu_gate_reference
from sprout_lab.kernels.scan import dechunk_scan, gated_scan, scan_reference
from sprout_lab.kernels.ternary import (TernaryWeight, pack_ternary, ternary_linear, ternary_matmul,
                                        unpack_ternary)
from sprout_lab.kernels.ternary_decode import (TERNARY_STEP_C, StepBlock, StepLinear, StepStage,
                                               TernaryStep, ternary_step_reference)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and mprotect")
REFUSALS = (ValueError, IndexError, ConfigError)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
FLOATS = [torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16]


# ---- tensors: as they should be, and not --------------------------------------------------------

LAYOUTS = {
    "with gaps": lambda t: torch.stack((t, t), -1).flatten(-2)[..., ::2] if t.dim() else t,
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "back to front": lambda t: t.permute(*reversed(range(t.dim()))).contiguous().permute(*reversed(range(t.dim()))),
    "one for all": lambda t: t[:1].expand(t.shape) if t.dim() and len(t) else t,
    "later in memory": lambda t: torch.cat((t.new_zeros(3), t.flatten()))[3:].view(t.shape),
}
BROADCASTS = {
    "first is 1": lambda t: t[:1] if t.dim() else t,
    "last is 1": lambda t: t[..., :1] if t.dim() else t,
    "without the first": lambda t: t[0] if t.dim() and len(t) else t,
}
MISTAKES = {
    "longer": lambda t: torch.cat((t, t[-1:])) if t.dim() and len(t) else t.new_zeros(2),
    "wider": lambda t: torch.cat((t, t), -1) if t.dim() else t.new_zeros(3, 3),
    "shorter": lambda t: t[:-1] if t.dim() else t.new_zeros(2),
    "narrower": lambda t: t[..., :-1] if t.dim() else t.new_zeros(0),
    "empty": lambda t: t[:0] if t.dim() else t.new_zeros(0),
    "turned": lambda t: t.mT if t.dim() > 1 else t.unsqueeze(-1),
    "one more dimension": lambda t: torch.stack((t, t)),
    "a number": lambda t: t.flatten()[0] if t.numel() else t.new_zeros(()),
    "flat": lambda t: t.flatten() if t.dim() > 1 else t.unsqueeze(0),
    "offloaded": lambda t: t.to("meta"),
    **{str(dtype): lambda t, dtype=dtype: t.to(dtype)
       for dtype in (torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool,
                     torch.complex64)},
}


@st.composite
def changes(draw, names, optional=()):
    """What is done to which arguments: mostly nothing, a layout, or one mistake. {name: (kind,
    what)}"""
    found = {}
    for name in names:
        if draw(st.integers(0, 3)) == 0:
            found[name] = "layout", draw(st.sampled_from(sorted(LAYOUTS)))
    kind = draw(st.sampled_from(["as it should be", "broadcast", "mistake", "mistake", "mistake"]))
    if kind != "as it should be":
        name = draw(st.sampled_from(sorted(names)))
        found[name] = kind, draw(st.sampled_from(sorted(BROADCASTS if kind == "broadcast"
                                                        else MISTAKES)))
    for name in optional:
        if draw(st.booleans()): found[name] = "left out", ""
    return found


def changed(tensor, change):
    kind, what = change
    if kind == "left out": return None
    return {**LAYOUTS, **BROADCASTS, **MISTAKES}[what](tensor)


def exact(value):
    "In float64, for the definition."
    if not isinstance(value, torch.Tensor) or value.dtype == torch.bool: return value
    if value.is_complex(): raise ValueError("complex")
    if value.is_meta: raise ValueError("meta")
    return value.double()


def clones(arguments: dict) -> dict:
    return {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}


# ---- a kernel beside its definition -------------------------------------------------------------

def outcome(function):
    "(values, refusal)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try: values = function()
        except Exception as error: return None, error
    return values if isinstance(values, (tuple, list)) else (values,), None


def differences(got, want, tolerance) -> str:
    if len(got) != len(want): return f"{len(got)} results instead of {len(want)}"
    for k, (ours, theirs) in enumerate(zip(got, want)):
        ours, theirs = ours.double(), theirs.double()
        if ours.shape != theirs.shape:
            return f"result {k} is {tuple(ours.shape)}, not {tuple(theirs.shape)}"
        scale = max(1.0,
                    theirs.abs().max().item()) if theirs.numel() and theirs.isfinite().all() else 1.0
        close = torch.isclose(ours, theirs, rtol=tolerance, atol=tolerance * scale, equal_nan=True)
        if not close.all(): return f"result {k} is off by {(ours - theirs).abs().max().item():.2g}"
    return ""


def compare(kernel, definition, arguments: dict, made: dict, tolerance=None,
            with_grad=False) -> str:
    "What is wrong, in the child; empty where nothing is."
    torch.set_num_threads(1)
    given = {name: guarded(v) if isinstance(v, torch.Tensor) else v for name,
             v in arguments.items()}
    leaves = [t for name,
              t in given.items() if isinstance(t, torch.Tensor) and t.is_floating_point()
              # caches are written in place
              and not t.is_meta and not name.startswith(("keys", "values"))]
    if with_grad:
        for leaf in leaves: leaf.requires_grad_()
    def ours():
        values = kernel(**given)
        if with_grad:
            kept = values if isinstance(values, (tuple, list)) else (values,)
            wanting = [v.float().sum() for v in kept if v.requires_grad]
            if wanting: sum(wanting).backward()
        return values
    def theirs():
        values = {name: v if name == "ids" else exact(v) for name, v in clones(arguments).items()}
        return definition(**values)
    want, refused = outcome(theirs)
    got, refusal = outcome(ours)
    told = f"{type(refusal).__name__}: {refusal}"
    if refusal is not None and (not isinstance(refusal, REFUSALS) or "\n" in str(refusal)):
        return f"refused by {told}"
    if refusal is not None and not {kind for kind,
                                    _ in made.values()} & {"mistake"} and refused is None:
        return f"what is right was refused: {told}"
    if refusal is not None: return ""
    # shapes without numbers
    if str(refused) == "meta" and all(v.is_meta for v in got): return ""
    if refused is not None: return f"taken, where the definition says {refused}"
    if tolerance is None:
        dtypes = {t.dtype for t in (*leaves, *got) if t.is_floating_point()}
        tolerance = max(TOLERANCE[dtype] for dtype in dtypes)
    return differences(got, want, tolerance)


def check(kernel, definition, arguments: dict, made: dict, **how):
    arguments = {name: changed(value, made[name]) if name in made
                 and isinstance(value, torch.Tensor) else value
                 for name, value in arguments.items()}
    told = in_child(lambda: compare(kernel, definition, arguments, made, **how))
    shown = {name: (v.dtype, tuple(v.shape), v.stride()) if isinstance(v, torch.Tensor) else v
             for name, v in arguments.items()}
    assert not told, f"{told}\n{made}\n{shown}"


@pytest.fixture(scope="module", autouse=True)
def _warm():
    "What a process does at its first call, once and not in each child."
    x, w = torch.rand(1, 2, 4, requires_grad=True), torch.rand(4, requires_grad=True)
    (gated_scan(x, x)[0].sum() + norm_gate(x, x, w).sum() + silu_gate(x).sum()
     + rms_norm(x, w).sum()
     + swiglu(x, x).sum() + bit_linear(x, torch.rand(4, 4), w).sum()).backward()
    rotary(torch.rand(1, 2, 1, 4, requires_grad=True), x[0, :, :2], x[0, :, :2]).sum().backward()
    ternary_linear(x, TernaryWeight.of(torch.rand(4, 4)), w)
    build.load_c(DECODE_C, "decode")
    for source in TERNARY_STEP_C.values(): build.load_c(source, "ternary_step")


# the slow test asks for more, and for others
TIMES = int(os.environ.get("KERNEL_MISUSES", "0"))


def kernel_test(examples=30):
    "The same examples in every run of CI; `TIMES` as many, and new ones, where that is asked for."
    relaxed = [HealthCheck.too_slow, HealthCheck.data_too_large]
    how = settings(max_examples=examples * max(1, TIMES), deadline=None, derandomize=not TIMES,
                   database=None,
                   phases=[Phase.generate], suppress_health_check=relaxed)
    return lambda function: how(given(st.data())(function))


def sizes(data, count, most=9): return [data.draw(st.integers(1, most)) for _ in range(count)]


def seeded(data):
    torch.manual_seed(data.draw(st.integers(0, 2**16)))
    return data.draw(st.sampled_from(FLOATS)), data.draw(st.sampled_from(["auto", "c", "torch",
                                                                          "reference"]))


# ---- each kernel --------------------------------------------------------------------------------

@kernel_test()
def test_gated_scan(data):
    (dtype, backend), (B, T, D) = seeded(data), sizes(data, 3, 40)
    arguments = dict(f=torch.rand(B, T, D).to(dtype), i=torch.randn(B, T, D).to(dtype),
                     h0=torch.randn(B, D).to(dtype), reset=torch.rand(B, T) < 0.3)
    made = data.draw(changes(["f", "i", "h0", "reset"], ["h0", "reset"]))
    check(lambda **given: gated_scan(**given, backend=backend), scan_reference, arguments,
          {k: v for k, v in made.items() if not (k in ("f", "i") and v[0] == "broadcast")},
          with_grad=data.draw(st.booleans()))


def dechunk_reference(z, p, e0, reset):
    p = p.expand(z.shape[:2]).unsqueeze(-1)
    return scan_reference((1 - p).expand_as(z), p * z, e0, reset)


@kernel_test()
def test_dechunk_scan(data):
    (dtype, backend), (B, T, D) = seeded(data), sizes(data, 3, 20)
    arguments = dict(z=torch.randn(B, T, D).to(dtype), p=torch.rand(B, T).to(dtype),
                     e0=torch.randn(B, D).to(dtype), reset=torch.rand(B, T) < 0.3)
    made = data.draw(changes(["z", "p", "e0", "reset"], ["e0", "reset"]))
    made = {k: v for k, v in made.items() if not (k == "z" and v[0] == "broadcast")}
    check(lambda **given: dechunk_scan(**given, backend=backend), dechunk_reference, arguments,
          made)


@kernel_test()
def test_norm_gate(data):
    (dtype, backend), (B, T, D) = seeded(data), sizes(data, 3, 40)
    arguments = dict(g=torch.randn(B, T, D).to(dtype), h=torch.randn(B, T, D).to(dtype),
                     weight=torch.rand(D))
    made = data.draw(changes(["g", "h", "weight"]))
    made = {k: v for k, v in made.items() if k == "weight" or v[0] != "broadcast"}
    check(lambda **given: norm_gate(**given, eps=1e-2, backend=backend),
          lambda **given: norm_gate_reference(**given, eps=1e-2), arguments, made,
          with_grad=data.draw(st.booleans()))


@kernel_test()
def test_silu_gate(data):
    (dtype, backend), (B, T, D) = seeded(data), sizes(data, 3, 40)
    made = {k: v for k, v in data.draw(changes(["x"])).items() if v[0] != "broadcast"}
    check(lambda x: silu_gate(x, backend), silu_gate_reference,
          dict(x=torch.randn(B, T, 2 * D).to(dtype)), made,
          with_grad=data.draw(st.booleans()))


@kernel_test()
def test_rms_norm(data):
    (dtype, _), (B, T, D) = seeded(data), sizes(data, 3, 80)
    arguments = dict(x=torch.randn(B, T, D).to(dtype), weight=torch.randn(D))
    made = data.draw(changes(["x", "weight"]))
    made = {k: v for k, v in made.items() if k == "weight" or v[0] != "broadcast"}
    check(lambda **given: rms_norm(**given, eps=1e-2),
          lambda **given: rms_norm_reference(**given, eps=1e-2),
          arguments, made, with_grad=data.draw(st.booleans()))


@kernel_test()
def test_swiglu(data):
    (dtype, _), (B, T, D) = seeded(data), sizes(data, 3, 80)
    arguments = dict(a=torch.randn(B, T, D).to(dtype), b=torch.randn(B, T, D).to(dtype))
    check(swiglu, swiglu_reference, arguments, data.draw(changes(["a", "b"])),
          with_grad=data.draw(st.booleans()))


@kernel_test()
def test_rotary(data):
    (dtype, _), (B, T, H, d) = seeded(data), sizes(data, 4)
    angle = torch.rand(*([B] if data.draw(st.booleans()) else []), T, d)
    arguments = dict(x=torch.randn(B, T, H, 2 * d).to(dtype), cos=angle.cos(), sin=angle.sin(),
                     half=data.draw(st.booleans()))
    made = data.draw(changes(["x", "cos", "sin"]))
    made = {k: v for k, v in made.items() if k != "x" or v[0] != "broadcast"}
    check(rotary, rotary_reference, arguments, made, with_grad=data.draw(st.booleans()))


def activations_reference(x, norm_weight):
    a = rms_norm_reference(x, norm_weight, 1e-2)
    return a * torch.ones_like(x)               # not larger than x


@kernel_test()
def test_quantize_activations(data):
    (dtype, backend), (B, D) = seeded(data), sizes(data, 2, 60)
    def kernel(x, norm_weight):
        codes, scale = quantize_activations(x, norm_weight, 1e-2, backend)
        assert codes.dtype == torch.int8
        return codes.double() * scale.double()
    arguments = dict(x=torch.randn(B, D).to(dtype), norm_weight=torch.rand(D) + 0.5)
    made = data.draw(changes(["x", "norm_weight"]))
    made = {k: v for k, v in made.items() if k != "x" or v[0] != "broadcast"}
    # half a step of 1/127, and bfloat16
    check(kernel, activations_reference, arguments, made, tolerance=0.02)


@kernel_test(20)
def test_quantize_weight(data):
    (dtype, backend), (O, D) = seeded(data), sizes(data, 2, 60)
    def kernel(weight):
        codes, scale = quantize_weight(weight, backend)
        return codes.double() * scale.double(), scale
    def definition(weight):
        scale = weight.abs().mean().clamp(min=1e-5)
        return (weight / scale).round().clamp(-1, 1) * scale, scale
    weight = torch.randint(-1, 2, (O, D)).to(dtype)
    # thirds and halves are far from where rounding turns
    weight[0, 0] = 1.0
    check(kernel, definition, dict(weight=weight), data.draw(changes(["weight"])), tolerance=1e-3)


@kernel_test()
def test_bit_linear(data):
    (dtype, backend), (B, D, O) = seeded(data), sizes(data, 3, 60)
    arguments = dict(x=torch.randn(B, D).to(dtype), weight=torch.randint(-1, 2, (O, D)).to(dtype),
                     norm_weight=torch.rand(D) + 0.5)
    arguments["weight"][0, 0] = 1.0
    made = data.draw(changes(["x", "weight", "norm_weight"]))
    made = {k: v for k, v in made.items() if k == "norm_weight" or v[0] != "broadcast"}
    integer = data.draw(st.sampled_from([None, True, False]))
    def kernel(x, weight, norm_weight):
        return bit_linear(x, weight, norm_weight, 1e-2, backend, integer)
    def definition(x, weight, norm_weight):
        if weight.dim() != 2: raise ValueError("no matrix")
        return bit_linear_reference(x, weight, norm_weight, 1e-2)
    check(kernel, definition, arguments, made, tolerance=0.06, with_grad=data.draw(st.booleans()))


# ---- whole numbers ------------------------------------------------------------------------------

def integers(low, high, *shape): return torch.randint(low, high, shape, dtype=torch.int8)


@kernel_test()
def test_integer_matmul(data):
    _, (N, D, O) = seeded(data), sizes(data, 3, 40)
    arguments = dict(codes=integers(-128, 128, N, D), weight_codes=integers(-128, 128, O, D))
    made = data.draw(changes(["codes", "weight_codes"]))
    made = {k: v for k, v in made.items() if v[0] != "broadcast"}
    check(integer_matmul, lambda codes, weight_codes: codes @ weight_codes.T, arguments, made,
          tolerance=0)


@kernel_test()
def test_ternary_matmul(data):
    (_, backend), (N, D, O) = seeded(data), sizes(data, 3, 40)
    D = D * data.draw(st.sampled_from([1, 64, 13]))
    codes = integers(-1, 2, O, D)
    packed = pack_ternary(codes)
    assert torch.equal(unpack_ternary(packed, D), codes)
    made = data.draw(changes(["x", "packed"]))
    made = {k: v for k, v in made.items() if v[0] != "broadcast"}
    def definition(x, packed):
        if packed.dim() != 2 or packed.shape[1] != pack_ternary(codes).shape[1]:
            raise ValueError("packed")
        return x @ unpack_ternary(packed.to(torch.uint8), x.shape[1]).double().T
    check(lambda x, packed: ternary_matmul(x, packed, backend), definition,
          dict(x=integers(-128, 128, N, D), packed=packed), made, tolerance=0)


@kernel_test()
def test_ternary_linear(data):
    (dtype, backend), (N, D, O) = seeded(data), sizes(data, 3, 40)
    matrix = torch.randint(-1, 2, (O, D)).float()
    matrix[0, 0] = 1.0
    stored = TernaryWeight.of(matrix)
    stored.packed = guarded(stored.packed)
    arguments = dict(x=torch.randn(N, D).to(dtype), norm_weight=torch.rand(D) + 0.5)
    made = data.draw(changes(["x", "norm_weight"]))
    made = {k: v for k, v in made.items() if k != "x" or v[0] != "broadcast"}
    check(lambda x, norm_weight: ternary_linear(x, stored, norm_weight, 1e-2, backend),
          lambda x, norm_weight: bit_linear_reference(x, matrix.double(), norm_weight, 1e-2),
          arguments, made,
          tolerance=0.06)


@kernel_test(20)
def test_pack_ternary(data):
    _, (O, D) = seeded(data), sizes(data, 2, 300)
    made = {k: v for k, v in data.draw(changes(["codes"])).items() if v[0] != "broadcast"}
    def kernel(codes): return unpack_ternary(guarded(pack_ternary(codes)), codes.shape[1])
    def definition(codes):
        if codes.dim() != 2: raise ValueError("no matrix")
        return codes
    check(kernel, definition, dict(codes=integers(-1, 2, O, D)), made, tolerance=0)


@kernel_test(20)
def test_rescale(data):
    _, (N, O) = seeded(data), sizes(data, 2, 20)
    values = rescale(torch.randint(-9, 9, (N, O), dtype=torch.int32), torch.rand(N),
                     torch.tensor(0.5))
    assert values.shape == (N, O) and values.dtype == torch.float32


# ---- whole steps --------------------------------------------------------------------------------

WORDS = {"past": [-1, 9, -2**40, 2**62, 10], "num_heads": [0, -1, 3, 8, 2**40],
         "norm": ["both", None, "none", "post"]}


def decode_arguments(data):
    "Two layers with their caches, and what they share; the norms are where `norm` has them."
    B, group, G, FF = sizes(data, 4, 4)
    d, H, norm = 2 * data.draw(st.integers(1,
                                           9)), group * G, data.draw(st.sampled_from(["pre", "post",
                                                                                      "none"]))
    W, gain = H * d, norm != "none"
    capacity = data.draw(st.integers(1, 20))
    past, with_norms, gate = data.draw(st.integers(0,
                                                   capacity - 1)), data.draw(st.booleans()), data.draw(st.booleans())
    prefix = data.draw(st.sampled_from([0, 0, 3, 18]))
    past += prefix
    arguments = dict(x=torch.randn(B, W), num_heads=H, past=past, norm=norm,
                     half=data.draw(st.booleans()))
    for k in range(2):
        layer = DecodeLayer(*(torch.randn(*shape) / shape[1] ** 0.5 for shape in
                              ((W, W), (G * d, W), (G * d, W), (W, W), (FF, W), (W, FF), (FF, W))),
                            *torch.rand(2, W), *torch.rand(2, d),
                            *torch.randn(2, B, G, capacity, d))
        if not gate: layer = layer._replace(w3=None)
        if not gain: layer = layer._replace(norm1=None, norm2=None)
        if not with_norms: layer = layer._replace(q_norm=None, k_norm=None)
        if prefix: layer = layer._replace(**dict(zip(("prefix_keys", "prefix_values"),
                                                     torch.randn(2, 1, G, prefix, d))))
        arguments |= {f"{name}{k}": tensor for name, tensor in layer._asdict().items()}
    rows = data.draw(st.sampled_from([1, B]))
    if data.draw(st.booleans()):
        arguments |= dict(cos=torch.rand(rows, d // 2), sin=torch.rand(rows, d // 2))
    if data.draw(st.booleans()): arguments |= dict(mask=torch.rand(B, past + 1) < 0.6)
    if data.draw(st.booleans()): arguments |= dict(last_norm=torch.rand(W))
    return arguments


def stepped(step, cos=None, sin=None, **given):
    "The result and the caches, written in place."
    layers = [DecodeLayer(*(given.pop(f"{name}{k}") for name in DecodeLayer._fields))
              for k in range(2)]
    cos_sin = None if cos is None and sin is None else (cos, sin)
    y = step(layers=layers, cos_sin=cos_sin, eps=1e-2, **given)
    return y, *(t for layer in layers for t in (layer.keys, layer.values))


def decode_definition(**given):
    if given["past"] < 0: raise IndexError("a column from the end")
    if given["norm"] not in ("pre", "post", "none"): raise ValueError("norm")
    return stepped(decode_step_reference, **given)


def kept_step(good):
    """As `decode_step`, by a `DecodeStep` that has seen the layers of `good`, of which each weight
    then becomes what is given."""
    def step(layers, x, num_heads, past, cos_sin=None, mask=None, **switches):
        seen = [DecodeLayer(*(good[f"{name}{k}"] for name in DecodeLayer._fields))
                for k in range(2)]
        seen = [DecodeLayer(*(t if t is None else t.clone() for t in layer)) for layer in seen]
        kept, (keys, values) = DecodeStep(seen, num_heads, **switches), list(zip(*seen))[-4:-2]
        with suppress(ValueError, IndexError, TypeError):            # a switch that is a mistake
            with torch.no_grad(): kept(good["x"], keys, values, good["past"])
        *_, keys, values, prefix_keys, prefix_values = zip(*layers)
        cache, prefix = (keys, values), (prefix_keys, prefix_values)
        if all(t is None for part in prefix for t in part): prefix = ()
        for old, new in zip((t for layer in seen for t in layer[:-4]),
                            (t for layer in layers for t in layer[:-4])):
            if (old is None) != (new is None): break
            if old is None: continue
            try: old.data = new
            except (RuntimeError, TypeError): break
        else: return kept(x, *cache, past, cos_sin, mask, prefix)
        return DecodeStep(layers, num_heads, **switches)(x, *cache, past, cos_sin, mask, prefix)
    return step


@pytest.mark.parametrize("kept", [False, True], ids=["each_call", "kept"])
@kernel_test(60)
def test_decode_step(kept, data):
    seeded(data)
    arguments = decode_arguments(data)
    good = dict(arguments)
    tensors = sorted(name for name, value in arguments.items() if isinstance(value, torch.Tensor))
    made = data.draw(changes(tensors))
    # broadcast are the tables and the mask; a cache that is one for all cannot be written
    shared = {"cos", "sin", "mask"}
    caches = {f"{name}{k}" for name in ("keys", "values") for k in range(2)}
    made = {k: v for k, v in made.items() if (v[0] != "broadcast" or k in shared)
            and not (k in caches and v[1] == "one for all")}
    if data.draw(st.integers(0, 4)) == 0:
        name = data.draw(st.sampled_from(sorted(WORDS)))
        made[name], arguments[name] = ("mistake",
                                       "another word"), data.draw(st.sampled_from(WORDS[name]))
    with_grad = data.draw(st.integers(0, 5)) == 0
    def kernel(**given):
        step = kept_step(good) if kept else decode_step
        with torch.set_grad_enabled(with_grad): return stepped(step, **given)
    check(kernel, decode_definition, arguments, made, with_grad=with_grad)


def step_model(data):
    "The tensors of a ternary model of one block, or of two stages, by name."
    width, state, ff, convs = *sizes(data, 3, 9), data.draw(st.integers(0, 2))
    shapes = dict(f=(state, width), i=(state, width), g=(state, width), o=(width, state),
                  gate=(2 * ff, width),
                  down=(width, ff))
    model = {f"{name}.codes": integers(-1, 2, *shape) for name, shape in shapes.items()}
    model |= {f"{name}.gain": torch.rand(shape[1]) + 0.5 for name, shape in shapes.items()}
    model |= dict(attn_norm=torch.rand(width), mlp_norm=torch.rand(width), g_norm=torch.rand(state),
                  norm=torch.rand(width), embedding=torch.randn(11, width),
                  head=torch.randn(11, width))
    model |= {f"conv{k}": torch.randn(width, 3) for k in range(convs)}
    if data.draw(st.booleans()): model |= dict(lower_bound=torch.rand(state))
    if data.draw(st.booleans()):
        model |= {name: torch.randn(width, width) for name in ("query", "key", "residual")}
        model |= dict(decoder_norm=torch.rand(width), pad=torch.rand(0))
    return model


def step_of(model, ids, states, step):
    linears = [StepLinear(model[f"{name}.codes"], 0.3, model[f"{name}.gain"], 1e-8) for name in
               ("f", "i", "g", "o", "gate", "down")]
    convs = tuple(model[name] for name in ("conv0", "conv1") if name in model)
    block = StepBlock(*linears, model["attn_norm"], model["mlp_norm"], model["g_norm"], 1e-6,
                      model.get("lower_bound"), convs)
    stage = StepStage([block], model["norm"], 1e-6)
    if "query" in model:
        router = {name: model[name] for name in ("query", "key", "residual", "decoder_norm")}
        stage = stage._replace(inner=stage, decoder=[block], **router)
    logits, prob = step(model["embedding"], stage, model["head"], ids, states)
    return logits, prob, *states


def by_kernel(embedding, stage, head, ids, states):
    with torch.no_grad(): return TernaryStep(embedding, stage, head)(ids, states)


def by_definition(embedding, stage, head, ids, states):
    if ids.dim() != 1 or len(states) != len(stage.state_shapes()): raise ValueError("ids or states")
    for state, shape in zip(states, stage.state_shapes()):
        if state.shape != (len(ids), *shape): raise ValueError("states")
    if len(ids) and (ids.min() < 0 or ids.max() >= len(embedding)): raise IndexError("ids")
    return ternary_step_reference(ids, embedding, stage, head, states)


@kernel_test(60)
def test_ternary_step(data):
    seeded(data)
    model, batch = step_model(data), data.draw(st.integers(1, 4))
    states = []
    step_of(model, None, [], lambda embedding, stage,
            *rest: (states.extend(stage.state_shapes()), None))
    names = [f"state{k}" for k in range(len(states))]
    model |= {name: torch.rand(batch, *shape) if shape else torch.rand(batch) < 0.5
              for name, shape in zip(names, states)}
    model |= dict(ids=torch.randint(11, (batch,)))
    made = {k: v for k, v in data.draw(changes(sorted(model))).items() if v[0] != "broadcast"}
    made = {k: v for k, v in made.items() if not (k in names and v[1] == "one for all")}
    if data.draw(st.integers(0, 5)) == 0:
        model["ids"][0] = data.draw(st.sampled_from([-1, 11, 2**40, -2**62]))
        made["ids"] = "mistake", "later in memory"
    double = data.draw(st.booleans())
    if double: model = {k: v.double() if v.is_floating_point() else v for k, v in model.items()}
    def run(step):
        def call(**given):
            kept = [given.pop(name) for name in names]
            return step_of(given, given.pop("ids"), kept, step)
        return call
    check(run(by_kernel), run(by_definition), model, made, tolerance=1e-6 if double else 0.1)


# ---- more of it, and under the compiler's sanitizers --------------------------------------------

@pytest.mark.slow   # ten times as many, other ones in every run: several minutes
def test_ten_times_as_many():
    if TIMES: pytest.skip("this is the longer run itself")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "KERNEL_MISUSES": "10"}, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout[-6000:]
