"""Tokenizers: parity with public ones, streams cut anywhere, training against its definition."""
import gzip
import json
import os
import subprocess
import sys
import time
import tracemalloc
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tokenizers as hf_tokenizers
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sprout_lab.configs import ConfigError
from sprout_lab.data import tokenizers as module
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import (
    PATTERN, ByteTokenizer, CharTokenizer, SentencePieceTokenizer, Tokenizer, apply_merges,
    count_pretokens, cut_point, document_end, encode_array, fingerprint, last_boundary,
    load_tokenizer, recoverable, resolve_tokenizer, save_tokenizer, token_bytes, train_bpe)

ROOT = Path(__file__).parent.parent
END = "<|endoftext|>"
# as published with GPT-2
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
any_text = st.text(max_size=60)
# text that provokes: boundaries, contractions, special tokens, scripts, white space of all kinds
tricky = st.lists(st.sampled_from([" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "\x1c",
                                   "\x85", "a", "the", "'s", "'ll", "'", "’", "1", "½", ".", "...",
                                   "!?", "été", "e\u0301", "世界",
                                   "。", "🌍", "👩‍👩‍👧", "مرحبا", "Привет", END, END + END, "<|end",
                                   "oftext|>", "<|", "|>", "<| a |>", "def f(x):\n    return"]),
                  max_size=20).map("".join)


def refused(call, *parts):
    with pytest.raises(ConfigError) as error: call()
    text = str(error.value)
    assert "\n" not in text and 10 < len(text) < 500, text
    for part in parts: assert part in text, text


def plain_encode(tokenizer: Tokenizer, text: str, pattern=GPT2_PATTERN) -> list[int]:
    """The definition, word for word: split at special tokens (longest first), then GPT-2's
    pattern, then merges by rank."""
    ranks = {}
    for rank, pair in enumerate(tokenizer.merges): ranks.setdefault(pair, rank)
    ids = {}
    for i, token in sorted(tokenizer.vocab.items(), reverse=True):
        if i not in tokenizer.special_tokens.values(): ids[token] = i
    special = sorted(tokenizer.special_tokens, key=len, reverse=True)
    anywhere = "(" + "|".join(map(regex.escape, special)) + ")"
    parts = regex.split(anywhere, text) if special else [text]
    found = []
    for i, part in enumerate(parts):
        if i % 2: found.append(tokenizer.special_tokens[part])
        else:
            for pretoken in regex.findall(pattern, part):
                found += [ids[token] for token in apply_merges(pretoken.encode(), ranks)]
    return found


@pytest.fixture(scope="module")
def small():
    text = "".join(load_corpus("tales").documents("validation")) + "世界。世界 été 🌍🌍 "
    special = [END, END + END, "<| a |>"]
    return Tokenizer(*train_bpe([text], 700, special), special)


@pytest.fixture(scope="module")
def gpt2(lab_data):
    return Tokenizer.from_files(lab_data("gpt2/encoder.json"), lab_data("gpt2/vocab.bpe"))


# --- bytes and characters

@settings(deadline=None)
@given(text=any_text)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids == list(text.encode()) and tokenizer.decode(ids) == text
    assert encode_array(tokenizer, text).tolist() == ids
    assert tokenizer(text)["input_ids"] == ids and max(ids, default=0) < 254


@settings(deadline=None)
@given(ids=st.lists(st.integers(0, 258), max_size=30))
def test_bytes_decode_anything(ids):
    masked = ByteTokenizer(masked=True)
    text = masked.decode(ids, skip_special_tokens=True)
    if not any(254 <= i for i in ids): assert text == bytes(ids).decode(errors="replace")
    assert masked.decode(np.array(ids, int)) == masked.decode(ids)


def test_byte_tokenizer_in_hugging_face_hands():
    tokenizer = ByteTokenizer()
    batch = tokenizer(["ab", "abcd"], padding=True, return_tensors="pt")
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert batch["input_ids"][0].tolist() == [97, 98, 255, 255]
    assert tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True) == ["ab", "abcd"]
    assert tokenizer.convert_ids_to_tokens([97, 255]) == ["a", "<eos>"]
    assert len(tokenizer.get_vocab()) == 256
    assert tokenizer.encode("a<eos>") == list(b"a<eos>")
    assert tokenizer.encode("ab", truncation=True, max_length=1) == [97]
    masked = ByteTokenizer(masked=True)
    assert masked.encode("a<mask>") == [97, 257] and len(masked.get_vocab()) == 259
    refused(lambda: tokenizer.decode([256]), "256")
    refused(lambda: tokenizer.encode("a\ud800"), "surrogate")


