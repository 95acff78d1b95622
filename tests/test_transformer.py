"""The Transformer: the laws for every switch, learning, saving, precision, and Hugging Face's ways in."""

import copy

import pytest
import torch
from laws import TOLERANCE, check_alone_or_together, check_laws, perturbed, random_ids

from sprout_lab.configs import ConfigError
from sprout_lab.models.transformer import KeyValueCache, TransformerConfig, TransformerForCausalLM

SMALL = dict(vocab_size=19, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48, max_position_embeddings=64)
SWITCHES = {
    "default": {}, "post": {"norm": "post"}, "no norm": {"norm": "none"}, "no positions": {"position": "none"}, "half": {"position": "rope_half"},
    "silu": {"activation": "silu"}, "two kv heads": {"num_key_value_heads": 2}, "one kv head": {"num_key_value_heads": 1}, "qk_norm": {"qk_norm": True},
    "tied": {"tie_word_embeddings": True}, "zero": {"zero_init_output": True}, "dropout": {"dropout": 0.2}, "gpt2": {"initializer": "gpt2"},
    "all at once": {"norm": "post", "position": "rope_half", "activation": "silu", "num_key_value_heads": 2, "qk_norm": True, "tie_word_embeddings": True},
}


def build(**kwargs):
    torch.manual_seed(0)
    return TransformerForCausalLM(TransformerConfig(**{**SMALL, **kwargs}))


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_laws(switches):
    check_laws(build(**switches))


def test_laws_with_spelled_out_attention():
    model = TransformerForCausalLM._from_config(TransformerConfig(**SMALL, num_key_value_heads=2), attn_implementation="eager")
    check_laws(model)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_parameter_count(switches):
    model = build(**switches)
    c = model.config
    attention = 2 * c.hidden_size**2 + 2 * c.hidden_size * c.kv_heads * c.head_dim + (2 * c.head_dim if c.qk_norm else 0)
    norms = 0 if c.norm == "none" else 2 * c.hidden_size
    blocks = c.num_hidden_layers * (attention + 3 * c.hidden_size * c.ff_size + norms)   # silu: two matrices, each 3/2 as wide
    last = c.hidden_size if c.norm == "pre" else 0
    tables = (1 if c.tie_word_embeddings else 2) * c.vocab_size * c.hidden_size
    assert model.num_parameters() == sum(p.numel() for p in dict.fromkeys(model.parameters())) == blocks + last + tables


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_save_and_load(switches, tmp_path):
    model = build(**switches).eval()
    model.save_pretrained(tmp_path)
    again = TransformerForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(model, 2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == model.config.tie_word_embeddings
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_learns_one_batch(switches):
    model = build(**switches).train()
    ids = torch.randint(19, (4, 17), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(150):
        loss = model(ids[:, :-1], shift_labels=ids[:, 1:]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        assert model(ids[:, :-1], shift_labels=ids[:, 1:]).loss < (0.9 if model.config.position == "none" else 0.3)   # without positions the first tokens' order must be guessed


def test_loss_at_the_start_is_that_of_a_uniform_guess():
    for switches in SWITCHES.values():
        if switches.get("norm") == "none": continue   # nothing bounds its logits
        model = build(**switches).eval()
        ids = torch.randint(19, (8, 32))
        assert abs(model(ids, labels=ids).loss.item() - torch.tensor(19.0).log().item()) < 1.5


def test_labels():
    model = perturbed(build())
    ids = random_ids(model, 3, 10)
    labels = ids.clone()
    labels[0, 4:] = -100
    logits = model(ids).logits
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(model(ids, labels=labels).loss, want, atol=1e-12)
    targets = torch.roll(labels, -1, 1)
    targets[:, -1] = -100
    assert torch.allclose(model(ids, shift_labels=targets).loss, want, atol=1e-12)
    assert torch.allclose(model(ids, shift_labels=targets, num_items_in_batch=torch.tensor(7)).loss * 7 / (targets != -100).sum(), want, atol=1e-12)
    assert model(ids, labels=labels).past_key_values is None and model(ids).past_key_values is not None


def test_logits_to_keep_and_outputs():
    model = perturbed(build())
    ids = random_ids(model, 2, 9)
    full = model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.allclose(model(ids, logits_to_keep=1).logits, full.logits[:, -1:], atol=1e-12)
    assert torch.allclose(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full.logits[:, [0, 5]])
    assert len(full.hidden_states) == 3 and torch.allclose(model.lm_head(full.hidden_states[-1]), full.logits)
    assert len(full.attentions) == 2 and full.attentions[0].shape == (2, 4, 9, 9)
    assert torch.allclose(full.attentions[1].sum(-1), torch.ones((), dtype=torch.float64)) and not full.attentions[1].triu(1).any()
    assert isinstance(model(ids, return_dict=False), tuple)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids)).logits
    assert torch.allclose(embedded, full.logits, atol=1e-12)
    with pytest.raises(ValueError):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))


