"""The flat ternary recurrent model: the laws, packing, learning, generation, saving, and its configuration."""
import copy
import json

import pytest
import torch
from laws import check_laws, perturbed, random_ids
from safetensors.torch import load_file

from sprout_lab.configs import ConfigError, preset_names, read_preset, resolve
from sprout_lab.decoding.engine import Engine
from sprout_lab.models.hnet import HNetBitConfig, HNetBitForCausalLM
from sprout_lab.models.slm import BitLinear, Rows, SimplifiedSLMForCausalLM, SLMConfig, half_lives, pack_rows
from sprout_lab.models.ternary import export_ternary, load_ternary

SMALL = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48)
VARIANTS = {
    "plain": {},
    "convolution, bounds, wide state": dict(use_short_conv=True, use_lower_bound=True, expand_ratio=2),
    "two convolutions, tied head": dict(use_short_conv=True, share_conv_kernel=False, conv_size=3, tie_word_embeddings=True),
}


def small(seed=0, **fields):
    torch.manual_seed(seed)
    return SimplifiedSLMForCausalLM(SLMConfig(**{**SMALL, **fields}))


@pytest.mark.parametrize("variant", VARIANTS)
def test_laws(variant):
    check_laws(small(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_packed_documents_are_as_if_alone(variant):
    model = perturbed(small(**VARIANTS[variant]))
    texts = [random_ids(model, 1, n, n)[0] for n in (5, 1, 2, 11)]
    alone = torch.cat([model(t[None], use_cache=False).logits[0] for t in texts])
    flat, edges = torch.cat(texts)[None], torch.tensor([0, 5, 6, 8, 19])
    torch.testing.assert_close(model(flat, cu_seqlens=edges).logits[0], alone, rtol=0, atol=1e-9)
    positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
    torch.testing.assert_close(model(flat, position_ids=positions).logits[0], alone, rtol=0, atol=1e-9)
    for split in range(1, 19):    # a packed row read in two calls
        first = model(flat[:, :split], position_ids=positions[:, :split], use_cache=True)
        second = model(flat[:, split:], position_ids=positions[:, split:], past_key_values=first.past_key_values)
        torch.testing.assert_close(torch.cat((first.logits, second.logits), 1)[0], alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_padding_may_be_anywhere_and_hold_anything():
    model = perturbed(small(use_short_conv=True))
    text = random_ids(model, 1, 6)[0]
    want = model(text[None]).logits[0]
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0]])
    ids = torch.full((1, 11), 77)
    ids[mask.bool()] = text
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], want, rtol=0, atol=1e-9)
    assert model(ids, attention_mask=torch.zeros_like(mask)).logits.isfinite().all()


@torch.no_grad()
def test_float32_states_do_not_depend_on_the_batch():
    "Ternary products and the scan are exact or of fixed order: in float32 a row alone, in a batch, at once or stepwise has the same bits up to the head."
    model = small(hidden_size=48).eval()
    ids = random_ids(model, 5, 30)
    whole = model.model(ids).last_hidden_state
    assert torch.equal(model.model(ids[2:3]).last_hidden_state, whole[2:3])
    cache, pieces = model.make_cache(), []
    for piece in ids.split((7, 1, 1, 20, 1), 1): pieces.append(model.model(piece, past_key_values=cache).last_hidden_state)
    assert torch.equal(torch.cat(pieces, 1), whole)


