"""The Transformer: the laws for every switch, learning, saving, precision, Hugging Face's ways in.
"""

import copy

import pytest
import torch
from laws import TOLERANCE, check_alone_or_together, check_laws, perturbed, random_ids

import sprout_lab.models.transformer as transformer
from sprout_lab.configs import ConfigError
from sprout_lab.models.cache import KeyValueCache
from sprout_lab.models.transformer import (
    MultiHeadSelfAttention, RMSNorm, RotaryPositionalEmbedding, TransformerConfig,
    TransformerForCausalLM)

SMALL = dict(vocab_size=19, hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
             intermediate_size=48, max_position_embeddings=64)
SWITCHES = {
    "default": {}, "post": {"norm": "post"}, "no norm": {"norm": "none"},
    "no positions": {"position": "none"}, "half": {"position": "rope_half"},
    "learned": {"position": "learned"}, "layernorm": {"norm_type": "layernorm"},
    "silu": {"activation": "silu"}, "gelu": {"activation": "gelu"},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "two kv heads": {"num_key_value_heads": 2}, "one kv head": {"num_key_value_heads": 1},
    "qk_norm": {"qk_norm": True}, "tied": {"tie_word_embeddings": True},
    "zero": {"zero_init_output": True}, "dropout": {"dropout": 0.2},
    "gpt2 start": {"initializer": "gpt2"},
    "all at once": {"norm": "post", "position": "rope_half", "activation": "silu",
                    "num_key_value_heads": 2, "qk_norm": True, "tie_word_embeddings": True},
    "gpt2": {"norm_type": "layernorm", "position": "learned", "activation": "gelu",
             "attention_bias": True, "mlp_bias": True, "initializer": "gpt2",
             "tie_word_embeddings": True},
}


def build(**kwargs):
    torch.manual_seed(0)
    return TransformerForCausalLM(TransformerConfig(**{**SMALL, **kwargs}))


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_laws(switches):
    check_laws(build(**switches))


def test_laws_with_spelled_out_attention():
    config = TransformerConfig(**SMALL, num_key_value_heads=2)
    model = TransformerForCausalLM._from_config(config, attn_implementation="eager")
    check_laws(model)


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_parameter_count(switches):
    model = build(**switches)
    c = model.config
    width, ff, keys = c.hidden_size, c.ff_size, c.kv_heads * c.head_dim
    attention = 2 * width**2 + 2 * width * keys + (2 * c.head_dim if c.qk_norm else 0)
    if c.attention_bias: attention += 2 * width + 2 * keys
    matrices = {"swiglu": 3, "silu": 3, "gelu": 2}[c.activation]   # silu: two, each 3/2 as wide
    mlp = matrices * width * ff + ((matrices - 1) * ff + width if c.mlp_bias else 0)
    norm = width * (2 if c.norm_type == "layernorm" else 1)
    blocks = c.num_hidden_layers * (attention + mlp + (0 if c.norm == "none" else 2 * norm))
    last = norm if c.norm == "pre" else 0
    tables = (1 if c.tie_word_embeddings else 2) * c.vocab_size * width
    if c.position == "learned": tables += c.max_position_embeddings * width
    counted = sum(p.numel() for p in dict.fromkeys(model.parameters()))
    assert model.num_parameters() == counted == blocks + last + tables


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES.keys())
def test_save_and_load(switches, tmp_path):
    model = build(**switches).eval()
    model.save_pretrained(tmp_path)
    again = TransformerForCausalLM.from_pretrained(tmp_path).eval()
    ids = random_ids(model, 2, 12)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings
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
    # without positions the first tokens' order must be guessed
    enough = 0.9 if model.config.position == "none" else 0.3
    with torch.no_grad():
        assert model(ids[:, :-1], shift_labels=ids[:, 1:]).loss < enough


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
    flat = logits[:, :-1].flatten(0, 1)
    want = torch.nn.functional.cross_entropy(flat, labels[:, 1:].flatten(), ignore_index=-100)
    assert torch.allclose(model(ids, labels=labels).loss, want, atol=1e-12)
    targets = torch.roll(labels, -1, 1)
    targets[:, -1] = -100
    assert torch.allclose(model(ids, shift_labels=targets).loss, want, atol=1e-12)
    in_sevenths = model(ids, shift_labels=targets, num_items_in_batch=torch.tensor(7)).loss
    assert torch.allclose(in_sevenths * 7 / (targets != -100).sum(), want, atol=1e-12)
    assert model(ids, labels=labels).past_key_values is None
    assert model(ids).past_key_values is not None