def test_positions_can_be_given():
    model = perturbed(build())
    ids = random_ids(model, 2, 9)
    assert torch.allclose(model(ids, position_ids=torch.arange(9).expand(2, 9)).logits, model(ids).logits, atol=1e-12)
    assert torch.allclose(model(ids, position_ids=torch.arange(20, 29)[None]).logits, model(ids).logits, atol=1e-9)   # only distances matter


def test_a_mask_with_a_hole():
    "Padding may stand in the middle: the text around it is read as one."
    model = perturbed(build())
    text = random_ids(model, 1, 8)
    holed = torch.cat([text[:, :5], random_ids(model, 1, 3, seed=9), text[:, 5:]], 1)
    mask = torch.tensor([[1] * 5 + [0] * 3 + [1] * 3])
    got = model(holed, attention_mask=mask).logits[mask.bool()]
    assert (got - model(text).logits[0]).abs().max() < TOLERANCE


@pytest.mark.parametrize("cache", ["own", "dynamic"])
def test_gradient_through_a_cache(cache):
    from transformers import DynamicCache

    model = perturbed(build())
    ids = random_ids(model, 2, 8)
    whole = torch.autograd.grad(model(ids, use_cache=False).logits[:, -1].sum(), model.model.embed_tokens.weight)[0]
    first = model(ids[:, :5], use_cache=True, past_key_values=KeyValueCache(2) if cache == "own" else DynamicCache())
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    pieces = torch.autograd.grad(second.logits[:, -1].sum(), model.model.embed_tokens.weight)[0]
    assert torch.allclose(whole, pieces, atol=1e-10)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = perturbed(build(dropout=0.0)).train()
    ids = random_ids(model, 2, 12)
    model(ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()   # renamed in transformers 5
    model(ids, labels=ids).loss.backward()
    for p, g in zip(model.parameters(), want):
        assert torch.allclose(p.grad, g, atol=1e-12)


def test_norm_gradient_is_the_formulas():
    from sprout_lab.models.transformer import RMSNorm

    for shape in ((3, 48), (2, 5, 7), (1, 1, 384), (4, 3, 2, 16)):
        norm, x = RMSNorm(shape[-1]).double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch.nn.init.normal_(norm.weight)
        assert torch.autograd.gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, x), (x, norm.weight.detach().requires_grad_()))


@pytest.mark.parametrize("switches", [{}, {"qk_norm": True, "num_key_value_heads": 2, "norm": "post"}], ids=["default", "qk_norm, gqa, post"])
def test_bf16_autocast_trains(switches):
    model = build(**switches).train()
    ids = random_ids(model, 4, 24)
    exact = model(ids, labels=ids).loss
    exact.backward()
    want = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(ids, labels=ids)
    output.loss.backward()
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert output.loss.dtype == torch.float32 and abs(output.loss - exact) < 0.03
    assert torch.nn.functional.cosine_similarity(got, want, dim=0) > 0.99


def test_bf16_weights():
    "Plain 16-bit weights, too: prefill and steps agree to rounding."
    model = build().to(torch.bfloat16).eval()
    ids = random_ids(model, 2, 12)
    with torch.no_grad():
        full = model(ids).logits
        first = model(ids[:, :7], use_cache=True)
        second = model(ids[:, 7:], past_key_values=first.past_key_values)
    assert full.dtype == torch.bfloat16
    assert (second.logits - full[:, 7:]).abs().max() < 0.1


def test_dropout_is_off_in_eval_and_on_in_training():
    model = build(dropout=0.3)
    ids = random_ids(model, 2, 12)
    model.eval()
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)


