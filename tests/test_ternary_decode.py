"""The ternary models' whole-step kernel: its definition, the laws, its caches, and no compiler."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laws import check_laws, perturbed, random_ids
from safetensors import safe_open
from safetensors.torch import save_file

from sprout_lab.configs import ConfigError
from sprout_lab.decoding.engine import Engine
from sprout_lab.families import load_model
from sprout_lab.kernels import ternary_decode
from sprout_lab.kernels.build import compiler
from sprout_lab.kernels.ternary_decode import (TERNARY_STEP_C, StepBlock, StepLinear, StepStage,
                                               TernaryStep,
                                               pack_fours, ternary_step_reference)
from sprout_lab.models.hnet import HNetBitConfig, HNetBitForCausalLM
from sprout_lab.models.slm import SimplifiedSLMForCausalLM, SLMConfig
from sprout_lab.models.ternary import (TERNARY_FILE, StepCache, TernaryHNet, TernarySLM,
                                       export_ternary,
                                       load_ternary)


def flat(hidden_size=24, num_hidden_layers=2, intermediate_size=33, **switches):
    sizes = dict(hidden_size=hidden_size, num_hidden_layers=num_hidden_layers)
    return SimplifiedSLMForCausalLM(SLMConfig(**sizes, intermediate_size=intermediate_size,
                                              **switches))


def with_all_switches():
    return flat(20, 2, 40, use_short_conv=True, share_conv_kernel=False, conv_size=3,
                use_lower_bound=True, expand_ratio=2, tie_word_embeddings=True)


def hierarchy(d_model, num_blocks, **switches):
    return HNetBitForCausalLM(HNetBitConfig(d_model=d_model, num_blocks=num_blocks, **switches))


def two_stages():
    return hierarchy([16, 24, 24], [[1, 0, 1], [1, 0, 0], [2]], use_short_conv=True)


MODELS = {"flat": flat, "flat, all switches": with_all_switches, "two stages": two_stages}


def exported(model, folder):
    export_ternary(model.eval(), folder)
    return load_ternary(folder)


def make(name, folder, seed=0):
    torch.manual_seed(seed)
    return exported(MODELS[name](), folder)


@pytest.fixture
def calls(monkeypatch):
    "Counts the steps that go through the C kernel; skips where there is no compiler."
    if compiler() is None: pytest.skip("needs a C compiler")
    step = TernaryStep(torch.zeros(2, 1), StepStage([], torch.ones(1), 1e-6), torch.zeros(2, 1))
    assert step.runs_in_c(), "there is a compiler, and the kernel was not built"
    seen, real = [], TernaryStep.__call__
    def counting(self, ids, states):
        assert self.runs_in_c()
        seen.append(len(ids))
        return real(self, ids, states)
    monkeypatch.setattr(TernaryStep, "__call__", counting)
    return seen


def random_block(width, state, ff, convs, dtype):
    def gain(n): return (torch.rand(n) + 0.5).to(dtype)
    def linear(outputs, inputs):
        codes = torch.randint(-1, 2, (outputs, inputs), dtype=torch.int8)
        return StepLinear(codes, inputs ** -0.5, gain(inputs), 1e-8)
    gates = [linear(state, width) for _ in "fig"]
    matrices = linear(width, state), linear(2 * ff, width), linear(width, ff)
    norms = gain(width), gain(width), gain(state)
    convs = tuple(torch.randn(width, 4).to(dtype) for _ in range(convs))
    return StepBlock(*gates, *matrices, *norms, 1e-6, torch.rand(state).to(dtype), convs)


def random_model(width, inner=None, convs=0, vocabulary=7, dtype=torch.float64):
    "(embedding, stage, head) of random tensors; with `inner` a hierarchy around that width."
    def gain(n): return (torch.rand(n) + 0.5).to(dtype)
    def matrix(): return (torch.randn(width, width) / width ** 0.5).to(dtype)
    stage = StepStage([random_block(width, 2 * width + 1, width + 2, convs, dtype)], gain(width),
                      1e-6)
    if inner:
        pad = torch.randn(inner - width).to(dtype) if inner > width else None
        innermost = StepStage([random_block(inner, inner, inner + 1, convs, dtype)], gain(inner),
                              1e-6, pad)
        stage = stage._replace(inner=innermost, query=matrix(), key=matrix(), residual=matrix(),
                               decoder=[random_block(width, width, 3 * width, convs, dtype)],
                               decoder_norm=gain(width))
    return torch.randn(vocabulary, width).to(dtype), stage, torch.randn(vocabulary, width).to(dtype)


def agree(model, rows=3, steps=5, atol=1e-9):
    step = TernaryStep(*model)
    ours, theirs = step.new_states(rows), step.new_states(rows)
    for _ in range(steps):
        ids = torch.randint(len(model[0]), (rows,))
        got, want = step(ids, ours), ternary_step_reference(ids, *model, theirs)
        for a, b in zip((*got, *ours), (*want, *theirs)):
            torch.testing.assert_close(a, b, rtol=0, atol=atol)


SIZES = [(1, None, 0), (2, 2, 2), (48, 63, 1), (63, None, 2), (257, None, 0), (130, 257, 0),
         (384, None, 1)]


@pytest.mark.parametrize("width, inner, convs", SIZES)
def test_it_is_its_definition_at_odd_sizes(calls, width, inner, convs):
    torch.manual_seed(width)
    agree(random_model(width, inner, convs))
    assert calls


@pytest.mark.parametrize("without", (["__AVX512VNNI__"], ["__AVX512VNNI__", "__AVX2__"]))
def test_other_processors(calls, monkeypatch, without):
    "The AVX2 path and the plain one, where this processor can take them."
    undefined = "".join(f"#undef {name}\n" for name in without)
    monkeypatch.setitem(TERNARY_STEP_C, torch.float64, undefined + TERNARY_STEP_C[torch.float64])
    torch.manual_seed(0)
    for width, inner in ((48, 67), (257, None)): agree(random_model(width, inner))


def test_single_precision_differs_by_roundings_only(calls):
    """Most agree to the last digits; an activation on another of its 255 values moves the logits by
    that share."""
    torch.manual_seed(0)
    model = random_model(64, dtype=torch.float32)
    step, differences = TernaryStep(*model), []
    ours, theirs = step.new_states(1), step.new_states(1)
    for _ in range(60):
        ids = torch.randint(7, (1,))
        got, want = step(ids, ours)[0], ternary_step_reference(ids, *model, theirs)[0]
        differences.append(((got - want).abs().max() / want.abs().max()).item())
        for a, b in zip(ours, theirs): a.copy_(b)
    assert sorted(differences)[30] < 1e-5 and max(differences) < 0.1, differences


def test_four_rows_in_a_byte():
    codes = torch.randint(-1, 2, (6, 65), dtype=torch.int8)
    packed = pack_fours(codes)
    assert packed.shape == (2, 128)
    rows = [((packed >> (2 * r)) & 3).to(torch.int8) - 1 for r in range(4)]
    back = torch.stack(rows, 1).view(8, 128)
    assert torch.equal(back[:6, :65], codes) and not back[6:].any() and not back[:, 65:].any()


@pytest.mark.parametrize("name", MODELS)
def test_laws_through_the_kernel(calls, tmp_path, name):
    check_laws(make(name, tmp_path))
    assert len(calls) > 100


@pytest.mark.parametrize("name", ("flat, all switches", "two stages"))
@torch.no_grad()
def test_forks_selections_and_beams(calls, tmp_path, name):
    model = perturbed(make(name, tmp_path))
    engine, prompts = Engine(model), [random_ids(model, 1, n, n)[0].tolist() for n in (3, 9)]
    how = dict(num_beams=3, max_new_tokens=6, do_sample=False)
    def story():
        "Logits along a fork, a selection and their going on."
        state = engine.prefill(prompts)
        for token in (5, 6): engine.step(state, [token, token + 1])
        other, seen = engine.fork(state), []
        for t in range(3):
            seen += [engine.step(state, [t, t]).logits, engine.step(other, [9, t]).logits]
        both = engine.select(engine.fork(other, 2), [3, 0, 0])
        seen += [engine.step(both, [1, 2, 3]).logits, engine.step(other, [4, 4]).logits]
        return seen
    ours, texts = story(), model.generate(torch.tensor(prompts[1:]), **how)
    used = len(calls)
    model.few = 0
    for a, b in zip(ours, story()): torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert torch.equal(texts, model.generate(torch.tensor(prompts[1:]), **how))
    assert used > 10 and len(calls) == used


def test_what_the_kernel_leaves_to_the_model(calls, tmp_path):
    model = make("flat", tmp_path)
    ids = random_ids(model, 2, 6)
    cache = model(ids[:, :3], use_cache=True).past_key_values
    assert type(cache) is StepCache and not calls
    model(ids[:, 3:4], past_key_values=cache, labels=ids[:, 3:4], use_cache=True)
    padded, new_document = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]), torch.tensor([[0],
                                                                                           [5]])
    model(ids[:, 3:4], past_key_values=cache, attention_mask=padded)
    model(ids[:, 3:4], past_key_values=cache, position_ids=new_document)
    model(ids[:, 3:5], past_key_values=cache)
    many = model(ids.repeat(9, 1), use_cache=True).past_key_values
    model(ids[:17].repeat(9, 1)[:, :1], past_key_values=many)
    assert not calls
    model(ids[:, 5:], past_key_values=cache)
    assert calls == [2]
    with pytest.raises(IndexError, match="the model knows 0 to 255"):
        model(torch.tensor([[3], [256]]), past_key_values=cache)
    attention = exported(HNetBitForCausalLM(HNetBitConfig(inner_pattern="xax")),
                         tmp_path / "attention")
    output = attention(ids, use_cache=True)
    assert attention(ids[:, :1],
                     past_key_values=output.past_key_values).logits.isfinite().all() and len(calls) == 2


def test_weights_that_change_are_packed_again(calls, tmp_path):
    one, two = (make("flat", tmp_path / str(seed), seed) for seed in (0, 1))
    ids = random_ids(one, 1, 5)
    def last(model):
        cache = model(ids[:, :4], use_cache=True).past_key_values
        return model(ids[:, 4:], past_key_values=cache).logits
    before, want = last(one), last(two)
    one.load_state_dict(two.state_dict())
    assert not torch.equal(before, want) and torch.equal(last(one), want)
    torch.testing.assert_close(last(one.double()).float(), want, rtol=0, atol=0.05)
    for action in (lambda: one.save_pretrained(tmp_path / "x"),
                   lambda: export_ternary(one, tmp_path / "x")):
        with pytest.raises(ConfigError, match="copy its folder"): action()


TEXT = b"the cat sat on the mat and the dog sat on the log, "
WRITE = """
import sys, warnings, torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from sprout_lab.evaluation.benchmarks import decode_greedily
    from sprout_lab.decoding.engine import Engine
    from sprout_lab.families import load_model
    model, _ = load_model(sys.argv[1])
    ids = decode_greedily(Engine(model), [list(b"the cat"), list(b"and the dog s")], 210)
