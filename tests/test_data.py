"""Token files, batches, corpora and preparation: damage, processes, kill -9, full disks, pipes."""
import ctypes
import gzip
import hashlib
import json
import lzma
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sprout_lab import progress as progress_module
from sprout_lab.configs import ConfigError, DataConfig, settings_fields
from sprout_lab.data import corpora as corpora_module
from sprout_lab.data import prepare as prepare_module
from sprout_lab.data.batches import Batches, Windows, permute
from sprout_lab.data.corpora import (
    Corpus, FileSource, character_start, corpora, load_corpus, local_corpus, read_text, scan,
    wikitext_documents)
from sprout_lab.data.prepare import (
    PrepareConfig, blocks, encode_block, file_kind, load_data, prepare, prepare_from_config,
    read_ids)
from sprout_lab.data.tokenizers import (
    ByteTokenizer, CharTokenizer, Tokenizer, document_end, encode_array, fingerprint, keeps_text,
    load_tokenizer, train_bpe)
from sprout_lab.data.tokens import HEADER_BYTES, TokenFile, TokenWriter, get_batch

ROOT = Path(__file__).parent.parent


def one_line(error) -> str:
    "The message of a ConfigError, which must be one line of reasonable length."
    text = str(error.value)
    assert "\n" not in text and 10 < len(text) < 500, text
    return text


def refused(call, *parts):
    with pytest.raises(ConfigError) as error: call()
    text = one_line(error)
    for part in parts: assert part in text, text


def python(code: str, **environment) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT,
                            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process) -> str:
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


@pytest.fixture
def in_time():
    "A test that would wait for ever (for a pipe's writer) fails after twenty seconds."
    def late(*_): raise AssertionError("waits for ever")
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@contextmanager
def without_root():
    "Root may read everything; without two of its capabilities it may not."
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)                  # the third version, this thread
    # effective, permitted, inheritable
    before, less = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    assert not libc.capget(header, before)
    less[:] = before
    less[0] &= ~0b110                                              # DAC_OVERRIDE, DAC_READ_SEARCH
    assert not libc.capset(header, less)
    try: yield
    finally: libc.capset(header, before)


# --- token files

def write(path, ids, vocab_size=256, **facts):
    with TokenWriter(path, vocab_size, **facts) as writer:
        writer.write(ids, num_bytes=len(ids), num_documents=1)
    return path


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.lists(st.integers(0, 299), max_size=50), max_size=6),
       vocab_size=st.sampled_from([300, 2**16, 2**16 + 1]))
def test_token_file_round_trip(tmp_path, pieces, vocab_size):
    with TokenWriter(tmp_path / "t.bin", vocab_size, "f" * 64, "a name") as writer:
        for piece in pieces: writer.write(piece, num_bytes=3, num_documents=2)
    tokens = TokenFile.open(tmp_path / "t.bin", "f" * 64)
    assert tokens[:].tolist() == sum(pieces, []) and len(tokens) == len(sum(pieces, []))
    assert (tokens.num_bytes, tokens.num_documents) == (3 * len(pieces), 2 * len(pieces))
    assert (tokens.vocab_size, tokens.name) == (vocab_size, "a name")
    assert tokens.dtype == ("uint32" if vocab_size > 2**16 else "uint16")
    assert not list(tmp_path.glob(".*"))


def test_every_single_damage_is_noticed(tmp_path):
    raw = write(tmp_path / "t.bin", np.arange(200), name="t").read_bytes()
    json_end = 20 + int.from_bytes(raw[12:16], "little")
    places = [*range(json_end), *range(HEADER_BYTES, len(raw))]
    flips = [(place, bit) for place in places for bit in (0, 7)]
    for place, bit in random.Random(0).sample(flips, 150):
        damaged = bytearray(raw)
        damaged[place] ^= 1 << bit
        (tmp_path / "d.bin").write_bytes(damaged)
        refused(lambda: TokenFile.open(tmp_path / "d.bin"), "d.bin")
    for length in (0, 1, 7, 19, 100, HEADER_BYTES - 1, HEADER_BYTES, len(raw) - 1):
        (tmp_path / "d.bin").write_bytes(raw[:length])
        refused(lambda: TokenFile.open(tmp_path / "d.bin"), "d.bin")
    (tmp_path / "d.bin").write_bytes(raw + b"\0")
    refused(lambda: TokenFile.open(tmp_path / "d.bin"), "longer")


def test_wrong_token_files_are_refused(tmp_path):
    write(tmp_path / "t.bin", [1, 2, 3], fingerprint=fingerprint(ByteTokenizer()))
    refused(lambda: TokenFile.open(tmp_path / "t.bin", CharTokenizer("abc")), "another tokenizer")
    refused(lambda: TokenFile.open(tmp_path / "u.bin"), "no such token file", "'t.bin'")
    refused(lambda: TokenFile.open(tmp_path), "folder")
    (tmp_path / "old.bin").write_bytes(np.arange(9000, dtype=np.uint16).tobytes())
    refused(lambda: TokenFile.open(tmp_path / "old.bin"), "not a sprout-lab token file")
    with TokenWriter(tmp_path / "w.bin", 10) as writer:
        refused(lambda: writer.write([3, 10]), "10", "0 to 9")
    assert TokenFile.open(tmp_path / "t.bin", ByteTokenizer())[:].tolist() == [1, 2, 3]


def resealed(path, facts=None, **changes) -> None:
    "A token file whose header says something else, under a checksum that holds."
    raw = path.read_bytes()
    header = json.loads(raw[20:20 + int.from_bytes(raw[12:16], "little")])
    text = facts if facts is not None else json.dumps(header | changes).encode()
    sealed = raw[:8] + struct.pack("<III", 1, len(text), zlib.crc32(text)) + text
    path.write_bytes(sealed.ljust(HEADER_BYTES, b"\0") + raw[HEADER_BYTES:])


@pytest.mark.parametrize("header",
                         [b"[]", b"{}", b"null", b"\xff\xfe", b"[" * 4000,
                          b'{"num_tokens": ' + b"9" * 4000 + b"}", b"{\"dtype\": \"uint8\"}"])
def test_sealed_nonsense_is_refused(tmp_path, header):
    resealed(write(tmp_path / "t.bin", np.arange(200)), header)
    refused(lambda: TokenFile.open(tmp_path / "t.bin"), "header does not hold")


@pytest.mark.parametrize("changes",
                         [dict(vocab_size=0), dict(vocab_size=-5), dict(vocab_size=10**12),
                          dict(vocab_size=200.0), dict(num_bytes=-1), dict(num_documents=-1),
                          dict(num_tokens=-1), dict(dtype="object"), dict(dtype="<u2"),
                                     dict(checksum=None), dict(name=[]), dict(num_tokens=True)])
def test_impossible_headers_are_refused(tmp_path, changes):
    resealed(write(tmp_path / "t.bin", np.arange(200)), **changes)
    refused(lambda: TokenFile.open(tmp_path / "t.bin"), "t.bin")


@pytest.mark.parametrize("size, ids",
                         [(256, [1, 2, 200] * 50), (300, [1, 299] * 50),
                          (70_000, [1, 69_999] * 50)])
