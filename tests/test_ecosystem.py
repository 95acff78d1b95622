"""The families among Hugging Face's tools: AutoModel, cards, Trainer, adapters, offloaded weights,
caches and hidden states, and checkpoints of an earlier wiring."""
import copy
import json

import pytest
import torch
from laws import perturbed, random_ids
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModel, DynamicCache

from sprout_lab.configs import ConfigError
from sprout_lab.families import get_family, load_model
from sprout_lab.models.hnet import HNetBitConfig, HNetBitForCausalLM
from sprout_lab.models.slm import SimplifiedSLMForCausalLM, SLMConfig
from sprout_lab.models.ternary import export_ternary, load_ternary
from sprout_lab.trainers.checkpoints import read_weights

SMALL = {
    "transformer": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
    "slm": dict(hidden_size=32, num_hidden_layers=3, intermediate_size=64, use_short_conv=True,
                use_lower_bound=True),
    "hnet": dict(d_model=[16, 24, 32], num_blocks=[[1, 0, 1], [1, 0, 1], [2]], inner_pattern="xa"),
}
CAUSAL = pytest.mark.parametrize("name", SMALL)
RECURRENT = pytest.mark.parametrize("name", ("slm", "hnet"))


def small(name, seed=0, **fields):
    torch.manual_seed(seed)
    return get_family(name).build(objective="causal", **{**SMALL[name], **fields}).eval()


# AutoModel, Trainer

@RECURRENT
def test_automodel_is_the_model_without_its_head(name, tmp_path):
    model = small(name)
    model.save_pretrained(tmp_path)
    ids, base = random_ids(model, 2, 20), AutoModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        hidden = base(ids).last_hidden_state
        assert_close(model.lm_head(hidden), model(ids).logits, rtol=0, atol=0)
    base.save_pretrained(tmp_path / "base")                          # and back, but for the head
    again = type(model).from_pretrained(tmp_path / "base").eval()
    again.lm_head.load_state_dict(model.lm_head.state_dict())
    with torch.no_grad(): assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name, task", [
    ("transformer", "text-generation"), ("slm", "text-generation"), ("hnet", "text-generation"),
    ("mot", "text-generation"), ("sprout", "fill-mask")])
def test_every_family_is_saved_with_a_card(name, task, tmp_path):
    model = get_family(name).build(**SMALL.get(name, dict(hidden_size=32)))
    model.card_facts = {"step": 7, "dataset": "tales", "bits_per_byte": 2.5}
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert f"pipeline_tag: {task}" in card and "license: apache-2.0" in card
    assert f"# {name}: {model.num_parameters():,} parameters" in card
    assert "7 steps on tales; 2.5000 bits per byte" in card


class Rows(torch.utils.data.Dataset):
    def __init__(self, ids): self.ids = ids
    def __len__(self): return len(self.ids)
    def __getitem__(self, k): return {"input_ids": self.ids[k], "labels": self.ids[k]}


@CAUSAL
def test_a_trainer_of_transformers_evaluates(name, tmp_path):
    from transformers import Trainer, TrainingArguments
    model = small(name)
    ids, seen = random_ids(model, 6, 24), []
    def accuracy(prediction):
        seen.append(prediction.predictions.shape)
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
        return {"accuracy": right.mean()}
    arguments = TrainingArguments(
        tmp_path, per_device_eval_batch_size=3, per_device_train_batch_size=3, max_steps=2,
        report_to=[], disable_tqdm=True, use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=Rows(ids), eval_dataset=Rows(ids),
                      compute_metrics=accuracy)
    found = trainer.evaluate()
    with torch.no_grad(): output = model(ids, labels=ids)
    assert abs(found["eval_loss"] - output.loss.item()) < 1e-4
    assert seen == [(6, 24, 256)] and 0 <= found["eval_accuracy"] <= 1
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != found["eval_loss"]


# Offloaded weights

def offloaded(model, how, folder):
    "The `model`, its weights elsewhere until a module is called."
    from accelerate import cpu_offload, disk_offload
    cpu = torch.device("cpu")
    if how == "cpu": return cpu_offload(copy.deepcopy(model), execution_device=cpu)
    if how == "disk":
        return disk_offload(copy.deepcopy(model), folder / "disk", execution_device=cpu)
    model.save_pretrained(folder)
    limit = {"cpu": int(how * 4 * model.num_parameters())}
    return type(model).from_pretrained(folder, device_map="auto", max_memory=limit,
                                       offload_folder=folder / "auto").eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("how", ("cpu", "disk", 0.3, 0.6))
@RECURRENT
def test_offloaded_weights_are_fetched(name, how, tmp_path):
    pytest.importorskip("accelerate")
    model = small(name)
    with torch.no_grad():
        for p in model.parameters(): p += 0.02 * torch.randn(p.shape)
    ids, away = random_ids(model, 2, 14), offloaded(model, how, tmp_path)
    assert any(p.is_meta for p in away.parameters())
    with torch.no_grad(): assert torch.equal(away(ids).logits, model(ids).logits)
    how = dict(max_new_tokens=8, do_sample=False)
    assert torch.equal(away.generate(ids[:, :5], **how), model.generate(ids[:, :5], **how))


