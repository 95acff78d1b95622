"""The MoT guide, line by line: its commands as they stand, sizes cut by further flags only."""
import re
from pathlib import Path

import pytest
from shell import shell

from sprout_lab.data.tokenizers import load_tokenizer
from sprout_lab.runs import Run, read_log

FULL = ("--train_file data/shakespeare.txt --vocab_size 50257 --hidden_size 768 --num_layers 12 "
        "--batch_size 32")
GUIDE_LINES = {
    "small": "--train_file data/shakespeare.txt --vocab_size 100 --hidden_size 256 --num_layers 4 "
             "--num_thoughts 8 --batch_size 16 --num_epochs 10 "
             "--output_dir outputs/shakespeare_small",
    "full": f"{FULL} --num_thoughts 8 --num_epochs 20 --use_wandb "
            f"--output_dir outputs/shakespeare_full",
    "machine": f"{FULL} --num_epochs 50 --use_wandb --output_dir outputs/gcp_run",
    "colab": "--train_file data/shakespeare.txt --vocab_size 1000 --hidden_size 512 --num_layers 6 "
             "--batch_size 16 --num_epochs 20 --output_dir outputs/colab_run",
    "tiny": "--train_file data/shakespeare.txt --vocab_size 100 --hidden_size 128 --num_layers 2 "
            "--num_thoughts 4 --batch_size 8 --num_epochs 5",
    "diverse": "--diversity_weight 0.2 --entropy_weight 0.1",
    "factual": "--diversity_weight 0.05 --entropy_weight 0.02",
    "branches": "--num_thoughts 16", "memory": "--batch_size 8",
    "accumulate": "--gradient_accumulation_steps 4",
    "smaller": "--hidden_size 512 --num_layers 6", "half": "--fp16", "workers": "--num_workers 8",
    "larger": "--batch_size 64", "rate": "--learning_rate 5e-5", "warmup": "--warmup_ratio 0.2",
}
CUT = ("--hidden_size 32 --num_layers 1 --num_heads 2 --d_ff 32 --sequence_length 32 --max_steps 4 "
       "--eval_batches 2 --final_eval_batches 2 --no_tensorboard --device cpu --sample_tokens 0")


def resolved(line: str) -> dict[str, str]:
    "Setting → value, from a dry run."
    rows = re.findall(r"^  (\w+) +(\S+) +\S", shell(f"{line} --dry_run"), re.M)
    return dict(rows)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    "A folder with the guide's data in it."
    from sprout_lab.data.corpora import load_corpus
    monkeypatch.chdir(tmp_path)
    text = "".join(load_corpus("shakespeare").documents("validation"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shakespeare.txt").write_text(text[:40_000])
    return tmp_path


@pytest.mark.parametrize("name", GUIDE_LINES)
def test_the_guides_lines_as_dry_runs(here, name):
    line = GUIDE_LINES[name]
    rows = resolved(f"train mot {line}")
    asked = dict(re.findall(r"--(num_thoughts|hidden_size|batch_size|vocab_size) (\d+)", line))
    assert {key: rows[key] for key in asked} == asked
    assert float(rows["max_grad_norm"]) == 1.0


def test_the_small_model_for_real(here):
    "The guide's first command, then resumed as its own script could not, then read and written."
    shell(f"train mot {GUIDE_LINES['small']} {CUT}")   # the last of two values counts
    assert len(load_tokenizer("outputs/shakespeare_small/checkpoints/latest")) <= 100, "characters"
    run = Run("outputs/shakespeare_small")
    assert read_log(run.training_log)["step"][-1] == 4
    shell("train mot --resume_from outputs/shakespeare_small --max_steps 6")
    assert read_log(run.training_log)["step"][-1] == 6
    (here / "data" / "train.txt").write_text("Your training text here... " * 400)
    shell(f"train mot --train_file data/train.txt --output_dir outputs/mine {CUT}")
    assert shell("generate --model_path outputs/mine --prompt Your --max_tokens 8 --seed 1")


def test_coming_soon_has_come(here):
    "What the guide promises: adapters, diversity, a server."
    shell(f"train mot --output_dir base --dataset shakespeare {CUT}")
    shell("finetune base --output_dir adapted --train_file data/shakespeare.txt --max_steps 2 "
          "--sequence_length 32 --batch_size 2 --eval_batches 1 --final_eval_batches 1 "
          "--no_tensorboard --device cpu --sample_tokens 0")
    assert (here / "adapted").is_dir()
    said = shell("evaluate --model_path base --diversity --max_batches 1")
    assert "distinct" in said
    assert "--port" in shell("serve --help")


@pytest.mark.parametrize("place", ["vertex", "vm", "colab"])
def test_cloud_jobs_are_written(here, place):
    said = shell(f"cloud {place} --job_dir job train mot --train_file gs://bucket/data/shakespeare.txt"
                 " --output_dir gs://bucket/outputs")
    files = [path for path in (here / "job").rglob("*") if path.is_file()]
    assert files and any("gs://bucket/outputs" in path.read_text() for path in files)
    assert len(said.splitlines()) > len(files) - 1, "each file, and the line that starts the job"