def test_logits_to_keep_and_outputs():
    model = perturbed(build())
    ids = random_ids(model, 2, 9)
    full = model(ids, output_hidden_states=True, output_attentions=True)
    assert torch.allclose(model(ids, logits_to_keep=1).logits, full.logits[:, -1:], atol=1e-12)
    chosen = model(ids, logits_to_keep=torch.tensor([0, 5])).logits
    assert torch.allclose(chosen, full.logits[:, [0, 5]])
    assert len(full.hidden_states) == 3
    assert torch.allclose(model.lm_head(full.hidden_states[-1]), full.logits)
    assert len(full.attentions) == 2 and full.attentions[0].shape == (2, 4, 9, 9)
    assert torch.allclose(full.attentions[1].sum(-1), torch.ones((), dtype=torch.float64))
    assert not full.attentions[1].triu(1).any()
    assert isinstance(model(ids, return_dict=False), tuple)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids)).logits
    assert torch.allclose(embedded, full.logits, atol=1e-12)
    with pytest.raises(ValueError):
        model(ids, inputs_embeds=model.model.embed_tokens(ids))


def test_positions_can_be_given():
    model = perturbed(build())
    ids = random_ids(model, 2, 9)
    want = model(ids).logits
    explicit = model(ids, position_ids=torch.arange(9).expand(2, 9)).logits
    assert torch.allclose(explicit, want, atol=1e-12)
    later = model(ids, position_ids=torch.arange(20, 29)[None]).logits
    assert torch.allclose(later, want, atol=1e-9)                # only distances matter


def test_learned_positions_can_be_given():
    model = perturbed(build(position="learned"))
    ids = random_ids(model, 2, 9)
    want = model(ids).logits
    assert torch.equal(model(ids, position_ids=torch.arange(9).expand(2, 9)).logits, want)
    later = model(ids, position_ids=torch.arange(20, 29)[None]).logits
    assert (later - want).abs().max() > 1e-3                     # each place is one of its own


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
    table = model.model.embed_tokens.weight
    last = model(ids, use_cache=False).logits[:, -1]
    whole = torch.autograd.grad(last.sum(), table)[0]
    cache = KeyValueCache(2) if cache == "own" else DynamicCache()
    first = model(ids[:, :5], use_cache=True, past_key_values=cache)
    second = model(ids[:, 5:], past_key_values=first.past_key_values)
    pieces = torch.autograd.grad(second.logits[:, -1].sum(), table)[0]
    assert torch.allclose(whole, pieces, atol=1e-10)


def test_gradient_checkpointing_gives_the_same_gradients():
    model = perturbed(build(dropout=0.0)).train()
    ids = random_ids(model, 2, 12)
    model(ids, labels=ids).loss.backward()
    want = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    older = model.gradient_checkpointing_enable                  # renamed in transformers 5
    getattr(model, "activation_checkpointing_enable", older)()
    model(ids, labels=ids).loss.backward()
    for p, g in zip(model.parameters(), want):
        assert torch.allclose(p.grad, g, atol=1e-12)


def test_norm_gradient_is_the_formulas():
    for shape in ((3, 48), (2, 5, 7), (1, 1, 384), (4, 3, 2, 16)):
        norm = RMSNorm(shape[-1]).double()
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        torch.nn.init.normal_(norm.weight)
        weight = norm.weight.detach().requires_grad_()
        apply = lambda x, w: torch.func.functional_call(norm, {"weight": w}, x)
        assert torch.autograd.gradcheck(apply, (x, weight))


@pytest.mark.parametrize(
    "switches",
    [{}, {"qk_norm": True, "num_key_value_heads": 2, "norm": "post"}, SWITCHES["gpt2"]],
    ids=["default", "qk_norm, gqa, post", "gpt2"])
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
    for beams in (1, 4):
        how = dict(max_new_tokens=10, num_beams=beams, do_sample=False)
        assert torch.equal(model.generate(ids, **how), model.generate(ids, use_cache=False, **how))
    three = model.generate(ids, max_new_tokens=5, do_sample=True, num_return_sequences=3)
    assert three.shape == (6, 11)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), ids], 1)
    mask = torch.tensor([[0] * 3 + [1] * 6] * 2)
    for beams in (1, 3):
        how = dict(max_new_tokens=10, num_beams=beams, do_sample=False)
        left = model.generate(padded, attention_mask=mask, **how)
        assert torch.equal(left[:, 3:], model.generate(ids, **how))
    eos = int(greedy[0, 8])
    end = 7 + greedy[0, 6:].tolist().index(eos)
    how = dict(max_new_tokens=10, do_sample=False, eos_token_id=eos, pad_token_id=0)
    with_eos = model.generate(ids[:1], attention_mask=torch.ones(1, 6), **how)
    assert torch.equal(with_eos[0], greedy[0, :end])


