"""Hub data sets in their own formats, from local folders: never the network."""
import gzip
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sprout_lab.configs import ConfigError, DataConfig
from sprout_lab.data.corpora import hub_reachable, load_corpus
from sprout_lab.data.datasets import (
    DatasetConfig, HuggingFaceDataset, HuggingFaceStream, TextDirectoryDataset, TokenSequences,
    collate_fn, print_dataset_stats)
from sprout_lab.data.prepare import PrepareConfig, load_data, prepare_from_config
from sprout_lab.data.tokens import TokenFile

ROOT = Path(__file__).parent.parent
STORIES = [f"Story number {i}. " * (i % 5 + 1) for i in range(60)]
CARD = """---
configs:
- config_name: default
  data_files:
  - split: train
    path: {train}
  - split: validation
    path: {held}
---
# Stories
"""



@pytest.fixture(autouse=True)
def _quiet(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hub-cache"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def refused(call, *parts):
    with pytest.raises(ConfigError) as error: call()
    text = str(error.value)
    assert "\n" not in text and 10 < len(text) < 500, text
    for part in parts: assert part in text, text


def prepared(**settings) -> dict: return prepare_from_config(PrepareConfig(**settings))


def data_set(name, **settings):
    "A data set by its name, a path or a hub name."
    return HuggingFaceDataset(DatasetConfig(dataset_name=str(name), **settings))


def jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def joined(texts) -> str: return "".join(text + "<eos>" for text in texts)


def rows(texts, column="text"):
    return datasets.Dataset.from_dict({column: texts, "id": list(range(len(texts)))})


@pytest.fixture(params=["parquet", "jsonl", "saved", "one saved split"])
def hub_folder(request, tmp_path):
    """The same stories in the forms that hub data sets have on disk; the last one without a split
    of its own."""
    folder = tmp_path / "stories"
    if request.param == "saved":
        splits = {"train": rows(STORIES), "validation": rows(["Held out."])}
        datasets.DatasetDict(splits).save_to_disk(str(folder))
    elif request.param == "one saved split": rows(STORIES).save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        for split, texts in (("train", STORIES), ("validation", ["Held out."])):
            if request.param == "parquet":
                rows(texts).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
            else: jsonl(folder / "data" / f"{split}.jsonl", texts)
        (folder / "README.md").write_text(CARD.format(train="data/train*", held="data/validation*"))
    return folder


def decoded(dataset) -> str:
    return dataset.tokenizer.decode(torch.cat([s["input_ids"] for s in dataset]))


def test_data_sets_in_the_hubs_formats(hub_folder):
    kept = data_set(hub_folder, max_seq_length=32)
    assert decoded(kept) == joined(STORIES)
    assert isinstance(kept, HuggingFaceDataset) and isinstance(kept, torch.utils.data.Dataset)
    streamed = data_set(hub_folder, max_seq_length=32, streaming=True)
    assert decoded(streamed) == joined(STORIES) and isinstance(streamed, HuggingFaceStream)
    few = data_set(hub_folder, max_seq_length=32, max_samples=3)
    assert decoded(few) == joined(STORIES[:3])
    refused(lambda: data_set(hub_folder, text_column="story"), "'story'", "text")
    refused(lambda: data_set(hub_folder, split="trian"), "'train'")


def test_the_trainer_reads_them_too(hub_folder):
    data = load_data(DataConfig(dataset_name=str(hub_folder), sequence_length=8))
    own_split = (hub_folder / "README.md").exists() or (hub_folder / "dataset_dict.json").exists()
    assert data.train.num_documents + data.validation.num_documents == 60 + own_split
    if own_split: assert bytes(data.validation[:]) == b"Held out.\xff"
    else: assert 3 <= data.validation.num_documents <= 12
    again = load_data(DataConfig(data_dir=str(hub_folder), sequence_length=8))
    assert again.train.path == data.train.path


def test_changed_files_are_noticed(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for texts in (["one", "two"], ["one", "two", "three"]):
        rows(texts).to_parquet(folder / "train.parquet")
        assert decoded(data_set(folder, max_seq_length=8)) == joined(texts)


def test_wrong_data_sets_are_one_line(tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "train.parquet").write_bytes(b"no parquet")
    (tmp_path / "torn").mkdir()
    rows(STORIES * 50).to_parquet(tmp_path / "torn" / "train.parquet")
    whole = (tmp_path / "torn" / "train.parquet").read_bytes()
    (tmp_path / "torn" / "train.parquet").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "numbers").mkdir()
    datasets.Dataset.from_dict({"text": [1, 2]}).to_parquet(tmp_path / "numbers" / "train.parquet")
    (tmp_path / "nothing").mkdir()
    rows(["", None]).to_parquet(tmp_path / "nothing" / "train.parquet")
    for name, part in [("broken", "cannot be loaded"), ("torn", "cannot be loaded"),
                       ("numbers", "int"), ("nothing", "no text")]:
        refused(lambda: data_set(tmp_path / name), part)
        refused(lambda: load_data(DataConfig(dataset_name=str(tmp_path / name))), part)
        refused(lambda: list(data_set(tmp_path / name, streaming=True)), part)
    refused(lambda: load_data(DataConfig(dataset_name=str(tmp_path / "numbers"),
                                         dataset_config="other")), "other")


@pytest.mark.parametrize("name",
                         ["tinystories", "wikitext", "openwebtext", "roneneldan/TinyStories",
                          "some/where"])
def test_hub_names_without_a_network(name, monkeypatch, tmp_path):
    monkeypatch.delenv("SPROUT_LAB_DATA", raising=False)
    parts = ["needs the network",
             "shakespeare and tales"] + ["SPROUT_LAB_DATA"] * (name == "wikitext")
    refused(lambda: load_corpus(name), *parts)
    refused(lambda: HuggingFaceDataset(DatasetConfig(dataset_name=name)), *parts)
    refused(lambda: prepared(dataset=name, output=tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_no_network_is_found_out_at_once(monkeypatch):
    "Without offline mode: one attempt to connect, no minute of retries."
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")   # nobody listens there
    assert not hub_reachable()
    refused(lambda: load_corpus("tinystories"), "needs the network")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert hub_reachable()


def test_named_corpora_as_data_sets(lab_data, monkeypatch):
    monkeypatch.setenv("SPROUT_LAB_DATA", str(lab_data("wikitext-2").parent))
    tales = HuggingFaceDataset(DatasetConfig(dataset_name="tales", split="validation",
                                             max_seq_length=256))
    assert decoded(tales) == joined(load_corpus("tales").documents("validation"))
    wiki = HuggingFaceDataset(DatasetConfig(dataset_name="wikitext",
                                            dataset_config="wikitext-2-raw-v1", split="test",
                                            max_seq_length=512))
    assert wiki.tokens.num_bytes == 1_290_590 and wiki.tokens.num_documents > 50
    refused(lambda: HuggingFaceDataset(DatasetConfig(dataset_name="tales", split="test")),
            "train, validation")


def test_text_directory(tmp_path):
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("Second.")
    (folder.parent / "a.txt").write_text("First ä.")
    (folder / "c.jsonl").write_text('{"text": "Third."}\n{"text": "Fourth."}\n')
    dataset = TextDirectoryDataset(directory=str(folder.parent), max_seq_length=10)
    assert decoded(dataset) == "First ä.<eos>Second.<eos>Third.<eos>Fourth.<eos>"
    assert all(torch.equal(s["input_ids"], s["labels"]) for s in dataset)
    assert {len(s["input_ids"]) for s in list(dataset)[:-1]} == {10}
    batch = next(iter(DataLoader(dataset, batch_size=16, shuffle=True, collate_fn=collate_fn)))
    assert {tensor.shape for tensor in batch.values()} == {(len(dataset), 10)}
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert torch.equal(batch["labels"][batch["attention_mask"] == 1],
                       batch["input_ids"][batch["attention_mask"] == 1])
    refused(lambda: TextDirectoryDataset(directory=tmp_path / "text", max_seq_length=10), "'texts'")
    (tmp_path / "none").mkdir()
    refused(lambda: TextDirectoryDataset(directory=tmp_path / "none", max_seq_length=10), "no text")
    refused(lambda: TextDirectoryDataset(directory=folder.parent, max_seq_length=1),
            "max_seq_length")


@pytest.mark.parametrize("n, length", [(2, 2), (9, 4), (10, 4), (8, 4), (100, 7)])
def test_sequences_leave_out_no_prediction(n, length):
    sequences = list(TokenSequences(np.arange(n), length))
    ids = torch.cat([s["input_ids"] for s in sequences]).tolist()
    assert ids == list(range(n))[:len(ids)] and n - len(ids) <= 1
    assert min(len(s["input_ids"]) for s in sequences) >= 2


def test_loader_processes_share_a_stream(hub_folder):
    config = DatasetConfig(dataset_name=str(hub_folder), max_seq_length=16, streaming=True)
    def documents(workers):
        loader = DataLoader(HuggingFaceDataset(config), batch_size=4, collate_fn=collate_fn,
                            num_workers=workers)
        return sum(int(batch["attention_mask"].sum()) for batch in loader)
    assert documents(2) == documents(0) == sum(len(s) + 1 for s in STORIES)


def test_statistics(tmp_path, capsys):
    jsonl(tmp_path / "a.jsonl", STORIES)
    dataset = TextDirectoryDataset(tmp_path, 64)
    print_dataset_stats(dataset)
    lines = capsys.readouterr().out.splitlines()
    total = sum(map(len, STORIES))
    assert lines[:5] == ["Dataset Statistics", "==================",
                         "Number of original samples: 60", f"Total bytes: {total:,}",
                         f"Training sequences: {len(dataset):,}"]
    print_dataset_stats(load_data())
    assert "Total bytes: 1,003,854" in capsys.readouterr().out


FORMS = {"parquet": lambda path, texts: rows(texts).to_parquet(path / "stories.parquet"),
         "jsonl": lambda path, texts: jsonl(path / "stories.jsonl", texts),
         "text": lambda path,
         texts: [(path / f"{i:02}.txt").write_text(t) for i, t in enumerate(texts)],
         "separated": lambda path, texts: (path / "a.txt").write_text("<|endoftext|>".join(texts)),
         "one text": lambda path, texts: (path / "a.txt").write_text("".join(texts)),
         "csv": lambda path, texts: rows(texts).to_csv(path / "stories.csv")}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_gives_all_of_the_split_that_it_is(tmp_path, form, streaming):
    """A folder without splits of its own is the split train, whatever its form; nothing is kept
    back."""
    folder = tmp_path / "stories"
    folder.mkdir()
    FORMS[form](folder, STORIES)
    expected = "".join(STORIES) + "<eos>" if form == "one text" else joined(STORIES)
    assert decoded(data_set(folder, max_seq_length=32, streaming=streaming)) == expected
    refused(lambda: data_set(folder, split="validation", streaming=streaming), "validation",
            "choose from train")
    one_file = next(folder.iterdir())
    if form not in ("text", "parquet"):
        assert decoded(data_set(one_file, max_seq_length=32)) == expected
    # a run needs two splits, and makes them
    data = load_data(DataConfig(dataset_name=str(folder), sequence_length=8))
    assert data.train.num_bytes + data.validation.num_bytes == sum(map(len, STORIES))


@pytest.mark.parametrize("ending", ["jsonl", "txt", "csv"])
def test_a_folder_whose_names_tell_splits_gives_them(tmp_path, ending):
    splits = {"train": ["One.", "Two."], "validation": ["Three."], "test": ["Four.", "Five."]}
    for name, texts in splits.items():
        path = tmp_path / f"stories.{name}.{ending}"
        if ending == "jsonl": jsonl(path, texts)
        elif ending == "csv": rows(texts).to_csv(path)
        else: path.write_text("<|endoftext|>".join(texts))
    for split, texts in splits.items():
        assert decoded(data_set(tmp_path, split=split)) == joined(texts)
    assert list(load_corpus(tmp_path, split="test").documents("train")) == splits["test"]
    assert list(load_corpus(tmp_path, split="test").documents("validation")) == splits["validation"]
    refused(lambda: load_data(DataConfig(dataset_name=str(tmp_path), dataset_split="tset")),
            "dataset_split='tset'", "'test'")


@pytest.mark.parametrize("name",
                         ["t.csv", "t.tsv", "t.json", "t.parquet", "t.csv.gz", "t.json.gz",
                          "a [1] t.csv"])
def test_single_tables(tmp_path, name):
    "By name, as a training file, and prepared; never as text that happens to have commas."
    texts = ["NA", "7", "null", "a, \"quoted\" line\nand another", "é", "  spaces "] + STORIES
    path, plain = tmp_path / name, tmp_path / name.removesuffix(".gz")
    if ".csv" in name: rows(texts).to_csv(plain)
    elif ".tsv" in name: rows(texts).to_csv(plain, sep="\t")
    elif ".json" in name:
        plain.write_text(json.dumps([{"id": i, "text": t} for i, t in enumerate(texts)]))
    else: rows(texts).to_parquet(plain)
    if path != plain: path.write_bytes(gzip.compress(plain.read_bytes()))
    corpus = load_corpus(path)
    assert sorted([*corpus.documents("train"), *corpus.documents("validation")]) == sorted(texts)
    data = load_data(DataConfig(train_data_path=str(path), sequence_length=8))
    assert "(table)" in data.description
    assert data.train.num_documents + data.validation.num_documents == len(texts)
    stats = prepared(input=str(path), output=str(tmp_path / "out"))
    num_bytes = sum(facts["num_bytes"] for facts in stats["splits"].values())
    assert num_bytes == len("".join(texts).encode())
    refused(lambda: list(load_corpus(path, column="story").documents()), "no column 'story'",
            "text")
    numbers = lambda: list(load_corpus(path, column="id").documents())
    if ".json" in name or ".parquet" in name: refused(numbers, "int")
    else: assert "0" in numbers()   # in a CSV file everything is text


def test_damaged_tables_are_one_line(tmp_path):
    for name, raw in [("a.parquet", b"PAR1"), ("a.json", b'[{"text": '), ("a.csv", b""),
                      ("b.csv", b'text\n"open'), ("c.csv", b"text\n\xff\xfe"),
                      ("a.csv.gz", b"no gzip"), ("a.arrow", b"ARROW1"), ("b.json", b"[" * 9000)]:
        (tmp_path / name).write_bytes(raw)
        refused(lambda: list(load_corpus(tmp_path / name).documents()), name)
    (tmp_path / "gone.csv").write_text("text\none\n")
    corpus = load_corpus(tmp_path / "gone.csv")
    (tmp_path / "gone.csv").unlink()
    refused(lambda: list(corpus.documents()), "gone.csv")


def test_a_changed_table_is_prepared_anew(tmp_path):
    path = tmp_path / "t.csv"
    for texts in (STORIES, STORIES[:30]):
        rows(texts).to_csv(path)
        data = load_data(DataConfig(train_data_path=str(path), sequence_length=8))
        assert data.train.num_documents + data.validation.num_documents == len(texts)


def test_preparing_like_the_guides(tmp_path, capsys):
    from sprout_lab.data.tokenizers import Tokenizer, train_bpe
    texts = tmp_path / "text_files"
    texts.mkdir()
    for i in range(12):
        (texts / f"{i}.txt").write_text(f"The story of number {i}, told twice. " * 20)
    one = texts / "0.txt"
    tokenizer = Tokenizer(*train_bpe(one, 280, ["<|endoftext|>"]), ["<|endoftext|>"])
    files = dict(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    tokenizer.save(*files.values())
    output = tmp_path / "data"
    stats = prepared(**files, input=str(texts), output=str(output), create_stats=True)
    assert "most frequent" in capsys.readouterr().out
    tokens = stats["splits"]["train"]["num_tokens"]
    stats = prepared(**files, input=str(texts), output=str(output), max_seq_length=16)
    assert stats["splits"]["train"]["num_sequences"] == (tokens - 1) // 16
    assert stats["splits"]["train"]["used_tokens"] > 10
    assert json.loads((output / "stats.json").read_text()) == stats
    parts = [TokenFile.open(output / name, tokenizer) for name in ("train.bin", "val.bin")]
    assert sum(part.num_documents for part in parts) == 12
    prepared(**files, input=str(one), output=str(tmp_path / "ids"), format="ids")
    words = (tmp_path / "ids" / "train.txt").read_text().split()
    assert tokenizer.decode(map(int, words)) == one.read_text()[:int(len(one.read_text()) * 0.9)]


def test_preparing_a_part_of_a_file(tmp_path):
    settings = dict(dataset=str(jsonl(tmp_path / "stories.jsonl", STORIES)),
                    output=str(tmp_path / "stories"))
    stats = prepared(**settings, max_seq_length=64, max_samples=40)
    assert sum(s["num_documents"] for s in stats["splits"].values()) == 40
    assert stats["splits"]["train"]["num_sequences"] > 5
    refused(lambda: prepared(**settings, max_samples=30), "max_samples was 40 and is 30")
    prepared(**settings, max_samples=30, overwrite=True)
    (tmp_path / "a file").touch()
    refused(lambda: prepared(output=str(tmp_path / "a file" / "x"), dataset="tales"),
            "cannot be written")
