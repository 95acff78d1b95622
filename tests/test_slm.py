"""The flat ternary recurrent model: laws, packing, learning, generation, saving, its configuration.
"""
import copy

import pytest
import torch
from laws import check_laws, perturbed, random_ids
from safetensors.torch import load_file
from torch.testing import assert_close

from sprout_lab.configs import ConfigError, preset_names, read_preset, resolve
from sprout_lab.decoding.engine import Engine
from sprout_lab.models.hnet import HNetBitConfig, HNetBitForCausalLM
from sprout_lab.models.hgrn import BitLinear, half_lives
from sprout_lab.models.recurrent import RaggedBatch, left_align
from sprout_lab.models.slm import SimplifiedSLMForCausalLM, SLMConfig
from sprout_lab.models.ternary import export_ternary, load_ternary

SMALL = dict(hidden_size=32, num_hidden_layers=2, intermediate_size=48)
VARIANTS = {
    "plain": {},
    "convolution, bounds, wide state": dict(use_short_conv=True, use_lower_bound=True,
                                            expand_ratio=2),
    "two convolutions, tied head": dict(
        use_short_conv=True, share_conv_kernel=False, conv_size=3, tie_word_embeddings=True),
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
    assert_close(model(flat, cu_seqlens=edges).logits[0], alone, rtol=0, atol=1e-9)
    positions = torch.cat([torch.arange(len(t)) for t in texts])[None]
    assert_close(model(flat, position_ids=positions).logits[0], alone, rtol=0, atol=1e-9)
    for split in range(1, 19):    # a packed row read in two calls
        first = model(flat[:, :split], position_ids=positions[:, :split], use_cache=True)
        second = model(flat[:, split:], position_ids=positions[:, split:],
                       past_key_values=first.past_key_values)
        both = torch.cat((first.logits, second.logits), 1)[0]
        assert_close(both, alone, rtol=0, atol=1e-9)


@torch.no_grad()
def test_padding_may_be_anywhere_and_hold_anything():
    model = perturbed(small(use_short_conv=True))
    text = random_ids(model, 1, 6)[0]
    want = model(text[None]).logits[0]
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1, 1, 1, 0]])
    ids = torch.full((1, 11), 77)
    ids[mask.bool()] = text
    assert_close(model(ids, attention_mask=mask).logits[mask.bool()], want, rtol=0, atol=1e-9)
    assert model(ids, attention_mask=torch.zeros_like(mask)).logits.isfinite().all()


@torch.no_grad()
def test_float32_states_do_not_depend_on_the_batch():
    """Ternary products and the scan are exact or of fixed order: in float32 a row alone or in a
    batch
    has the same bits up to the head; in pieces, up to the last bit of torch's own sigmoid."""
    model = small(hidden_size=48).eval()
    ids = random_ids(model, 5, 30)
    whole = model.model(ids).last_hidden_state
    assert torch.equal(model.model(ids[2:3]).last_hidden_state, whole[2:3])
    cache, pieces = model.make_cache(), []
    for piece in ids.split((7, 1, 1, 20, 1), 1):
        pieces.append(model.model(piece, past_key_values=cache).last_hidden_state)
    assert_close(torch.cat(pieces, 1), whole, rtol=0, atol=1e-5)


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
    # the next byte, not the one after
    assert (logits.argmax(-1)[19:-1] == ids[0, 20:]).all()
    out = model.generate(torch.tensor([document + document[:4]]), max_new_tokens=60,
                         do_sample=False)
    # goes on, says it ends, and stops
    assert out[0, len(document):].tolist() == document


def checkpoint(model):
    # renamed in transformers 5.23
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


