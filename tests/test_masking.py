"""Masking: shares, special tokens, purity, whole words, held-out windows, pseudo-log-likelihood."""
import math

import numpy as np
import pytest
import torch

from sprout_lab.configs import ConfigError
from sprout_lab.data.masking import (
    MaskedBatches, MaskedWindows, MaskingRules, mask_tokens, pseudo_log_likelihood)
from sprout_lab.data.tokenizers import (
    ByteTokenizer, CharTokenizer, load_tokenizer, train_wordpiece)

TEXT = ("It was the best of times, it was the worst of times; naïve façade, 狐!\n" * 60)
BYTES = ByteTokenizer(masked=True)


@pytest.fixture(scope="module")
def wordpiece(): return train_wordpiece([TEXT], vocab_size=120)


def ids_of(tokenizer):
    return np.asarray(tokenizer.encode(TEXT, add_special_tokens=False), dtype=np.int64)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("mask_prob", [0.05, 0.15, 0.5])
@pytest.mark.parametrize("name", ["bytes", "wordpiece"])
def test_shares_and_special_tokens(name, mask_prob, whole, wordpiece):
    tokenizer = BYTES if name == "bytes" else wordpiece
    rules = MaskingRules(tokenizer)
    ids = np.tile(ids_of(tokenizer)[None, :800], (60, 1))
    ids[:, ::17] = rules.pad_id
    input_ids, labels = mask_tokens(ids, rules, np.random.default_rng(0), mask_prob, whole)
    chosen, ordinary = labels != -100, ~rules.special[ids]
    assert not chosen[ids == rules.pad_id].any()
    assert (input_ids[~chosen] == ids[~chosen]).all() and (labels[chosen] == ids[chosen]).all()
    assert abs(chosen[ordinary].mean() - mask_prob) < 0.02
    assert abs((input_ids == rules.mask_id)[chosen].mean() - 0.8) < 0.02
    assert abs((input_ids == ids)[chosen].mean() - 0.1) < 0.03
    assert not rules.special[input_ids[chosen & (input_ids != rules.mask_id)]].any()
    if not whole: return
    words = rules.words(ids[0])
    for word in np.unique(words):
        counts = chosen[:, words == word][:, ordinary[0][words == word]].sum(1)
        assert len(np.unique(counts)) <= 2, "a word is asked for as a whole or not at all"


def test_words_of_bytes_and_pieces(wordpiece):
    rules = MaskingRules(BYTES)
    raw = np.array(BYTES.encode("naïve don't 42nd"), dtype=np.int64)
    assert len(np.unique(rules.words(raw))) == 7   # naïve, blank, don, ', t, blank, 42nd
    pieces = wordpiece.convert_ids_to_tokens(ids := ids_of(wordpiece)[:200])
    starts = np.flatnonzero(np.diff(MaskingRules(wordpiece).words(ids), prepend=-1))
    assert starts.tolist() == [i for i, p in enumerate(pieces) if not p.startswith("##")]


@pytest.mark.parametrize("order", ["random", "shuffle"])
def test_a_batch_is_a_function_of_seed_and_number(order):
    tokens = ids_of(BYTES)
    make = lambda seed=3: MaskedBatches(tokens, BYTES, 6, 32, seed, order)
    a, b = make(), make()
    for _ in range(3): a.batch(0)   # no hidden state
    for index in (0, 7, 12345):
        one, two = a.batch(index), b.batch(index)
        assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
    assert not torch.equal(a.batch(1)["input_ids"], make(seed=4).batch(1)["input_ids"])


