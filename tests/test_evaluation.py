"""Evaluation: the numbers against brute force, no traces left behind, every form of data,
lm_eval."""
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from sprout_lab.configs import ConfigError
from sprout_lab.data.batches import Windows
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import ByteTokenizer, CharTokenizer, encode_array
from sprout_lab.data.tokens import TokenWriter
from sprout_lab.decoding.sampling import SamplingConfig
from sprout_lab.evaluation.evaluator import (Comparison, EvaluationConfig, Evaluator, count_bytes,
                                             write_results)
from sprout_lab.evaluation.harness import choice_task, harness_table, run_harness
from sprout_lab.evaluation.health import health_layers, layer_health
from sprout_lab.metrics import (aligned_targets, baselines, bits_per_byte, byte_entropy,
                                distinct_n, evaluate_model, invalid_bytes, summarize,
                                target_ranks, token_sums, utf8_validity)
from sprout_lab.evaluation.surprise import text_surprise
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM

root = Path(__file__).parent.parent


def small(seed=0, **shape):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        usual = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        return TransformerForCausalLM(
            TransformerConfig(**{**usual, "max_position_embeddings": 64, **shape}))


@pytest.fixture(scope="module")
def model(): return small(dropout=0.1)


@pytest.fixture(scope="module")
def text(): return next(iter(load_corpus("shakespeare").documents("validation")))[:3001]


@pytest.fixture(scope="module")
def tokens(text): return np.frombuffer(text.encode(), np.uint8)


def brute_force(model, tokens, length):
    "Loss, top-1 and top-5 accuracy window by window, position by position, in float64."
    model = model.eval()
    nats = first = five = 0
    for start in range(0, len(tokens) - 1, length):
        row = torch.tensor(tokens[start:start + length + 1].astype(np.int64))[None]
        with torch.no_grad(): logits = model(row[:, :-1]).logits[0].double()
        for scores, target in zip(logits, row[0, 1:]):
            nats -= scores.log_softmax(-1)[target].item()
            rank = sorted(range(len(scores)),
                          key=lambda i: (-scores[i].item(), i)).index(target.item())
            first += rank == 0
            five += rank < 5
    n = len(tokens) - 1
    return nats / n, first / n, five / n


# ---- evaluate_model -----------------------------------------------------------------

def test_numbers_equal_brute_force_however_the_batches_are_cut(model, tokens):
    tokens = tokens[:900]
    loss, first, five = brute_force(model, tokens, 40)
    for batch_size in (1, 3, 7, 64):
        metrics = evaluate_model(model, Windows(tokens, 40, batch_size), bytes_per_token=1.0)
        assert math.isclose(metrics["loss"], loss, rel_tol=1e-5) and metrics["accuracy"] == first
        assert metrics["top5_accuracy"] == five
        assert metrics["num_tokens"] == metrics["num_bytes"] == len(tokens) - 1
        assert math.isclose(metrics["bits_per_byte"], metrics["loss"] / math.log(2))
        assert math.isclose(metrics["perplexity"], math.exp(metrics["loss"]))


def test_a_mean_of_batch_means_would_be_wrong(model, tokens):
    windows = Windows(tokens[:170], 32, 4)
    means = [F.cross_entropy(model.eval()(b["input_ids"]).logits.flatten(0, 1),
                             b["shift_labels"].flatten()).item() for b in windows]
    assert abs(evaluate_model(model, windows, 1.0)["loss"] - sum(means) / len(means)) > 1e-5


def test_evaluation_leaves_no_trace(model, tokens):
    model.train()
    model.model.layers[0].eval()                        # a part that was frozen on purpose
    modes = [m.training for m in model.modules()]
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    state = torch.random.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    first = evaluate_model(model, Windows(tokens, 64, 8), 1.0)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(next(model.parameters())))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert evaluate_model(model, Windows(tokens, 64, 8), 1.0) == first, "dropout was on"
    model.zero_grad()
    model.train()
    # nothing was turned into an inference tensor
    model(torch.randint(256, (1, 8)), labels=torch.randint(256, (1, 8))).loss.backward()

    class Breaks(torch.nn.Module):
        def forward(self, input_ids): raise RuntimeError("broken")
    broken = Breaks().train()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate_model(broken, Windows(tokens, 64, 8), 1.0)
    assert broken.training and torch.is_grad_enabled()


def test_progress_and_streams_of_unknown_length(model, tokens):
    seen = []
    windows = Windows(tokens, 64, 8)
    with_length = evaluate_model(model, windows, 1.0,
                                 progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(windows)) for i in range(len(windows))]
    seen.clear()
    assert evaluate_model(model, (b for b in windows), 1.0,
                          progress=lambda done, total: seen.append(total)) == with_length
    assert set(seen) == {None}


def test_precision(model, tokens):
    windows = Windows(tokens, 64, 8)
    full = evaluate_model(model, windows, 1.0)
    half = evaluate_model(model, windows, 1.0, autocast="bf16")
    assert full["loss"] != half["loss"] and abs(full["loss"] - half["loss"]) < 0.02 * full["loss"]
    assert evaluate_model(model, windows, 1.0, autocast=torch.bfloat16) == half
    assert evaluate_model(model, windows, 1.0, autocast="no") == full
    exact = evaluate_model(small(dropout=0.1).double(), windows, 1.0)
    assert math.isclose(full["loss"], exact["loss"], rel_tol=1e-6)
    with pytest.raises(ConfigError, match="autocast='int8'"):
        evaluate_model(model, windows, 1.0, autocast="int8")


def test_sums_keep_their_digits():
    logits = torch.zeros(40_000, 2)
    logits[:, 0] = 1e-3
    total = token_sums(logits, torch.zeros(40_000, dtype=torch.long))[0].item()
    each = -torch.tensor([1e-3, 0.0]).double().log_softmax(-1)[0].item()
    assert math.isclose(total, 40_000 * each, rel_tol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [1, 5, 8192])
