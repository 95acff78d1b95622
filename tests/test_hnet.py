"""The hierarchical model: the laws through chunk boundaries, packing, the router's ratio and
gradients, generation, two processes, saving, and its configuration."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from laws import check_laws, perturbed, random_ids
from torch.testing import assert_close

from sprout_lab.configs import ConfigError, preset_names, read_preset, read_settings, resolve
from sprout_lab.decoding.engine import Engine
from sprout_lab.models.hnet import (Boundaries, ChunkLayer, DeChunkLayer, HNetBitConfig,
                                    HNetBitForCausalLM, RoutingModule, chunk_statistics, ratio_loss)
from sprout_lab.models.recurrent import RaggedBatch, StateLayer

root = Path(__file__).resolve().parent.parent
SMALL = dict(d_model=[16, 24], num_blocks=[[1, 0, 1], [2]])
VARIANTS = {
    "one stage": {},
    "convolution": dict(use_short_conv=True, expand_ratio=2, num_blocks=[[1, 0, 1], [1]]),
    "two stages, attention": dict(
        d_model=[16, 24, 24], num_blocks=[[1, 0, 1], [1, 0, 1], [2]], inner_pattern="xa",
        sliding_window=3, num_attention_heads=2),
    "attention alone, tied head": dict(
        d_model=[16, 16], num_blocks=[[0, 0, 1], [1]], inner_pattern="a", tie_word_embeddings=True),
    "no hierarchy": dict(d_model=[16], num_blocks=[[2]]),
}


def small(seed=0, **fields):
    torch.manual_seed(seed)
    return HNetBitForCausalLM(HNetBitConfig(**{**SMALL, **fields}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_laws(variant):
    check_laws(small(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", ("one stage", "convolution", "two stages, attention"))
@torch.no_grad()
def test_every_split_of_a_ragged_batch(variant):
    """Prefill to any point, then steps; rows of different lengths, padded on the left or right,
    cross
    boundaries at different times."""
    model = perturbed(small(**VARIANTS[variant]))
    lengths, steps = (4, 9, 6), 5
    texts = [random_ids(model, 1, n + steps, n)[0] for n in lengths]
    alone = [model(t[None]) for t in texts]
    cuts = {tuple(a.boundary_mask[0][0, :9].tolist()) for a in alone}
    assert len(cuts) > 1, "rows must cross boundaries at different times"
    for side in ("left", "right"):
        ids, mask = torch.full((3, 9), 7), torch.zeros(3, 9, dtype=torch.long)
        for row, (text, n) in enumerate(zip(texts, lengths)):
            where = slice(9 - n, 9) if side == "left" else slice(0, n)
            ids[row, where], mask[row, where] = text[:n], 1
        for split in range(1, 9):
            cache, seen = None, []
            for piece, part in ((ids[:, :split], mask[:, :split]),
                                (ids[:, split:], mask[:, split:])):
                output = model(piece, attention_mask=part, past_key_values=cache, use_cache=True)
                cache = output.past_key_values
                seen.append(output)
            logits = torch.cat([s.logits for s in seen], 1)
            prob = torch.cat([s.boundary_prob[-1] for s in seen], 1)
            for row, n in enumerate(lengths):
                real = mask[row].bool()
                assert_close(logits[row][real], alone[row].logits[0, :n], rtol=0, atol=1e-9)
                want = alone[row].boundary_prob[-1][0, :n]
                assert_close(prob[row][real], want, rtol=0, atol=1e-9)
            if split not in (1, 8): continue
            for step in range(steps):
                tokens = torch.stack([t[n + step] for t, n in zip(texts, lengths)])[:, None]
                output = model(tokens, past_key_values=cache)
                for row, n in enumerate(lengths):
                    want = alone[row].logits[0, n + step]
                    assert_close(output.logits[row, -1], want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_packed_documents_are_as_if_alone(variant):
    model = perturbed(small(**VARIANTS[variant]))
    texts = [random_ids(model, 1, n, n)[0] for n in (5, 1, 2, 11)]
    alone = torch.cat([model(t[None], use_cache=False).logits[0] for t in texts])
    flat, positions = torch.cat(texts)[None], torch.cat([torch.arange(len(t)) for t in texts])[None]
    by_offsets = model(flat, cu_seqlens=torch.tensor([0, 5, 6, 8, 19])).logits[0]
    assert_close(by_offsets, alone, rtol=0, atol=1e-9)
    for split in range(1, 19):
        first = model(flat[:, :split], position_ids=positions[:, :split], use_cache=True)
        second = model(flat[:, split:], position_ids=positions[:, split:],
                       past_key_values=first.past_key_values)
        both = torch.cat((first.logits, second.logits), 1)[0]
        assert_close(both, alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_forward_and_step_of_each_part():
    torch.manual_seed(0)
    router, chunk, dechunk = RoutingModule(8).double(), ChunkLayer(), DeChunkLayer()
    x = torch.randn(3, 10, 8, dtype=torch.float64)
    boundaries = router(x, RaggedBatch())
    kept, kept_idx, inner_batch = chunk(x, boundaries.mask, RaggedBatch())
    y = dechunk(kept, kept_idx, inner_batch, boundaries)
    routing_state, dechunk_state = StateLayer(), StateLayer()
    for t in range(10):
        now = router.step(x[:, t:t + 1], routing_state)
        assert_close(now.prob[:, 0], boundaries.prob[:, t])
        z, active_rows = chunk.step(x[:, t:t + 1], now.mask)
        assert_close(dechunk.step(z, active_rows, now, dechunk_state)[:, 0], y[:, t])
    # it never changes direction: one chunk
    same = x[:, :1].expand(-1, 10, -1)
    for layer in (router.q_proj, router.k_proj): torch.nn.init.eye_(layer.weight)
    assert router(same, RaggedBatch()).mask.sum(1).tolist() == [1, 1, 1]


def test_confidence_is_one_forward_and_itself_backward():
    z, prob = torch.randn(1, 2, 3), torch.tensor([[1.0, 0.3, 0.8]], requires_grad=True)
    mask, kept_idx = torch.tensor([[True, False, True]]), torch.tensor([[0, 2]])
    y = DeChunkLayer()(z, kept_idx, RaggedBatch(), Boundaries(prob, mask))
    assert torch.equal(y[0, 0], y[0, 1])
    (gradient,) = torch.autograd.grad(y[0, 1].sum(), prob)
    assert_close(gradient[0, 1], -y[0, 1].sum())      # c = 1 - p at a place that is no boundary


def test_ratio_loss_and_its_place():
    prob = torch.full((2, 8), 0.5, requires_grad=True)
    mask, valid = torch.zeros(2, 8, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    mask[:, ::2] = True
    loss = ratio_loss(prob, mask, 2.0, valid)
    assert_close(loss, torch.tensor(1.0))
    half = valid.clone()
    half[:, 4:] = False
    padded = ratio_loss(prob.masked_fill(~half, 0.0), mask & half, 2.0, half)
    assert_close(padded, loss)                        # padding does not count
    model, ids = small(), torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    training = model(ids, labels=ids)
    evaluated = model.eval()(ids, labels=ids)
    assert_close(training.loss, evaluated.loss + 0.03 * training.ratio_loss[0])
    half = model.train()(ids, labels=ids, num_items_in_batch=116).loss
    assert_close(half, training.loss / 2)
    assert small(ratio_loss_weight=0.0)(ids, labels=ids).aux_loss == 0


def train(model, batch, steps, lr=4e-3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        ids = batch(step)
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return loss.item()


def test_it_learns_the_next_byte_and_stops_at_the_end():
    model = small(d_model=[32, 48], eos_token_id=255)
    document = list(b"one two three four") + [255]
    ids = torch.tensor([document * 4])
    train(model, lambda step: ids, 130)
    model.eval()
    with torch.no_grad(): predicted = model(ids).logits[0].argmax(-1)
    assert (predicted[19:-1] == ids[0, 20:]).all()
    out = model.generate(torch.tensor([document + document[:4]]), max_new_tokens=60,
                         do_sample=False)
    assert out[0, len(document):].tolist() == document


def test_the_router_keeps_its_ratio_and_learns():
    sentence = b"the quick brown fox jumps over the lazy dog and the small cat sleeps. "
    text, generator = torch.tensor(list(sentence * 20)), torch.Generator().manual_seed(0)
    def batch(step):
        begins = torch.randint(len(text) - 48, (8,), generator=generator)
        return torch.stack([text[a:a + 48] for a in begins])
    model = small(d_model=[32, 32], target_chunk_size=5.0, ratio_loss_weight=0.3)
    start = model.backbone.routing.q_proj.weight.detach().clone()
    train(model, batch, 80)
    facts = chunk_statistics(model, text[None, :200])
    assert 3.0 < facts["bytes_per_chunk"] < 8.0, facts
    assert (model.backbone.routing.q_proj.weight - start).abs().max() > 1e-3


def checkpoint(model):
    # renamed in transformers 5.23
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def test_training_under_autocast_and_checkpointing():
    model = small(**VARIANTS["two stages, attention"])
    ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16): loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad(); checkpoint(model)
    model(ids, labels=ids).loss.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(want, model.parameters()))


def test_generation_padded_beams_and_engine():
    model = perturbed(small(**VARIANTS["two stages, attention"]))
    prompts = [random_ids(model, 1, n, n)[0] for n in (3, 7)]
    alone = [model.generate(p[None], max_new_tokens=8, do_sample=False)[0, len(p):]
             for p in prompts]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, p in enumerate(prompts): ids[row, 7 - len(p):], mask[row, 7 - len(p):] = p, 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 7:]
    assert torch.equal(together, torch.stack(alone))
    how = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    beams = [model.generate(prompts[1][None], use_cache=cached, **how) for cached in (True, False)]
    assert torch.equal(*beams)
    engine = Engine(model)
    state, tokens = engine.prefill([p.tolist() for p in prompts]), []
    for _ in range(8):
        tokens.append(state.logits.argmax(-1))
        state = engine.step(state, tokens[-1])
    assert torch.equal(torch.stack(tokens, 1), torch.stack(alone))
    fork = engine.select(engine.fork(state, 2), [3, 0])
    state = engine.step(state, [5, 6])
    assert_close(engine.step(fork, [6, 5]).logits, state.logits[[1, 0]], rtol=0, atol=1e-9)
    assert len(engine.drop(state, [0])) == 1


def test_save_load(tmp_path):
    model = small().eval()
    model.save_pretrained(tmp_path)
    again = HNetBitForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(model, 2, 15)
    with torch.no_grad(): assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.d_model == [16, 24] and again.config.num_blocks == [[1, 0, 1], [2]]


def test_learning_rates_per_stage():
    model = small(lr_multiplier=[2.0, 1.0])
    assert {p.lr_scale for n, p in model.named_parameters() if "inner." in n} == {1.0}
    assert {p.lr_scale for n, p in model.named_parameters() if "inner." not in n} == {2.0}
    assert not hasattr(next(small().parameters()), "lr_scale")
    from sprout_lab.configs import TrainingConfig
    from sprout_lab.trainers.optimizers import build_optimizer
    # every parameter stands in a group of its own factor, once
    for optimizer in ("adamw", "muon"):
        groups = build_optimizer(model, TrainingConfig(optimizer=optimizer)).param_groups
        grouped = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
        assert grouped == {id(p): p.lr_scale for p in model.parameters()}
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


WORKER = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from sprout_lab.models.hnet import HNetBitConfig, HNetBitForCausalLM
from sprout_lab.models.shared_batch import batch_shared_by
dist.init_process_group("gloo")
torch.manual_seed(0)
config = HNetBitConfig(d_model=[16, 24], num_blocks=[[1, 0, 1], [1]], ratio_loss_weight=0.3)
model = DistributedDataParallel(HNetBitForCausalLM(config))
ids = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(0))
mine = ids[dist.get_rank():][:1]
with batch_shared_by(2): loss = model(mine, labels=mine).loss
loss.backward()
if dist.get_rank() == 0:
    torch.manual_seed(0)
    alone = HNetBitForCausalLM(config)
    alone(ids, labels=ids).loss.backward()
    for a, b in zip(model.module.parameters(), alone.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)
    print("equal")
dist.destroy_process_group()
"""