def test_ids_beyond_the_vocabulary_are_refused(tmp_path, size, ids):
    """A header that promises a smaller vocabulary than its ids need would otherwise be an index
    error in the embedding."""
    resealed(write(tmp_path / "t.bin", ids, size), vocab_size=max(ids))
    refused(lambda: TokenFile.open(tmp_path / "t.bin"), f"holds the id {max(ids)}",
            f"0 to {max(ids) - 1}")
    resealed(tmp_path / "t.bin", vocab_size=max(ids) + 1)
    assert TokenFile.open(tmp_path / "t.bin")[:].tolist() == ids


def test_checksum_is_remembered_until_the_file_changes(tmp_path):
    path = write(tmp_path / "t.bin", np.zeros(100, int))
    TokenFile.open(path)
    raw = bytearray(path.read_bytes())
    raw[-1] = 1
    path.write_bytes(raw)
    refused(lambda: TokenFile.open(path), "checksum")
    assert TokenFile.open(path, verify=False)[-1] == 1


def test_an_error_leaves_no_token_file(tmp_path):
    with pytest.raises(RuntimeError):
        with TokenWriter(tmp_path / "t.bin", 256) as writer:
            writer.write([1])
            raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_token_file_as_an_array(tmp_path):
    "As every NumPy asks for it: version 1 without `copy`, which must not become None there."
    tokens = TokenFile.open(write(tmp_path / "t.bin", np.arange(50)))
    assert tokens.__array__() is tokens.tokens and tokens.__array__(copy=None) is tokens.tokens
    assert np.array(tokens).flags.writeable and not np.asarray(tokens).flags.writeable
    assert np.asarray(tokens, np.int64).tolist() == tokens[:].tolist()
    with pytest.raises(ValueError): tokens.__array__(np.int64, copy=False)


def test_token_file_in_another_process(tmp_path):
    import pickle
    tokens = TokenFile.open(write(tmp_path / "t.bin", np.arange(50)))
    again = pickle.loads(pickle.dumps(tokens))
    assert again[:].tolist() == list(range(50)) and len(pickle.dumps(tokens)) < 1000


def test_opening_a_large_file_takes_no_anonymous_memory(tmp_path):
    path = tmp_path / "large.bin"
    with TokenWriter(path, 2**16) as writer:
        for _ in range(40): writer.write(np.zeros(2_000_000, np.uint16))   # 160 MB
    code = f"""
import sprout_lab.data.tokens as t, sprout_lab.data.batches as b
status = lambda: open('/proc/self/status')
anonymous = lambda: int(next(l for l in status() if l.startswith('RssAnon')).split()[1])
tokens = t.TokenFile.open({str(path)!r}); b.Batches(tokens, 4, 64).batch(0); before = anonymous()
tokens = t.TokenFile.open({str(path)!r}); batches = b.Batches(tokens, 16, 256)
for i in range(300): batches.batch(i)
for batch in b.Windows(tokens, 256, 16, max_batches=50): pass
print(anonymous() - before)"""
    if not os.path.exists("/proc/self/status"): pytest.skip("needs /proc")
    assert int(finished(python(code))) < 20_000   # kB


# --- batches

@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n, seed):
    assert np.array_equal(np.sort(permute(np.arange(n), n, seed)), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 400), length=st.integers(1, 40), batch_size=st.integers(1, 9),
       seed=st.integers(0, 5), index=st.integers(0, 10**9),
       order=st.sampled_from(["random", "shuffle"]))
def test_batches_are_a_function_of_seed_and_index(n, length, batch_size, seed, index, order):
    stream = np.arange(n) + 7
    if n < length + 1:
        refused(lambda: Batches(stream, batch_size, length), "sequence_length")
        return
    one = Batches(stream, batch_size, length, seed, order)
    one.batch(3)
    batch, again = one.batch(index), Batches(stream, batch_size, length, seed, order).batch(index)
    assert torch.equal(batch["input_ids"], again["input_ids"])
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["shift_labels"], batch["input_ids"] + 1)
    assert batch["shift_labels"].is_contiguous()
    assert batch["input_ids"].shape == (batch_size, length) and batch["shift_labels"].max() < n + 7


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 300), length=st.integers(1, 30), batch_size=st.integers(1, 7),
       epoch=st.integers(0, 3))
