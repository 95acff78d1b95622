"""Two hundred wrong configurations and a dozen wrong files: each one line, no traceback, exit code
2."""
import contextlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from sprout_lab.cli import main
from sprout_lab.configs import DataConfig, OutputConfig, TrainingConfig, settings_fields
from sprout_lab.families import get_family


def shell(*words):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: main(list(map(str, words)))
        except SystemExit as left: return left.code, out.getvalue(), err.getvalue()
    return None, out.getvalue(), err.getvalue()


def is_one_clear_line(code, out, err):
    assert code == 2, (code, out[-300:], err)
    assert err.startswith("sprout-lab: ") and err.count("\n") == 1 and len(err.strip()) > 20, err
    assert "Traceback" not in out + err


def wrong_flags():
    "Seeded wrong flags: types, ranges, names, combinations."
    dice = random.Random(0)
    specs = [s for cls in (DataConfig, TrainingConfig, OutputConfig,
                           get_family("transformer").config_class) for s in settings_fields(cls)]
    cases = []
    for s in specs:
        flag = dice.choice([f"--{s.name}", f"--{s.name.replace('_', '-')}"])
        if s.type in (int, float):
            cases += [(flag, "many"), (flag, "1e999" if s.type is float else "2.5"), (flag, "true")]
            if s.ge is not None: cases.append((flag, str(s.ge - 1)))
            if s.gt is not None: cases.append((flag, str(s.gt)))
            if s.le is not None: cases.append((flag, str(s.le * 2 + 1)))
            if s.lt is not None: cases.append((flag, str(s.lt)))
        if s.choices: cases += [(flag, "banana"), (flag, str(s.choices[0]) + "x")]
        swapped = list(s.name)
        i = dice.randrange(len(swapped) - 1)
        swapped[i], swapped[i + 1] = swapped[i + 1], swapped[i]
        if "".join(swapped) != s.name: cases.append((f"--{''.join(swapped)}", "1"))
    return cases


COMBINATIONS = [
    ("--num_heads", "5"), ("--hidden_size", "30", "--num_heads", "4"),
    ("--num_heads", "4", "--num_key_value_heads", "3"),
    ("--min_learning_rate", "1", "--learning_rate", "0.1"),
    ("--warmup_steps", "100", "--lr_decay_steps", "50"),
    ("--val_data_path", "x.txt"), ("--train_data_path", "x.txt", "--data_dir", "y"),
    ("--sequence_length", "512", "--max_position_embeddings", "256"),
    ("--max_steps", "none"), ("--mixed_precision", "fp16", "--device", "cpu"), ("--size", "giant"),
    ("--preset", "nanno"), ("--objective", "masked"),
    ("--config", "missing.yaml"), ("--resume_from", "missing"), ("--resume_from", "auto"),
    ("--dataset_name", "shakespear"), ("--train_data_path", "missing.txt"),
    ("--data_dir", "missing"), ("--tokenizer", "missing-tokenizer"),
    ("--tokenizer", "char", "--vocab_size", "3"), ("--grad_clip", "1", "--gradient_clip", "2"),
    ("--device", "cuda"),
    ("--use_wandb", "--no_wandb"), ("--batch_size",), ("--sequence_length", "1000000"),
    ("--vocab_size", "50", "--tokenizer", "byte"), ("extra", "words"),
]