@pytest.mark.parametrize("integer", (False, True))
def test_training_under_autocast_and_checkpointing(integer):
    model = small(integer_forward=integer)
    ids = random_ids(model, 2, 16)
    with torch.autocast("cpu", torch.bfloat16): loss = model(ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
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
    assert_close(model(ids, shift_labels=shifted).loss, plain)
    assert_close(model(ids, labels=ids, num_items_in_batch=32).loss, plain / 2)
    packed = model(ids.view(1, -1), labels=ids.view(1, -1),
                   cu_seqlens=torch.tensor([0, 9, 18])).loss
    assert_close(packed, plain)                       # no target crosses into the next document


def test_generation_padded_beams_and_engine():
    model = perturbed(small(use_short_conv=True))
    prompts = [random_ids(model, 1, n, n)[0] for n in (3, 7)]
    alone = [model.generate(p[None], max_new_tokens=8, do_sample=False)[0, len(p):]
             for p in prompts]
    ids, mask = torch.zeros(2, 7, dtype=torch.long), torch.zeros(2, 7, dtype=torch.long)
    for row, p in enumerate(prompts): ids[row, 7 - len(p):], mask[row, 7 - len(p):] = p, 1
    together = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)[:, 7:]
    assert torch.equal(together, torch.stack(alone))
    how = dict(max_new_tokens=6, num_beams=3, do_sample=False)
    beams, plain = (model.generate(prompts[1][None], use_cache=cached, **how)
                    for cached in (True, False))
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
    cache = model(random_ids(model, 1, 3)).past_key_values
    with pytest.raises(ConfigError, match="keep a fork"): cache.crop(1)


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
    assert_close(model(ids).logits, before)        # with gradients: nothing kept, the same numbers


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
    if family == "slm":
        model = small(tie_word_embeddings=True, use_short_conv=True, use_lower_bound=True)
    else:
        blocks = [[1, 0, 1], [1, 0, 1], [2]]
        config = HNetBitConfig(d_model=[16, 24, 32], num_blocks=blocks, inner_pattern="xa")
        model = HNetBitForCausalLM(config)
    model.eval()
    path = export_ternary(model, tmp_path)
    again, ids = load_ternary(tmp_path), random_ids(model, 2, 20)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        for n in (1, 12):
            how = dict(max_new_tokens=10, do_sample=False)
            assert torch.equal(model.generate(ids[:1, :n], **how),
                               again.generate(ids[:1, :n], **how))
    codes = sum(t.numel() for name, t in load_file(path).items() if name.endswith(".codes"))
    layers = [m for m in model.modules() if isinstance(m, BitLinear)]
    assert codes == sum(-(-layer.weight.numel() // 4) for layer in layers)
    plain = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="no ternary layers"): export_ternary(plain, tmp_path)
    with pytest.raises(ConfigError, match="is a folder with"): load_ternary(tmp_path / "elsewhere")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="damaged or no safetensors"): load_ternary(tmp_path)


def test_configuration_errors():
    wrong = {"hidden_size=0": dict(hidden_size=0), "did you mean 'hidden_size'": dict(hiden_size=3),
             "one of fused_recurrent": dict(attn_mode="fast"), "conv_size=1": dict(conv_size=1),
             "outside vocab_size=256": dict(eos_token_id=300),
             "hidden_size": dict(hidden_size=True)}
    for words, fields in wrong.items():
        with pytest.raises(ConfigError, match=words): SLMConfig(**fields)
    ids = torch.zeros(1, 5, dtype=torch.long)
    short = small(max_position_embeddings=4)
    with pytest.raises(ConfigError, match="max_position_embeddings=4"): short(ids)
    with pytest.raises(ConfigError, match="it must cover the 5 new tokens"):
        small()(ids, attention_mask=torch.ones(1, 4))


def test_presets_and_the_guides_format():
    millions = {}
    for name in preset_names("slm"):
        config = SLMConfig(**resolve("slm", SLMConfig, presets=[name]).model)
        with torch.device("meta"): model = SimplifiedSLMForCausalLM(config)
        millions[name] = model.num_parameters() / 1e6
    assert round(millions["slm_base"], 1) == 20.7
    assert {k: round(v) for k, v in millions.items()} == {
        "nano": 1, "mini": 10, "small": 31, "base": 100, "guide": 21, "slm_base": 21,
        "training_flat_tinystories": 21}
    fields = SLMConfig.settings.model_fields
    nano = {k: v for k, v in read_preset("slm", "nano").items() if k in fields}
    # the class's defaults are nano's
    assert SLMConfig().to_dict() == SLMConfig(**nano).to_dict()
    run = resolve("slm", SLMConfig, flags=GUIDES_FORMAT)
    names = "hidden_size", "num_hidden_layers", "num_attention_heads"
    assert [run.model[name] for name in names] == [512, 6, 1]


GUIDES_FORMAT = {
    "vocab_size": 256, "d_model": 512, "num_layers": 6, "num_heads": 1, "expand_ratio": 1,
    "hidden_ratio": 4, "attn_mode": "fused_recurrent", "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6}


def test_ragged_batches():
    columns = torch.arange(3).expand(2, 3)
    aligned, batch = left_align(columns, torch.tensor([[0, 1, 1], [1, 0, 1]]))
    assert batch.lengths.tolist() == [2, 2] and aligned.tolist() == [[1, 2, 0], [0, 2, 1]]
    assert left_align(columns, torch.ones(2, 3))[1] == RaggedBatch(None, None)
    states = torch.arange(6.0).view(2, 3)[..., None]
    last = RaggedBatch(torch.tensor([2, 0])).last(states, torch.tensor([[9.0], [8.0]]))
    assert last.flatten().tolist() == [1, 8]


def test_half_lives():
    model = small()
    lives = half_lives(model, random_ids(model, 2, 50))
    assert len(lives) == 2 and all((life > 0).all() for life in lives) and model.training