def test_shuffle_visits_every_window_once(n, length, batch_size, epoch):
    if n < length + 1: return
    batches = Batches(np.arange(n), batch_size, length, order="shuffle")
    windows = batches.num_windows
    samples = np.arange(epoch * windows, (epoch + 1) * windows)
    starts = np.array([batches.starts(int(s // batch_size))[s % batch_size] for s in samples])
    assert len(set(starts)) == windows and len(set(starts % length)) == 1
    assert starts.max() + length < n


def test_random_order_is_uniform_over_all_starts():
    starts = np.concatenate([Batches(np.arange(61), 50, 11, seed=3).starts(i) for i in range(400)])
    counts = np.bincount(starts, minlength=50)
    assert len(counts) == 50   # 0 to 49, the last valid start
    expected = counts.sum() / 50
    # chi-squared, 49 degrees of freedom, p = 0.001
    assert ((counts - expected) ** 2 / expected).sum() < 85.4


def test_get_batch_is_uniform_and_seeded(tmp_path):
    mapped = np.memmap(tmp_path / "m", dtype=np.uint16, mode="w+", shape=(100,))
    mapped[:] = np.arange(100)
    x, y = get_batch(mapped, 32, 7, "cpu", torch.Generator().manual_seed(1))
    again, _ = get_batch(mapped, 32, 7, "cpu", torch.Generator().manual_seed(1))
    assert torch.equal(x, again) and torch.equal(x + 1, y) and x.dtype == torch.int64
    assert x.shape == (32, 7)
    counts = sum(np.bincount(get_batch(mapped, 1000, 7)[0][:, 0], minlength=93) for _ in range(20))
    # 92 degrees of freedom
    assert len(counts) == 93 and ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 139
    refused(lambda: get_batch(mapped, 2, 100), "101")


@pytest.mark.cuda
def test_get_batch_on_a_gpu():
    x, y = get_batch(np.arange(1000), 8, 16, "cuda")
    torch.cuda.synchronize()
    assert x.is_cuda and torch.equal(x + 1, y)


@settings(max_examples=80, deadline=None)
@given(n=st.integers(2, 300), length=st.integers(1, 40), batch_size=st.integers(1, 7))
def test_windows_predict_each_token_once(n, length, batch_size):
    windows = Windows(np.arange(n), length, batch_size)
    inputs, targets = [], []
    for batch in windows:
        real = batch["shift_labels"] != -100
        mask = batch.get("attention_mask", torch.ones_like(real, dtype=torch.long))
        assert torch.equal(real, mask.bool())
        inputs += batch["input_ids"][real].tolist()
        targets += batch["shift_labels"][real].tolist()
    assert targets == list(range(1, n)) and inputs == list(range(n - 1))
    assert windows.num_targets == n - 1


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 500), length=st.integers(1, 40), batch_size=st.integers(1, 7),
       limit=st.integers(1, 5))
def test_limited_windows_are_whole_and_distinct(n, length, batch_size, limit):
    windows = Windows(np.arange(n), length, batch_size, max_batches=limit)
    starts = torch.cat([b["input_ids"][:, 0] for b in windows])
    assert len(windows) <= limit and len(set(starts.tolist())) == len(starts)
    assert windows.num_targets == sum(int((b["shift_labels"] != -100).sum()) for b in windows)


# --- reading text

@settings(max_examples=60, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(min_size=1, max_size=60).filter(lambda t: "\0" not in t),
       block=st.integers(1, 9), where=st.floats(0, 1))
def test_reading_never_cuts_a_character(tmp_path, text, block, where, monkeypatch):
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora_module, "BLOCK", block)
        assert "".join(read_text(path)) == text
        cut = character_start(path, int(where * len(text.encode())))
        assert "".join(read_text(path, 0, cut)) + "".join(read_text(path, cut)) == text


@pytest.mark.parametrize("raw, place",
                         [(b"abc\xffdef", "byte 3"), (b"ab\xc3", "byte 2"),
                          ("ä".encode() * 400 + b"\xe4\xb8", "byte 800"), (b"\xfe\xffab", "byte 0"),
                          ("naïve".encode("latin-1"), "byte 2"),
                          (b"a" * 1000 + b"\x80", "byte 1,000")])
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_invalid_utf8_is_told_with_its_place(tmp_path, raw, place, block, monkeypatch):
    monkeypatch.setattr(corpora_module, "BLOCK", block)
    path = tmp_path / "t.txt"
    path.write_bytes(raw)
    refused(lambda: list(read_text(path)), place, "UTF-8")


def test_wrong_paths_are_one_line(tmp_path):
    (tmp_path / "story.txt").write_text("Once. " * 200)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "short.txt").write_text("Hello")
    (tmp_path / "image.txt").write_bytes(b"\x89PNG\0\0\0")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "number.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    deep, columns = "[" * 9000 + "]" * 9000, {f"column number {i}": i for i in range(5000)}
    (tmp_path / "deep.jsonl").write_text('{"text": "a"}\n{"text": ' + deep + "}\n")
    digits = '{"text": "a"}\n{"text": "b", "n": ' + "9" * 5000 + "}\n"
    (tmp_path / "digits.jsonl").write_text(digits)
    (tmp_path / "columns.jsonl").write_text(json.dumps(columns) + "\n")
    (tmp_path / "surrogate.jsonl").write_text('{"text": "whole"}\n{"text": "\\ud83d half"}\n')
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(b"abc" * 1000)[:-20])
    (tmp_path / "not.txt.gz").write_bytes(b"plain text")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing" / "picture.jpg").touch()
    use = lambda **kw: lambda: load_data(DataConfig(**kw))
    for name, *parts in [("storry.txt", "no such", "'story.txt'"), ("empty.txt", "empty"),
                         ("blank.jsonl", "no text"), ("short.txt", "sequence_length"),
                         ("image.txt", "binary"), ("bad.jsonl", "line 2"), ("number.jsonl", "int"),
                         ("list.jsonl", "line 1"), ("deep.jsonl", "line 2", "nested"),
                         ("digits.jsonl", "line 2", "digits"),
                         ("columns.jsonl", "no column 'text'"),
                         ("surrogate.jsonl", "line 2", "U+D83D"), ("torn.txt.gz", "decompressed"),
                         ("not.txt.gz", "decompressed"), ("nothing", "no text")]:
        refused(use(train_data_path=str(tmp_path / name)), *parts)
        refused(use(dataset_name=str(tmp_path / name)), *parts)
    refused(use(dataset_name="shakespere"), "'shakespeare'")
    for name in ("", " ", "x" * 5000, "a/" * 300, "~nobody-of-that-name/x.txt", "nul\0l.txt",
                 "no such text.txt", "/dev/null"):
        refused(use(dataset_name=name))
        if name.strip():
            for setting in ("train_data_path", "data_dir", "tokenizer"):
                refused(use(**{setting: name}))
    refused(use(data_dir=str(tmp_path / "nowhere")), "no such")
    refused(use(data_dir=str(tmp_path / "nothing")), "no text")
    refused(use(text_column="story", train_data_path=str(tmp_path / "number.jsonl")), "'story'",
            "text_column")
    refused(use(tokenizer="byte", vocab_size=300), "vocab_size=300")
    refused(use(vocab_size=20), "65")


@pytest.mark.parametrize("late", [4097, 5000, 3 << 20])
@pytest.mark.parametrize("name", ["late.txt", "late.txt.gz", "late.jsonl"])
def test_a_zero_byte_anywhere_is_binary(tmp_path, late, name):
    raw = b"a line of text\n" * (late // 15 + 100)
    raw = raw[:late] + b"\0" + raw[late:]
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    refused(lambda: list(read_text(tmp_path / name)), "binary", f"byte {late:,} is zero")
    if not name.endswith("jsonl"):   # a row that is no JSON is told before
        refused(lambda: load_data(DataConfig(train_data_path=str(tmp_path / name))), "binary")


def special_files(folder) -> list[Path]:
    "A pipe, a socket and a device, all by names of their own."
    os.mkfifo(folder / "pipe")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(folder / "socket"))
    server.close()
    (folder / "device").symlink_to("/dev/zero")
    return [folder / "pipe", folder / "socket", folder / "device"]


@pytest.mark.parametrize("ending",
                         ["", ".txt", ".bin", ".npy", ".jsonl", ".csv", ".parquet", ".gz"])
def test_pipes_sockets_and_devices_are_one_line(tmp_path, ending, in_time):
    for number, made in enumerate(special_files(tmp_path)):
        path = tmp_path / f"{number}{ending}"
        path.symlink_to(made)
        use = lambda **settings: lambda: load_data(DataConfig(**settings))
        (tmp_path / "good.txt").write_text("good text " * 200)
        for call in (use(train_data_path=str(path)), use(dataset_name=str(path)),
                     use(data_dir=str(path)),
                     use(train_data_path=str(tmp_path / "good.txt"), val_data_path=str(path)),
                     lambda: TokenFile.open(path), lambda: list(read_text(path)),
                     lambda: scan(path),
                     lambda: list(FileSource(path).documents()), lambda: local_corpus(path),
                     lambda: file_kind(path), lambda: list(read_ids(path)),
                     lambda: prepare(path, tmp_path / "out"),
                     lambda: prepare("tales", path), lambda: train_bpe(path, 300),
                     lambda: Tokenizer.from_files(path, path), lambda: load_tokenizer(path)):
            refused(call, str(number))


