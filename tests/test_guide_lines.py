"""What a reader of a training guide types next: its scripts with `sprout-lab` in place of `python`,
its remedies, and the natural thing after each. Sizes are cut by further flags only."""
import json
import re
from configparser import ConfigParser
from pathlib import Path

import pytest
import torch
from shell import refused, shell

from sprout_lab.cli import SCRIPTS, cli
from sprout_lab.runs import Run, read_log

TINY = ("--hidden_size 16 --num_layers 1 --num_heads 1 --sequence_length 16 --batch_size 2 "
        "--max_steps 2 --eval_batches 1 --final_eval_batches 1 --no_tensorboard --device cpu "
        "--sample_tokens 0")


def resolved(line: str) -> dict[str, str]:
    "Setting → value, from a dry run."
    return dict(re.findall(r"^  (\w+) +(\S+) +\S", shell(f"{line} --dry_run"), re.M))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


# the guides' lines as they stand, after `python`, `uv run python`, `!python` or `./`
TRAINING = {
    "scripts/train.py": {"hidden_size": "768", "num_hidden_layers": "12", "max_steps": "100000"},
    "scripts/train.py --config configs/small_model.yaml": {"num_hidden_layers": "12"},
    "scripts/train.py --config configs/gpt2_medium.yaml": {"num_hidden_layers": "24"},
    "scripts/train.py --config configs/small_model.yaml --max_iters 50000 --wandb_name "
    "small-model-test": {"max_steps": "50000", "wandb_name": '"small-model-test"'},
    "scripts/train.py --config configs/gpt2_medium.yaml --batch_size 8 --grad_clip 0.5":
        {"batch_size": "8", "max_grad_norm": "0.5", "hidden_size": "1024"},
    "scripts/train.py --d-model 512 --num-layers 6 --num-heads 8 --batch-size 64 --learning-rate "
    "2e-4 --max-iters 25000 --train-data-path data/my_data.txt --no-wandb":
        {"hidden_size": "512", "max_steps": "25000", "use_wandb": "false"},
    "scripts/train.py --log-interval 1 --eval-interval 10":
        {"log_interval": "1", "eval_interval": "10", "hidden_size": "768"},
    "scripts/run_experiment.py --config configs/training_flat_tinystories.json":
        {"type": '"slm"', "hidden_size": "512"},
    "train.py --model_config configs/slm_base.json --data_path ./data/tinystories --batch_size 16 "
    "--learning_rate 3e-4 --max_steps 10000 --output_dir ./checkpoints/my_run":
        {"type": '"slm"', "max_steps": "10000", "data_dir": '"./data/tinystories"'},
    "scripts/train_sprout_mlm.py --debug_mode --num_epochs 1 --visualize_structure":
        {"hidden_size": "64", "num_epochs": "1.0", "visualize_structure": "true"},
    "scripts/train_sprout_mlm.py --checkpoint_dir /content/drive/MyDrive/sprout/checkpoints/ "
    "--num_epochs 3 --batch_size 32 --max_samples 50000 --max_nodes 5 --visualize_structure":
        {"hidden_size": "512", "max_samples": "50000", "max_nodes": "5"},
    "train_mot.py --train_file data/shakespeare.txt --vocab_size 100 --hidden_size 256 "
    "--num_layers 4 --num_thoughts 8 --batch_size 16 --num_epochs 10 --output_dir "
    "outputs/shakespeare_small": {"type": '"mot"', "num_thoughts": "8", "num_epochs": "10.0"},
    "scripts/training/train_with_wandb.py --config configs/mps/quick_test.yaml --wandb_entity "
    "your_username --wandb_project specdifftree":
        {"type": '"tslm"', "use_wandb": "true", "wandb_entity": '"your_username"'},
    "./scripts/training/train_single.sh --config configs/mps/full_training.yaml":
        {"type": '"tslm"', "batch_size": "8", "device": '"mps"'},
}


@pytest.mark.parametrize("line", TRAINING, ids=lambda line: line[:48])
def test_a_script_that_trains(here, line):
    rows = resolved(line)
    assert {name: rows[name] for name in TRAINING[line]} == TRAINING[line]


