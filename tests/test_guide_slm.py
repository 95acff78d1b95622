"""The training guide of the SLM: every command line, snippet and file of it, with `sprout-lab` in
place of its scripts. At full size as a dry run, at a small size for real."""
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sprout_lab.configs import ConfigError
from sprout_lab.runs import Run, checkpoint_facts, read_log

from shell import refused, shell

SMALL = ("--hidden_size 32 --num_layers 1 --batch_size 4 --gradient_accumulation_steps 1 "
         "--sequence_length 32 --warmup_steps 1 --eval_interval 2 --save_interval 2 "
         "--log_interval 1 --eval_batches 2 --mixed_precision none --device cpu --sample_tokens 20")
SMALL_HNET = SMALL.replace("--hidden_size 32 --num_layers 1",
                           "--d_model 16 --d_model 32 --num_blocks '[1, 0, 1]' --num_blocks '[1]'")


def resolved(line: str) -> dict:
    "name → (value, source) as `--dry-run` prints it."
    rows = {}
    for row in shell(f"{line} --dry-run").splitlines():
        if row.startswith("  "):
            sources = "flag|file|preset|default|set aside|follows"
            name, value, source = re.fullmatch(rf"  (\S+)\s+(.*?)\s+((?:{sources}).*)", row).groups()
            rows[name] = (value, source)
    return rows


def values(line: str, expected: dict) -> None:
    rows = resolved(line)
    assert {name: rows[name][0] for name in expected} == {name: json.dumps(value) for name,
                                                          value in expected.items()}


STORIES = [f"Once upon a time there was a {who} who had a {what}. The {who} lost the {what} and "
           f"was sad. A friend found it. They all smiled. The end."
           for who in ("cat", "dog", "little girl", "boy", "bird", "bear", "fox", "mouse")
           for what in ("ball", "red car", "kite", "book", "hat")]


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    """A folder of the guide's kind: its experiment files, and TinyStories in miniature as a text
    file, as a folder in the hub's format, and prepared."""
    folder = tmp_path_factory.mktemp("guide")
    (folder / "TinyStories.txt").write_text("\n<|endoftext|>\n".join(STORIES) + "\n<|endoftext|>\n")
    (folder / "hub").mkdir()
    import datasets
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": STORIES}).to_parquet(folder / "hub" / "train-00000-of-00001.parquet")
    datasets.Dataset.from_dict({"text": STORIES[:3]}).to_parquet(folder / "hub" / "validation-00000-of-00001.parquet")
    (folder / "configs").mkdir()
    (folder / "my_experiment.json").write_text(json.dumps(EXPERIMENT, indent=4))
    (folder / "custom.json").write_text(CUSTOM)
    shell(f"prepare --input {folder}/TinyStories.txt --output_dir {folder}/data/tinystories "
          f"--max_seq_length 32")
    return folder