def train(model, ids, steps, lr=5e-3, **inputs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        loss = model(ids, labels=ids, **inputs).loss
        optimizer.zero_grad(); loss.backward(); optimizer.step()
    return loss.item()


def test_it_learns_the_next_byte_and_stops_at_the_end():
    model = small(hidden_size=48, intermediate_size=128, eos_token_id=255)
    document = list(b"one two three four") + [255]
    ids = torch.tensor([document * 4])
    assert train(model, ids, 100) < 0.2
    model.eval()
    with torch.no_grad():
        logits = model(ids).logits[0]
    assert (logits.argmax(-1)[19:-1] == ids[0, 20:]).all()          # top-1 is the next byte, not the one after
    out = model.generate(torch.tensor([document + document[:4]]), max_new_tokens=60, do_sample=False)
    assert out[0, len(document):].tolist() == document              # continues the document, then says it ends, and stops


def checkpoint(model):
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()   # renamed in transformers 5.23


@pytest.mark.parametrize("integer", (False, True))
def test_training_under_autocast_and_checkpointing(integer):
    model = small(integer_forward=integer)
    ids = random_ids(model, 2, 16)
    with torch.autocast("cpu", torch.bfloat16): loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    plain, saving = copy.deepcopy(model), copy.deepcopy(model)
    checkpoint(saving)
    gradients = []
    for m in (plain, saving):
        m.train().zero_grad()
        m(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in m.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_integer_forward_changes_nothing():
    ids = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    losses, gradients = [], []
    for integer in (False, True):
        model = small(integer_forward=integer)
        loss = model(ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item()); gradients.append([p.grad for p in model.parameters()])
    assert losses[0] == losses[1] and all(torch.equal(a, b) for a, b in zip(*gradients))


def test_loss_conventions():
    model = small().eval()
    ids = random_ids(model, 2, 9)
    plain = model(ids, labels=ids).loss
    shifted = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100)
    torch.testing.assert_close(model(ids, shift_labels=shifted).loss, plain)
    torch.testing.assert_close(model(ids, labels=ids, num_items_in_batch=32).loss, plain / 2)
    packed = model(ids.view(1, -1), labels=ids.view(1, -1), cu_seqlens=torch.tensor([0, 9, 18])).loss
    torch.testing.assert_close(packed, plain)                       # no target crosses into the next document


def test_generation_padded_beams_and_engine():
    model = perturbed(small(use_short_conv=True))
    prompts = [random_ids(model, 1, n, n)[0] for n in (3, 7)]
    alone = [model.generate(p[None], max_new_tokens=8, do_sample=False)[0, len(p):] for p in prompts]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, p in enumerate(prompts): ids[row, 7 - len(p):], mask[row, 7 - len(p):] = p, 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 7:]
    assert torch.equal(together, torch.stack(alone))
    beams = model.generate(prompts[1][None], max_new_tokens=6, num_beams=3, do_sample=False)
    plain = model.generate(prompts[1][None], max_new_tokens=6, num_beams=3, do_sample=False, use_cache=False)
    assert torch.equal(beams, plain)

    engine = Engine(model)
    state, tokens = engine.prefill([p.tolist() for p in prompts]), []
    for _ in range(8):
        tokens.append(state.logits.argmax(-1))
        state = engine.step(state, tokens[-1])
    assert torch.equal(torch.stack(tokens, 1), torch.stack(alone))
    fork = engine.select(engine.fork(state, 2), [3, 0])
    state = engine.step(state, [5, 6])
    assert torch.allclose(engine.step(fork, [6, 5]).logits, state.logits[[1, 0]])


@torch.no_grad()
def test_state_is_of_fixed_size():
    model = small().eval()
    sizes = {model(random_ids(model, 2, n)).past_key_values.bytes_per_row() for n in (1, 10, 100)}
    assert sizes == {2 * 32 * 4}
    with pytest.raises(ConfigError, match="keep a fork"): model(random_ids(model, 1, 3)).past_key_values.crop(1)


def test_quantised_weights_follow_the_float_ones():
    model = small().eval()
    ids = random_ids(model, 1, 5)
    with torch.no_grad():
        before = model(ids).logits
        model.model.layers[0].mlp.down_proj.weight.neg_()
        changed = model(ids).logits
        assert not torch.equal(changed, before)
        model.load_state_dict(small().state_dict())
        assert torch.equal(model(ids).logits, before)
    torch.testing.assert_close(model(ids).logits, before)           # with gradients: nothing kept, the same numbers


def test_save_load_and_names(tmp_path):
    model = small(tie_word_embeddings=True).eval()
    model.save_pretrained(tmp_path)
    again = SimplifiedSLMForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(model, 1, 9)
    with torch.no_grad(): assert torch.equal(again(ids).logits, model(ids).logits)
    assert {**again.config.to_dict(), "_name_or_path": ""} == model.config.to_dict()