def test_a_guides_width_that_its_heads_do_not_divide(here):
    "The guide's second command: 1,024 by twelve heads, which its own script cannot divide either."
    line = "scripts/train.py --d-model 1024 --num-layers 24 --batch-size 16 --learning-rate 6e-5"
    said = refused(f"train transformer --preset guide {line.partition(' ')[2]} --dry_run")
    assert "hidden_size=1024 is not a multiple of num_attention_heads=12" in said
    assert resolved(f"{line} --num-heads 16")["num_hidden_layers"] == "24"


# what a script that is refused in a clean folder answers: it was understood, and names the way
ANSWERED = {
    "scripts/prepare_tinystories.py --output_dir ./data/tinystories": "needs the network",
    "scripts/prepare_tinystories.py --output_dir ./data/tinystories_small --max_seq_length 256 "
    "--max_samples 10000": "shakespeare and tales are embedded",
    "scripts/prepare_data.py --vocab vocab.json --merges merges.txt --input text_files/ "
    "--output data/ --create-stats": "vocab=vocab.json: no such",
    "train.py --resume_from ./checkpoints/my_run/step_5000.pt": "no such run or checkpoint",
    "scripts/evaluate_model.py --model_path ./checkpoints/best.pt --data_dir ./data/tinystories "
    "--output_dir ./evaluation_results": "no such run or checkpoint",
    "generate.py --model_path ./checkpoints/best.pt --interactive": "no such run or checkpoint",
    "serve_mot.py outputs/shakespeare_small": "outputs/shakespeare_small",
    "evaluate_diversity.py outputs/shakespeare_small": "no such run or checkpoint",
    "train_lora_mot.py outputs/shakespeare_small": "outputs/shakespeare_small",
    "./scripts/training/run_ablation.sh --config configs/ablation.yaml":
        "ablation: {hidden_size: [32, 64]}",
    "curriculum_learning.py --stage stage2_captioning --epochs 20": "run --stage stage1_mcq first",
    "curriculum_learning.py --stage stage5_ecg_cot --epochs 60": "--from_scratch",
    "talk nowhere": "no such run or checkpoint",
}


@pytest.mark.parametrize("line", ANSWERED, ids=lambda line: line[:48])
def test_a_script_that_needs_what_is_not_there(here, line, capsys):
    from sprout_lab.cli import main
    with pytest.raises(SystemExit) as left: main(line.split())
    said = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and len(said) == 2, said
    assert said[0].startswith(f"{line.split()[0]}: here it is `sprout-lab ")
    assert ANSWERED[line] in said[1]


def test_every_script_is_a_command_that_is_there():
    for script, words in SCRIPTS.items():
        assert words.split()[0] in cli.commands, script


def test_a_gated_model_is_refused_with_the_way_around(here):
    said = refused("train tslm --config configs/cpu/standard.yaml --dataset questions")
    assert "Llama-3.2-1B" in said and "--llm_id none" in said
    shell("train tslm --config configs/cpu/standard.yaml --dataset questions --llm_id none "
          "--max_steps 1 --batch_size 2 --eval_batches 1 --final_eval_batches 1 --no_tensorboard "
          "--sample_tokens 0 --hidden_size 16 --num_layers 1 --num_heads 1 --output_dir quick")
    assert read_log(Run("quick").training_log)["step"] == [1]


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(),
                    reason="what a machine without a GPU answers")
def test_a_device_that_is_not_here(here):
    for device in ("mps", "cuda"):
        assert "choose from cpu" in refused(f"train tslm --device {device} --max_steps 1")


# ---- remedies -----------------------------------------------------------------------------------
@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), MemoryError("Unable to"),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to")])
def test_out_of_memory_names_the_guides_remedies(here, monkeypatch, error):
    from sprout_lab.trainers.trainer import Trainer

    def full(self): raise error
    monkeypatch.setattr(Trainer, "train", full)
    said = refused(f"train transformer {TINY} --output_dir run")
    assert "out of memory with batches of 2 × 16 tokens" in said
    for way in ("--batch_size 1 --gradient_accumulation_steps 2", "--sequence_length 8",
                "--gradient_checkpointing", "a smaller model"): assert way in said