def test_pipes_within_folders_are_one_line(tmp_path, in_time):
    """A pipe among the files of a prepared folder, of an unfinished one, of a tokenizer, of a
    corpus."""
    (tmp_path / "t.txt").write_text("some text to prepare " * 200)
    def prepared(name):
        prepare(tmp_path / "t.txt", tmp_path / name)
        return tmp_path / name
    for name in ("train.bin", "val.bin", "tokenizer/tokenizer_config.json"):
        folder = prepared(name.replace("/", "-"))
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(lambda: load_data(DataConfig(data_dir=str(folder), sequence_length=16)), name)
    folder = prepared("stats")
    (folder / "stats.json").unlink()
    os.mkfifo(folder / "stats.json")
    refused(lambda: prepare(tmp_path / "t.txt", folder), "stats.json")
    for name in ("journal.json", "train.part"):
        (tmp_path / name / ".prepare").mkdir(parents=True)
        os.mkfifo(tmp_path / name / ".prepare" / name)
        prepare(tmp_path / "t.txt", tmp_path / name)   # ours to begin again
        assert digest(tmp_path / name) == digest(prepared("whole"))
    texts = tmp_path / "texts"
    texts.mkdir()
    os.mkfifo(texts / "a.txt")
    refused(lambda: load_corpus(texts), "no text")


def test_directories_in_a_files_place(tmp_path):
    (tmp_path / "d.bin").mkdir()
    for call in (lambda: TokenFile.open(tmp_path / "d.bin"),
                 lambda: list(read_text(tmp_path / "d.bin")),
                 lambda: Tokenizer.from_files(tmp_path / "d.bin", tmp_path / "d.bin"),
                 lambda: list(FileSource(tmp_path / "d.bin").documents())):
        refused(call, "is a folder")


def test_what_may_not_be_read_is_one_line(tmp_path):
    if os.geteuid(): pytest.skip("takes rights from root")
    texts, locked = tmp_path / "texts", tmp_path / "locked"
    for folder in (texts, texts / "deep", locked): folder.mkdir()
    for path in (texts / "a.txt", texts / "deep" / "b.txt", locked / "c.txt", tmp_path / "d.npy"):
        path.write_text("good text " * 200)
    write(tmp_path / "e.bin", np.arange(200))
    prepare(texts / "a.txt", tmp_path / "prepared")
    # imports what it needs
    load_data(DataConfig(train_data_path=str(texts / "a.txt"), sequence_length=16))
    for path in (texts / "deep", locked, tmp_path / "d.npy", tmp_path / "e.bin", texts / "a.txt"):
        path.chmod(0)
    (tmp_path / "prepared" / "train.bin").chmod(0)
    use = lambda **settings: lambda: load_data(DataConfig(**settings, sequence_length=16))
    with without_root():
        for path in (texts / "a.txt", texts, locked, locked / "c.txt", tmp_path / "d.npy",
                     tmp_path / "e.bin"):
            refused(use(train_data_path=str(path)), "cannot be read (Permission denied)")
        for path in (texts / "a.txt", texts, locked / "c.txt"):
            refused(use(dataset_name=str(path)), "cannot be read (Permission denied)")
        refused(use(data_dir=str(tmp_path / "prepared")), "train.bin", "Permission denied")
        refused(lambda: load_tokenizer(locked), "Permission denied")


# --- splits

def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts), encoding="utf-8")
    return path


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=40),
       seed=st.integers(0, 3), share=st.sampled_from([0.05, 0.1, 0.5, 0.9]))
def test_splits_are_disjoint_whole_and_independent_of_order(tmp_path, texts, seed, share):
    if len(set(texts)) < 2: return
    corpus = load_corpus(jsonl(tmp_path / "c.jsonl", texts), val_fraction=share, split_seed=seed)
    train, held = list(corpus.documents("train")), list(corpus.documents("validation"))
    assert sorted(train + held) == sorted(texts) and not set(train) & set(held) and train and held
    turned = load_corpus(jsonl(tmp_path / "d.jsonl", texts[::-1]), val_fraction=share,
                         split_seed=seed)
    assert set(turned.documents("validation")) == set(held)


def test_large_corpora_are_split_by_threshold(tmp_path):
    texts = [f"document number {i}" for i in range(3000)]
    corpus = load_corpus(jsonl(tmp_path / "c.jsonl", texts), val_fraction=0.1)
    held = list(corpus.documents("validation"))
    assert 240 < len(held) < 360
    more = load_corpus(jsonl(tmp_path / "d.jsonl", texts + ["and one more"]), val_fraction=0.1)
    assert set(held) <= set(more.documents("validation"))   # growing the corpus moves nothing
    assert held != list(load_corpus(tmp_path / "c.jsonl", val_fraction=0.1,
                                    split_seed=1).documents("validation"))


def test_one_document_cannot_be_split_by_document(tmp_path):
    def split(*texts, **settings):
        corpus = load_corpus(jsonl(tmp_path / "c.jsonl", texts), **settings)
        return lambda: list(corpus.documents("train"))
    refused(split("one"), "one document")
    refused(split("one", "one"), "copies")
    refused(split("one", "two", max_samples=1), "max_samples=1")