def fast_bytes():
    "Hugging Face's own byte-level tokenizer without merges: one token per byte, with offsets."
    alphabet = sorted(hf_tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: i for i, character in enumerate(alphabet)}
    backend = hf_tokenizers.Tokenizer(hf_tokenizers.models.BPE(vocab=vocab, merges=[]))
    byte_level = hf_tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False)
    backend.pre_tokenizer = byte_level
    backend.post_processor = hf_tokenizers.processors.ByteLevel(trim_offsets=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="!")


@settings(max_examples=60, deadline=None)
@given(texts=st.lists(tricky, min_size=1, max_size=3), side=st.sampled_from(["left", "right"]),
       length=st.one_of(st.none(), st.integers(1, 20)))
def test_offsets_are_those_of_hugging_face(texts, side, length):
    "Characters of each byte, with truncation and padding at either side, in batches."
    ours, theirs = ByteTokenizer(), fast_bytes()
    options = dict(padding=True, return_offsets_mapping=True, add_special_tokens=False)
    if length: options |= dict(truncation=True, max_length=length)
    for tokenizer in (ours, theirs): tokenizer.padding_side = tokenizer.truncation_side = side
    found, expected = ours(texts, **options), theirs(texts, **options)
    places = [[tuple(pair) for pair in row] for row in expected["offset_mapping"]]
    assert found["offset_mapping"] == places
    assert found["attention_mask"] == expected["attention_mask"]
    assert found["input_ids"] == ours(texts,
                                      **(options | {"return_offsets_mapping": False}))["input_ids"]
    assert all(type(i) is int for row in found["input_ids"] for i in row)


def test_offsets_in_every_form():
    plain, masked = ByteTokenizer(), ByteTokenizer(masked=True)
    one = plain("né!", return_offsets_mapping=True)
    assert one["offset_mapping"] == [(0, 1), (1, 2), (1, 2), (2, 3)]
    assert one["input_ids"] == [*"né!".encode()]
    assert plain("", return_offsets_mapping=True)["offset_mapping"] == []
    assert plain(["", "a"], return_offsets_mapping=True)["offset_mapping"] == [[], [(0, 1)]]
    assert masked("é<mask> b",
                  return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (0, 1), (1, 7), (7, 8),
                                                                     (8, 9)]
    # text stays text
    assert len(plain("é<mask>", return_offsets_mapping=True)["offset_mapping"]) == 8
    pair = plain("né", "ab", return_offsets_mapping=True)
    assert pair["offset_mapping"] == [(0, 1), (1, 2), (1, 2), (0, 1), (1, 2)]
    words = plain(["é", "ab"], is_split_into_words=True, return_offsets_mapping=True)
    assert words["offset_mapping"] == [(0, 1), (0, 1), (0, 1), (1, 2)]
    tensors = plain(["é", "ab!"], padding=True, return_offsets_mapping=True, return_tensors="pt")
    assert tensors["offset_mapping"].tolist() == [[[0, 1], [0, 1], [0, 0]],
                                                  [[0, 1], [1, 2], [2, 3]]]
    assert tensors["input_ids"].dtype == torch.int64 and tensors["input_ids"].shape == (2, 3)
    assert plain("ab", return_offsets_mapping=True,
                 return_tensors="pt")["offset_mapping"].shape == (1, 2, 2)
    assert "offset_mapping" not in plain("ab")
    characters = CharTokenizer.from_text("abé", eos=True)
    assert characters("bé", return_offsets_mapping=True)["offset_mapping"] == [(0, 1), (1, 2)]


def test_raw_bytes():
    tokenizer = ByteTokenizer()
    for raw, place in [(b"a\xfe", "byte 1 is 0xFE"), (b"\xff", "begin and end of text"),
                       (b"abc\xc3", "byte 3")]:
        refused(lambda: tokenizer.encode_bytes(raw), place)
    replaced = tokenizer.encode_bytes(b"a\xfe\xffb", invalid="replace")
    assert replaced == list("a\ufffd\ufffdb".encode())


@settings(deadline=None)
@given(vocabulary=st.sets(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20),
       data=st.data())