@RECURRENT
def test_a_hooked_export_does_not_step_past_its_modules(name, tmp_path):
    from accelerate import cpu_offload
    fields = {} if name == "slm" else dict(inner_pattern=None)
    export_ternary(small(name, **fields), tmp_path)
    plain, away = load_ternary(tmp_path), load_ternary(tmp_path)
    ids, how = random_ids(plain, 2, 6), dict(max_new_tokens=8, do_sample=False)
    for model in (plain, away): model.double()
    want = plain.generate(ids, **how)
    assert torch.equal(away.generate(ids, **how), want)              # packed for the kernel by now
    cpu_offload(away, execution_device=torch.device("cpu"), offload_buffers=True)
    assert torch.equal(away.generate(ids, **how), want)
    plain.lm_head.register_forward_hook(lambda module, inputs, output: -output)
    assert not torch.equal(plain.generate(ids, **how), want)


# Adapters

def adapted(model, **settings):
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for parameter_name, p in wrapped.named_parameters():
            if "lora_B" in parameter_name: p.normal_(std=0.05)
    return wrapped


@CAUSAL
def test_every_family_has_default_adapter_targets(name):
    model = small(name)
    ids = random_ids(model, 2, 12)
    with torch.no_grad(): before = model(ids).logits
    wrapped = adapted(model)
    loss = wrapped(ids, labels=ids).loss
    loss.backward()
    gradients = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    assert gradients and all("lora_" in n for n in gradients)
    assert any(g is not None and g.abs().sum() > 0 for g in gradients.values())
    with torch.no_grad(): assert not torch.equal(wrapped(ids).logits, before)


@RECURRENT
def test_an_adapter_on_ternary_layers_trains_saves_and_refuses_to_merge(name, tmp_path):
    peft = pytest.importorskip("peft")
    model, bare = small(name), small(name)
    ids, wrapped = random_ids(model, 2, 16), adapted(model)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(wrapped(ids, labels=ids).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    wrapped.eval().save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(bare, tmp_path).eval()
    with torch.no_grad():
        want = wrapped(ids).logits
        assert torch.equal(again(ids).logits, want)
        for merge in (wrapped.merge_and_unload, wrapped.merge_adapter):
            with pytest.raises(ConfigError, match="cannot be merged into ternary weights"): merge()
            assert torch.equal(wrapped(ids).logits, want)            # and nothing was changed
        with pytest.raises(ConfigError, match="has adapters"):
            export_ternary(model, tmp_path / "out")
        plain = wrapped.unload()
        assert torch.equal(plain(ids).logits, small(name)(ids).logits)


@pytest.mark.parametrize("target", ("routing.q_proj", "routing.k_proj", "residual_proj"))
def test_an_adapter_on_router_and_residual_is_in_the_path(target):
    model = small("hnet", inner_pattern=None)
    ids = random_ids(model, 2, 20)
    with torch.no_grad(): before = model(ids)
    wrapped = adapted(model, target_modules=[target])
    output = wrapped.train()(ids, labels=ids)
    if target == "residual_proj": assert not torch.equal(output.logits, before.logits)
    else: assert not torch.equal(output.boundary_prob[0], before.boundary_prob[0])
    output.loss.backward()
    for parameter_name, p in wrapped.named_parameters():
        if "lora_" in parameter_name and "inner" not in parameter_name:
            assert p.grad is not None and p.grad.abs().sum() > 0, parameter_name
    with torch.no_grad():
        want = wrapped.eval()(ids).logits
        merged = wrapped.merge_and_unload()(ids).logits              # plain matrices merge
        assert_close(merged, want, rtol=0, atol=1e-4)


# Caches

@RECURRENT
def test_another_kind_of_cache_is_one_line(name):
    peft, model = pytest.importorskip("peft"), small(name)
    ids, words = random_ids(model, 2, 8), "this model keeps its past in a RecurrentCache"
    with pytest.raises(ConfigError, match=words): model(ids, past_key_values=DynamicCache())
    with pytest.raises(ConfigError, match=words):
        model.generate(ids, past_key_values=DynamicCache(), max_new_tokens=3)
    settings = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, token_dim=16,
        num_attention_heads=2, num_transformer_submodules=1)
    wrapped = peft.get_peft_model(model, settings)
    with pytest.raises(ConfigError, match=words): wrapped(ids, labels=ids)


@RECURRENT
def test_soft_prompts_work(name):
    peft, model = pytest.importorskip("peft"), small(name)
    settings = peft.PromptTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=3, num_layers=2, num_attention_heads=2,
        num_transformer_submodules=1, token_dim=model.config.hidden_size)
    wrapped, ids = peft.get_peft_model(model, settings), random_ids(model, 2, 8)
    wrapped(ids, labels=ids).loss.backward()
    (prompt,) = [p for p in wrapped.parameters() if p.requires_grad]
    assert prompt.grad.abs().sum() > 0
    assert wrapped.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] == 11