@pytest.mark.parametrize("ending, pack",
                         [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files_read_alike(tmp_path, ending, pack):
    text = "First.\n<|endoftext|>\nSecond ä.\n<|endoftext|>\n"
    path = tmp_path / f"two.txt{ending}"
    path.write_bytes(pack(text.encode()))
    corpus = load_corpus(path, val_fraction=0.5)
    assert sorted([*corpus.documents("train"),
                   *corpus.documents("validation")]) == ["First.", "Second ä."]


@settings(max_examples=40, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text("ab<|>\n", min_size=1, max_size=9), min_size=1, max_size=5),
       block=st.integers(1, 20))
def test_separators_across_pieces(tmp_path, texts, block):
    path = tmp_path / "s.txt"
    path.write_text("<|endoftext|>".join([*texts, ""]), newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora_module, "BLOCK", block)
        found = ["".join(d.pieces) for d in FileSource(path).documents()]
    assert found == [t.strip("\n") for t in texts if t.strip("\n")]


def test_embedded_corpora(lab_data):
    notice = (corpora_module.embedded_folder() / "NOTICE.md").read_text()
    for name, original in (("shakespeare", "tinyshakespeare.txt"), ("tales", "tales.txt")):
        raw = lzma.decompress((corpora_module.embedded_folder() / f"{name}.txt.xz").read_bytes())
        assert raw == lab_data(original).read_bytes()
        assert hashlib.sha256(raw).hexdigest() in notice


def test_shakespeare_is_cut_where_everyone_cuts_it():
    corpus = load_corpus("shakespeare")
    train, held = ("".join(corpus.documents(split)) for split in ("train", "validation"))
    assert (len(train), len(held)) == (1_003_854, 111_540)
    assert train.startswith("First Citizen:")
    packed = (corpora_module.embedded_folder() / "shakespeare.txt.xz").read_bytes()
    assert train + held == lzma.decompress(packed).decode()
    assert len(CharTokenizer.from_text(train + held)) == 65


def test_tales_documents_join_to_the_corpus():
    source = load_corpus("tales").sources["all"][0]
    documents = ["".join(d.pieces) for d in source.documents()]
    raw = lzma.decompress((corpora_module.embedded_folder() / "tales.txt.xz").read_bytes()).decode()
    assert "".join(documents) == raw and len(documents) == 83 and min(map(len, documents)) > 100
    share = sum(map(len, load_corpus("tales").documents("validation"))) / len(raw)
    assert 0.07 < share < 0.13


def test_every_card_is_complete():
    for name, card in corpora.items():
        assert card.title and card.licence and card.provenance, name
        assert card.where in ("embedded", "local", "hub"), name
        assert card.files or card.hub_name, name


def test_wikitext_from_raw_files(lab_data, monkeypatch):
    monkeypatch.setenv("SPROUT_LAB_DATA", str(lab_data("wikitext-2").parent))
    corpus = load_corpus("wikitext-2")
    held = list(corpus.documents("validation"))
    assert len(held) == 60
    packed = lab_data("wikitext-2/wiki.valid.raw.gz").read_bytes()
    assert "".join(held).encode() == gzip.decompress(packed)
    assert load_corpus("wikitext", config="wikitext-2-raw-v1").fingerprint() == corpus.fingerprint()


@settings(max_examples=40, deadline=None)
@given(cuts=st.lists(st.integers(0, 80), max_size=6))
def test_wikitext_documents_do_not_depend_on_pieces(cuts):
    text = (" \n = A lobster = \n \n It swims . \n \n = = Life = = \n \n Long . \n"
            " \n = A poet = \n \n Du Fu . \n")
    edges = sorted({0, len(text), *[min(c, len(text)) for c in cuts]})
    pieces = [text[a:b] for a, b in zip(edges, edges[1:])]
    assert list(wikitext_documents(iter(pieces))) == list(wikitext_documents(iter([text])))


def test_enwik8_split(lab_data, monkeypatch):
    monkeypatch.setenv("SPROUT_LAB_DATA", str(lab_data("enwik8").parent))
    corpus = load_corpus("enwik8")
    assert corpus.splits == ("train", "validation", "test")
    for split in ("validation", "test"):
        assert next(corpus.split_documents(split)).num_bytes == 5_000_000


# --- preparation

def digest(folder) -> dict:
    files = sorted(p for p in Path(folder).iterdir() if p.is_file() and p.name[0] != ".")
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(prepare_module.blocks, "__defaults__", (2000,))
    monkeypatch.setattr(corpora_module, "BLOCK", 2000)


@settings(max_examples=30, deadline=None,
          suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(min_size=1, max_size=30), min_size=2, max_size=8, unique=True),
       size=st.integers(1, 50))
def test_blocks_never_change_the_ids(tmp_path, texts, size):
    corpus, tokenizer = load_corpus(jsonl(tmp_path / "c.jsonl", texts)), ByteTokenizer()
    found = [encode_block(tokenizer, b) for b in blocks(corpus, "train", tokenizer, size)]
    expected = b"".join(t.encode() + b"\xff" for t in corpus.documents("train"))
    assert bytes(np.concatenate([ids for ids, _, _ in found])) == expected
    assert sum(n for _, n, _ in found) + sum(d for _, _, d in found) == len(expected)


@pytest.mark.parametrize("spec",
                         ["bpe", "gpt2", "bert-base-uncased/vocab.txt",
                          "sentencepiece/botchan_en_unigram_1000.model",
                          "stories15M/tokenizer.bin"])
def test_blocks_of_one_long_text_give_the_ids_of_the_whole(tmp_path, spec, small_blocks, lab_data,
                                                           monkeypatch):
    monkeypatch.setenv("SPROUT_LAB_DATA", str(lab_data("gpt2").parent))
    text = "".join(load_corpus("tales").documents("validation"))[:40_000] + "世界，你好。" * 500
    corpus = Corpus("t", {"train": [FileSource(tmp_path / "t.txt")]})
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(spec if spec in ("bpe", "gpt2") else str(lab_data(spec)), corpus,
                               400 if spec == "bpe" else None)
    found = [encode_block(tokenizer, block) for block in blocks(corpus, "train", tokenizer)]
    expected = [*encode_array(tokenizer, text), document_end(tokenizer)]
    assert np.concatenate([ids for ids, _, _ in found]).tolist() == expected
    # capitals and line ends, runs of blanks: no bytes, no bits per byte
    loses = spec.endswith(("vocab.txt", "botchan_en_unigram_1000.model"))
    assert sum(n for _, n, _ in found) == (0 if loses else len(text.encode()))
    assert keeps_text(tokenizer) is not loses
    # those have no certain cut, and keep a text whole
    assert len(found) > 5 or spec.endswith((".model", ".bin"))


def test_prepared_twice_is_done_once(tmp_path):
    first = prepare("tales", tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.bin")}
    assert prepare("tales", tmp_path / "out") == first
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.bin")}
    (tmp_path / "out" / "val.bin").unlink()
    assert prepare("tales", tmp_path / "out") == first and (tmp_path / "out" / "val.bin").exists()


def test_other_data_in_the_folder_is_refused(tmp_path):
    """What a preparation with other settings, or someone else, left there is never replaced
    unasked; the line says what differs."""
    text = tmp_path / "t.jsonl"
    jsonl(text, [f"Story {i}, told twice. " * 3 for i in range(40)])
    out = tmp_path / "out"
    first = prepare(text, out)
    before = digest(out)
    refused(lambda: prepare(text, out, val_fraction=0.3), "val_fraction was 0.1 and is 0.3",
            "another output")
    refused(lambda: prepare(text, out, max_samples=10), "max_samples was None and is 10")
    refused(lambda: prepare(text, out, tokenizer="char"), "tokenizer was ByteTokenizer of 256",
            "char of its usual")
    refused(lambda: prepare(text, out, format="npy"), "format was bin and is npy")
    refused(lambda: prepare("tales", out), "text was ", "t.jsonl and is Children")
    text.write_text(text.read_text() + '{"text": "One more."}\n')
    refused(lambda: prepare(text, out), "the text has changed since")
    assert digest(out) == before
    other = prepare(text, out, val_fraction=0.3, format="npy", overwrite=True)
    assert other["splits"]["validation"]["num_bytes"] > first["splits"]["validation"]["num_bytes"]
    names = sorted(p.name for p in out.iterdir() if not p.name.startswith("."))
    assert names == ["stats.json", "tokenizer", "train.npy", "val.npy"]

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "train.txt").write_text("my own text " * 20)
    refused(lambda: prepare(text, mine, format="ids"), "holds a train.txt")
    assert (mine / "train.txt").read_text() == "my own text " * 20
    for content in ("[]", '{"splits": []}', '{"splits": {}', "\udcff", "[" * 5000,
                    '{"key": 1, "splits": {"train": []}, "asked": []}'):
        (out / "stats.json").write_text(content, errors="surrogateescape")
        refused(lambda: prepare(text, out), "holds a stats.json")
        refused(lambda: load_data(DataConfig(data_dir=str(out))), "no train.bin")


def test_an_unfinished_preparation_with_other_settings_is_begun_again(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"good text, " * 100 + b"\xff" + b" and more" * 100)
    refused(lambda: prepare(tmp_path / "t.txt", tmp_path / "out"), "not valid UTF-8")
    (tmp_path / "t.txt").write_bytes(b"good text, " * 200)
    assert prepare(tmp_path / "t.txt", tmp_path / "out")["splits"]["train"]["num_bytes"] == 1980
    assert not (tmp_path / "out" / ".prepare").exists()