def test_characters_round_trip(vocabulary, data):
    tokenizer = CharTokenizer.from_text("".join(vocabulary))
    text = data.draw(st.text(st.sampled_from(sorted(vocabulary)), max_size=30))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text) == len(tokenizer(text)["input_ids"])
    others = st.characters(exclude_categories=["Cs"]).filter(lambda c: c not in vocabulary)
    foreign = data.draw(others)
    refused(lambda: tokenizer.encode(text + foreign), f"U+{ord(foreign):04X}")


# --- training

def naive_merges(counts: Counter, number: int) -> list:
    """BPE as defined: count all pairs, take the most frequent, the lexicographically greater on a
    tie, merge it everywhere, begin again."""
    words = {tuple(bytes([b]) for b in piece.encode()): n for piece, n in counts.items()}
    merges = []
    while len(merges) < number:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]): pairs[pair] += n
        if not pairs: break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = Counter()
        for word, n in words.items():
            new, i = [], 0
            while i < len(word):
                if word[i:i + 2] == best: new.append(word[i] + word[i + 1]); i += 2
                else: new.append(word[i]); i += 1
            merged[tuple(new)] += n
        words = merged
    return merges


@settings(max_examples=150, deadline=None)
@given(pieces=st.dictionaries(st.text("ab\xff", min_size=1, max_size=12), st.integers(1, 5),
                              max_size=8),
       number=st.integers(0, 30))
def test_merges_are_those_of_the_definition(pieces, number):
    assert module.learn_merges(pieces, number) == naive_merges(Counter(pieces), number)


def test_training_on_real_text_follows_the_definition():
    text = "".join(load_corpus("tales").documents("validation"))[:40_000]
    vocab, merges = train_bpe([text], 256 + 150 + 1, [END])
    assert merges == naive_merges(Counter(regex.findall(GPT2_PATTERN, text)), 150)
    assert list(vocab.values()) == [END.encode(), *(bytes([b]) for b in range(256)),
                                    *(a + b for a, b in merges)]


def test_rust_trainers_break_ties_otherwise():
    "Why training is not delegated: the same frequent pairs, another order among equals."
    rustbpe = pytest.importorskip("rustbpe")
    text = "".join(load_corpus("tales").documents("validation"))[:40_000]
    _, merges = train_bpe([text], 500)
    other = rustbpe.Tokenizer()
    other.train_from_iterator(iter([text]), 500, pattern=GPT2_PATTERN)
    theirs = [bytes(t) for t, _ in sorted(other.get_mergeable_ranks(), key=lambda r: r[1])][256:]
    assert theirs != [a + b for a, b in merges]
    assert len(set(theirs) & {a + b for a, b in merges}) > 0.9 * len(merges)