@pytest.mark.filterwarnings("ignore:.*assistant.*:UserWarning")
@pytest.mark.parametrize("switches", [{}, SWITCHES["gpt2"], {"num_key_value_heads": 2}])
def test_assisted_decoding_and_prompt_lookup(switches):
    "Guesses of a smaller model, or of the prompt, are taken where they are right: the text stays."
    model = perturbed(build(**switches)).float()
    assistant = perturbed(build(**switches, num_hidden_layers=1), seed=1).float()
    ids = torch.cat([random_ids(model, 1, 6)] * 2, 1)            # a prompt that repeats itself
    how = dict(max_new_tokens=30, do_sample=False)
    want = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **how), want)
    assert torch.equal(model.generate(ids, assistant_model=assistant, **how), want)
    assert torch.equal(model.generate(ids, assistant_model=model, **how), want)
    sampled = model.generate(ids, prompt_lookup_num_tokens=3, max_new_tokens=8, do_sample=True)
    assert sampled.shape == (1, 20)


def test_beyond_the_limit():
    model = build()
    with pytest.raises(ConfigError, match="max_position_embeddings=64"):
        model(random_ids(model, 1, 65))
    step = model.eval()(random_ids(model, 1, 64))
    with pytest.raises(ConfigError, match="max_position_embeddings=64"):
        model(random_ids(model, 1, 1), past_key_values=step.past_key_values)
    with pytest.raises(ConfigError, match="attention_mask has 5 columns"):
        model(random_ids(model, 1, 6), attention_mask=torch.ones(1, 5))
    # 70 columns, 60 of them text
    padded = torch.cat([torch.zeros(1, 10, dtype=torch.long), random_ids(model, 1, 60)], 1)
    mask = torch.tensor([[0] * 10 + [1] * 60])
    with_padding = model(padded, attention_mask=mask).logits[:, 10:]
    assert (with_padding - model(padded[:, 10:]).logits).abs().max() < 1e-4


@pytest.mark.parametrize("wrong", [
    {"hidden_size": 30}, {"num_attention_heads": 32}, {"num_key_value_heads": 3}, {"norm": "layer"},
    {"position": "rop"}, {"hidden_size": "wide"}, {"num_hidden_layers": 0}, {"dropout": 1.0},
    {"rope_theta": -1}, {"hiden_size": 32}, {"qk_norm": "perhaps"}, {"eos_token_id": 19},
    {"vocab_size": 1}])
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
    from transformers import DynamicCache, StaticCache

    model = perturbed(build())
    ids = random_ids(model, 2, 10)
    first = model(ids[:, :4], past_key_values=DynamicCache(), use_cache=True)
    second = model(ids[:, 4:], past_key_values=first.past_key_values)
    assert (second.logits - model(ids).logits[:, 4:]).abs().max() < TOLERANCE
    how = dict(max_new_tokens=8, do_sample=False)
    want = model.generate(ids, **how)
    assert torch.equal(model.generate(ids, past_key_values=DynamicCache(), **how), want)
    with pytest.raises(ConfigError, match="StaticCache has a fixed length"):
        model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=16))
    with pytest.raises(ConfigError, match="cache_implementation=static"):
        model.generate(ids, cache_implementation="static", **how)


def test_the_laws_notice_a_broken_model(monkeypatch):
    "A check that cannot fail checks nothing."
    model = perturbed(build())
    whole = transformer.attention_pattern
    monkeypatch.setattr(transformer, "attention_pattern", lambda mask, *rest: whole(None, *rest))
    with pytest.raises(AssertionError, match="alone or together"):   # padding is ignored
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
            for mask in (torch.ones_like(left), left):
                step = model(ids[:, :9], attention_mask=mask[:, :9], use_cache=True)
                for t in range(9, 14):
                    step = model(ids[:, t:t + 1], attention_mask=mask[:, :t + 1],
                                 past_key_values=step.past_key_values)
                    found.append(step.logits)
        return found

    with_kernels = everything()
    without_kernels(monkeypatch)
    for ours, plain in zip(with_kernels, everything()):
        assert (ours - plain).abs().max() < 1e-4 * max(1.0, plain.abs().max())


def test_the_step_kernel_steps_aside():
    "Hooks see every block, adapters act, subclasses are not misread: the blocks run then."
    model = perturbed(build()).float()
    ids = random_ids(model, 2, 9)
    first = model(ids[:, :8], use_cache=True).past_key_values
    last_step = lambda: model(ids[:, 8:], past_key_values=first.fork()).logits

    class Doubled(torch.nn.Module):
        def __init__(self, inside): super().__init__(); self.inside = inside
        def forward(self, x): return 2 * self.inside(x)

    with torch.no_grad():
        fast = last_step()
        seen, mlp = [], model.model.layers[1].mlp
        double = lambda module, inputs, output: seen.append(output) or output * 2
        handle = mlp.w2.register_forward_hook(double)
        hooked = last_step()
        handle.remove()
        assert len(seen) == 1 and (hooked - fast).abs().max() > 1e-3

        plain, mlp.w2 = mlp.w2, Doubled(mlp.w2)
        wrapped = last_step()
        mlp.w2 = plain
        assert (wrapped - hooked).abs().max() < 1e-5
        assert torch.equal(last_step(), fast)


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
    assert abs(losses[0][0] - losses[1][0]) < 1e-5
    assert torch.allclose(losses[0][1], losses[1][1], atol=1e-5)