@pytest.mark.parametrize("format", ["npy", "ids"])
def test_formats(tmp_path, format):
    prepare("tales", tmp_path / "bin")
    prepare("tales", tmp_path / format, format=format)
    expected = TokenFile.open(tmp_path / "bin" / "val.bin")[:]
    path = tmp_path / format / ("val.npy" if format == "npy" else "val.txt")
    assert file_kind(path) == format
    assert np.array_equal(np.concatenate(list(read_ids(path))), expected)
    # the tokenizer is found beside the ids
    data = load_data(DataConfig(train_data_path=str(path.with_stem("train")),
                                val_data_path=str(path)))
    assert np.array_equal(data.validation[:], expected)
    assert isinstance(data.tokenizer, ByteTokenizer)
    assert data.validation.num_bytes == TokenFile.open(tmp_path / "bin" / "val.bin").num_bytes


def test_more_workers_give_the_same_files(tmp_path, small_blocks):
    "From a script without `if __name__ == '__main__'`, too."
    source = tmp_path / "t.txt"
    source.write_text("".join(load_corpus("shakespeare").documents("validation"))[:60_000])
    prepare(source, tmp_path / "one", "bpe", vocab_size=300)
    script = tmp_path / "script.py"
    script.write_text(f"""
import sprout_lab.data.prepare as p, sprout_lab.data.corpora as c
print('once')
p.blocks.__defaults__, c.BLOCK = (2000,), 2000
p.prepare({str(source)!r}, {str(tmp_path / 'two')!r}, 'bpe', vocab_size=300, num_workers=2)""")
    done = subprocess.run([sys.executable, script], env=os.environ | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, timeout=120)
    assert done.stdout == "once\n" and not done.returncode, done.stderr
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


KILLED_WORKERS = """
import os, sys, time
import sprout_lab.data.tokenizers as t
mode = sys.argv[1]
def items():
    yield from range(4)
    for child in t.multiprocessing.active_children():
        print(child.pid, flush=True)
        if mode == "worker": os.kill(child.pid, 9)
    if mode == "parent": os.kill(os.getpid(), 9)
    yield from range(100)
try: list(t.process_map(abs, items(), 2))
except t.ConfigError as error: print(error)
"""


def is_running(pid: int) -> bool:
    "Whether a process lives and is no zombie."
    path = Path(f"/proc/{pid}/stat")
    return path.exists() and path.read_text().split(") ")[1][:1] != "Z"