def test_sums_do_not_depend_on_the_chunk(dtype, rows):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator).to(dtype)
    targets = torch.randint(11, (3, 7), generator=generator)
    targets[0, :3] = -100
    keep = targets.flatten() != -100
    sums = token_sums(logits, targets, rows=rows)
    reference = F.cross_entropy(logits.flatten(0, 1)[keep].double(), targets.flatten()[keep],
                                reduction="sum")
    assert math.isclose(sums[0].item(), reference.item(), rel_tol=1e-5) and sums[3] == 18
    assert token_sums(logits, torch.full((3, 7), -100))[3] == 0


@pytest.mark.parametrize("seed", range(5))
def test_ranks_with_ties_are_those_of_a_stable_sort(seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(4, (50, 9), generator=generator).float()
    targets = torch.randint(9, (50,), generator=generator)
    order = torch.sort(-logits, dim=-1, stable=True).indices
    assert torch.equal(target_ranks(logits, targets),
                       (order == targets[:, None]).int().argmax(-1))


def test_a_model_that_has_diverged_scores_nothing():
    logits = torch.full((4, 5), float("nan"))
    metrics = summarize(token_sums(logits, torch.zeros(4, dtype=torch.long)), 1.0)
    assert math.isnan(metrics["loss"]) and metrics["accuracy"] == metrics["top5_accuracy"] == 0


def test_masked_models_are_not_shifted(tokens):
    class Reads(torch.nn.Module):
        "Knows the token at its own position, as a masked model's labels want it."
        def forward(self, input_ids, **kwargs): return F.one_hot(input_ids, 256).float() * 20
    ids = torch.tensor(tokens[:64].astype(np.int64))[None]
    labels = ids.masked_fill(torch.arange(64) % 5 != 0, -100)
    batch = [{"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}]
    metrics = evaluate_model(Reads(), batch, 1.0, shift=False)
    assert metrics["accuracy"] == 1 and metrics["num_tokens"] == 13
    assert evaluate_model(Reads(), [{"input_ids": ids, "labels": ids}], 1.0)["accuracy"] < 0.5


def test_models_of_other_forms(model, tokens):
    windows = Windows(tokens, 64, 8)

    class Plain(torch.nn.Module):
        "Names its input as it likes and returns bare logits."
        def forward(self, x): return model(x).logits

    class Named(torch.nn.Module):
        def forward(self, input_ids): return {"logits": model(input_ids).logits}
    expected = evaluate_model(model, windows, 1.0)
    model.eval()
    for form in (Plain(), Named()): assert evaluate_model(form, windows, 1.0) == expected


def test_targets_of_every_batch_form():
    ids = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 7]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    expected = [[2, 3, -100, -100], [5, 6, 7, -100]]
    for batch in ({"input_ids": ids, "attention_mask": mask},
                  {"input_ids": ids, "attention_mask": mask, "labels": ids},
                  {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}):
        assert aligned_targets(batch).tolist() == expected
    left = {"input_ids": ids.flip(1), "attention_mask": mask.flip(1)}
    assert aligned_targets(left).tolist() == [[3, 2, 1, -100], [6, 5, 4, -100]]


# ---- metrics of text ----------------------------------------------------------------

@given(st.text(max_size=60))
@settings(max_examples=60, deadline=None)
def test_text_is_valid_utf8_also_when_cut(text):
    raw = text.encode("utf-8", errors="replace")
    assert invalid_bytes(raw) == (0, len(raw))
    for cut in range(len(raw)): assert invalid_bytes(raw[:cut])[0] == 0


@given(st.binary(max_size=60))
@settings(max_examples=100, deadline=None)
def test_invalid_bytes_are_those_that_decoding_loses(raw):
    lost, total = invalid_bytes(raw, cut_end=False)
    assert total == len(raw)
    assert lost == len(raw) - len(raw.decode("utf-8", errors="ignore").encode())
    assert 0 <= utf8_validity([raw, b"ok"]) <= 1 and invalid_bytes(raw)[0] <= lost


def test_distinct_counts_over_all_samples():
    assert distinct_n(["a b", "a b"], 2) == 0.5 and distinct_n([[1, 2, 3, 1, 2]], 2) == 3 / 4
    assert math.isnan(distinct_n([], 1))


def test_baselines_of_the_embedded_corpora():
    for name, bits in (("shakespeare", (4.78, 3.11, 2.36)), ("tales", (4.53, 2.95, 2.27))):
        corpus = load_corpus(name)
        whole = "".join(t for split in ("train", "validation") for t in corpus.documents(split))
        if name == "shakespeare":
            assert len(whole) == 1_115_394
            assert tuple(round(v, 2) for v in baselines(whole).values()) == bits
        else:   # documents stand in another order there
            assert all(abs(v - b) < 0.05 for v, b in zip(baselines(whole).values(), bits))
    assert byte_entropy("aaaa") == 0 and math.isclose(byte_entropy(bytes(range(256))), 8)
    for wrong in (lambda: baselines(""), lambda: bits_per_byte(1.0, 0),
                  lambda: byte_entropy("ab", 2), lambda: summarize(torch.zeros(4), 1.0)):
        with pytest.raises(ConfigError): wrong()


# ---- evaluator ----------------------------------------------------------------------

def token_file(path, ids, vocab_size, num_bytes):
    with TokenWriter(path, vocab_size) as writer:
        writer.write(ids, num_bytes=num_bytes, num_documents=1)
    from sprout_lab.data.tokens import TokenFile
    return TokenFile.open(path)


def test_every_form_of_data_gives_the_same_numbers(model, text, tokens, tmp_path):
    evaluator = Evaluator(model, ByteTokenizer(), {"sequence_length": 64, "batch_size": 8})
    expected = evaluator.evaluate(text)
    assert expected == evaluate_model(model, Windows(tokens, 64, 8),
                                      1.0) == evaluator.results["evaluation"]
    forms = [tokens, torch.tensor(tokens),
             token_file(tmp_path / "t.bin", tokens, 256, len(tokens)), Windows(tokens, 64, 8),
             (b for b in Windows(tokens, 64, 8))]
    for form in forms: assert evaluator.evaluate(form) == expected


def test_guide_batches_give_the_same_numbers(model, text, tmp_path):
    from torch.utils.data import DataLoader
    datasets = pytest.importorskip("sprout_lab.data.datasets")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text(text)
    loader = DataLoader(datasets.TextDirectoryDataset(directory=str(tmp_path / "texts"),
            max_seq_length=48), batch_size=5, collate_fn=datasets.collate_fn)
    batches = list(loader)
    assert set(batches[0]) >= {"input_ids", "attention_mask", "labels"}
    metrics = Evaluator(model, ByteTokenizer()).evaluate(loader)
    model.eval()
    nats = count = 0
    for batch in batches:
        with torch.no_grad(): logits = model(batch["input_ids"]).logits
        for row, ids, mask in zip(logits, batch["input_ids"], batch["attention_mask"]):
            n = int(mask.sum())
            nats += F.cross_entropy(row[:n - 1].double(), ids[1:n], reduction="sum").item()
            count += n - 1
    assert metrics["num_tokens"] == count
    assert math.isclose(metrics["loss"], nats / count, rel_tol=1e-6)


def test_bits_per_byte_do_not_depend_on_the_vocabulary(tmp_path):
    """A character model and a byte model that make the same guesses have the same bits per byte,
    not the same loss."""
    text = "naïve café, naïve façade. " * 40
    characters = CharTokenizer.from_text(text)

    class Uniform(torch.nn.Module):
        "Every character costs 3 bits, however many tokens it has."
        def __init__(self, tokenizer):
            super().__init__()
            self.tokenizer, self.weight = tokenizer, torch.nn.Parameter(torch.zeros(()))
        def forward(self, input_ids, **kwargs):
            bits = torch.full((*input_ids.shape, 256), -1e9)
            following = F.pad(input_ids[:, 1:], (0, 1))
            inside = (following & 0xC0) == 0x80
            if not isinstance(self.tokenizer, ByteTokenizer): inside = torch.zeros_like(inside)
            chosen = torch.where(inside, 0.0, -3.0 * math.log(2))
            bits.scatter_(-1, following[..., None], chosen[..., None])
            rest = torch.log1p(-chosen.exp().clamp(max=1 - 1e-12))
            bits.scatter_(-1, ((following + 1) % 256)[..., None],
                          torch.where(inside, -1e9, rest)[..., None])
            return bits
    results = {}
    for tokenizer in (ByteTokenizer(), characters):
        ids = encode_array(tokenizer, text)
        batch = [{"input_ids": torch.tensor(ids.astype(np.int64))[None]}]
        results[type(tokenizer)] = Evaluator(Uniform(tokenizer), tokenizer).evaluate(batch)
    one, other = results.values()
    assert abs(one["loss"] - other["loss"]) > 0.1
    assert abs(one["bits_per_byte"] - other["bits_per_byte"]) < 0.01
    assert one["num_bytes"] == other["num_bytes"] == len(text.encode()) - 1
    assert abs(one["bits_per_byte"] - 3 * len(text) / len(text.encode())) < 0.02


def test_bytes_of_bpe_tokens(text):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(
        add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator([text], trainers.BpeTrainer(vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            special_tokens=["<|endoftext|>"], show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>")
    for sample in (text[:700], "naïve 狐狸 café"):
        ids = tokenizer.encode(sample)
        end = [tokenizer.eos_token_id] + [-100] * (len(ids) - 1)
        assert count_bytes(tokenizer, torch.tensor([ids, end])) == len(sample.encode())
    model = small(vocab_size=400)
    evaluator = Evaluator(model, tokenizer, {"sequence_length": 64})
    metrics = evaluator.evaluate(text)
    assert metrics["num_tokens"] == len(tokenizer.encode(text)) - 1 < len(text) / 1.5
    assert math.isclose(metrics["bits_per_byte"],
                        metrics["loss"] * len(tokenizer.encode(text)) / (
        math.log(2) * len(text.encode())))
    # the bytes counted on the way, the first token's not among them
    counted = evaluator.evaluate(b for b in Windows(np.array(tokenizer.encode(text)), 64, 8))
    assert counted["num_bytes"] == len(text.encode()) - len(
        tokenizer.decode(tokenizer.encode(text)[:1]).encode())
    assert "".join(text_surprise(model, tokenizer, "naïve 狐狸 café").pieces) == "naïve 狐狸 café"


def test_generation_is_judged(model):
    asked = {}

    def generate(model, tokenizer, prompts, **sampling):
        asked.update(sampling, prompts=prompts)
        return ["one two one two", b"three \xff four"] * len(prompts)
    evaluator = Evaluator(model, ByteTokenizer(), {"seed": 7})
    results = evaluator.evaluate_generation(["A", "B"], SamplingConfig(top_k=9), num_samples=2,
                                            generate=generate, temperature=0.5)
    assert asked == {**SamplingConfig().model_dump(), "temperature": 0.5, "top_k": 9, "seed": 7,
                     "num_samples": 2, "prompts": ["A", "B"]}
    assert results["utf8_validity"] == 1 - 2 / 54 and results["valid_samples"] == 0.5
    assert results["distinct_1"] == 5 / 14
    assert [s["prompt"] for s in results["samples"]] == ["A", "A", "B", "B"]


def test_generation_by_the_engine(model):
    evaluator = Evaluator(model, ByteTokenizer())
    first = evaluator.evaluate_generation(["To be", "Or"], num_samples=2, max_tokens=12, seed=3)
    assert len(first["samples"]) == 4
    assert all(isinstance(s["text"], str) and not s["text"].startswith("To be")
               for s in first["samples"])
    assert evaluator.evaluate_generation(["To be", "Or"], num_samples=2, max_tokens=12,
                                         seed=3) == first
    one, other = (sample["text"] for sample in first["samples"][:2])
    assert one != other, "two samples of one prompt are two draws"


@pytest.fixture()
def run_folder(tmp_path, text):
    "A run with three whole checkpoints, as the trainer writes them."
    from sprout_lab.runs import Run, sealed_folder
    run = Run(tmp_path / "run")
    for step, seed in ((5, 1), (10, 2)):
        with sealed_folder(run.step_folder(step)) as folder:
            small(seed).save_pretrained(folder)
            ByteTokenizer().save_pretrained(folder)
    run.point("best", 10)
    return run


def test_compare_checkpoints_as_the_guide_writes_it(run_folder, text, capsys):
    import sprout_lab.families   # noqa: F401  registers the model with the Auto classes
    evaluator = Evaluator(small(), ByteTokenizer(), {"sequence_length": 64})
    paths = [run_folder.folder / "checkpoints" / name
             for name in ("step_5.pt", "step_10.pt", "best.pt")]
    data = Windows(np.frombuffer(text.encode(), np.uint8), 64, 8)
    rows = evaluator.compare_checkpoints(checkpoint_paths=paths, test_dataloader=data)
    shown = capsys.readouterr().out
    assert list(rows) == ["step_5", "step_10", "best"]
    assert rows["best"] == rows["step_10"] == evaluate_model(small(2), data, 1.0)
    assert rows["step_5"] == evaluate_model(small(1), data, 1.0)
    assert "checkpoint" in shown and "step_10" in shown
    assert f"{rows['best']['bits_per_byte']:.3f}" in shown and shown.count("*") == 2
    assert rows.figure().png().startswith(b"\x89PNG")
    stream = evaluator.compare_checkpoints(paths, (b for b in data),
                                           load_fn=lambda path: (small(1), ByteTokenizer()),
                                           show=False)
    assert stream["best"] == stream["step_5"] == rows["step_5"] and capsys.readouterr().out == ""


def test_a_comparison_that_has_diverged_still_prints():
    rows = Comparison({"a": {"loss": float("nan"), "bits_per_byte": float("nan"),
                             "perplexity": math.inf}, "b": {"loss": 1.0, "bits_per_byte": 1.4},
                       "<c>": {"loss": 2.0, "bits_per_byte": 2.9}})
    assert rows.best == "b" and "b *" in str(rows) and "nan" in str(rows)
    assert "&lt;c&gt;" in rows._repr_html_()


def test_what_has_bits_per_byte_and_what_has_none_have_no_best():
    rows = Comparison({"bytes": {"loss": 3.0, "bits_per_byte": 4.3},
                       "lossy words": {"loss": 2.0, "bits_per_byte": None}})
    assert rows.best is None and "*" not in str(rows) and "*" not in rows._repr_html_()
    assert Comparison({"x": {"loss": 3.0, "bits_per_byte": None},
                       "y": {"loss": 2.0, "bits_per_byte": None}}).best == "y"


def test_results_are_strict_json_and_replace_in_one_step(tmp_path, model, text):
    evaluator = Evaluator(model, ByteTokenizer(), EvaluationConfig(sequence_length=64))
    evaluator.evaluate(text)
    (tmp_path / "results").mkdir()
    path = evaluator.save_results(tmp_path, checkpoint="best", step=10)
    assert path == tmp_path / "results" / "evaluation_results.json"
    saved = json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved["checkpoint"] == "best"
    assert saved["loss"] == evaluator.results["evaluation"]["loss"]
    assert saved["settings"]["sequence_length"] == 64
    write_results(path, {"a": float("nan"), "b": [math.inf, np.float32(0.5), np.int64(3)],
                         "c": Path("x"), "d": True})
    assert json.loads(path.read_text()) == {"a": None, "b": [None, 0.5, 3], "c": "x", "d": True}
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        write_results(tmp_path / "file" / "r.json", {})


def test_unknown_bytes_are_not_invented(model, tokens):
    metrics = Evaluator(model, None).evaluate(Windows(tokens, 64, 8))
    assert metrics["bits_per_byte"] is None and metrics["num_bytes"] is None
    assert metrics["loss"] > 0
    with pytest.raises(ConfigError, match="no tokenizer"): Evaluator(model, None).evaluate("text")


def ours(model, **settings): return Evaluator(model, ByteTokenizer(), settings or None)


MISTAKES = [
    (lambda m: ours(m, batchsize=1), "did you mean 'batch_size'"),
    (lambda m: Evaluator(m, ByteTokenizer(), 3), "EvaluationConfig or a dict"),
    (lambda m: ours(m).evaluate(""), "at least 2"),
    (lambda m: ours(m, sequence_length=65).evaluate("some text"), "max_position_embeddings=64"),
    (lambda m: ours(m, stride=9, sequence_length=8), "tokens would be left out"),
    (lambda m: ours(m, stride=9, stateful=True), "keep one"),
    (lambda m: ours(m, stride=4).evaluate([]), "these are batches"),
    (lambda m: ours(m, stateful=True).evaluate("some text"), "no state of fixed size"),
    (lambda m: ours(m).evaluate([]), "nothing to evaluate"),
    (lambda m: ours(m).evaluate_generation([]), "nothing to continue"),
    (lambda m: ours(m).evaluate_generation("a", topk=3), "did you mean 'top_k'"),
    (lambda m: ours(m).evaluate_generation("a", top_p=2), "top_p=2"),
    (lambda m: ours(m).compare_checkpoints([], "some text"), "no checkpoints"),
    (lambda m: ours(m).compare_checkpoints(["/nowhere/best.pt"], "some text"),
     "no such run or checkpoint"),
    (lambda m: text_surprise(m, ByteTokenizer(), ""), "empty"),
    (lambda m: text_surprise(m, ByteTokenizer(), "ab", window=1), "at least 2"),
    (lambda m: layer_health(torch.nn.ReLU(), {}), "no layers"),
]


@pytest.mark.parametrize("call, says", MISTAKES)
def test_mistakes_are_answered_in_one_line(model, call, says):
    with pytest.raises(ConfigError) as error: call(model)
    assert says in str(error.value) and "\n" not in str(error.value)


# ---- the command --------------------------------------------------------------------

@pytest.fixture()
def corpus_run(run_folder, text, tmp_path):
    "The same run with a configuration: a local text, its last part held out."
    import yaml
    (tmp_path / "text.txt").write_text(text * 3)
    data = {"train_data_path": str(tmp_path / "text.txt"), "sequence_length": 32}
    run_folder.config.write_text(yaml.safe_dump({"model": {"type": "transformer"}, "data": data}))
    return run_folder


def evaluate(*args, **options):
    import sprout_lab.families   # noqa: F401
    from sprout_lab.evaluation.commands import evaluate_from_options
    lines = []
    results = evaluate_from_options(*args, log=lines.append, **options)
    return results, "\n".join(lines)


def test_the_command_evaluates_what_the_run_held_out(corpus_run):
    from sprout_lab.configs import DataConfig
    from sprout_lab.data.prepare import load_data
    results, shown = evaluate(corpus_run.folder,
                              compare=[corpus_run.folder / "checkpoints" / "step_5.pt"],
                              num_samples=2)
    data = load_data(DataConfig(train_data_path=str(corpus_run.folder.parent / "text.txt"),
                                sequence_length=32))
    assert results["evaluation"] == evaluate_model(small(2), Windows(data.validation, 32, 32),
                                                   data.validation.bytes_per_token)
    assert "step_10 on" in shown and "windows of 32 tokens" in shown and "utf8 validity" in shown
    assert set(results["checkpoints"]) == {"step_10", "step_5"}
    saved = json.loads(corpus_run.evaluation.read_text())
    assert saved["loss"] == results["evaluation"]["loss"] and saved["checkpoint"] == "step_10"
    assert len(saved["generation"]["samples"]) == 2
    assert (corpus_run.results / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_elsewhere(corpus_run, text, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "a.txt").write_text(text[:1500]), (other / "b.txt").write_text(text[1500:])
    results, shown = evaluate(corpus_run.folder / "best.pt", data_dir=str(other),
                              output_dir=tmp_path / "out", sequence_length=16, max_batches=2)
    saved = json.loads((tmp_path / "out" / "evaluation_results.json").read_text())
    assert saved["num_tokens"] == results["evaluation"]["num_tokens"] == 2 * 32 * 16
    assert not corpus_run.evaluation.exists()
    small(3).save_pretrained(tmp_path / "bare")   # a model of no run, without a tokenizer
    results, shown = evaluate(tmp_path / "bare", dataset="shakespeare", max_batches=1)
    assert results["evaluation"]["bits_per_byte"] > 7 and "results:" not in shown


def test_the_command_notices_a_damaged_checkpoint(corpus_run):
    weights = corpus_run.step_folder(10) / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 1
    weights.write_bytes(raw)
    results, shown = evaluate(corpus_run.folder)
    assert "is damaged" in shown and "step_5 instead" in shown
    assert json.loads(corpus_run.evaluation.read_text())["checkpoint"] == "step_5"


def test_the_command_runs_tasks(corpus_run, text, tmp_path):
    pytest.importorskip("lm_eval")
    task = choice_task(text, tmp_path / "task", questions=6)
    results, shown = evaluate(corpus_run.folder, tasks=str(task))
    assert results["tasks"]["misspelt_continuation"]["samples"] == 6
    assert "misspelt_continuation  acc" in shown
    assert json.loads(corpus_run.evaluation.read_text())["tasks"] == results["tasks"]


@pytest.mark.parametrize("options, says",
                         [(dict(dataset="a", data_dir="b"), "both given"),
                          (dict(dataset="shakespear"), "did you mean 'shakespeare'"),
                          (dict(sequence_length=65), "max_position_embeddings=64"),
                          (dict(compare=["/nowhere"]), "no such run"),
                          (dict(tasks="x.yaml"), "no such task file")])
def test_the_command_answers_mistakes_in_one_line(corpus_run, options, says):
    with pytest.raises(ConfigError) as error: evaluate(corpus_run.folder, **options)
    assert says in str(error.value) and "\n" not in str(error.value)
    assert not corpus_run.evaluation.exists()


def test_a_folder_without_a_loadable_model(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"model_type": "sprout_nothing"}')
    with pytest.raises(ConfigError, match="no model that can be loaded") as error:
        evaluate(tmp_path / "m")
    assert "\n" not in str(error.value)


# ---- how much context --------------------------------------------------------------------

@pytest.mark.parametrize("length, stride", [(8, 1), (8, 3), (16, 5), (16, 16)])
def test_stride_scores_each_token_once_with_the_context_it_promises(model, tokens, length, stride):
    tokens = tokens[:101]
    evaluator = ours(model, sequence_length=length, stride=stride, batch_size=3)
    metrics = evaluator.evaluate(tokens)
    model.eval()
    nats, scored_to, start = 0.0, 1, 0
    while scored_to < len(tokens):
        row = torch.tensor(tokens[start:start + length + 1].astype(np.int64))[None]
        with torch.no_grad(): scores = model(row[:, :-1]).logits[0].double().log_softmax(-1)
        for at in range(scored_to, start + row.shape[1]):      # the index of a target in the text
            assert at - start >= min(at, length - stride), "less context than promised"
            nats -= scores[at - start - 1, tokens[at]].item()
        scored_to, start = start + row.shape[1], start + stride
    assert metrics["num_tokens"] == len(tokens) - 1
    assert math.isclose(metrics["loss"], nats / (len(tokens) - 1), rel_tol=1e-5)
    assert f"stride {stride} (at least {length - stride}" in evaluator.results["context"]


def test_a_stride_of_the_length_is_todays_windows(model, text):
    for most in (None, 2):
        usual = dict(sequence_length=64, batch_size=8, max_batches=most)
        assert ours(model, **usual, stride=64).evaluate(text) == ours(model, **usual).evaluate(text)


def recurrent(name):
    "A recurrent model in float64, its weights away from their neutral start."
    from sprout_lab.families import get_family
    with torch.random.fork_rng():
        torch.manual_seed(0)
        built = get_family(name).build("nano").double().eval()
        for weight in built.parameters(): weight.data.add_(0.02 * torch.randn_like(weight))
    return built


@pytest.mark.parametrize("name", ["slm", "hnet"])
def test_a_carried_state_scores_as_one_forward_pass(name, text):
    recurrent_model, text = recurrent(name), text[:241]
    row = torch.tensor([list(text.encode())])
    with torch.no_grad(): logits = recurrent_model(row[:, :-1]).logits
    at_once = F.cross_entropy(logits[0], row[0, 1:]).item()
    for length in (7, 40, 240):      # the last one is the whole text in one window
        evaluator = ours(recurrent_model, stateful=True, sequence_length=length, batch_size=1)
        metrics = evaluator.evaluate(text)
        assert math.isclose(metrics["loss"], at_once, rel_tol=1e-9) and metrics["num_tokens"] == 240
        assert evaluator.results["context"] == "the state carried through the whole text"
    in_parts = ours(recurrent_model, stateful=True, sequence_length=16, batch_size=3)
    assert in_parts.evaluate(text)["num_tokens"] == 240
    assert in_parts.results["context"] == "the state carried through 3 parts of 80 tokens"
    apart = ours(recurrent_model, sequence_length=16).evaluate(text)
    assert not math.isclose(apart["loss"], at_once, rel_tol=1e-4)


def test_the_command_says_which_context_it_was(corpus_run):
    results, shown = evaluate(corpus_run.folder, stride=8)
    words = "windows of 32 tokens, stride 8 (at least 24 tokens before each)"
    assert words in shown and json.loads(corpus_run.evaluation.read_text())["context"] == words
    with pytest.raises(ConfigError, match="no state of fixed size"):
        evaluate(corpus_run.folder, stateful=True)


# ---- any objective -----------------------------------------------------------------------

@pytest.fixture()
def masked_run(tmp_path, text):
    "A run of a masked model: a local text, windows of 32 tokens, bytes and a gap."
    import sprout_lab.families   # noqa: F401
    import yaml
    from sprout_lab.models.sprout import SproutConfig, SproutForMaskedLM
    from sprout_lab.runs import Run, sealed_folder
    run = Run(tmp_path / "masked")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = dict(vocab_size=259, hidden_size=32, num_attention_heads=2, max_nodes=3)
        filler = SproutForMaskedLM(SproutConfig(**shape))
    with sealed_folder(run.step_folder(5)) as folder:
        filler.save_pretrained(folder)
        ByteTokenizer(masked=True).save_pretrained(folder)
    (tmp_path / "masked.txt").write_text(text * 3)
    data = {"train_data_path": str(tmp_path / "masked.txt"), "sequence_length": 32,
            "vocab_size": 259}
    run.config.write_text(yaml.safe_dump({"model": {"type": "sprout"}, "data": data}))
    return run


def test_the_command_evaluates_a_masked_run(masked_run):
    results, shown = evaluate(masked_run.folder, max_batches=1, batch_size=2, num_samples=2)
    assert "hidden tokens" in shown and "bits per byte     " not in shown
    assert len(results["fillings"]) == 2
    for text in results["fillings"]: assert repr(text) in shown
    assert results["evaluation"]["bits_per_byte"] is None


def test_pseudo_bits_per_byte_heed_max_batches(masked_run):
    pseudo = lambda **options: evaluate(masked_run.folder, **options)[0]["evaluation"][
        "pseudo_log_likelihood"]["num_tokens"]
    assert pseudo(max_batches=1) == 32 and pseudo(max_batches=2, sequence_length=16) == 32
    assert pseudo() > 400


def test_a_mixed_pair_is_refused_before_any_work(corpus_run, masked_run, monkeypatch):
    from sprout_lab.evaluation import commands, evaluator
    for module in (commands, evaluator):
        monkeypatch.setattr(module, "load_model", lambda path: pytest.fail(f"{path} was loaded"))
    for first, other in ((corpus_run, masked_run), (masked_run, corpus_run)):
        with pytest.raises(ConfigError, match="different questions") as error:
            evaluate(first.folder, compare=[other.folder])
        assert "\n" not in str(error.value) and not first.evaluation.exists()
    with pytest.raises(ConfigError, match="ask what comes next"):
        evaluate(masked_run.folder, tasks="hellaswag")
    pair = [run.folder for run in (corpus_run, masked_run)]
    with pytest.raises(ConfigError, match="different questions"):
        ours(small()).compare_checkpoints(pair, "some text")
    with pytest.raises(ConfigError, match="stride: is for models that say what comes next"):
        monkeypatch.undo()
        evaluate(masked_run.folder, stride=4)


def test_another_kind_of_model_needs_nothing_from_the_evaluator(monkeypatch):
    "Windows, metrics, table and samples of an objective that the evaluator has never heard of."
    from sprout_lab import objectives
    from sprout_lab.evaluation.commands import metric_lines
    from sprout_lab.objectives import Objective, objective_of, register_objective, shared_objective

    class Sunshine(Objective):
        name, metric, unit, target = "sunshine", "squared_error", "hours²", "hours"
        metrics = ("squared_error",)

        def owns(self, model): return isinstance(model, Mean)

        def windows(self, config, tokens, tokenizer, length, batch_size, max_batches=None):
            return [tokens[start:start + length] for start in range(0, len(tokens), length)]

        def evaluate(self, model, windows, bytes_per_token=None, **options):
            errors = np.concatenate([(window - model.mean) ** 2 for window in windows])
            return {"squared_error": float(errors.mean()), "num_tokens": len(errors)}

        def samples(self, model, tokenizer, tokens, count, *, window, seed=42):
            return {"weeks": [tokens[:window].tolist()] * count}

    class Mean(torch.nn.Module):
        mean, config = 2.0, None

    monkeypatch.setattr(objectives, "objectives", dict(objectives.objectives))
    register_objective(Sunshine())
    hours = np.array([1.0, 2.0, 3.0, 2.0])
    evaluator = Evaluator(Mean(), None, {"sequence_length": 2})
    assert evaluator.evaluate(hours) == {"squared_error": 0.5, "num_tokens": 4}
    kind = objective_of(Mean())
    shown = metric_lines(kind, evaluator.results["evaluation"])[0]
    assert shown.split() == ["squared", "error", "0.5000"]
    rows = Comparison({"a": {"squared_error": 0.5}, "b": {"squared_error": 0.4}}, kind)
    assert rows.best == "b" and "squared error" in str(rows) and "0.4000" in str(rows)
    assert kind.samples(Mean(), None, hours, 2, window=2) == {"weeks": [[1.0, 2.0]] * 2}
    with pytest.raises(ConfigError, match="different questions"):
        shared_objective({"a": kind, "b": objective_of(small())})


# ---- progress ----------------------------------------------------------------------------

def test_progress_in_plain_lines_and_nothing_when_quiet(corpus_run, monkeypatch):
    from sprout_lab import progress
    monkeypatch.setattr(progress.Progress.__init__, "__defaults__", ("steps", None, 0.0, 0))
    _, shown = evaluate(corpus_run.folder)
    assert "evaluating: 1 of" in shown
    _, quiet = evaluate(corpus_run.folder, quiet=True)
    assert "evaluating" not in quiet and quiet.splitlines() == [
        line for line in shown.splitlines() if "evaluating" not in line]


def test_generation_of_many_texts_shows_its_progress(model, monkeypatch, capsys):
    from sprout_lab import progress
    from sprout_lab.decoding.sampling import generate_text
    monkeypatch.setattr(progress.Progress.__init__, "__defaults__", ("steps", None, 0.0, 0))
    one = generate_text(model, ByteTokenizer(), "a", max_tokens=4, seed=1)
    assert capsys.readouterr().err == "" and len(one) == 1
    texts = generate_text(model, ByteTokenizer(), ["a", "b"], max_tokens=4, seed=1)
    assert "generating: 4 of 4 tokens" in capsys.readouterr().err
    with progress.without_progress():
        assert generate_text(model, ByteTokenizer(), ["a", "b"], max_tokens=4, seed=1) == texts
    assert capsys.readouterr().err == ""


# ---- health and surprise ------------------------------------------------------------

@pytest.mark.parametrize("checkpointing", [False, True])
def test_layer_health_equals_an_ordinary_backward_pass(checkpointing):
    model = small(tie_word_embeddings=True)
    batch = {"input_ids": torch.randint(256, (2, 16)),
             "shift_labels": torch.randint(256, (2, 16))}
    batch["shift_labels"][0, :5] = -100
    if checkpointing:
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    hooks = [len(m._forward_hooks) for m in model.modules()]
    state = torch.random.get_rng_state()
    rows = {row["layer"]: row for row in layer_health(model, batch)}
    assert torch.equal(torch.random.get_rng_state(), state) and model.training
    assert all(p.grad is None for p in model.parameters())
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    model.eval()
    model(**batch).loss.backward()
    for name, module in health_layers(model).items():
        gradient = math.sqrt(sum(p.grad.double().square().sum().item()
                                 for p in module.parameters()))
        weight = math.sqrt(sum(p.detach().double().square().sum().item()
                               for p in module.parameters()))
        assert math.isclose(rows[name]["gradient_to_weight"], gradient / weight,
                            rel_tol=1e-5), name
    assert all(row["activation_rms"] > 0 and row["gradient_rms"] > 0 for row in rows.values())
    frozen = small()
    frozen.requires_grad_(False)
    assert all(row["gradient_rms"] is None for row in layer_health(frozen, batch))


@pytest.mark.parametrize("window", [2, 3, 8, 17, 64])
def test_surprise_of_a_text_longer_than_the_window(model, text, window):
    text = text[:100]
    told = text_surprise(model, ByteTokenizer(), text, window=window)
    ids = torch.tensor([list(text.encode())])
    assert "".join(told.pieces) == text and len(told.nats) == 100 and math.isnan(told.nats[0])
    assert not any(map(math.isnan, told.nats[1:]))
    model.eval()
    for at in random.Random(0).sample(range(1, 100), 8):
        possible = []
        for size in range(1, min(window, at) + 1):   # from a context of at least half a window
            with torch.no_grad():
                possible.append(
                    -model(ids[:, at - size:at]).logits[0, -1].log_softmax(-1)[ids[0, at]].item())
        assert min(abs(p - told.nats[at])
                   for p in possible[min(window // 2, len(possible)) - 1:]) < 1e-4, at


@given(st.text(alphabet="aé狐🦊\u0301 \n", min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_surprise_puts_bytes_together_to_characters(text):
    told = text_surprise(small(), ByteTokenizer(), text, alternatives=2, begin=254)
    assert told.pieces == list(text) and all(n > 0 for n in told.nats)
    assert all(len(a) == 2 for a in told.alternatives)


# ---- lm_eval ------------------------------------------------------------------------

lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def offline_datasets(tmp_path_factory):
    "The data sets library keeps its files in a folder of this test's own."
    import datasets
    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    yield
    datasets.config.HF_DATASETS_CACHE = before


def by_hand(model, tokenizer, rows):
    model.eval()
    right = 0
    for row in rows:
        scores = []
        for choice in row["choices"]:
            context = tokenizer.encode(row["context"])
            whole = tokenizer.encode(row["context"] + choice)
            ids = torch.tensor([whole[-65:]])
            with torch.no_grad():
                logp = model(ids[:, :-1]).logits.log_softmax(-1).gather(-1,
                        ids[:, 1:, None])[0, :, 0]
            scores.append(logp[-(len(whole) - len(context)):].sum().item())
        right += int(np.argmax(scores)) == row["answer"]
    return right / len(rows)


@pytest.mark.parametrize("make", ["bytes", "characters"])
def test_local_task_equals_the_models_own_likelihoods(make, text, tmp_path, offline_datasets,
        capsys):
    # the latter has neither begin nor end token
    tokenizer = ByteTokenizer() if make == "bytes" else CharTokenizer.from_text(text)
    model = small(5)
    state = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
    results = run_harness(model, tokenizer,
                          choice_task(text, tmp_path, wrong="elsewhere", questions=30),
                          batch_size=7)["elsewhere_continuation"]
    rows = [json.loads(line)
            for line in (tmp_path / "elsewhere_continuation.jsonl").read_text().splitlines()]
    assert results["samples"] == 30
    assert math.isclose(results["acc"], by_hand(model, tokenizer, rows))
    assert results["truncated"] == 120
    assert capsys.readouterr().err == ""
    assert random.getstate() == state[0] and (np.random.get_state()[1] == state[1]).all()
    assert torch.equal(torch.random.get_rng_state(), state[2])
    assert "elsewhere_continuation  acc" in harness_table({"elsewhere_continuation": results})
    assert run_harness(model, tokenizer, str(tmp_path / "elsewhere_continuation.yaml"),
                       limit=4)["elsewhere_continuation"]["samples"] == 4


def test_same_likelihoods_as_lm_evals_own_wrapper(text, caplog):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from sprout_lab.evaluation.harness import HarnessModel
    model, tokenizer = small(6), ByteTokenizer()
    ours = HarnessModel(model, tokenizer, batch_size=3)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=3)
    pairs = [("To be", ", or not"), ("", "To be"), ("with a blank ", "after"),
             (text[:90], text[90:120]), ("a", "b")]
    ask = lambda kind, all_args: [Instance(kind, {}, args, i) for i, args in enumerate(all_args)]
    for (a, greedy_a), (b, greedy_b) in zip(ours.loglikelihood(ask("loglikelihood", pairs),
            disable_tqdm=True), theirs.loglikelihood(ask("loglikelihood", pairs),
                                                     disable_tqdm=True)):
        assert math.isclose(a, b, rel_tol=1e-5) and greedy_a == greedy_b
    texts = [(text[:200],), ("short",)]
    for a, b in zip(ours.loglikelihood_rolling(ask("loglikelihood_rolling", texts)),
                    theirs.loglikelihood_rolling(ask("loglikelihood_rolling", texts),
                                                 disable_tqdm=True)):
        assert math.isclose(a, b, rel_tol=1e-5)


def test_rolling_and_generating_tasks(text, tmp_path, offline_datasets):
    import yaml
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text[i:i + 150],
            "answer": "yes"}) + "\n" for i in (0, 150, 300)))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "d.jsonl"}},
            "test_split": "test"}
    rolling = {"task": "rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
               "doc_to_target": "{{text}}",
               "metric_list": [{"metric": "bits_per_byte"}, {"metric": "byte_perplexity"}]}
    writing = {"task": "writing", "output_type": "generate_until", "doc_to_text": "{{text}}",
               "doc_to_target": "answer", "metric_list": [{"metric": "exact_match"}],
               "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8, "do_sample": False}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump({**data, **rolling}))
    (tmp_path / "g.yaml").write_text(yaml.safe_dump({**data, **writing}))
    model, asked = small(7), []

    def generate(model, tokenizer, prompts, **sampling):
        asked.append((prompts, sampling))
        return ["yes. and more" if i % 2 == 0 else "no" for i in range(len(prompts))]
    results = run_harness(model, ByteTokenizer(), [tmp_path / "r.yaml", tmp_path / "g.yaml"],
                          generate=generate)
    # a begin token before each text: the model's own bits per byte over windows of 64 tokens
    perplexity = results["rolling"]["byte_perplexity"]
    assert abs(results["rolling"]["bits_per_byte"] - math.log2(perplexity)) < 1e-6
    assert 7 < results["rolling"]["bits_per_byte"] < 10
    assert math.isclose(results["writing"]["exact_match"], 2 / 3)
    assert all(len(p) <= 64 - 8 for p in asked[0][0]) and asked[0][1]["temperature"] == 0
    assert asked[0][1]["max_tokens"] == 8


def test_generating_with_the_engine(text, tmp_path, offline_datasets):
    from lm_eval.api.instance import Instance

    from sprout_lab.evaluation.harness import HarnessModel
    model, tokenizer = small(8).eval(), ByteTokenizer()
    requests = [Instance("generate_until", {},
                         (prompt, {"until": [], "max_gen_toks": 10, "do_sample": False}), i)
                for i, prompt in enumerate(("To be", text[:100]))]
    for request, told in zip(requests, HarnessModel(model, tokenizer).generate_until(requests)):
        ids = torch.tensor([tokenizer.encode(request.args[0])[-54:]])
        with torch.no_grad():
            expected = model.generate(ids, max_new_tokens=10, do_sample=False, eos_token_id=255,
                                      pad_token_id=255)[0, ids.shape[1]:]
        assert told == tokenizer.decode(expected.tolist(), skip_special_tokens=True)


def test_a_checkpoint_by_its_path(run_folder, text, tmp_path, offline_datasets):
    import sprout_lab.families   # noqa: F401
    task = choice_task(text, tmp_path / "task", questions=8)
    assert run_harness(run_folder.folder, tasks=task) == run_harness(small(2), ByteTokenizer(),
            task)


@pytest.mark.parametrize("wrong, says",
                         [("nothing.yaml", "no such task file"),
                          ("no_name.yaml", "needs a `task:`"),
                          ("no_data.yaml", "gone.jsonl is not beside it"),
                          ("broken.yaml", "not valid YAML"), ([], "no task"),])
def test_wrong_tasks_are_answered_in_one_line(wrong, says, tmp_path, model):
    (tmp_path / "no_name.yaml").write_text("dataset_path: json")
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "no_data.yaml").write_text(
        "task: x\ndataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}")
    with pytest.raises(ConfigError, match=says) as error:
        run_harness(model, ByteTokenizer(), tmp_path / wrong if wrong else wrong)
    assert "\n" not in str(error.value)


def test_unknown_and_offline_names(model):
    with pytest.raises(ConfigError, match="knows no task of this name"):
        run_harness(model, ByteTokenizer(), "hellaswagg")
    if os.environ.get("HF_HUB_OFFLINE"):
        with pytest.raises(ConfigError, match="need the network"):
            run_harness(model, ByteTokenizer(), "copa")


def test_without_lm_eval_one_line_says_how_to_get_it():
    code = ("import sys; sys.modules['lm_eval'] = None\n"
            "from sprout_lab.evaluation.harness import run_harness\n"
            "from sprout_lab.configs import ConfigError\n"
            "try: run_harness('a', None, 'b')\nexcept ConfigError as error: print(error)")
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root,
                           check=True)
    assert "pip install" in shown.stdout and shown.stdout.count("\n") == 1 and not shown.stderr