print(ids)
warned = sum("kernels run in plain torch" in str(w.message) for w in caught)
print(warned, model._step is not None and model._step[0].runs_in_c())
"""


@pytest.mark.parametrize("family", ("slm", "hnet"))
def test_a_trained_model_writes_the_same_text(calls, tmp_path, family):
    """Kept quantised, exported and stepped by the kernel, and without a compiler: the same 210
    tokens."""
    torch.manual_seed(0)
    model = flat(48, 2, 96) if family == "slm" else hierarchy([48, 64], [[1, 0, 1], [1]])
    ids = torch.tensor([list(TEXT * 6)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=8e-3)
    for _ in range(80):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    assert loss < 0.5
    again = exported(model, tmp_path)
    assert type(again) is (TernarySLM if family == "slm" else TernaryHNet)
    from sprout_lab.evaluation.benchmarks import decode_greedily
    prompts = [list(b"the cat"), list(b"and the dog s")]
    want = decode_greedily(Engine(model.eval()), prompts, 210)
    assert bytes(want[0]).startswith(b" sat on the")
    assert decode_greedily(Engine(again), prompts, 210) == want and len(calls) == 209
    loaded, _ = load_model(tmp_path)
    out = loaded.generate(torch.tensor(prompts[:1]),
                          attention_mask=torch.ones(1, 7, dtype=torch.long),
                          max_new_tokens=40, do_sample=False)
    assert out[0, 7:].tolist() == want[0][:40] and len(calls) > 209
    empty = tmp_path / "empty"
    empty.mkdir()
    environment = {**os.environ, "PATH": str(empty), "CC": "", "OMP_NUM_THREADS": "1",
                   "SPROUT_LAB_CACHE": str(tmp_path / "cache"),
                   "PYTHONPATH": str(Path(ternary_decode.__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], env=environment,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tokens, said = done.stdout.strip().splitlines()
    assert tokens == str(want) and said == "1 False"


def test_generate_command(tmp_path, capsys):
    from sprout_lab.cli import cli
    from sprout_lab.data.tokenizers import ByteTokenizer
    make("flat", tmp_path)
    ByteTokenizer().save_pretrained(tmp_path)
    cli.main(["generate", "--model_path", str(tmp_path), "--prompt", "hello", "--max_new_tokens",
              "5",
              "--temperature", "0"], standalone_mode=False)
    assert capsys.readouterr().out.startswith("hello")


@pytest.mark.parametrize("damage", ["cut", "null", "bytes", "deeper", "codes"])
def test_a_damaged_export_is_one_line(tmp_path, damage):
    export_ternary(flat(32, 1), tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / TERNARY_FILE
    if damage == "cut": config.write_text(config.read_text()[:30])
    elif damage == "null": config.write_text("null")
    elif damage == "bytes": config.write_bytes(b"\xff\xff")
    elif damage == "deeper":
        config.write_text(json.dumps({**json.loads(config.read_text()), "num_hidden_layers": 2}))
    else:
        with safe_open(weights, "pt") as file:
            tensors, facts = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()
        tensors[next(name for name in tensors if name.endswith(".codes"))].fill_(255)
        save_file(tensors, weights, facts)
    with pytest.raises(ConfigError) as caught: load_ternary(tmp_path)
    assert "\n" not in str(caught.value) and "export" in str(caught.value)