@pytest.mark.parametrize("mode", ["worker", "parent"])
def test_processes_that_die(mode):
    done = subprocess.run([sys.executable, "-c", KILLED_WORKERS, mode],
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    lines = done.stdout.splitlines()
    if mode == "worker":
        assert "a working process died" in lines[-1] and "Traceback" not in done.stderr, done
    pids = [int(l) for l in lines if l.isdigit()]
    assert pids
    for _ in range(100):
        if not any(map(is_running, pids)): return
        time.sleep(0.1)
    raise AssertionError("a worker outlived its parent")


SLOW_PREPARE = """
import time
import sprout_lab.data.prepare as p, sprout_lab.data.corpora as c
p.blocks.__defaults__, c.BLOCK = (2000,), 2000
# the journal after every block
plain, p.time.monotonic = p.encode_block, lambda clock=iter(range(10**9)): 3 * next(clock)
def slow(*a): time.sleep(0.004); return plain(*a)
p.encode_block = slow
print("start", flush=True)
p.prepare({source!r}, {output!r})
"""


def test_killed_and_run_again_gives_the_same_file(tmp_path, small_blocks):
    source = tmp_path / "t.txt"
    source.write_text("".join(load_corpus("shakespeare").documents("validation")), encoding="utf-8")
    prepare(source, tmp_path / "whole")
    code = SLOW_PREPARE.format(source=str(source), output=str(tmp_path / "killed"))
    chance, continued = random.Random(1), 0
    for _ in range(4):
        process = python(code)
        process.stdout.readline()
        time.sleep(chance.uniform(0.02, 0.25))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close(), process.stderr.close()
        if (tmp_path / "killed" / "stats.json").exists(): break
        journal = prepare_module._read_journal(tmp_path / "killed" / ".prepare")
        continued += journal.get("splits", {}).get("train", {}).get("blocks", 0) > 0
        refused(lambda: load_data(DataConfig(data_dir=str(tmp_path / "killed"))), "continues")
        assert not (tmp_path / "killed" / "train.bin").exists()
    assert continued
    prepare(source, tmp_path / "killed")
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")


def test_blocks_of_another_rule_are_not_continued(tmp_path, small_blocks):
    """An unfinished preparation whose text was cut otherwise is begun again, not continued at the
    wrong place."""
    source = tmp_path / "t.txt"
    source.write_text("".join(load_corpus("shakespeare").documents("validation"))[:30_000] + "\r\n")
    whole = prepare(source, tmp_path / "whole")
    work = tmp_path / "out" / ".prepare"
    work.mkdir(parents=True)
    writer = TokenWriter(work / "train.bin", 256, fingerprint(ByteTokenizer()),
                         part_path=work / "train.part")
    writer.write([0] * 500, num_bytes=500)
    splits = {"train": {"blocks": 1, "state": writer.state(), "finished": False}}
    writer.abandon()
    (work / "journal.json").write_text(json.dumps({"key": whole["key"], "splits": splits}))
    prepare(source, tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_progress_of_a_preparation(tmp_path, small_blocks, monkeypatch, capfd):
    """Plain lines where standard error is no terminal, with the share that is done; none when
    they are not wanted."""
    lines = []
    monkeypatch.setattr(prepare_module, "Progress",
                        partial(progress_module.Progress, log=lines.append, every=0))
    (tmp_path / "t.txt").write_text("a text of some length " * 500)
    config = PrepareConfig(input=tmp_path / "t.txt", output=tmp_path / "out")
    prepare_from_config(config, log=lambda line: None)
    assert len(lines) > 5 and all("\n" not in line and "\r" not in line for line in lines)
    assert lines[-1].startswith("t → out: 11,000 of 11,000 bytes (100%)")
    lines.clear()
    prepare(tmp_path / "t.txt", tmp_path / "silent")
    with progress_module.without_progress():
        prepare(tmp_path / "t.txt", tmp_path / "quiet", progress=True)
    assert not lines and capfd.readouterr() == ("", "")


def test_a_quiet_preparation_prints_nothing(tmp_path, small_blocks, monkeypatch, capfd):
    "The command with --quiet: no line of the result, none of the progress."
    from sprout_lab.cli import main
    eager = partial(progress_module.Progress, every=0)
    monkeypatch.setattr(prepare_module, "Progress", eager)
    (tmp_path / "t.txt").write_text("a text of some length " * 500)
    def shown(*words):
        command = ["prepare", "--input", str(tmp_path / "t.txt"), *words]
        with pytest.raises(SystemExit) as end: main(command)
        assert not end.value.code
        return capfd.readouterr()
    loud = shown("--output", str(tmp_path / "loud"))
    assert "train.bin: " in loud.out and "11,000 bytes (100%)" in loud.err
    assert shown("--quiet", "--output", str(tmp_path / "quiet")) == ("", "")
    assert digest(tmp_path / "quiet") == digest(tmp_path / "loud")


def test_settings_of_a_preparation_are_settings(tmp_path):
    for wrong, *parts in [({}, "output"), ({"output": "x"}, "--input"),
                          ({"output": " ", "input": "a"}, "output"),
                          (dict(output="x", input="a", dataset="b"), "both"),
                          (dict(output="x", input=" "), "input"),
                          (dict(output="x", input="a", dataset_config="c"), "--dataset"),
                          (dict(output="x", input="a", val_fraction=1), "val_fraction", "below 1"),
                          (dict(output="x", input="a", num_workers=-1), "num_workers",
                           "at least 0"),
                          (dict(output="x", input="a", max_seq_length=0), "max_seq_length",
                           "at least 1"),
                          (dict(output="x", input="a", format="bim"), "format", "'bin'"),
                          (dict(output="x", inputs="a"), "inputs", "'input'")]:
        refused(lambda: PrepareConfig(**wrong), *parts)
    fields = {spec.name: spec for spec in settings_fields(PrepareConfig)}
    assert all(spec.help.endswith(".") for spec in fields.values())
    assert (fields["val_fraction"].default, fields["num_workers"].le,
            fields["max_samples"].unit) == (0.1, 256, "documents")
    assert set(PrepareConfig.aliases.values()) <= set(fields)
    assert not set(PrepareConfig.aliases) & set(fields)


def test_full_disk_leaves_nothing_half_written(tmp_path):
    room = tmp_path / "small"
    room.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs",
                                       str(room)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small tmpfs")
    try:
        refused(lambda: prepare("shakespeare", room / "out"), "free")
        assert not [p for p in (room / "out").iterdir() if not p.name.startswith(".")]
        refused(lambda: load_data(DataConfig(data_dir=str(room / "out"))), "continues")
        subprocess.run(["mount", "-o", "remount,size=4m", str(room)], check=True)
        prepare("shakespeare", room / "out")
        prepare("shakespeare", tmp_path / "whole")
        assert digest(room / "out") == digest(tmp_path / "whole")
    finally: subprocess.run(["umount", str(room)], check=True)


def test_processes_that_ask_together_share_the_cache(tmp_path):
    code = ("from sprout_lab.data.prepare import load_data\n"
            "d = load_data(); print(d.train.path, d.train.checksum, len(d.validation))")
    together = [python(code, SPROUT_LAB_CACHE=str(tmp_path)) for _ in range(2)]
    assert len({finished(p) for p in together}) == 1
    assert len(list((tmp_path / "data").iterdir())) == 1


def test_a_damaged_cache_is_made_again(caplog):
    path = load_data().train.path
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 4
    path.write_bytes(raw)
    data = load_data()
    assert len(data.train) == 1_003_854 and "damaged" in caplog.text


def test_the_cache_follows_content_not_names(tmp_path):
    source = tmp_path / "t.txt"
    source.write_text("one two three " * 100)
    first = load_data(DataConfig(train_data_path=str(source), sequence_length=8))
    source.write_text("one two thre! " * 100)
    second = load_data(DataConfig(train_data_path=str(source), sequence_length=8))
    assert first.train.path != second.train.path
    moved = shutil.move(source, tmp_path / "moved.txt")
    assert load_data(DataConfig(train_data_path=str(moved),
                                sequence_length=8)).train.checksum == second.train.checksum


# --- ready-made ids

def test_ids_in_every_form(tmp_path):
    ids = np.random.default_rng(0).integers(0, 300, 5000)
    (tmp_path / "lines.txt").write_text("\n".join(map(str, ids)))
    (tmp_path / "spaces.txt").write_text(" ".join(map(str, ids)))
    np.save(tmp_path / "ids.npy", ids)
    write(tmp_path / "ids.bin", ids, 300)
    for name in ("lines.txt", "spaces.txt", "ids.npy"):
        data = load_data(DataConfig(train_data_path=str(tmp_path / name), sequence_length=8))
        assert data.train[:].tolist() + data.validation[:].tolist() == ids.tolist()
        assert data.tokenizer is None and data.vocab_size <= 300
        assert ("token ids as text" if name.endswith("txt") else "npy") in data.description
        both = load_data(DataConfig(train_data_path=str(tmp_path / name),
                                    val_data_path=str(tmp_path / "ids.bin"), vocab_size=300))
        assert both.train[:].tolist() == both.validation[:].tolist() == ids.tolist()
        assert both.vocab_size == 300


def test_wrong_ids_are_one_line(tmp_path):
    (tmp_path / "ids.txt").write_text("1 2 3 " * 100)
    (tmp_path / "words.txt").write_text("1 2 " * 50_000 + "three")
    (tmp_path / "huge.txt").write_text("1 2 " + "9" * 30)
    (tmp_path / "white.txt").write_text(" \n ")
    (tmp_path / "text.txt").write_text("plain text, long enough for a window " * 50)
    np.save(tmp_path / "two.npy", np.zeros((3, 3), int))
    np.save(tmp_path / "float.npy", np.zeros(300))
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    np.save(tmp_path / "minus.npy", np.full(300, -1))
    (tmp_path / "torn.npy").write_bytes((tmp_path / "float.npy").read_bytes()[:100])
    whole = (tmp_path / "minus.npy").read_bytes()
    for name, shape in (("absurd.npy", b"(10**15,)"), ("vast.npy", b"(999999999999999999999999,)"),
                        ("vast2.npy", b"(9999999999999,)"), ("negative.npy", b"(-3,)"),
                        ("words.npy", b"('a',)"), ("deep.npy", b"(" * 3000),
                        ("none.npy", b"()"), ("empty.npy", b"(0,)"), ("many.npy", b"(1,) * 99")):
        header = b"{'descr': '<i8', 'fortran_order': False, 'shape': " + shape + b", }"
        start = whole[:6] + b"\x02\x00" + struct.pack("<I", len(header)) + header
        (tmp_path / name).write_bytes(start + bytes(800))

    write(tmp_path / "alone.bin", np.arange(200))
    (tmp_path / "foreign.bin").write_bytes(bytes(10_000))
    use = lambda name, **kw: lambda: load_data(DataConfig(train_data_path=str(tmp_path / name),
                                                          **({"sequence_length": 8} | kw)))
    refused(use("words.txt"), "entry 100,000", "three")
    refused(use("huge.txt"), "9999")
    refused(use("two.npy"), "shape")
    refused(use("float.npy"), "float64")
    refused(use("objects.npy"), ".npy")
    refused(use("minus.npy"), "-1")
    refused(use("torn.npy"), "torn.npy")
    for name in ("absurd", "vast", "vast2", "negative", "words", "deep", "none", "empty", "many"):
        refused(use(f"{name}.npy"), f"{name}.npy")
    refused(use("alone.bin"), "val_data_path")
    refused(use("foreign.bin", val_data_path=str(tmp_path / "ids.txt")),
            "not a sprout-lab token file")
    refused(use("ids.txt", vocab_size=3), "id 3")
    refused(use("ids.txt", sequence_length=1000), "sequence_length")
    refused(use("ids.txt", val_data_path=str(tmp_path / "text.txt")), "both as text")
    refused(use("ids.txt", val_data_path=str(tmp_path / "nothing.txt")), "no such")
    prepare("tales", tmp_path / "chars", tokenizer="char")
    refused(lambda: load_data(DataConfig(data_dir=str(tmp_path / "chars"), vocab_size=70)),
            "vocab_size=70", "81")
    assert load_data(DataConfig(data_dir=str(tmp_path / "chars"), vocab_size=100)).vocab_size == 81
    assert load_data(DataConfig(data_dir=str(tmp_path / "chars"),
                                vocab_size=50257)).vocab_size == 50257
    refused(lambda: load_data(DataConfig(data_dir=str(tmp_path / "chars"), tokenizer="byte")),
            "another tokenizer")


@pytest.mark.parametrize("content, entry", [
    ("1 2 3.5 4 ", "entry 2 is '3.5'"), ("1 2 -3 4 ", "entry 2 is '-3'"),
    ("1 2 three 4 ", "entry 2 is 'three'"),
    ("1 2 ٣ 4 ", "entry 2 is '٣'"), ("1 2 ４ 4 ", "entry 2 is '４'"),
    ("1 2 1_0 4 ", "entry 2 is '1_0'"), ("1 +2 3 4 ", "entry 1 is '+2'"),
    ("1 2 1e3 4 ", "entry 2 is '1e3'"), ("1,2,3\n4,5,6\n", "entry 0 is '1,2,3'"),
    ("[1, 2, 3, 4]\n", "entry 0 is '[1,'")])
@pytest.mark.parametrize("place", ["first", "last"])
def test_what_is_no_id_among_ids_is_one_line(tmp_path, content, entry, place):
    """Fractions, negatives, words and other scripts' digits are not ids, and such a file is no
    text either."""
    path = tmp_path / "ids.txt"
    path.write_text(content * 300 if place == "first" else "7 " * 50_000 + content * 20)
    number, written = entry.removeprefix("entry ").split(" is ")
    if place == "last": entry = f"entry {50_000 + int(number):,} is {written}"
    refused(lambda: load_data(DataConfig(train_data_path=str(path), sequence_length=8)), entry,
            "dataset_name")
    refused(lambda: prepare_from_config(PrepareConfig(input=path, output=tmp_path / "out")),
            "tokens already", "as dataset")
    # asked for as text, it is text
    data = load_data(DataConfig(dataset_name=str(path), sequence_length=8))
    assert data.train.num_bytes + data.validation.num_bytes == path.stat().st_size


@pytest.mark.parametrize("text",
                         ["12 + 7 = 19\n", "Chapter 12, verse 7: in those days 40 men went forth\n",
                          "3.5 kg at 2 shillings\n", "1990s 2,5 or so\n"])
def test_text_with_numbers_is_text(tmp_path, text):
    (tmp_path / "t.txt").write_text(text * 100)
    data = load_data(DataConfig(train_data_path=str(tmp_path / "t.txt"), sequence_length=8))
    assert data.train.num_bytes + data.validation.num_bytes == len(text) * 100


@pytest.mark.parametrize("shape, held",
                         [("(301,)", 300), ("(10000,)", 300), ("(299,)", 300), ("(1,)", 0)])
@pytest.mark.parametrize("version", [1, 2])
def test_npy_of_another_size_than_its_header_says(tmp_path, shape, held, version):
    header = f"{{'descr': '<u2', 'fortran_order': False, 'shape': {shape}, }}"
    header = header.encode().ljust(117) + b"\n"
    size = struct.pack("<H" if version == 1 else "<I", len(header))
    (tmp_path / "ids.npy").write_bytes(b"\x93NUMPY" + bytes([version,
                                                             0]) + size + header + bytes(2 * held))
    refused(lambda: load_data(DataConfig(train_data_path=str(tmp_path / "ids.npy"),
                                         sequence_length=8)), "promises", f"holds {2 * held}")


def test_a_validation_file_shorter_than_a_window(tmp_path):
    (tmp_path / "train.txt").write_text("a long text for training " * 100)
    (tmp_path / "short.txt").write_text("a short one")
    np.save(tmp_path / "train.npy", np.arange(500) % 7)
    np.save(tmp_path / "short.npy", np.arange(12) % 7)
    for kind, length in (("txt", 12), ("npy", 12)):
        use = lambda size: load_data(DataConfig(train_data_path=str(tmp_path / f"train.{kind}"),
                                                val_data_path=str(tmp_path / f"short.{kind}"),
                                                sequence_length=size))
        refused(lambda: use(length), f"short.{kind}", "12 tokens", "needs 13")
        assert len(use(length - 1).validation) == 12


# --- nothing but what is needed

TRAIN_WITHOUT = """
import sys
for name in ("datasets", "pyarrow", "pandas", "ipywidgets", "seaborn", "sentencepiece"):
    sys.modules[name] = None
from sprout_lab.cli import main
small = "--hidden_size 32 --num_hidden_layers 1 --num_attention_heads 2 --sequence_length 128"
run = "--max_samples 12 --max_steps 2 --batch_size 2 --sample_tokens 0 --output_dir"
words = ["train", "transformer", "--dataset_name", "tales", *small.split(), *run.split(), {run!r}]
try: main(words)
except SystemExit as end: assert not end.code, end.code
from sprout_lab.configs import ConfigError
from sprout_lab.data.corpora import load_corpus
for name in ({table!r}, {hub!r}, "roneneldan/TinyStories"):
    try: next(load_corpus(name).documents())
    except ConfigError as error: print(error)
"""


def test_training_on_an_embedded_corpus_needs_little(tmp_path):
    """Without the libraries that only tables, hub data, panels and figures need; each is asked
    for when its source is."""
    (tmp_path / "t.csv").write_text("text\none\ntwo\n")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.parquet").write_bytes(b"PAR1")
    code = TRAIN_WITHOUT.format(run=str(tmp_path / "run"), table=str(tmp_path / "t.csv"),
                                hub=str(tmp_path / "hub"))
    lines = finished(python(code)).splitlines()
    assert (tmp_path / "run" / "experiment_summary.json").exists()
    assert ["pip install datasets" in line for line in lines[-3:]] == [True] * 3, lines[-3:]


def test_train_and_validation_text_files(tmp_path):
    (tmp_path / "a.txt").write_text("the training text " * 30)
    (tmp_path / "b.txt").write_text("the held-out text " * 10)
    data = load_data(DataConfig(train_data_path=str(tmp_path / "a.txt"),
                                val_data_path=str(tmp_path / "b.txt"), sequence_length=16))
    assert bytes(data.validation[:]) == b"the held-out text " * 10 + b"\xff"
    assert data.train.num_documents == 1 and "text" in data.description