def test_no_merge_crosses_a_special_token(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("ab" + END + "ab" + END + "xy" + END * 50)
    vocab, merges = train_bpe(path, 256 + 2 + 1, [END])
    assert merges == [(b"a", b"b"), (b"x", b"y")]
    _, unaware = train_bpe(path, 256 + 2)
    assert unaware != merges   # without the special token its letters are text


@pytest.mark.parametrize("size", [50, 1000, 1 << 20])
def test_counting_does_not_depend_on_parts_or_processes(size):
    text = ("The quick brown fox's <|a b|> 世界。" + END) * 200
    special = (END, "<|a b|>")
    whole = module._count(text, special)
    pieces = [text[i:i + 77] for i in range(0, len(text), 77)]
    parts = Counter()
    for part in module._split_at_boundaries(pieces, special, size):
        parts.update(module._count(part, special))
    assert parts == whole == count_pretokens([pieces], special)


def test_parallel_training_gives_the_same(tmp_path, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_text("".join(load_corpus("tales").documents("validation")))
    assert train_bpe(path, 300, [END], num_workers=2) == train_bpe(path, 300, [END])


def test_a_text_that_runs_out_of_pairs(caplog):
    """The size asked for is the largest there may be; what there is comes back, and by name it is
    said."""
    vocab, merges = train_bpe(["low low lower"], 10_000, [END])
    assert merges == naive_merges(Counter(regex.findall(GPT2_PATTERN, "low low lower")), 10_000)
    assert len(vocab) == 257 + len(merges) < 300
    tokenizer = load_tokenizer("bpe", "low low lower", 10_000)
    assert len(tokenizer) == len(vocab)
    assert tokenizer.decode(tokenizer.encode("lower slow")) == "lower slow"
    assert f"vocab_size=10000: the text has pairs for {len(merges)} merges" in caplog.text
    assert [len(part) for part in train_bpe([""], 400)] == [256, 0]


def test_impossible_sizes(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text("aaaa")
    refused(lambda: train_bpe(path, 255), "at least 256")
    refused(lambda: train_bpe(path, 256, [END]), "at least 257")
    assert [len(part) for part in train_bpe(path, 300)] == [258, 2]   # all that there is
    refused(lambda: train_bpe(path, 300, [""]), "empty")
    refused(lambda: train_bpe(tmp_path / "u.txt", 300), "no such", "'t.txt'")


# --- encoding: our engine, the definition, Hugging Face, tiktoken

TEXTS = ["", " ", "\n", "Hello, world!", "  two  spaces ", "tabs\tand\r\nlines\r\n\r\n",
         "I'll don't we've they're 'tis 's 'S 'LL", "été e\u0301te\u0301 naïve", "a" * 3000,
         " " * 3000, "\n" * 500 + "x",
         "1234567 ½ ① ４２ 1,000.50", "世界你好。今日は、한국어", "Привет мир", "مرحبا بالعالم", "नमस्ते दुनिया",
         "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 👍🏽", "a\u0300\u0301\u0302b", "\u200b\u200d\ufeff\u00a0\u2003x",
         "def f(x):\n    return x ** 2  # comment\n", "http://a.b/c?d=e&f=%20", "<|endoftext|>",
         "<|endoftext|><|endoftext|>", "x<|endoftext|>y <|endoftext|> z", "<|endoftext",
         "|endoftext|>",
         "\x00\x01\x7f", "\x1c\x1d \x85 \u2028\u2029", "Ω≈ç√∫˜µ≤≥÷", "ﬁ ﬂ Ǆ ß ẞ İ ı",
         "don’t “quote” — dash…", "A\u00adB", "\U000e0041\U000e0042", "𝕳𝖊𝖑𝖑𝖔 𝟙𝟚"]


@pytest.mark.parametrize("which", ["small", "gpt2"])
def test_encoding_follows_the_definition(which, request):
    tokenizer = request.getfixturevalue(which)
    hugging = tokenizer.to_hf()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        theirs = hugging.encode(text, add_special_tokens=False)
        assert ids == plain_encode(tokenizer, text) == theirs, text
        back = hugging.decode(ids, clean_up_tokenization_spaces=False)
        assert tokenizer.decode(ids) == text == back


def test_gpt2_is_gpt2(gpt2, lab_data):
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks
    from transformers import GPT2Tokenizer
    ranks = data_gym_to_mergeable_bpe_ranks(vocab_bpe_file=str(lab_data("gpt2/vocab.bpe")),
                                            encoder_json_file=str(lab_data("gpt2/encoder.json")))
    theirs = tiktoken.Encoding("gpt2", pat_str=GPT2_PATTERN, mergeable_ranks=ranks,
                               special_tokens={END: 50256}, explicit_n_vocab=50257)
    hugging = GPT2Tokenizer(vocab=str(lab_data("gpt2/encoder.json")),
                            merges=str(lab_data("gpt2/vocab.bpe")))
    assert (len(gpt2), gpt2.eos_token_id, document_end(gpt2)) == (50257, 50256, 50256)
    wiki = gzip.decompress(lab_data("wikitext-2/wiki.valid.raw.gz").read_bytes()).decode()[:300_000]
    for text in [*TEXTS, wiki, "".join(load_corpus("tales").documents("validation"))]:
        expected = theirs.encode(text, allowed_special="all")
        assert gpt2.encode(text) == expected == hugging.encode(text)
        assert gpt2.decode(expected) == theirs.decode(expected)
    assert fingerprint(hugging) == fingerprint(gpt2)
    assert Tokenizer.from_hf(hugging).encode("a b") == gpt2.encode("a b")


@settings(max_examples=150, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.one_of(tricky, any_text))
def test_encoding_any_text(small, text):
    # characters newer than some library's tables, see below
    text = "".join(c for c in text if unicodedata.category(c) != "Cn")
    ids = small.encode(text)
    assert ids == plain_encode(small, text) and small.decode(ids) == text
    assert ids == _hugging(small).encode(text, add_special_tokens=False)
    assert regex.findall(PATTERN, text) == regex.findall(GPT2_PATTERN, text)


_cache: dict = {}
def _hugging(tokenizer):
    if id(tokenizer) not in _cache: _cache[id(tokenizer)] = tokenizer.to_hf()
    return _cache[id(tokenizer)]


def test_every_character_is_divided_alike(small):
    """Each character that Python's tables know, among letters, digits, signs and spaces:
    tiktoken, tokenizers and regex agree."""
    known = [character for character in map(chr, range(0x110000))
             if unicodedata.category(character) not in ("Cn", "Cs", "Co")]
    assert len(known) > 140_000
    for begin in range(0, len(known), 20_000):
        text = "\n".join(f"a{c}b {c}1{c} ." for c in known[begin:begin + 20_000])
        ids = small.encode(text)
        assert ids == _hugging(small).encode(text, add_special_tokens=False)
        assert ids == plain_encode(small, text)


@settings(max_examples=200, deadline=None)
@given(parts=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=6),
       text=st.text("ab c'", max_size=14), shuffle=st.booleans())
@example(parts=[(0, 1), (1, 2), (0, 7)], text="abc", shuffle=False)   # [ab, c] joins by no rule
def test_any_merges_give_the_definition(parts, text, shuffle):
    "Also merges that no training would make: repeated results, rules that cannot be recovered."
    tokens, merges = [b"a", b"b", b"c", b" ", b"'", b"x"], []
    for i, j in parts:
        merges.append((tokens[i % len(tokens)], tokens[j % len(tokens)]))
        tokens.append(tokens[i % len(tokens)] + tokens[j % len(tokens)])
    merges = list(dict.fromkeys(merges))
    if shuffle: merges = merges[::-1]
    names = [bytes([b]) for b in range(256)]
    names += [t for t in dict.fromkeys(a + b for a, b in merges) if len(t) > 1]
    tokenizer = Tokenizer(dict(enumerate(names)), merges)
    assert tokenizer.encode(text) == plain_encode(tokenizer, text)
    if recoverable(merges): assert not isinstance(tokenizer._engine, module._MergeEngine)


@settings(max_examples=100, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 702), max_size=20))
def test_decoding_anything(small, ids):
    ids = [i for i in ids if i < len(small)]
    assert small.decode(ids) == b"".join(small.vocab[i] for i in ids).decode(errors="replace")
    ordinary = [small.vocab[i] for i in ids if i not in small.special_tokens.values()]
    without = small.decode(np.array(ids, int), skip_special_tokens=True)
    assert without == b"".join(ordinary).decode(errors="replace")