def test_generate_all_ways():
    model = perturbed(build()).float()
    ids = random_ids(model, 2, 6)
    greedy = model.generate(ids, max_new_tokens=10, do_sample=False)
    naive = ids
    for _ in range(10):
        naive = torch.cat([naive, model(naive, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, naive)
    assert torch.equal(greedy, model.generate(ids, max_new_tokens=10, do_sample=False, use_cache=False))
    beams = model.generate(ids, max_new_tokens=10, num_beams=4, do_sample=False)
    assert torch.equal(beams, model.generate(ids, max_new_tokens=10, num_beams=4, do_sample=False, use_cache=False))
    assert model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3).shape == (6, 11)
    padded, mask = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1), torch.tensor([[0] * 3 + [1] * 6] * 2)
    for beams in (1, 3):
        alone = model.generate(ids, max_new_tokens=10, num_beams=beams, do_sample=False)
        left = model.generate(padded, attention_mask=mask, max_new_tokens=10, num_beams=beams, do_sample=False)
        assert torch.equal(left[:, 3:], alone)
    eos = int(greedy[0, 8])
    end = 7 + greedy[0, 6:].tolist().index(eos)
    with_eos = model.generate(ids[:1], attention_mask=torch.ones(1, 6), max_new_tokens=10, do_sample=False, eos_token_id=eos, pad_token_id=0)
    assert torch.equal(with_eos[0], greedy[0, :end])


def test_beyond_the_limit():
    model = build()
    with pytest.raises(ConfigError, match="max_position_embeddings=64"):
        model(random_ids(model, 1, 65))
    step = model.eval()(random_ids(model, 1, 64))
    with pytest.raises(ConfigError, match="max_position_embeddings=64"):
        model(random_ids(model, 1, 1), past_key_values=step.past_key_values)
    with pytest.raises(ConfigError, match="attention_mask has 5 columns"):
        model(random_ids(model, 1, 6), attention_mask=torch.ones(1, 5))
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), random_ids(model, 1, 60)], 1)   # 70 columns, 60 of them text
    mask = torch.tensor([[0] * 10 + [1] * 60])
    assert (model(padded, attention_mask=mask).logits[:, 10:] - model(padded[:, 10:]).logits).abs().max() < 1e-4


@pytest.mark.parametrize("wrong", [
    {"hidden_size": 30}, {"num_attention_heads": 32}, {"num_key_value_heads": 3}, {"norm": "layer"}, {"position": "rop"}, {"hidden_size": "wide"}, {"num_hidden_layers": 0},
    {"dropout": 1.0}, {"rope_theta": -1}, {"hiden_size": 32}, {"qk_norm": "perhaps"}, {"eos_token_id": 19}, {"vocab_size": 1}])
def test_wrong_shapes_are_refused_in_one_line(wrong):
    with pytest.raises(ConfigError) as caught:
        TransformerConfig(**{**SMALL, **wrong})
    assert "\n" not in str(caught.value) and next(iter(wrong)) in str(caught.value)


def test_resizing_the_vocabulary():
    model = build(tie_word_embeddings=True)
    model.resize_token_embeddings(23)
    assert model(torch.tensor([[22]])).logits.shape == (1, 1, 23) and model.config.vocab_size == 23


def test_blocks_do_not_share_state():
    model = build()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.w1.weight.zero_()
    assert model.model.layers[0].mlp.w1.weight.any()
    assert other.model.layers[0].self_attn.rope is other.model.rope is not model.model.rope


@pytest.mark.slow
def test_compiles():
    "About half a minute of compiling."
    model = build().train()
    ids = random_ids(model, 2, 16)
    want = model(ids, labels=ids).loss
    got = torch.compile(model)(ids, labels=ids).loss
    got.backward()
    assert abs(got - want) < 1e-4