def test_two_processes_have_the_gradients_of_one(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, str(script)], env=environment, capture_output=True, text=True,
                          timeout=120)
    assert done.returncode == 0 and "equal" in done.stdout, done.stderr[-2000:]


def test_configuration_errors():
    wrong = (
        (dict(d_model=[24, 16]), "may not be narrower"),
        (dict(d_model=[16]), "one entry per stage"),
        (dict(num_blocks=[[1, 1, 1], [2]]), r"must be \[encoder, 0, decoder\]"),
        (dict(num_blocks=[[1, 0, 1], [0]]), "at least 1"),
        (dict(d_model="wide"), "a list is needed"),
        (dict(d_model=[16, "x"]), "list of widths|a list"),
        (dict(inner_pattern="xy"), "letters x or a"),
        (dict(lr_multiplier=[1.0]), "one factor above 0"), (dict(target_chunk_size=1.0), "above 1"),
        (dict(num_attention_heads=5), "multiples of num_attention_heads=5"),
        (dict(eos_token_id=256), "outside vocab_size=256"),
        (dict(num_bloks=1), "did you mean 'num_blocks'"))
    for fields, words in wrong:
        with pytest.raises(ConfigError, match=words): HNetBitConfig(**{**SMALL, **fields})


def test_presets_and_the_guides_format(tmp_path):
    millions = {}
    for name in preset_names("hnet"):
        config = HNetBitConfig(**resolve("hnet", HNetBitConfig, presets=[name]).model)
        with torch.device("meta"):
            millions[name] = HNetBitForCausalLM(config).num_parameters() / 1e6
    guides = {k: round(v, 1) for k, v in millions.items() if k.startswith("hnet_bit")}
    assert guides == {"hnet_bit_1stage": 21.4, "hnet_bit_2stage": 189.7}
    sizes = {k: round(millions[k]) for k in ("nano", "mini", "small", "base")}
    assert sizes == {"nano": 1, "mini": 10, "small": 30, "base": 100}
    fields = HNetBitConfig.settings.model_fields
    nano = {k: v for k, v in read_preset("hnet", "nano").items() if k in fields}
    assert nano.pop("ratio_loss_weight") == 0.3
    assert HNetBitConfig().ratio_loss_weight == 0.03                # the guide's own is the default
    assert HNetBitConfig().to_dict() == HNetBitConfig(**nano).to_dict()
    (tmp_path / "mine.json").write_text(json.dumps(GUIDES_FORMAT))
    content = {k: v for k, v in read_settings(tmp_path / "mine.json").items() if k != "family"}
    run = resolve("hnet", HNetBitConfig, flags=content)
    assert HNetBitConfig(**run.model).d_model == [384, 512, 768]
    assert run.model["num_attention_heads"] == 1
    flags = {"d_model": ["64", "96"], "num_blocks": ["[1,0,1]", "[2]"]}
    model = resolve("hnet", HNetBitConfig, flags=flags).model
    assert (model["d_model"], model["num_blocks"]) == ([64, 96], [[1, 0, 1], [2]])


GUIDES_FORMAT = {
    "model_type": "hnet_bit", "vocab_size": 256, "d_model": [384, 512, 768],
    "num_blocks": [[3, 0, 3], [3, 0, 3], [6]], "num_heads": 1, "expand_ratio": 1, "hidden_ratio": 4,
    "attn_mode": "fused_recurrent", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