def test_long_runs_do_not_crash(small):
    for text in ("a" * 300_000, " " * 300_000, "^" * 300_000, "\n" * 100_000 + "a", "世" * 100_000):
        assert small.decode(small.encode_array(text)) == text


def test_wrong_use(small, tmp_path):
    refused(lambda: small.decode([10_000]), "10000")
    refused(lambda: small.encode("\udc00"), "surrogate")
    refused(lambda: Tokenizer({0: b"a"}, []), "lacks")
    refused(lambda: Tokenizer(small.vocab, [(b"zq", b"q")]), "lacks")
    refused(lambda: Tokenizer(small.vocab, [], [""]), "empty")
    small.save(tmp_path / "vocab.json", tmp_path / "merges.txt")
    (tmp_path / "bad.json").write_text("[1, 2]")
    (tmp_path / "bad.txt").write_text("one two three\n")
    refused(lambda: Tokenizer.from_files(tmp_path / "vocob.json", tmp_path / "merges.txt"),
            "'vocab.json'")
    refused(lambda: Tokenizer.from_files(tmp_path / "bad.json", tmp_path / "merges.txt"),
            "vocabulary")
    refused(lambda: Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "bad.txt"), "merge")
    plain = Tokenizer.from_files(tmp_path / "vocab.json", tmp_path / "merges.txt", [])
    assert plain.encode(END) != [0]


# --- streams

@settings(max_examples=200, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=tricky, cuts=st.lists(st.integers(0, 200), max_size=12),
       size=st.sampled_from([1, 2, 5, 20]))
def test_streams_cut_anywhere(small, text, cuts, size):
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    pieces = [text[a:b] for a, b in zip(edges, edges[1:])]
    assert list(small.encode_iterable(iter(pieces))) == small.encode(text)
    parts = list(module._split_at_boundaries(pieces, tuple(small.special_tokens), size))
    assert "".join(parts) == text
    assert sum((small.encode(p) for p in parts), []) == small.encode(text)