@pytest.fixture
def here(stories, tmp_path, monkeypatch) -> Path:
    "A folder for one test, with the guide's files and data in it."
    for path in stories.iterdir(): (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def experiment_with(model: dict) -> None:
    "Write the guide's experiment file, with another model in it."
    Path("experiment.json").write_text(json.dumps(EXPERIMENT | {"model": model}))


EXPERIMENT = {
    "experiment_name": "my_experiment",
    "model": {"config_file": "configs/slm_base.json", "type": "flat"},
    "data": {"data_dir": "./data/tinystories", "max_seq_length": 512},
    "training": {"batch_size": 16, "gradient_accumulation_steps": 4, "learning_rate": 3e-4,
                 "max_steps": 10000, "warmup_steps": 500, "scheduler": "cosine",
                 "mixed_precision": "bf16"},
    "output": {"checkpoint_dir": "./checkpoints/my_experiment", "log_dir": "./logs/my_experiment"},
}
CUSTOM = """{
    "model_type": "hnet_bit",
    "vocab_size": 256,
    "d_model": [384, 512, 768],
    "num_blocks": [[3, 0, 3], [3, 0, 3], [6]],
    "num_heads": 1,
    "expand_ratio": 1,
    "hidden_ratio": 4,
    "attn_mode": "fused_recurrent",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6
}"""


# --- dataset preparation

def test_tinystories_from_a_file_and_a_folder_of_the_hub(here):
    said = shell("prepare --input TinyStories.txt --output_dir ./data2/tinystories "
                 "--max_seq_length 256")
    stats = json.loads(Path("data2/tinystories/stats.json").read_text())
    held = [stats["splits"][s]["num_documents"] for s in ("train", "validation")]
    assert (sum(held) == len(STORIES) and min(held) > 0 and f"{held[0]:,} documents" in said
            and "sequences of 256" in said)
    shell("prepare --input TinyStories.txt --output_dir ./data2/tinystories_small "
          "--max_seq_length 256 --max_samples 10")
    assert sum(s["num_documents"]
               for s in json.loads(Path("data2/tinystories_small/stats.json").read_text())["splits"].values()) == 10
    shell("prepare --dataset ./hub --output_dir ./data2/hub --max_seq_length 512 --max_samples "
          "10000")
    stats = json.loads(Path("data2/hub/stats.json").read_text())
    documents = [stats["splits"][s]["num_documents"] for s in ("train", "validation")]
    assert documents == [len(STORIES), 3] and stats["splits"]["train"]["num_sequences"] > 5
    for line in ("prepare --dataset tinystories --output_dir ./data2/whole --max_seq_length "
                 "512", "prepare --dataset tinystories --output_dir ./data2/subset "
                        "--max_seq_length 256 --max_samples 10000"):
        # by hub name: without a network, one line that says so
        assert "needs the network" in refused(line)


def test_snippets_of_data_sets(here, capsys):
    from torch.utils.data import DataLoader

    from sprout_lab.data.datasets import (
        DatasetConfig, HuggingFaceDataset, TextDirectoryDataset, collate_fn, print_dataset_stats)
    Path("my_texts").mkdir()
    for i, story in enumerate(STORIES[:6]): Path(f"my_texts/{i}.txt").write_text(story)
    dataset = TextDirectoryDataset(
        directory="./my_texts",
        max_seq_length=512,
    )
    dataloader = DataLoader(dataset, batch_size=16, collate_fn=collate_fn)
    batch = next(iter(dataloader))
    assert batch["input_ids"].shape == batch["labels"].shape == (len(dataset), 512)

    config = DatasetConfig(
        dataset_name="wikitext",
        dataset_config="wikitext-103-v1",
        split="train",
        max_seq_length=512,
    )
    if not (Path(os.environ.get("SPROUT_LAB_DATA", "/nowhere")) / "wikitext-103").exists():
        with pytest.raises(ConfigError, match="needs the network"): HuggingFaceDataset(config)
    config = DatasetConfig(
        dataset_name="./hub",        # the guide's your/dataset
        text_column="text",  # Column containing text
        max_seq_length=512,
    )
    dataset = HuggingFaceDataset(config)
    assert dataset.tokenizer.decode(dataset[0]["input_ids"]).startswith(STORIES[0] + "<eos>"
                                                                        + STORIES[1])
    print_dataset_stats(dataset)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["Dataset Statistics", "==================", f"Number of original samples: "
                                                                 f"{len(STORIES):,}",
                     f"Total bytes: {sum(map(len, STORIES)):,}",
                     f"Training sequences: {len(dataset):,}", *lines[5:]]


# --- models and their files

@pytest.mark.parametrize("name, millions, guide_says, family",
                         [("slm_base", 20.7, 25, "slm"), ("hnet_bit_1stage", 21.4, 35, "hnet"),
                          ("hnet_bit_2stage", 189.7, 80, "hnet")])
def test_the_guides_models(here, name, millions, guide_says, family):
    """Their shapes are the guide's; their sizes are what the shapes give, which is not what the
    guide's table says."""
    from sprout_lab.families import get_family
    with torch.device("meta"): model = get_family(family).build(name)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(count, 1) == millions and abs(count - guide_says) > 4
    with_family, without = (resolved(f"train {family} --model_config configs/{name}.json"),
                            resolved(f"train --model_config configs/{name}.json"))
    assert with_family == without and (without["hidden_size"] if family == "slm"
                                       else without["d_model"])[1] == f"preset {name}"


def test_the_custom_configuration(here):
    expected = {"type": "hnet", "d_model": [384, 512, 768],
                "num_blocks": [[3, 0, 3], [3, 0, 3], [6]], "num_attention_heads": 1,
                "expand_ratio": 1, "hidden_ratio": 4,
                "attn_mode": "fused_recurrent", "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6, "vocab_size": 256}
    for line in ("train --model_config custom.json", "train --config custom.json",
                 "train hnet --model-config custom.json"):
        values(line, expected)
    for kind in ("hierarchical", "hnet_bit", "hnet"):
        experiment_with({"config_file": "custom.json", "type": kind})
        values("train --config experiment.json",
               expected | {"batch_size": 16, "sequence_length": 512})
    experiment_with({"type": "hierarchical", "config_file": "configs/hnet_bit_1stage.json"})
    values("train --config experiment.json",
           {"type": "hnet", "d_model": [256, 384], "max_steps": 10000})
    experiment_with({"config_file": "custom.json", "type": "flat"})
    # a hierarchy's shape for a flat model
    assert "slm has no such setting" in refused("train --config experiment.json --dry_run")
    assert "keep one" in refused("train slm --config my_experiment.json --model_config "
                                 "custom.json --dry_run")


# --- training: full size

def test_the_experiment_file(here):
    expected = {"type": "slm", "hidden_size": 512, "num_hidden_layers": 6,
                "experiment_name": "my_experiment", "data_dir": "./data/tinystories",
                "sequence_length": 512, "batch_size": 16,
                "gradient_accumulation_steps": 4, "learning_rate": 3e-4, "max_steps": 10000,
                "warmup_steps": 500, "scheduler": "cosine", "mixed_precision": "bf16",
                "output_dir": "./checkpoints/my_experiment", "log_dir": "./logs/my_experiment"}
    for line in ("train --config my_experiment.json", "train slm --config my_experiment.json"):
        values(line, expected)
    values("train --config configs/training_flat_tinystories.json",
           {"type": "slm", "hidden_size": 512, "data_dir": "data/tinystories",
            "experiment_name": "flat_tinystories"})
    values("train slm --config configs/training_flat_tinystories.json",
           {"type": "slm", "max_steps": 10000})


def test_train_directly(here):
    line = ("train {} --model_config configs/slm_base.json --data_path ./data/tinystories "
            "--batch_size 16 --learning_rate 3e-4 --max_steps 10000 --output_dir "
            "./checkpoints/my_run")
    expected = {"hidden_size": 512, "data_dir": "./data/tinystories", "batch_size": 16,
                "learning_rate": 3e-4, "max_steps": 10000, "output_dir": "./checkpoints/my_run"}
    for family in ("slm", ""): values(line.format(family), expected)
    dashed = line.format("slm")
    for word in ("path", "config", "size", "rate", "steps", "dir"):
        dashed = dashed.replace(f"_{word}", f"-{word}")
    values(dashed, expected)


def test_the_tables_defaults(here):
    table = {"batch_size": 16, "gradient_accumulation_steps": 4, "learning_rate": 3e-4,
             "weight_decay": 0.01, "max_grad_norm": 1.0, "warmup_steps": 500, "scheduler": "cosine",
             "mixed_precision": "bf16"}
    for preset in ("slm --preset guide", "hnet --preset guide", "slm --preset slm_base",
                   "hnet --preset hnet_bit_1stage", "hnet --preset hnet_bit_2stage"):
        values(f"train {preset}", table)
    changed = {"batch_size": 8, "gradient_accumulation_steps": 8, "learning_rate": 1e-4,
               "weight_decay": 0.1, "max_grad_norm": 0.5, "warmup_steps": 1000,
               "scheduler": "linear", "mixed_precision": "fp16",
               "save_interval": 250, "num_workers": 2, "compile": True}
    flags = " ".join(f"--{name} {value}" for name,
                     value in changed.items() if name not in ("compile", "mixed_precision"))
    values(f"train slm --preset guide {flags} --mixed_precision fp16 --compile_model", changed)
    values("train slm --preset guide --mixed_precision none", {"mixed_precision": "no"})
    values("train slm --preset guide --mixed_precision bf16 --batch_size 32 --max_steps 20000 "
           "--use_wandb", {"mixed_precision": "bf16", "use_wandb": True})


def test_the_file_against_running_out_of_memory(here):
    Path("oom.json").write_text(json.dumps({"training": {"batch_size": 8,
                                                         "gradient_accumulation_steps": 8,
                                                         "max_seq_length": 256}}))
    values("train slm --preset guide --config oom.json",
           {"batch_size": 8, "gradient_accumulation_steps": 8, "sequence_length": 256,
            "hidden_size": 512})


# --- training, evaluation and generation: a size that fits

def test_the_experiment_from_beginning_to_end(here):
    shell(f"train --config my_experiment.json --max_steps 4 {SMALL}")
    run = Run("checkpoints/my_experiment")
    # the guide's tree
    for name in ("checkpoints/step_2", "checkpoints/step_4", "checkpoints/best",
                 "logs/training_log.csv", "logs/eval_log.csv", "logs/tensorboard",
                 "results/evaluation_results.json", "results/generations.txt",
                 "experiment_summary.json"):
        assert (run.folder / name).exists(), name
    # and where its sections on logs and checkpoints look
    log = read_log("logs/my_experiment/training_log.csv")
    assert log["step"] == [1, 2, 3, 4] and {"loss", "bits_per_byte", "learning_rate",
                                            "grad_norm"} <= set(log) and all(log["grad_norm"])
    assert log["learning_rate"][0] == pytest.approx(3e-4) and log["learning_rate"][-1] < 3e-4
    assert Path("logs").is_dir() and list(Path("logs/my_experiment/tensorboard").rglob("events*"))
    for name in ("step_2.pt", "step_4.pt", "best.pt"):
        assert checkpoint_facts(f"checkpoints/my_experiment/{name}")["step"] in (2, 4)

    said = shell("evaluate --model_path ./checkpoints/my_experiment/best.pt --data_dir "
                 "./data/tinystories --output_dir ./evaluation_results --num_samples 2")
    results = json.loads(Path("evaluation_results/evaluation_results.json").read_text())
    assert {"bits_per_byte", "perplexity", "accuracy",
            "top5_accuracy"} <= set(results) and 0 <= results["generation"]["utf8_validity"] <= 1
    assert (6 < results["bits_per_byte"] < 10
            and results["perplexity"] == pytest.approx(2 ** results["bits_per_byte"], rel=0.05))
    assert "utf8 validity" in said and "bits per byte" in said.lower()
    said = shell("evaluate --model_path ./checkpoints/my_experiment/step_2.pt --compare "
                 "./checkpoints/my_experiment/step_4.pt --data_dir ./data/tinystories "
                 "--output_dir ./evaluation_results")
    assert "step_2" in said and "step_4" in said

    written = shell('generate --model_path ./checkpoints/my_experiment/best.pt --prompt "Once '
                    'upon a time" --max_tokens 20 --temperature 0.8')
    assert written.startswith("Once upon a time")

    # inside the run's folder the guide's ./checkpoints/best.pt is a path of its own
    os.chdir(run.folder)
    assert shell('generate --model_path ./checkpoints/best.pt --prompt "Once upon a time" '
                 '--max_tokens 5').startswith("Once upon a time")


def test_direct_training_and_resumption(here):
    shell(f"train slm --model_config configs/slm_base.json --data_path ./data/tinystories "
          f"--learning_rate 3e-4 --max_steps 4 --output_dir ./checkpoints/my_run {SMALL}")
    assert read_log(Run("checkpoints/my_run").training_log)["step"] == [1, 2, 3, 4]
    shell("train --resume_from ./checkpoints/my_run/step_4.pt --max_steps 6")
    assert (checkpoint_facts("checkpoints/my_run/latest.pt")["step"] == 6
            and read_log(Run("checkpoints/my_run").training_log)["step"] == [1, 2, 3, 4, 5, 6])
    # an earlier step goes on beside what is there
    said = shell("train slm --resume_from ./checkpoints/my_run/step_4.pt --max_steps 6")
    assert "my_run-2" in said and checkpoint_facts("checkpoints/my_run-2/latest.pt")["step"] == 6


def test_the_hierarchical_model_from_beginning_to_end(here):
    experiment_with({"config_file": "custom.json", "type": "hierarchical"})
    shell(f"train --config experiment.json --max_steps 2 {SMALL_HNET}")
    results = json.loads(Path("checkpoints/my_experiment/results/evaluation_results.json").read_text())
    assert results["bits_per_byte"] > 3
    assert shell("generate --model_path ./checkpoints/my_experiment/best.pt --prompt 'The story "
                 "begins' --max_tokens 10").startswith("The story begins")


def test_comparing_checkpoints(here, capsys):
    from torch.utils.data import DataLoader

    from sprout_lab.data.datasets import TextDirectoryDataset, collate_fn
    from sprout_lab.evaluation.evaluator import Evaluator
    from sprout_lab.families import load_model
    shell(f"train slm --data_path ./data/tinystories --max_steps 4 --output_dir ./my_run {SMALL} "
          f"--sample_tokens 0")
    Path("texts").mkdir()
    for i, story in enumerate(STORIES[:3]): Path(f"texts/{i}.txt").write_text(story)
    model, tokenizer = load_model("my_run")
    test_loader = DataLoader(TextDirectoryDataset("texts", max_seq_length=32), batch_size=4,
                             collate_fn=collate_fn)
    config = {"batch_size": 4}
    os.chdir("my_run/checkpoints")
    capsys.readouterr()
    evaluator = Evaluator(model, tokenizer, config)
    results = evaluator.compare_checkpoints(
        checkpoint_paths=["step_2.pt", "step_4.pt", "best.pt"],
        test_dataloader=test_loader,
        load_fn=load_model,
    )
    table = capsys.readouterr().out
    assert list(results) == ["step_2", "step_4",
                             "best"] and all(word in table
                                             for word in ("step_2", "step_4", "best", "perplexity"))
    assert (results["step_2"]["loss"] != results["step_4"]["loss"]
            and results["best"]["loss"] in (results["step_2"]["loss"], results["step_4"]["loss"]))
    assert {"bits_per_byte", "perplexity", "accuracy", "top5_accuracy"} <= set(results["best"])


@pytest.fixture(scope="module")
def trained(stories) -> Path:
    shell(f"train slm --data_path {stories}/data/tinystories --max_steps 2 --output_dir "
          f"{stories}/trained {SMALL}")
    return stories / "trained"


def test_batch_generation(here, trained):
    Path("prompts.txt").write_text("Once upon a time\nThe dog\n\nA friend\n")
    shell("generate --model_path ./trained/best.pt --prompt_file prompts.txt --output_file "
          "outputs.txt --max_tokens 10")
    texts = Path("outputs.txt").read_text().split("\n---\n")
    assert [text.startswith(prompt) for text,
            prompt in zip(texts, ("Once upon a time", "The dog",
                                  "A friend"))] == [True] * 3 == [True] * len(texts)
    said = shell('generate --model_path ./trained/best.pt --prompt "The story begins" '
                 '--num_samples 5 --max_tokens 10 --seed 1')
    assert said.count("The story begins") == 5


def test_interactive_generation(here, trained, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("Once upon a time\n/temp 0.5\n/topk 10\n/topp "
                                                 "0.8\nThe dog\n/quit\nnot read\n"))
    said = shell("generate --model_path ./trained/best.pt --interactive --max_tokens 5")
    assert all(words in said for words in ("Once upon a time", "temperature is 0.5", "top_k is 10",
                                           "top_p is 0.8", "The dog")) and "not read" not in said


def test_generation_defaults():
    from sprout_lab.decoding.sampling import SamplingConfig
    guide = {"max_tokens": 100, "temperature": 1.0, "top_k": 50, "top_p": 0.9,
             "repetition_penalty": 1.0}
    defaults = SamplingConfig().model_dump()
    assert {name: defaults[name] for name in guide} == guide


def test_key_classes(trained):
    """What the guide calls SimplifiedSLMForCausalLM, HNetBitForCausalLM, Trainer, Evaluator and
    ByteTokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sprout_lab.data.tokenizers import ByteTokenizer
    from sprout_lab.evaluation.evaluator import Evaluator
    from sprout_lab.families import get_family
    from sprout_lab.models.hnet import HNetBitForCausalLM
    from sprout_lab.models.slm import SimplifiedSLMForCausalLM
    from sprout_lab.trainers.trainer import Trainer
    assert (get_family("slm").model_class() is SimplifiedSLMForCausalLM
            and get_family("hnet").model_class() is HNetBitForCausalLM)
    model, tokenizer = (AutoModelForCausalLM.from_pretrained(trained / "checkpoints" / "best"),
                        AutoTokenizer.from_pretrained(trained / "checkpoints" / "best"))
    assert isinstance(model, SimplifiedSLMForCausalLM) and isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.encode("né") == [110, 195, 169]
    assert callable(Trainer.train) and callable(Evaluator.evaluate)


def test_logs_lead_to_the_run(here):
    "`log_dir` is a link, follows the newest run, and is never made over something else."
    line = (f"train slm --data_path ./data/tinystories --max_steps 1 {SMALL} --sample_tokens 0 "
            f"--no_tensorboard")
    shell(f"{line} --output_dir one --log_dir logs/mine")
    shell(f"{line} --output_dir two --log_dir logs/mine")
    assert (Path("logs/mine").resolve() == Path("two/logs").resolve()
            and read_log("logs/mine/training_log.csv")["step"] == [1])
    Path("taken").mkdir()
    assert ("is already there" in refused(f"{line} --output_dir three --log_dir taken")
            and not Path("three").exists())
    shell(f"{line} --output_dir four --log_dir four")
    assert Path("four/logs").is_dir() and not Path("four").is_symlink()


def test_in_a_process_of_its_own(here, trained):
    "The guide's simplest command, with a prompt that a locale without letters hands over as bytes."
    out = subprocess.run([str(Path(sys.executable).with_name("sprout-lab")), "generate",
                          "--model_path", "./trained/best.pt", "--prompt", "é", "--max_tokens", "3",
                          "--output_file", "out.txt"],
                         capture_output=True, env=os.environ
                         | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert (out.returncode == 0
            and Path("out.txt").read_text(encoding="utf-8").startswith("é")), out.stderr
    assert "not UTF-8" in refused("generate --model_path ./trained/best.pt --prompt \udce9")