def test_two_hundred_wrong_flags(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cases = wrong_flags()
    random.Random(1).shuffle(cases)
    assert len(cases) >= 180
    for words in [*cases[:180], *COMBINATIONS]:
        short = [] if "--max_steps" in words else ["--max_steps", "1", "--hidden_size", "8",
                                                   "--num_layers",
                                                   "1"][:2 if "--hidden_size" in words
                                                        or "--num_heads" in words else None]
        try: is_one_clear_line(*shell("train", "transformer", *short, *words))
        except AssertionError as error:
            raise AssertionError(f"{' '.join(words)}: {error}") from None
    assert not (tmp_path / "runs").exists(), "nothing is left behind"


FILES = {
    "empty.yaml": b"", "list.yaml": b"- 1\n- 2\n", "text.yaml": b"just words",
    "broken.yaml": b"a: [1, 2", "broken.json": b'{"batch_size": 16,',
    "binary.yaml": b"\xff\xfe\x00\x01\x80",
    "tags.yaml": b"!!python/object/apply:os.system ['echo owned']",
    "unknown.yaml": b"bach_size: 3\n", "type.json": b'{"training": {"batch_size": "many"}}',
    "range.yaml": b"training: {learning_rate: -1}\n",
    "twice.yaml": b"training: {batch_size: 3}\nbatch_size: 4\n", "foreign.yaml": b"model: {type: hnet_bit}\n",
    "nested.yaml": b"training: {optimizer: {name: adamw}}\n", "number.yaml": b"1: 2\n",
    "bool.yaml": b"batch_size: true\n", "null.yaml": b"batch_size: null\n",
    "deep.json": b'{"a":' * 3000 + b"1" + b"}" * 3000,
    "config_file.json": b'{"model": {"config_file": "nowhere.json"}}',
    "itself.json": b'{"model": {"config_file": "itself.json"}}',
    "two_spellings.json": b'{"hidden_size": 8, "d_model": 16}',
    "log_dir.json": b'{"output": {"log_dir": ["a"]}}',
    "nobody.json": b'{"model": {"type": "hierarchikal"}}',
}


@pytest.mark.parametrize("name", FILES)
def test_wrong_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(FILES[name])
    is_one_clear_line(*shell("train", "transformer", "--config", name))


DATA = {"empty.txt": b"", "binary.txt": bytes(range(256)) * 40, "short.txt": b"To be",
        "invalid.txt": b"To be, or not to be " * 100 + b"\xff\xfe" + b"that is " * 100,
        "special.txt": "ok".encode() * 500 + b"\xfe\xff"}


@pytest.mark.parametrize("name", DATA)
def test_wrong_data(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(DATA[name])
    is_one_clear_line(*shell("train", "transformer", "--train_data_path", name, "--max_steps", "2"))
    is_one_clear_line(*shell("train", "transformer", "--dataset_name", str(tmp_path / name),
                             "--max_steps", "2"))


def test_folder_without_text_and_foreign_tokens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").write_bytes(b"\x89PNG")
    is_one_clear_line(*shell("train", "transformer", "--dataset_name", "pictures", "--max_steps",
                             "2"))
    is_one_clear_line(*shell("train", "transformer", "--data_dir", "pictures", "--max_steps", "2"))
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    code, out, err = shell("prepare", "--input", "text.txt", "--output", "chars", "--tokenizer",
                           "char")
    assert code in (0, None), err
    code, out, err = shell("prepare", "--input", "text.txt", "--output", "bytes", "--tokenizer",
                           "byte")
    assert code in (0, None), err
    (tmp_path / "chars" / "train.bin").replace(tmp_path / "bytes" / "train.bin")
    is_one_clear_line(*shell("train", "transformer", "--data_dir", "bytes", "--max_steps", "2"))


ROWS = {"deep.jsonl": '{"text": ' + "[" * 5000 + "]" * 5000 + "}\n",
        "digits.jsonl": '{"text": "a", "n": ' + "9" * 5000 + "}\n",
        "surrogate.jsonl": '{"text": "\\ud83d"}\n', "scalar.jsonl": "3\n"}


@pytest.mark.parametrize("name", ROWS)
def test_wrong_rows(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text('{"text": "a story"}\n' * 50 + ROWS[name])
    is_one_clear_line(*shell("train", "transformer", "--train_data_path", name, "--max_steps", "2"))
    is_one_clear_line(*shell("prepare", "--input", name, "--output", "out"))


@pytest.mark.parametrize("header", [b"[]", b"\xff\xfe{}", {"vocab_size": 5}, {"vocab_size": 2**31},
                                    {"name": ["a"]}])
def test_sealed_wrong_token_files(tmp_path, monkeypatch, header):
    """Headers that say something impossible under a checksum that holds: found when the file is
    opened, not as an index error in the first step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    assert shell("prepare", "--input", "text.txt", "--output", "data", "--tokenizer", "char",
                 "--vocab_size", "100")[0] in (0, None)
    for name in ("train", "val"):
        path = tmp_path / "data" / f"{name}.bin"
        raw = path.read_bytes()
        facts = json.loads(raw[20:20 + int.from_bytes(raw[12:16], "little")])
        text = header if isinstance(header, bytes) else json.dumps(facts | header).encode()
        path.write_bytes((raw[:8] + struct.pack("<III", 1, len(text), zlib.crc32(text))
                          + text).ljust(4096, b"\0") + raw[4096:])
    is_one_clear_line(*shell("train", "transformer", "--data_dir", "data", "--max_steps", "2"))
    is_one_clear_line(*shell("train", "transformer", "--train_data_path", "data/train.bin",
                             "--val_data_path", "data/val.bin", "--max_steps", "2"))


@pytest.mark.parametrize("content", ["[]", "3", '{"splits": 3}', "[" * 5000, "\ufffe"])
def test_wrong_statistics(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    assert shell("prepare", "--input", "text.txt", "--output", "data")[0] in (0, None)
    (tmp_path / "data" / "stats.json").write_text(content)
    is_one_clear_line(*shell("prepare", "--input", "text.txt", "--output", "data"))
    assert shell("prepare", "--input", "text.txt", "--output", "data", "--overwrite")[0] in (0,
                                                                                             None)
    assert json.loads((tmp_path / "data" / "stats.json").read_text())["splits"]["train"]["num_bytes"] == 2385


@pytest.mark.parametrize("journal",
                         ["[]", {"splits": {"train": 3}},
                          {"splits": {"train": {"blocks": 1, "state": {"num_tokens": 10**9},
                                                "finished": False}}},
                          {"splits": {"train": {"blocks": 0, "state": None, "finished": True}}}])
def test_wrong_journals(tmp_path, monkeypatch, journal):
    """What an interrupted preparation left may be anything; at the second attempt at the latest it
    is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    assert shell("prepare", "--input", "text.txt", "--output", "data")[0] in (0, None)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.bin")}
    key = json.loads((tmp_path / "data" / "stats.json").read_text())["key"]
    for name in ("stats.json", *whole): (tmp_path / "data" / name).unlink()
    (tmp_path / "data" / ".prepare").mkdir()
    if not isinstance(journal, str): journal = json.dumps({"key": key} | journal)
    (tmp_path / "data" / ".prepare" / "journal.json").write_text(journal)
    for name in ("train.part", "train.bin"):
        (tmp_path / "data" / ".prepare" / name).write_bytes(whole["train.bin"][:-9] + b"x" * 9)
    said = shell("prepare", "--input", "text.txt", "--output", "data")
    if said[0] == 2:
        is_one_clear_line(*said)
        assert shell("prepare", "--input", "text.txt", "--output", "data")[0] in (0, None)
    assert {path.name: path.read_bytes() for path in (tmp_path / "data").glob("*.bin")} == whole


def test_pipes_and_devices(tmp_path, monkeypatch):
    "Reading them would wait for ever, or never end."
    monkeypatch.chdir(tmp_path)
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "data").mkdir()
    for name in ("train.bin", "val.bin"): os.mkfifo(tmp_path / "data" / name)
    for path in ("pipe.txt", "/dev/zero"):
        is_one_clear_line(*shell("prepare", "--input", path, "--output", "out"))
        is_one_clear_line(*shell("train", "transformer", "--train_data_path", path, "--max_steps",
                                 "2"))
        is_one_clear_line(*shell("train", "transformer", "--dataset_name", str(tmp_path / path),
                                 "--max_steps", "2"))
    is_one_clear_line(*shell("train", "transformer", "--data_dir", "data", "--max_steps", "2"))


@pytest.mark.parametrize("words",
                         [("--output", ""), ("--output", " "), ("--output", "text.txt"),
                          ("--output", "text.txt/out"), ("--output", "out", "--input", ""),
                          ("--output", "out", "--num_workers", "-1"),
                          ("--output", "out", "--num_workers", "100000"),
                                   ("--output", "out", "--max_seq_length", "0"),
                          ("--output", "out", "--max_seq_length", "-5"),
                          ("--output", "out", "--dataset_config", "x"),
                          ("--output", "out", "--text_column", "c" * 10**5, "--input",
                           "rows.jsonl"),
                                   ("--output", "out", "--input", "table.parquet"),
                          ("--output", "out", "--input", "loop"),
                          ("--output", "out", "--input", "damaged")])
def test_wrong_preparations(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 50)
    (tmp_path / "rows.jsonl").write_text('{"a": "b"}\n')
    (tmp_path / "table.parquet").write_bytes(b"PAR1")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "train.parquet").write_bytes(b"PAR1")
    (tmp_path / "loop").symlink_to("loop")
    is_one_clear_line(*shell("prepare", *([] if "--input" in words else ["--input", "text.txt"]),
                             *words))


@pytest.mark.parametrize("ids", [f"{2**62} " * 100, "1 2 3 " * 100 + "9" * 25, f"{2**24} " * 100])
def test_ids_too_large_for_any_vocabulary(tmp_path, monkeypatch, ids):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ids.txt").write_text(ids)
    is_one_clear_line(*shell("train", "transformer", "--train_data_path", "ids.txt", "--max_steps",
                             "2"))


MODEL_FILES = {"config.json": ["", "[]", "null", "[" * 5000, '{"model_type": "banana"}',
                               '{"model_type": ["x"]}', {"hidden_size": 32},
                               {"num_hidden_layers": 3}, {"vocab_size": 100}, {"hidden_size": 0}],
               "tokenizer_config.json": ["", "[]", "null", "[" * 5000, "{}"],
               "model.safetensors": ["", "x" * 100, "\x02\0\0\0\0\0\0\0[]"]}


@pytest.mark.parametrize("name", MODEL_FILES)
def test_wrong_model_folders(tmp_path, monkeypatch, capfd, name):
    """A saved model with one damaged file: generate and evaluate say so in one line, without
    transformers' report."""
    monkeypatch.chdir(tmp_path)
    from sprout_lab.data.tokenizers import ByteTokenizer
    model = get_family("slm").build(hidden_size=16, num_hidden_layers=1)
    for content in MODEL_FILES[name]:
        model.save_pretrained("model")
        ByteTokenizer().save_pretrained("model")
        path = tmp_path / "model" / name
        path.write_text(content if isinstance(content, str)
                        else json.dumps(json.loads(path.read_text()) | content), encoding="latin-1")
        capfd.readouterr()
        is_one_clear_line(*shell("generate", "--model_path", "model", "--prompt", "a",
                                 "--max_tokens", "2"))
        is_one_clear_line(*shell("evaluate", "--model_path", "model", "--max_batches", "1"))
        assert capfd.readouterr().err == ""


def test_two_preparations_in_one_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shell("prepare", "--dataset", "tales", "--output", "data", "--max_samples",
                 "20")[0] in (0, None)
    assert shell("prepare", "--dataset", "tales", "--output", "data", "--max_samples", "20",
                 "--max_seq_length", "64")[0] in (0, None)
    said = shell("prepare", "--dataset", "tales", "--output", "data")
    is_one_clear_line(*said)
    assert "max_samples was 20 and is None" in said[2] and "--overwrite" in said[2]


@pytest.mark.parametrize("words",
                         [("trian",), ("train",), ("train", "transfromer"),
                          ("train", "--batch_size", "3"), ("evaluate",),
                          ("evaluate", "--model_path", "nowhere"),
                          ("generate", "--model_path", "."),
                                   ("generate", "--model_path", "x", "--top_p", "2"),
                          ("runs", "show", "nothing"), ("runs", "delete", "/", "--yes"),
                          ("runs", "lst"), ("prepare", "--input", "nowhere.txt", "--output", "out"),
                                   ("prepare", "--output", "out"), ("completion", "csh"),
                          ("doctor", "--now")])
def test_wrong_commands(tmp_path, monkeypatch, words):
    monkeypatch.chdir(tmp_path)
    if words == ("train",): return   # shows the families
    is_one_clear_line(*shell(*words))


def test_in_a_process_of_its_own(tmp_path):
    out = subprocess.run([str(Path(sys.executable).with_name("sprout-lab")), "train", "transformer",
                          "--bach-size", "3"], capture_output=True, text=True, cwd=tmp_path)
    # whatever this state of the code was asked before, it may have to load its settings first
    said = out.stderr.removeprefix("loading PyTorch and the models …\n")
    is_one_clear_line(out.returncode, out.stdout, said)
    assert "did you mean 'batch_size'" in said


GUIDES = {
    "transformer.yaml": "vocab_size: 256\ncontext_length: 64\nd_model: 32\nnum_layers: "
                        "2\nnum_heads: 2\nd_ff: 64\nbatch_size: 4\nlearning_rate: "
                        "1.0e-4\nmax_iters: 100000\n",
    "slm.json": json.dumps({"experiment_name": "my_experiment", "model": {"type": "transformer"},
                            "data": {"max_seq_length": 512},
                            "training": {"batch_size": 16, "gradient_accumulation_steps": 4,
                                         "learning_rate": 3e-4, "max_steps": 10000,
                                         "warmup_steps": 500, "scheduler": "cosine",
                                         "mixed_precision": "bf16"},
                            "output": {"checkpoint_dir": "./checkpoints/my_experiment",
                                       "log_dir": "./logs/my_experiment"}}),
    "specdifftree.yaml": "experiment:\n  name: first\n  tags: [a, b]\n  notes: "
                         "Description\ndataset:\n  name: tales\n  num_samples_train: "
                         "6300\nmodel:\n  type: transformer\n  gradient_checkpointing: false\n"
                         "training:\n  num_epochs: 30\n  batch_size: 8\n  grad_clip_norm: "
                         "0.5\ndevice:\n  type: cpu\n",
    "flat.json": json.dumps({"hidden_dim": 64, "num_heads": 4, "num_epochs": 3,
                             "gradient_clip": 1.0, "max_length": 128, "save_every": 5000,
                             "eval_every": 1000, "log_every": 100}),
    "mot.yaml": "hidden_size: 64\nnum_layers: 4\nbatch_size: 16\nnum_epochs: 10\nwarmup_ratio: "
                "0.2\nfp16: false\nnum_workers: 2\noutput_dir: outputs/small\n",
}


@pytest.mark.parametrize("name", GUIDES)
def test_the_guides_formats_load(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(GUIDES[name])
    code, out, err = shell("train", "transformer", "--config", name, "--dry_run")
    assert code == 0, err
    assert f"file {name}" in out


def test_precedence_and_origins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("batch_size: 7\nlearning_rate: 0.5\n")
    code, out, err = shell("train", "transformer", "--config", "my.yaml", "--learning-rate", "0.25",
                           "--dry-run")
    assert code == 0, err
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith("  ")}
    assert rows["batch_size"][1:3] == ["7", "file"] and rows["learning_rate"][1:] == ["0.25",
                                                                                      "flag"]
    assert rows["optimizer"][2:] == ["preset", "nano"] and rows["weight_decay"][2:] == ["default"]