@settings(max_examples=200, deadline=None)
@given(before=tricky, after=tricky)
def test_a_border_is_one_whatever_follows(before, after):
    place = last_boundary(before)
    pieces = lambda t: regex.findall(GPT2_PATTERN, t)
    assert pieces(before[:place]) + pieces(before[place:] + after) == pieces(before + after)


def test_encode_iterable_is_lazy(small):
    taken = []
    def stream():
        for i in range(10_000):
            taken.append(i)
            yield "some words and more words\n" * 10
    ids = small.encode_iterable(stream())
    for _ in range(10): next(ids)
    assert len(taken) < 1000


@settings(max_examples=60, deadline=None)
@given(text=tricky)
def test_cut_points_of_other_tokenizers(text, lab_bert):
    text = text * 5
    place = cut_point(lab_bert, text)
    ids = lambda text: encode_array(lab_bert, text).tolist()
    assert ids(text[:place]) + ids(text[place:]) == ids(text)


@pytest.fixture(scope="module")
def lab_bert(lab_data): return load_tokenizer(str(lab_data("bert-base-uncased/vocab.txt")))


@pytest.mark.parametrize("line",
                         ["antidisestablishmentarian\r\n", "one\ttwo\t", "mot\u3000", "x\x0b",
                          "word\r"])