@pytest.mark.parametrize("family", ("slm", "hnet"))
def test_exported_model_has_the_same_logits(tmp_path, family):
    torch.manual_seed(0)
    if family == "slm": model = small(tie_word_embeddings=True, use_short_conv=True, use_lower_bound=True)
    else: model = HNetBitForCausalLM(HNetBitConfig(d_model=[16, 24, 32], num_blocks=[[1, 0, 1], [1, 0, 1], [2]], inner_pattern="xa"))
    model.eval()
    path = export_ternary(model, tmp_path)
    again, ids = load_ternary(tmp_path), random_ids(model, 2, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        for n in (1, 12):
            assert torch.equal(*(m.generate(ids[:1, :n], max_new_tokens=10, do_sample=False) for m in (model, again)))
    codes = sum(t.numel() for name, t in load_file(path).items() if name.endswith(".codes"))
    assert codes == sum(-(-m.weight.numel() // 4) for m in model.modules() if isinstance(m, BitLinear))
    with pytest.raises(ConfigError, match="no ternary layers"): export_ternary(torch.nn.Linear(2, 2), tmp_path)
    with pytest.raises(ConfigError, match="is a folder with"): load_ternary(tmp_path / "elsewhere")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="damaged or no safetensors"): load_ternary(tmp_path)


def test_configuration_errors():
    for fields, words in ((dict(hidden_size=0), "hidden_size=0"), (dict(hiden_size=3), "did you mean 'hidden_size'"), (dict(attn_mode="fast"), "one of fused_recurrent"),
                          (dict(eos_token_id=300), "outside vocab_size=256"), (dict(conv_size=1), "conv_size=1"), (dict(hidden_size=True), "hidden_size")):
        with pytest.raises(ConfigError, match=words.split("'")[0].strip() or words): SLMConfig(**fields)
    with pytest.raises(ConfigError, match="max_position_embeddings=4"): small(max_position_embeddings=4)(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(ConfigError, match="it must cover the 5 new tokens"): small()(torch.zeros(1, 5, dtype=torch.long), attention_mask=torch.ones(1, 4))


def test_presets_and_the_guides_format(tmp_path):
    millions = {}
    for name in preset_names("slm"):
        run = resolve("slm", SLMConfig, presets=[name])
        with torch.device("meta"): millions[name] = sum(p.numel() for p in SimplifiedSLMForCausalLM(SLMConfig(**run.model)).parameters()) / 1e6
    assert {k: round(v) for k, v in millions.items()} == {"nano": 1, "mini": 10, "small": 31, "base": 100, "guide": 21, "slm_base": 21, "training_flat_tinystories": 21}
    assert round(millions["slm_base"], 1) == 20.7
    nano = {k: v for k, v in read_preset("slm", "nano").items() if k in SLMConfig.settings.model_fields}
    assert SLMConfig().to_dict() == SLMConfig(**nano).to_dict()                                        # the class's defaults are nano's
    (tmp_path / "slm_base.json").write_text(json.dumps({
        "model_type": "slm", "vocab_size": 256, "d_model": 512, "num_layers": 6, "num_heads": 1, "expand_ratio": 1, "hidden_ratio": 4,
        "attn_mode": "fused_recurrent", "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}))
    (tmp_path / "experiment.json").write_text(json.dumps({
        "experiment_name": "mine", "model": {"config_file": "slm_base.json", "type": "flat"}, "data": {"data_dir": "./data/tinystories", "max_seq_length": 512},
        "training": {"batch_size": 16, "gradient_accumulation_steps": 4, "learning_rate": 3e-4, "max_steps": 10000, "warmup_steps": 500, "scheduler": "cosine", "mixed_precision": "bf16"},
        "output": {"checkpoint_dir": "./checkpoints/mine", "log_dir": "./logs/mine"}}))
    content = json.loads((tmp_path / "slm_base.json").read_text())
    run = resolve("slm", SLMConfig, flags={k: v for k, v in content.items() if k != "model_type"})
    assert (run.model["hidden_size"], run.model["num_hidden_layers"], run.model["num_attention_heads"]) == (512, 6, 1)


def test_rows():
    rows, order = pack_rows(torch.tensor([[0, 1, 1], [1, 0, 1]]), None)
    assert rows.lengths.tolist() == [2, 2] and order.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert pack_rows(torch.ones(2, 3), None) == (Rows(None, None), None)
    states = torch.arange(6.0).view(2, 3)[..., None]
    assert Rows(torch.tensor([2, 0])).last(states, torch.tensor([[9.0], [8.0]])).flatten().tolist() == [1, 8]


def test_half_lives():
    model = small()
    lives = half_lives(model, random_ids(model, 2, 50))
    assert len(lives) == 2 and all((life > 0).all() for life in lives) and model.training