def test_a_state_and_gradient_checkpointing_exclude_one_another():
    model = small("slm").train()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    ids = random_ids(model, 2, 8)
    bounds = model.model.lower_bounds
    model(ids, labels=ids, use_cache=True).loss.backward()           # no state is made
    checkpointed, bounds.grad = bounds.grad, None
    plain = small("slm").train()
    plain(ids, labels=ids).loss.backward()
    assert torch.equal(plain.model.lower_bounds.grad, checkpointed)
    with pytest.raises(ConfigError, match="train without past_key_values"):
        model(ids, past_key_values=model.make_cache())


# Hidden states

@torch.no_grad()
def test_hidden_states_of_the_hierarchy():
    model = perturbed(small("hnet"))
    ids = random_ids(model, 3, 14)
    output = model(ids, output_hidden_states=True)
    states = output.hidden_states
    widths = [h.shape[-1] for h in states]
    # the embedding, seven blocks less one, the last
    assert widths == [16, 16, 24, 32, 32, 24, 16, 16]
    assert torch.equal(model.lm_head(states[-1]), output.logits)
    for k, stage in ((2, 0), (5, 0), (3, 1), (4, 1)):    # what is inside stands where it was kept
        assert torch.equal((states[k] != 0).any(-1), output.boundary_mask[stage])
    cache, pieces = model.make_cache(), []
    for piece in ids.split((4, 1, 1, 5, 1, 1, 1), 1):
        pieces.append(model(piece, past_key_values=cache, output_hidden_states=True).hidden_states)
    for whole, parts in zip(states, zip(*pieces)):
        assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-9)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0                                      # padded on the left: as if alone
    padded = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
    alone = model(ids[:1, 6:], output_hidden_states=True).hidden_states
    for a, b in zip(padded, alone): assert_close(a[:1, 6:], b, rtol=0, atol=1e-9)


# The short convolution

@RECURRENT
@torch.no_grad()
def test_a_shared_convolution_feeds_all_three_streams(name):
    model = perturbed(small(name, use_short_conv=True))
    attention = next(m for n, m in model.named_modules() if n.endswith("layers.0.attn"))
    seen = {}
    def watch(key, module):
        module.register_forward_pre_hook(lambda m, inputs: seen.update({key: inputs[0]}))
    for key in ("f_proj", "i_proj", "g_proj"): watch(key, getattr(attention, key))
    watch("block", attention)
    model(random_ids(model, 1, 10))
    assert torch.equal(seen["f_proj"], seen["g_proj"])
    assert torch.equal(seen["i_proj"], seen["g_proj"])
    x, taps = seen["block"], attention.convs["shared"].weight           # (1, 10, D), (D, 4)
    padded = torch.nn.functional.pad(x, (0, 0, 3, 0))
    by_hand = sum(padded[:, k:k + 10] * taps[:, k] for k in range(4))
    assert_close(seen["g_proj"], torch.nn.functional.silu(by_hand))


def test_weights_of_the_earlier_wiring_say_so(tmp_path):
    config = SLMConfig(hidden_size=32, num_hidden_layers=1, use_short_conv=True)
    model = SimplifiedSLMForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    path, words = (tmp_path / "model.safetensors",
                   "attn.convs.0.weight: was trained when a shared short")
    weights = {name.replace("convs.shared", "convs.0"): t for name, t in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    for load in (SimplifiedSLMForCausalLM.from_pretrained, AutoModel.from_pretrained, load_model):
        with pytest.raises(ConfigError, match=words): load(tmp_path)
    # as a resumed run does
    with pytest.raises(ConfigError, match=words): read_weights(tmp_path, model)
    export = export_ternary(model, tmp_path / "export")
    weights = {name.replace("convs.shared", "convs.0"): t for name, t in load_file(export).items()}
    save_file(weights, export, {"format": "sprout-lab ternary", "version": "1"})
    with pytest.raises(ConfigError, match=words): load_ternary(tmp_path / "export")
    config = SLMConfig(hidden_size=32, num_hidden_layers=1, use_short_conv=True,
                       share_conv_kernel=False)
    each = SimplifiedSLMForCausalLM(config)                          # one for each gate, as before
    each.save_pretrained(tmp_path / "each")
    names = {f"model.layers.0.attn.convs.{k}.weight" for k in (0, 1)}
    assert names <= set(load_file(tmp_path / "each" / "model.safetensors"))
    SimplifiedSLMForCausalLM.from_pretrained(tmp_path / "each")


def test_lower_bounds_start_at_zero_in_a_checkpoint_without_them(tmp_path):
    SimplifiedSLMForCausalLM(SLMConfig(hidden_size=32,
                                       num_hidden_layers=2)).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "use_lower_bound": True}))
    model = SimplifiedSLMForCausalLM.from_pretrained(tmp_path)
    assert not model.model.lower_bounds.any()


def test_default_lists_belong_to_one_configuration():
    first, second = HNetBitConfig(), HNetBitConfig()
    first.d_model.append(200)
    assert second.d_model == [96, 128] and HNetBitConfig().d_model == [96, 128]
    assert HNetBitForCausalLM(second).config.num_blocks == [[1, 0, 1], [3]]