def test_a_window_comes_back_with_other_gaps():
    batches = MaskedBatches(ids_of(BYTES), BYTES, 6, 32, seed=3, order="shuffle")
    seen = {}   # window → its gaps
    for index in range(2 * batches.windows.num_windows // 6 + 2):
        batch = batches.batch(index)
        asked = batch["labels"] != -100
        whole = torch.where(asked, batch["labels"], -1)
        for row, gaps, ids in zip(whole, asked, batch["input_ids"]):
            known = tuple(torch.where(gaps, row, ids).tolist())
            seen.setdefault(known, []).append(tuple(gaps.tolist()))
    repeated = [gaps for gaps in seen.values() if len(gaps) > 1]
    assert repeated and sum(len(set(gaps)) > 1 for gaps in repeated) > 0.9 * len(repeated)


def test_padding_gets_a_mask_and_no_target():
    tokens = ids_of(BYTES).copy()
    tokens[::5] = 256
    batch = MaskedBatches(tokens, BYTES, 4, 40).batch(0)
    padding = batch["attention_mask"] == 0
    assert padding.any() and (batch["labels"][padding] == -100).all()
    assert (batch["input_ids"][padding] == 256).all()


def test_held_out_windows_are_fixed_and_cover_the_text():
    tokens = ids_of(BYTES)[:1003]
    one, two = list(MaskedWindows(tokens, BYTES, 64, 3)), list(MaskedWindows(tokens, BYTES, 64, 8))
    for key in ("input_ids", "labels", "shift_labels"):
        assert torch.equal(torch.cat([b[key] for b in one]), torch.cat([b[key] for b in two]))
    last = one[-1]
    assert (last["labels"][last["attention_mask"] == 0] == -100).all()
    restored = [torch.where(b["labels"] == -100, b["input_ids"], b["labels"]) for b in one]
    restored = torch.cat([rows.flatten() for rows in restored])
    assert restored[:1002].tolist() == tokens[:1002].tolist()
    assert len(MaskedWindows(tokens, BYTES, 64, 2, max_batches=3)) == 3
    other = MaskedWindows(tokens, BYTES, 64, 3, seed=1)
    assert not torch.equal(other[0]["labels"], one[0]["labels"])


def test_evaluation_of_a_masked_model_does_not_shift():
    from sprout_lab.metrics import evaluate_model

    class Oracle(torch.nn.Module):
        "Knows the answer at its own place."

        def __init__(self, windows):
            super().__init__()
            self.answers = iter([batch["labels"] for batch in windows])
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, attention_mask=None):
            answer = next(self.answers).clamp(min=0)
            return {"logits": 50.0 * torch.nn.functional.one_hot(answer, 259).float()}

    windows = list(MaskedWindows(ids_of(BYTES)[:2000], BYTES, 64, 4))
    for shift in (True, False):
        assert evaluate_model(Oracle(windows), windows, None, shift=shift)["accuracy"] == 1.0


def test_pseudo_log_likelihood_by_hand(wordpiece):
    from sprout_lab.models.sprout import SproutConfig, SproutForMaskedLM
    torch.manual_seed(0)
    config = SproutConfig(vocab_size=len(wordpiece), hidden_size=32, num_attention_heads=2,
                          tree=[-1, 0, 0])
    model = SproutForMaskedLM(config).train()
    text = "it was the best of times"
    ids = torch.tensor(wordpiece.encode(text, add_special_tokens=False))
    score = pseudo_log_likelihood(model, wordpiece, text, batch_size=3)
    assert model.training
    model.eval()
    total = 0.0
    for t in range(len(ids)):
        hidden = ids.clone()
        hidden[t] = wordpiece.mask_token_id
        with torch.no_grad(): logits = model(hidden[None]).logits[0, t].double()
        total += logits.log_softmax(-1)[ids[t]].item()
    assert math.isclose(score["pseudo_log_likelihood"], total, rel_tol=1e-5)
    assert score["num_bytes"] == len(text)
    bits = -total / math.log(2) / len(text)
    assert math.isclose(score["pseudo_bits_per_byte"], bits, rel_tol=1e-5)


def test_wordpiece_saves_and_loads(wordpiece, tmp_path):
    from transformers import AutoTokenizer
    wordpiece.save_pretrained(tmp_path)
    twin = AutoTokenizer.from_pretrained(tmp_path)
    assert twin.encode("It was naive!") == wordpiece.encode("It was naive!")
    assert twin.mask_token_id == wordpiece.mask_token_id
    text = "it was the best of times"
    assert wordpiece.decode(wordpiece.encode(text)) == text


def test_the_published_vocabulary(lab_data):
    bert = load_tokenizer(str(lab_data("bert-base-uncased/vocab.txt")))
    assert len(bert) == 30522 and bert.mask_token_id == 103
    pieces = ["the", "quick", "brown", "fox", ",", "una", "##ffa", "##ble"]
    assert bert.tokenize("The quick brown fox, unaffable") == pieces


@pytest.mark.parametrize("call", [
    lambda: MaskingRules(ByteTokenizer()), lambda: MaskingRules(CharTokenizer("abc")),
    lambda: train_wordpiece("a b", 3), lambda: pseudo_log_likelihood(None, BYTES, ""),
    lambda: MaskedBatches(np.arange(5), BYTES, 2, 64)],
    ids=["no mask", "no mask in characters", "too few pieces", "no text", "too short"])
def test_wrong_input_is_one_line(call):
    with pytest.raises(ConfigError) as caught: call()
    assert "\n" not in str(caught.value)