def test_foreign_caches():
    from transformers import DynamicCache

    model = perturbed(build())
    ids = random_ids(model, 2, 10)
    first = model(ids[:, :4], past_key_values=DynamicCache(), use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert (second.logits - model(ids).logits[:, 4:]).abs().max() < TOLERANCE


def test_the_laws_notice_a_broken_model():
    "A check that cannot fail checks nothing."
    model = perturbed(build())
    whole = model.model._pattern
    model.model._pattern = lambda mask, *rest: whole(None, *rest)          # ignores padding
    with pytest.raises(AssertionError, match="alone or together"):
        check_alone_or_together(model)


def without_kernels(monkeypatch):
    "As on a machine without a compiler."
    monkeypatch.setattr("sprout_lab.kernels.elementwise.load_c", lambda *_: None)
    monkeypatch.setattr("sprout_lab.kernels.decode.load_c", lambda *_: None)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_kernels_change_nothing_but_rounding(switches, monkeypatch):
    "Training and decoding in float32, with the C kernels and without them."
    model = perturbed(build(**{**switches, "dropout": 0.0})).float()
    ids = random_ids(model, 3, 14)
    left = torch.tensor([[0] * 4 + [1] * 10, [1] * 14, [0] * 7 + [1] * 7])

    def everything():
        model.zero_grad()
        model.train()
        model(ids, labels=ids).loss.backward()
        model.eval()
        found = [p.grad.clone() for p in model.parameters()]
        with torch.no_grad():
            for mask in (None, left):
                first = model(ids[:, :9], attention_mask=None if mask is None else mask[:, :9], use_cache=True)
                for t in range(9, 14):
                    first = model(ids[:, t:t + 1], attention_mask=None if mask is None else mask[:, :t + 1], past_key_values=first.past_key_values)
                    found.append(first.logits)
        return found

    with_kernels = everything()
    without_kernels(monkeypatch)
    for ours, plain in zip(with_kernels, everything()):
        assert (ours - plain).abs().max() < 1e-4 * max(1.0, plain.abs().max())


def test_the_step_kernel_steps_aside():
    "Hooks see every block, adapters act, and 16-bit or subclassed weights are not misread: the blocks run themselves then."
    model = perturbed(build()).float()
    ids = random_ids(model, 2, 9)
    first = model(ids[:, :8], use_cache=True)
    with torch.no_grad():
        fast = model(ids[:, 8:], past_key_values=first.past_key_values.fork()).logits
        seen = []
        handle = model.model.layers[1].mlp.w2.register_forward_hook(lambda module, inputs, output: seen.append(output) or output * 2)
        hooked = model(ids[:, 8:], past_key_values=first.past_key_values.fork()).logits
        handle.remove()
        assert len(seen) == 1 and (hooked - fast).abs().max() > 1e-3

        class Doubled(torch.nn.Module):
            def __init__(self, inside): super().__init__(); self.inside = inside
            def forward(self, x): return 2 * self.inside(x)

        plain = model.model.layers[1].mlp.w2
        model.model.layers[1].mlp.w2 = Doubled(plain)
        wrapped = model(ids[:, 8:], past_key_values=first.past_key_values.fork()).logits
        model.model.layers[1].mlp.w2 = plain
        assert (wrapped - hooked).abs().max() < 1e-5
        assert torch.equal(model(ids[:, 8:], past_key_values=first.past_key_values.fork()).logits, fast)


def test_decoding_before_training():
    "Tables made while decoding serve in training, too."
    from sprout_lab.decoding.engine import Engine

    for dtype in (torch.float32, torch.float64):
        model = build().to(dtype)
        Engine(model).step(Engine(model).prefill([[1, 2, 3]]), [4])
        ids = random_ids(model, 2, 9)
        model.train()(ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in model.parameters())


def test_many_threads_give_the_same_numbers():
    threads = torch.get_num_threads()
    model = perturbed(build(hidden_size=128, max_position_embeddings=256)).float().train()
    ids = random_ids(model, 8, 128)
    losses = []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            model.zero_grad()
            loss = model(ids, labels=ids).loss
            loss.backward()
            losses.append((loss.item(), model.model.norm.weight.grad.clone()))
    finally:
        torch.set_num_threads(threads)
    assert abs(losses[0][0] - losses[1][0]) < 1e-5 and torch.allclose(losses[0][1], losses[1][1], atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_lora_through_peft():
    peft = pytest.importorskip("peft")
    model = perturbed(build()).float()
    ids = random_ids(model, 1, 6)
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "w2"], task_type="CAUSAL_LM"))
    assert torch.equal(wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False), before)   # a fresh adapter changes nothing
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name: p.add_(0.5)
    adapted = wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    naive = ids
    for _ in range(8):
        naive = torch.cat([naive, wrapped(input_ids=naive, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(adapted, naive)
    wrapped.train()(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for n, p in wrapped.named_parameters() if "lora_A" in n)