def test_lines_of_all_kinds_in_constant_memory(small, line):
    "White space of any kind is a place to cut: word lists with CRLF and tab-separated text too."
    def stream(): return (line * 200 for _ in range(1_500_000 // (200 * len(line))))
    next(small.encode_iterable(stream()))   # what is made once, is made now
    tracemalloc.start()
    try:
        tokens = sum(1 for _ in small.encode_iterable(stream()))
        peak = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert tokens == len(small.encode("".join(stream())))
    assert peak < 6 << 20, f"{peak / 2**20:.0f} MiB"   # 18 and more if the text were held whole
    # counting takes parts like these
    parts = list(module._split_at_boundaries(stream(), (END,), 1 << 15))
    assert max(map(len, parts)) < 1 << 17 and "".join(parts) == "".join(stream())


def test_encoding_takes_the_fast_way(gpt2):
    """tiktoken is a third slower with an empty table of special tokens: it then finds the empty
    one everywhere."""
    assert gpt2.encode("some text") == [11246, 2420]
    assert gpt2._engine.encoding.special_tokens_set
    assert not isinstance(gpt2._engine, module._MergeEngine)


@pytest.mark.slow   # a ratio of CPU times, which a busy machine makes noisy
def test_encoding_is_as_fast_as_tiktoken(gpt2, lab_data):
    import tiktoken
    ranks = {gpt2.vocab[i]: i for i in range(50256)}
    theirs = tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks,
                               special_tokens={END: 50256})
    text = "".join(load_corpus("tales").documents("train"))
    def seconds(encode):
        begin = time.process_time()
        encode(text)
        return time.process_time() - begin
    ratios = sorted(seconds(theirs.encode_ordinary) / seconds(gpt2.encode) for _ in range(9))
    assert ratios[4] > 0.9, ratios


def test_without_tiktoken_the_definition_does_the_work(small, monkeypatch, caplog):
    text = "".join(load_corpus("tales").documents("validation"))[:5000]
    expected = small.encode(text)
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    assert Tokenizer(small.vocab, small.merges, list(small.special_tokens)).encode(text) == expected
    assert "tiktoken is not installed" in caplog.text


@pytest.mark.slow   # two minutes: 100 MB through the tokenizer, twice
def test_100_mb_in_constant_memory(lab_data):
    files = str(lab_data("gpt2/encoder.json")), str(lab_data("gpt2/vocab.bpe"))
    code = f"""
import sprout_lab.data.tokenizers as t
from sprout_lab.data.corpora import read_text
status = lambda: open('/proc/self/status')
anonymous = lambda: int(next(l for l in status() if l.startswith('RssAnon')).split()[1])
tokenizer = t.Tokenizer.from_files(*{files!r})
ids = tokenizer.encode_iterable(read_text({str(lab_data('enwik8/enwik8.gz'))!r}))
peak = number = 0
for number, _ in enumerate(ids, 1):
    if number == 200_000: base = anonymous()
    if number % 200_000 == 0: peak = max(peak, anonymous())
print(number, peak - base)"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    number, grown = map(int, done.stdout.split())
    assert number > 20_000_000 and grown < 30_000, done.stdout   # kB


# --- saved, loaded, compared

@pytest.fixture(scope="module")
def everyone(small, lab_data):
    found = {"byte": ByteTokenizer(), "masked": ByteTokenizer(masked=True),
             "char": CharTokenizer.from_text("abc dé"),
             "char with end": CharTokenizer.from_text("abc dé", eos=True), "bpe": small}
    for name, path in (("sentencepiece", "sentencepiece/botchan_en_unigram_1000.model"),
                       ("llama", "stories15M/tokenizer.bin"),
                       ("bert", "bert-base-uncased/vocab.txt")):
        found[name] = load_tokenizer(str(lab_data(path)))
    return found


def test_checkpoints_bring_their_tokenizer(everyone, tmp_path):
    expected = {}
    for name, tokenizer in everyone.items():
        save_tokenizer(tokenizer, tmp_path / name)
        expected[name] = [encode_array(tokenizer, "abc d").tolist(), len(tokenizer),
                          tokenizer.eos_token_id]
        again = load_tokenizer(tmp_path / name)
        assert fingerprint(again) == fingerprint(tokenizer), name
    code = f"""
import json
import sprout_lab.data.tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
def facts(name):
    t = AutoTokenizer.from_pretrained({str(tmp_path)!r} + "/" + name)
    return [t.encode("abc d", add_special_tokens=False), len(t), t.eos_token_id]
print(json.dumps({{name: facts(name) for name in {list(everyone)!r}}}))"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert json.loads(done.stdout) == expected, done.stderr
    assert len({fingerprint(t) for t in everyone.values()}) == len(everyone)


def test_fingerprints_follow_rules_not_names(small, tmp_path):
    hugging = small.to_hf()
    hugging.save_pretrained(tmp_path)
    assert fingerprint(AutoTokenizer.from_pretrained(tmp_path)) == fingerprint(small)
    other = Tokenizer(small.vocab, small.merges[::-1], list(small.special_tokens))
    fewer = Tokenizer(small.vocab, small.merges, [END])
    assert fingerprint(other) != fingerprint(small) != fingerprint(fewer)


def test_tokenizers_travel_to_processes(everyone):
    import pickle
    for name, tokenizer in everyone.items():
        again = pickle.loads(pickle.dumps(tokenizer))
        assert np.array_equal(encode_array(again, "abc d"), encode_array(tokenizer, "abc d")), name
        assert fingerprint(again) == fingerprint(tokenizer), name


def test_special_tokens_anywhere(tmp_path):
    special = ["<|début|>", "<| spaced out |>", "<a>", "<a><a>"]
    tokenizer = Tokenizer(*train_bpe(["some text to merge, some text"], 270, special[:2]), special)
    tokenizer.save_pretrained(tmp_path)
    text = "x<|début|> <a><a><a><| spaced out |>y"
    ids = tokenizer.encode(text)
    assert ids == plain_encode(tokenizer, text)
    assert ids == AutoTokenizer.from_pretrained(tmp_path).encode(text)
    assert [tokenizer.special_tokens[s] for s in special] == [0, 1, 270, 271]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    files = tmp_path / "vocab.json", tmp_path / "merges.txt"
    assert Tokenizer.from_files(*files, special).encode(text) == ids


@settings(deadline=None)
@given(text=tricky)
def test_sentencepiece_ids(text, lab_sentencepiece):
    import sentencepiece
    model = sentencepiece.SentencePieceProcessor(model_file=str(lab_sentencepiece))
    tokenizer = _cache.setdefault("sp", load_tokenizer(str(lab_sentencepiece)))
    assert tokenizer.encode(text) == model.encode(text)
    assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text))


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def lab_sentencepiece(lab_data, request):
    _cache.pop("sp", None)
    return lab_data(f"sentencepiece/botchan_en_{request.param}_1000.model")