def test_attention_takes_any_leading_dimensions():
    torch.manual_seed(0)
    for rope in (None, RotaryPositionalEmbedding(10_000, 8, 64)):
        attention = MultiHeadSelfAttention(32, 4, rope)
        x = torch.randn(2, 3, 7, 32)
        positions = torch.randint(64, (2, 3, 7))
        for given in (None, torch.arange(7), positions):
            whole = attention(x, given)
            for i in range(2):
                for j in range(3):
                    own = given[i, j] if given is positions else given
                    assert torch.allclose(whole[i, j], attention(x[i, j], own), atol=1e-6)


def test_silu_has_a_public_name():
    from sprout_lab.models.blocks import silu

    x = torch.randn(3, 5)
    assert torch.allclose(silu(x), x * torch.sigmoid(x))


@pytest.mark.parametrize("switches", [{}, SWITCHES["gpt2"]], ids=["default", "gpt2"])
def test_auto_model_gives_hidden_states(switches, tmp_path):
    from transformers import AutoModel

    import sprout_lab.families  # noqa: F401  (for the Auto classes)
    model = build(**switches).eval()
    model.save_pretrained(tmp_path)
    body, ids = AutoModel.from_pretrained(tmp_path).eval(), random_ids(model, 2, 9)
    with torch.no_grad():
        assert torch.equal(model.lm_head(body(ids).last_hidden_state), model(ids).logits)


class Sequences(torch.utils.data.Dataset):
    def __len__(self): return 6

    def __getitem__(self, i):
        ids = torch.randint(19, (12,), generator=torch.Generator().manual_seed(i))
        return {"input_ids": ids, "labels": ids}


def test_hugging_faces_trainer_evaluates(tmp_path):
    "`Trainer.evaluate` gives eval_loss and calls compute_metrics."
    from transformers import Trainer, TrainingArguments

    model, shapes = build().eval(), []
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], per_device_eval_batch_size=4, disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=Sequences(),
                      compute_metrics=lambda p: shapes.append(p.predictions.shape) or {"met": 1.0})
    found = trainer.evaluate()
    rows = torch.stack([Sequences()[i]["input_ids"] for i in range(6)])
    with torch.no_grad(): want = model(rows, labels=rows).loss.item()
    assert abs(found["eval_loss"] - want) < 1e-5
    assert found["eval_met"] == 1.0 and shapes == [(6, 12, 19)]


def test_peft_knows_where_to_adapt():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(build(), peft.LoraConfig(task_type="CAUSAL_LM"))
    adapted = {n.split(".")[-2] for n, _ in wrapped.named_modules() if n.endswith("lora_A")}
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
@pytest.mark.parametrize("switches", [{}, {"num_key_value_heads": 2}], ids=["default", "grouped"])
def test_prefix_and_prompt_tuning(kind, switches):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    wrapped = peft.get_peft_model(build(**switches), settings)
    ids = random_ids(wrapped, 2, 9)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = wrapped(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    wrapped.eval()
    written = wrapped.generate(input_ids=ids, max_new_tokens=5, do_sample=False)
    assert written.shape == (2, 14)
    naive = ids
    for _ in range(5):
        whole = torch.ones_like(naive)
        logits = wrapped(input_ids=naive, attention_mask=whole, use_cache=False).logits
        naive = torch.cat([naive, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(written, naive)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_lora_through_peft():
    peft = pytest.importorskip("peft")
    model = perturbed(build()).float()
    ids = random_ids(model, 1, 6)
    before = model.generate(ids, max_new_tokens=8, do_sample=False)
    places = ["q_proj", "v_proj", "w2"]
    settings = peft.LoraConfig(r=4, target_modules=places, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, settings)
    fresh = wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    assert torch.equal(fresh, before)                            # a fresh adapter changes nothing
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_B" in name: p.add_(0.5)
    adapted = wrapped.generate(input_ids=ids, max_new_tokens=8, do_sample=False)
    naive = ids
    for _ in range(8):
        logits = wrapped(input_ids=naive, use_cache=False).logits
        naive = torch.cat([naive, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(adapted, naive)
    wrapped.train()(input_ids=ids, labels=ids).loss.backward()
    assert any(p.grad is not None for n, p in wrapped.named_parameters() if "lora_A" in n)
