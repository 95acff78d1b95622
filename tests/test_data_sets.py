"""Hub data sets in their own formats, from local folders: never the network."""
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from sprout_lab.configs import ConfigError, DataConfig
from sprout_lab.data.corpora import hub_reachable, load_corpus
from sprout_lab.data.datasets import DatasetConfig, HuggingFaceDataset, HuggingFaceStream, TextDirectoryDataset, TokenSequences, collate_fn, print_dataset_stats
from sprout_lab.data.prepare import PrepareConfig, load_data, prepare_from_config
from sprout_lab.data.tokens import TokenFile

ROOT = Path(__file__).parent.parent
STORIES = [f"Story number {i}. " * (i % 5 + 1) for i in range(60)]
CARD = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: {train}\n  - split: validation\n    path: {held}\n---\n# Stories\n"


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


def rows(texts, column="text"): return datasets.Dataset.from_dict({column: texts, "id": list(range(len(texts)))})


@pytest.fixture(params=["parquet", "jsonl", "saved", "one saved split"])
def hub_folder(request, tmp_path):
    "The same stories in the forms that hub data sets have on disk; the last one without a split of its own."
    folder = tmp_path / "stories"
    if request.param == "saved": datasets.DatasetDict({"train": rows(STORIES), "validation": rows(["Held out."])}).save_to_disk(str(folder))
    elif request.param == "one saved split": rows(STORIES).save_to_disk(str(folder))
    else:
        (folder / "data").mkdir(parents=True)
        for split, texts in (("train", STORIES), ("validation", ["Held out."])):
            if request.param == "parquet": rows(texts).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
            else: (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        (folder / "README.md").write_text(CARD.format(train="data/train*", held="data/validation*"))
    return folder


def decoded(dataset) -> str: return dataset.tokenizer.decode(torch.cat([s["input_ids"] for s in dataset]))


def test_data_sets_in_the_hubs_formats(hub_folder):
    expected = "".join(s + "<eos>" for s in STORIES)
    kept = HuggingFaceDataset(DatasetConfig(dataset_name=str(hub_folder), max_seq_length=32))
    assert decoded(kept) == expected and isinstance(kept, HuggingFaceDataset) and isinstance(kept, torch.utils.data.Dataset)
    streamed = HuggingFaceDataset(DatasetConfig(dataset_name=str(hub_folder), max_seq_length=32, streaming=True))
    assert decoded(streamed) == expected and isinstance(streamed, HuggingFaceStream)
    few = HuggingFaceDataset(DatasetConfig(dataset_name=str(hub_folder), max_seq_length=32, max_samples=3))
    assert decoded(few) == "".join(s + "<eos>" for s in STORIES[:3])
    refused(lambda: HuggingFaceDataset(DatasetConfig(dataset_name=str(hub_folder), text_column="story")), "'story'", "text")
    refused(lambda: HuggingFaceDataset(DatasetConfig(dataset_name=str(hub_folder), split="trian")), "'train'")


def test_the_trainer_reads_them_too(hub_folder):
    data = load_data(DataConfig(dataset_name=str(hub_folder), sequence_length=8))
    own_split = (hub_folder / "README.md").exists() or (hub_folder / "dataset_dict.json").exists()
    assert data.train.num_documents + data.validation.num_documents == 60 + own_split
    if own_split: assert bytes(data.validation[:]) == b"Held out.\xff"
    else: assert 3 <= data.validation.num_documents <= 12
    assert load_data(DataConfig(data_dir=str(hub_folder), sequence_length=8)).train.path == data.train.path


def test_changed_files_are_noticed(tmp_path):
    folder = tmp_path / "d"
    folder.mkdir()
    for texts in (["one", "two"], ["one", "two", "three"]):
        rows(texts).to_parquet(folder / "train.parquet")
        assert decoded(HuggingFaceDataset(DatasetConfig(dataset_name=str(folder), max_seq_length=8))) == "".join(t + "<eos>" for t in texts)


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
    datasets.Dataset.from_dict({"text": ["", None]}).to_parquet(tmp_path / "nothing" / "train.parquet")
    for name, *parts in [("broken", "cannot be loaded"), ("torn", "cannot be loaded"), ("numbers", "int"), ("nothing", "no text")]:
        refused(lambda: HuggingFaceDataset(DatasetConfig(dataset_name=str(tmp_path / name))), *parts)
        refused(lambda: load_data(DataConfig(dataset_name=str(tmp_path / name))), *parts)
        refused(lambda: list(HuggingFaceDataset(DatasetConfig(dataset_name=str(tmp_path / name), streaming=True))), *(parts if name != "nothing" else ["no text"]))
    refused(lambda: load_data(DataConfig(dataset_name=str(tmp_path / "numbers"), dataset_config="other")), "other")


@pytest.mark.parametrize("name", ["tinystories", "wikitext", "openwebtext", "roneneldan/TinyStories", "some/where"])
def test_hub_names_without_a_network(name, monkeypatch, tmp_path):
    monkeypatch.delenv("SPROUT_LAB_DATA", raising=False)
    parts = ["needs the network", "shakespeare and tales"] + ["SPROUT_LAB_DATA"] * (name == "wikitext")
    refused(lambda: load_corpus(name), *parts)
    refused(lambda: HuggingFaceDataset(DatasetConfig(dataset_name=name)), *parts)
    refused(lambda: prepared(dataset=name, output=tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


def test_no_network_is_found_out_at_once(monkeypatch):
    "Without offline mode: one attempt to connect, no minute of retries."
    monkeypatch.delenv("HF_HUB_OFFLINE")
    for proxy in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"): monkeypatch.delenv(proxy, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")   # nobody listens there
    assert not hub_reachable()
    refused(lambda: load_corpus("tinystories"), "needs the network")
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    assert hub_reachable()


def test_named_corpora_as_data_sets(lab_data, monkeypatch):
    monkeypatch.setenv("SPROUT_LAB_DATA", str(lab_data("wikitext-2").parent))
    tales = HuggingFaceDataset(DatasetConfig(dataset_name="tales", split="validation", max_seq_length=256))
    assert decoded(tales) == "".join(d + "<eos>" for d in load_corpus("tales").documents("validation"))
    wiki = HuggingFaceDataset(DatasetConfig(dataset_name="wikitext", dataset_config="wikitext-2-raw-v1", split="test", max_seq_length=512))
    assert wiki.tokens.num_bytes == 1_290_590 and wiki.tokens.num_documents > 50
    refused(lambda: HuggingFaceDataset(DatasetConfig(dataset_name="tales", split="test")), "train, validation")


def test_text_directory(tmp_path):
    folder = tmp_path / "texts" / "deep"
    folder.mkdir(parents=True)
    (folder / "b.txt").write_text("Second.")
    (folder.parent / "a.txt").write_text("First ä.")
    (folder / "c.jsonl").write_text('{"text": "Third."}\n{"text": "Fourth."}\n')
    dataset = TextDirectoryDataset(directory=str(folder.parent), max_seq_length=10)
    assert decoded(dataset) == "First ä.<eos>Second.<eos>Third.<eos>Fourth.<eos>"
    assert all(torch.equal(s["input_ids"], s["labels"]) for s in dataset) and {len(s["input_ids"]) for s in list(dataset)[:-1]} == {10}
    batch = next(iter(DataLoader(dataset, batch_size=16, shuffle=True, collate_fn=collate_fn)))
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (len(dataset), 10)
    assert torch.equal(batch["labels"] == -100, batch["attention_mask"] == 0)
    assert torch.equal(batch["labels"][batch["attention_mask"] == 1], batch["input_ids"][batch["attention_mask"] == 1])
    refused(lambda: TextDirectoryDataset(directory=tmp_path / "text", max_seq_length=10), "'texts'")
    (tmp_path / "none").mkdir()
    refused(lambda: TextDirectoryDataset(directory=tmp_path / "none", max_seq_length=10), "no text")
    refused(lambda: TextDirectoryDataset(directory=folder.parent, max_seq_length=1), "max_seq_length")


@pytest.mark.parametrize("n, length", [(2, 2), (9, 4), (10, 4), (8, 4), (100, 7)])
def test_sequences_leave_out_no_prediction(n, length):
    sequences = list(TokenSequences(np.arange(n), length))
    ids = torch.cat([s["input_ids"] for s in sequences]).tolist()
    assert ids == list(range(n))[:len(ids)] and n - len(ids) <= 1 and min(len(s["input_ids"]) for s in sequences) >= 2


def test_loader_processes_share_a_stream(hub_folder):
    config = DatasetConfig(dataset_name=str(hub_folder), max_seq_length=16, streaming=True)
    def documents(workers):
        loader = DataLoader(HuggingFaceDataset(config), batch_size=4, collate_fn=collate_fn, num_workers=workers)
        return sum(int(batch["attention_mask"].sum()) for batch in loader)
    assert documents(2) == documents(0) == sum(len(s) + 1 for s in STORIES)


def test_statistics(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in STORIES))
    dataset = TextDirectoryDataset(tmp_path, 64)
    print_dataset_stats(dataset)
    lines = capsys.readouterr().out.splitlines()
    total = sum(map(len, STORIES))
    assert lines[:5] == ["Dataset Statistics", "==================", "Number of original samples: 60", f"Total bytes: {total:,}", f"Training sequences: {len(dataset):,}"]
    print_dataset_stats(load_data())
    assert "Total bytes: 1,003,854" in capsys.readouterr().out


def test_preparing_like_the_guides(tmp_path, capsys):
    from sprout_lab.data.tokenizers import Tokenizer, train_bpe
    texts = tmp_path / "text_files"
    texts.mkdir()
    for i in range(12): (texts / f"{i}.txt").write_text(f"The story of number {i}, told twice. " * 20)
    tokenizer = Tokenizer(*train_bpe(texts / "0.txt", 280, ["<|endoftext|>"]), ["<|endoftext|>"])
    tokenizer.save(tmp_path / "vocab.json", tmp_path / "merges.txt")
    files = dict(vocab=str(tmp_path / "vocab.json"), merges=str(tmp_path / "merges.txt"))
    stats = prepared(**files, input=str(texts), output=str(tmp_path / "data"), create_stats=True)
    assert "most frequent" in capsys.readouterr().out
    again = prepared(**files, input=str(texts), output=str(tmp_path / "data"), max_seq_length=16)
    assert again["splits"]["train"]["num_sequences"] == (stats["splits"]["train"]["num_tokens"] - 1) // 16
    stats = again
    assert stats["splits"]["train"]["used_tokens"] > 10 and json.loads((tmp_path / "data" / "stats.json").read_text()) == stats
    assert TokenFile.open(tmp_path / "data" / "train.bin", tokenizer).num_documents + TokenFile.open(tmp_path / "data" / "val.bin").num_documents == 12
    prepared(**files, input=str(texts / "0.txt"), output=str(tmp_path / "ids"), format="ids")
    words = (tmp_path / "ids" / "train.txt").read_text().split()
    assert tokenizer.decode(map(int, words)) == (texts / "0.txt").read_text()[:int(len((texts / "0.txt").read_text()) * 0.9)]
    (tmp_path / "stories.jsonl").write_text("".join(json.dumps({"text": s}) + "\n" for s in STORIES))
    stats = prepared(dataset=str(tmp_path / "stories.jsonl"), output=str(tmp_path / "stories"), max_seq_length=64, max_samples=40)
    assert sum(s["num_documents"] for s in stats["splits"].values()) == 40 and stats["splits"]["train"]["num_sequences"] > 5
    refused(lambda: prepared(dataset=str(tmp_path / "stories.jsonl"), output=str(tmp_path / "stories"), max_samples=30), "max_samples was 40 and is 30")
    prepared(dataset=str(tmp_path / "stories.jsonl"), output=str(tmp_path / "stories"), max_samples=30, overwrite=True)
    refused(lambda: prepared(output="x"), "--input")
    refused(lambda: prepared(output="x", input="a", dataset="b"), "both")
    refused(lambda: prepared(output="x", dataset="tales", vocab="v.json"), "merges")
    refused(lambda: prepared(output="x", dataset="tales", **files, tokenizer="byte"), "both")
    refused(lambda: prepared(output=str(tmp_path / "merges.txt" / "x"), dataset="tales"), "cannot be written")