def test_any_other_failure_is_not_called_so(here, monkeypatch):
    from sprout_lab.cli import main
    from sprout_lab.trainers.trainer import Trainer

    def broken(self): raise RuntimeError("a mistake of the lab's own")
    monkeypatch.setattr(Trainer, "train", broken)
    with pytest.raises(RuntimeError, match="the lab's own"):
        main(f"train transformer {TINY} --output_dir run --quiet".split())


def test_the_remedies_train(here):
    """Smaller batches, accumulation, checkpointing, a lower rate, clipping, a longer warmup: as
    flags."""
    shell(f"train transformer {TINY} --output_dir run --batch_size 1 "
          "--gradient_accumulation_steps 2 --gradient_checkpointing --learning_rate 5e-5 "
          "--grad_clip 0.5 --warmup_ratio 0.2 --num_workers 2 --log_interval 1")
    log = read_log(Run("run").training_log)
    assert log["step"] == [1, 2] and max(log["learning_rate"]) <= 5e-5 and all(log["grad_norm"])


def test_doctor_says_what_is_here_and_what_is_missing(here, monkeypatch):
    monkeypatch.setattr("sprout_lab.cli.OPTIONAL", {"no_such_package": "a test"})
    monkeypatch.setenv("SPROUT_LAB_DATA", "/nowhere/at/all")
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) if "  " in line else line.split(" ", 1)
                for line in shell("doctor").splitlines())
    assert rows["torch"] == torch.__version__ and "cores" in rows["python"]
    assert rows["no_such_package"] == "missing: only for a test; pip install no_such_package"
    assert "missing" in rows["SPROUT_LAB_DATA"] and "free" in rows["disk"]
    gpu = "cuda:0" if torch.cuda.is_available() else "cuda"
    assert gpu in rows and "transformer" in rows["families"]


def test_what_the_guides_install_is_declared():
    "`pip install -e .` and `.[wandb]`: the package, and the extra that the guides' loggers need."
    root = Path(__file__).parent.parent
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    names = re.findall(r"^\s*([\w-]+)", ini["DEFAULT"]["requirements"], re.M)
    assert {"torch", "transformers", "datasets", "tensorboard", "matplotlib", "seaborn",
            "tqdm"} <= set(names)
    assert "wandb" in (root / "settings.ini").read_text()
    makefile = (root / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.M) and "pip install" in makefile


# ---- the natural next thing ---------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "one"
    shell(f"train transformer {TINY} --output_dir {folder}")
    return folder


def test_several_prompts_by_place_and_by_flag(here, run):
    said = shell(f"generate {run} --prompt ROMEO: --prompt JULIET: --max_tokens 4 --seed 1")
    assert said.count("--- ") == 2 and "--- 2 of 2" in said
    assert said.index("ROMEO:") < said.index("JULIET:")
    one = "--prompt A --max_tokens 4 --seed 1"
    assert shell(f"generate {run} {one}") == shell(f"generate --model_path {run} {one}")
    assert "keep one of them" in refused(f"generate {run} --model_path {run}")
    assert "which model?" in refused("generate --prompt A")


def test_a_finished_run_says_how_to_go_on(here, run):
    import shutil
    shutil.copytree(run, here / "again", symlinks=True)
    said = shell("train transformer --resume_from again")
    assert "nothing is left to train: --max_steps above 2 goes on" in said
    assert "nothing is left" not in shell("train transformer --resume_from again --max_steps 3")


def test_a_search_takes_the_words_of_generate(here, run):
    flags = f"search {run} --prompt ROMEO: --reward length:20 --token_budget 60 --seed 1"
    assert shell(f"{flags} --max_tokens 4") == shell(f"{flags} --max_new_tokens 4")


def test_two_runs_are_compared_by_evaluate(here, run):
    assert f"evaluate {run} --compare OTHER" in refused(f"compare {run} {run}")
    said = shell(f"evaluate {run} --compare {run}/checkpoints/step_2 --max_batches 1 "
                 f"--output_dir results")
    assert "step_2" in said


def test_loaded_in_python(run):
    from transformers import AutoModelForCausalLM

    from sprout_lab.families import load_model
    model, tokenizer = load_model(run)
    ids = tokenizer("ROMEO:", return_tensors="pt").input_ids
    again = AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "best")
    assert torch.equal(model(ids).logits, again.eval()(ids).logits)
    assert json.loads((run / "experiment_summary.json").read_text())["state"] == "finished"
