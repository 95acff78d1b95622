"""Thoughts in place of the feed-forward networks of other people's causal models."""
import pytest
import torch
import transformers

from sprout_lab.configs import ConfigError
from sprout_lab.models.upcycled import (load_upcycled, save_upcycled, thought_layers,
                                        upcycle_mlps, upcycled_loss)

SHAPE = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=24, max_position_embeddings=32, pad_token_id=0, bos_token_id=0,
             eos_token_id=0)
GROUPED = {**SHAPE, "num_key_value_heads": 1}
ENDS = {"bos_token_id": 0, "eos_token_id": 0}
GPT = dict(vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, **ENDS)
# each with a network of another form: gated or not, Conv1D, with biases, in parallel to attention
MODELS = {"Llama": GROUPED, "Mistral": GROUPED, "Qwen2": GROUPED,
          "Qwen3": {**GROUPED, "head_dim": 8},
          "GPTNeoX": SHAPE, "Phi": GROUPED, "Phi3": GROUPED, "Gemma2": {**GROUPED, "head_dim": 8},
          "Falcon": SHAPE, "GPT2": GPT}


def build(name: str, fields: dict):
    "A tiny random model, its weights moved away from their neutral start."
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters(): p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("name", MODELS)
def test_any_model_keeps_its_logits_trains_and_comes_back(name, tmp_path):
    model, ids = build(name, MODELS[name]), torch.randint(64, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        assert before.std() > 0.1
        upcycle_mlps(model, num_thoughts=4)
        assert torch.allclose(model(ids).logits, before, rtol=0, atol=1e-4)
    assert len(thought_layers(model)) == 2
    with torch.no_grad(): plain = model(ids, labels=ids).loss
    optimizer = torch.optim.AdamW(model.train().parameters(), 3e-3)
    for _ in range(6):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(): assert model.eval()(ids, labels=ids).loss < plain - 0.05
    again = load_upcycled(save_upcycled(model, tmp_path / "saved"))
    with torch.no_grad(): assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_later_token_changes_nothing_before_it_and_the_cache_agrees():
    model = upcycle_mlps(build("Qwen3", MODELS["Qwen3"]), num_thoughts=4)
    ids = torch.randint(64, (1, 9))
    moved = ids.clone()
    moved[:, 6] = (moved[:, 6] + 1) % 64
    with torch.no_grad():
        whole, changed = model(ids).logits, model(moved).logits
        assert torch.allclose(whole[:, :6], changed[:, :6], rtol=0, atol=1e-5)
        cache = model(ids[:, :5], use_cache=True).past_key_values
        rest = model(ids[:, 5:], past_key_values=cache).logits
    assert torch.allclose(rest, whole[:, 5:], rtol=0, atol=1e-4)


def test_training_adds_the_three_terms_and_evaluation_does_not():
    model, ids = build("Qwen2", MODELS["Qwen2"]), torch.randint(64, (2, 9))
    upcycle_mlps(model, num_thoughts=4, noise_scale=0.0, diversity_weight=0.5)
    plain = model(ids, labels=ids).loss
    trained = model.train()(ids, labels=ids).loss
    assert torch.allclose(trained - plain, upcycled_loss(model), atol=1e-5)


@pytest.mark.parametrize("name, fields, words", [
    ("OPT", {**SHAPE, "ffn_dim": 24, "word_embed_proj_dim": 16}, "no single module"),
    ("Mixtral", {**GROUPED, "num_local_experts": 2}, "no single module")])
def test_what_has_no_such_module_is_one_line(name, fields, words):
    model, ids = build(name, fields), torch.randint(64, (2, 9))
    with torch.no_grad(): before = model(ids).logits
    with pytest.raises(ConfigError, match=words) as error: upcycle_mlps(model)
    assert "\n" not in str(error.value)
    with torch.no_grad(): assert torch.equal(model(ids).logits, before)


def test_wrong_settings_and_a_second_time_are_one_line():
    model = build("Llama", MODELS["Llama"])
    with pytest.raises(ConfigError, match="above num_thoughts=2"):
        upcycle_mlps(model, num_thoughts=2, thoughts_per_token=3)
    upcycle_mlps(model, num_thoughts=2)
    with pytest.raises(ConfigError, match="it has thoughts"): upcycle_mlps(model)