def llama2c_encode(path, text: str) -> list[int]:
    """llama2.c's own procedure: characters (or their bytes), then again and again the neighbours
    whose union has the best score."""
    import struct
    raw, place, pieces, scores = path.read_bytes(), 4, [], []
    while place < len(raw):
        score, length = struct.unpack_from("<fi", raw, place)
        pieces.append(raw[place + 8:place + 8 + length].decode()), scores.append(score)
        place += 8 + length
    known = {p: i for i, p in enumerate(pieces) if i >= 259}
    ids = []
    for character in " " + text if text else "":
        ids += [known[character]] if character in known else [b + 3 for b in character.encode()]
    while True:
        text_of = lambda i: pieces[i] if i >= 259 else "\0"
        joined = [text_of(a) + text_of(b) for a, b in zip(ids, ids[1:])]
        ways = [(scores[known[text]], -k) for k, text in enumerate(joined) if text in known]
        best = max(ways, default=None)
        if best is None: return ids
        k = -best[1]
        ids[k:k + 2] = [known[text_of(ids[k]) + text_of(ids[k + 1])]]


def test_llama2c_ids(lab_data):
    path = lab_data("stories15M/tokenizer.bin")
    tokenizer = load_tokenizer(str(path))
    assert tokenizer.encode("Once upon a time") == [1, 9038, 2501, 263, 931]
    assert len(tokenizer) == 32000 and tokenizer.eos_token_id == 2
    more = ["One day, Lily went to the park.\nShe said: \"Hi!\"", "ababababab aaaaaaaaa", "a ▁ b"]
    for text in [t for t in TEXTS if len(t) < 200 and "\0" not in t] + more:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert ids == llama2c_encode(path, text), text
        assert tokenizer.decode(ids) == text


def test_bytes_of_tokens(everyone, gpt2):
    for name in ("byte", "char", "bpe"):
        tokenizer, text = everyone[name], "abc d"
        lengths = token_bytes(tokenizer)[encode_array(tokenizer, text)]
        assert lengths.sum() == len(text.encode()), name
    text = "".join(load_corpus("tales").documents("validation"))[:5000] + "世界🌍"
    assert token_bytes(gpt2)[gpt2.encode_array(text)].sum() == len(text.encode())
    assert token_bytes(gpt2)[50256] == 0
    assert token_bytes(gpt2.to_hf()).tolist() == token_bytes(gpt2).tolist()


# --- by name

def test_auto_follows_the_size(monkeypatch, lab_data):
    kinds = {None: "byte", 256: "byte", 100: "char", 257: "bpe", 1000: "bpe", 50257: "gpt2"}
    assert {size: resolve_tokenizer("auto", size) for size in kinds} == kinds
    shakespeare = load_corpus("shakespeare")
    assert len(load_tokenizer("auto", shakespeare, 100)) == 65
    assert load_tokenizer("char", shakespeare).eos_token_id is None
    assert load_tokenizer("char", load_corpus("tales")).eos_token_id is not None
    bpe = load_tokenizer("auto", shakespeare, 300)
    assert len(bpe) == 300   # from the training split only
    assert bpe.merges == train_bpe([*shakespeare.documents("train")], 300, [END])[1]
    monkeypatch.setenv("SPROUT_LAB_DATA", str(lab_data("gpt2").parent))
    assert len(load_tokenizer("auto", vocab_size=50257)) == 50257
    refused(lambda: load_tokenizer("auto", shakespeare, 40), "65")
    refused(lambda: load_tokenizer("bpe", shakespeare, 200), "at least 257")
    refused(lambda: load_tokenizer("gpt2", vocab_size=1000), "50,257")


def test_names_and_files_that_are_wrong(tmp_path, monkeypatch):
    monkeypatch.delenv("SPROUT_LAB_DATA", raising=False)
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text('{"model": ')
    for name in ("a.model", "a.bin", "a.txt"):
        (tmp_path / name).write_bytes(b"\x00\x01nothing of the kind")
    for name, *parts in [("byt", "'byte'"), ("./nowhere", "no such"),
                         (tmp_path / "empty", "no tokenizer"),
                         (tmp_path / "broken", "no tokenizer"),
                         (tmp_path / "a.model", "SentencePiece"),
                         (tmp_path / "a.bin", "llama2.c"),
                         (tmp_path / "a.txt", "no tokenizer file"), ("gpt2", "SPROUT_LAB_DATA"),
                         ("some/where", "hub")]:
        refused(lambda: load_tokenizer(str(name)), *parts)
    refused(lambda: load_tokenizer("char"), "corpus")
    refused(lambda: load_tokenizer("bpe", load_corpus("tales")), "vocab_size")


def test_sentencepiece_is_optional(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    (tmp_path / "a.model").touch()
    refused(lambda: SentencePieceTokenizer(str(tmp_path / "a.model")), "pip install sentencepiece")
