"""The training guide of the Transformer: every command line, with `sprout-lab` in place of its
scripts. At full size as a dry run, at a small size for real."""
import io

import pytest

from sprout_lab.runs import Run, checkpoint_facts, read_log

from shell import shell


def resolved(line: str) -> dict:
    "name → (value, source) as `--dry-run` prints it."
    rows = {}
    for row in shell(f"{line} --dry-run").splitlines():
        if row.startswith("  "):
            name, value, source = row[2:30].strip(), row[31:59].strip(), row[60:].strip()
            rows[name] = (value, source)
    return rows


GUIDE_LINES = [
    "train transformer --preset guide",
    "train transformer --preset guide --d-model 1024 --num-layers 24 --num-heads 16 --batch-size "
    "16 --learning-rate 6e-5",
    "train transformer --config configs/small_model.yaml",
    "train transformer --config configs/gpt2_medium.yaml",
    'train transformer --config configs/small_model.yaml --max_iters 50000 --wandb_name '
    '"small-model-test"',
    "train transformer --config configs/gpt2_medium.yaml --batch_size 8 --grad_clip 0.5",
    'train transformer --preset guide --d-model 512 --num-layers 6 --num-heads 8 --batch-size 64 '
    '--learning-rate 2e-4 --max-iters 25000 --train-data-path "data/my_data.txt" --no-wandb',
    "train transformer --preset guide --log-interval 1 --eval-interval 10",
]


@pytest.mark.parametrize("line", GUIDE_LINES)
def test_full_size_as_a_dry_run(tmp_path, monkeypatch, line):
    monkeypatch.chdir(tmp_path)
    assert "hidden_size" in resolved(line)


def test_the_guides_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = resolved("train transformer --preset guide")
    expected = {"vocab_size": "50257", "sequence_length": "1024", "hidden_size": "768",
                "num_hidden_layers": "12", "num_attention_heads": "12", "intermediate_size": "3072",
                "rope_theta": "10000.0",
                "batch_size": "32", "max_steps": "100000", "learning_rate": "0.0001",
                "weight_decay": "0.1", "max_grad_norm": "1.0", "warmup_steps": "1000",
                "lr_decay_steps": "100000",
                "min_learning_rate": "1e-05", "train_data_path": '"data/owt_train.txt"',
                "val_data_path": '"data/owt_valid.txt"', "output_dir": '"checkpoints"',
                "save_interval": "1000",
                "eval_interval": "100", "log_interval": "10",
                "wandb_project": '"cs336-transformer"', "use_wandb": "true", "device": '"auto"',
                "seed": "42"}
    assert {name: rows[name][0] for name in expected} == expected
    medium = resolved("train transformer --preset gpt2_medium")
    assert {n: medium[n][0]
            for n in ("num_hidden_layers", "hidden_size", "num_attention_heads",
                      "intermediate_size")} == {"num_hidden_layers": "24", "hidden_size": "1024",
                                                "num_attention_heads": "16",
                                                "intermediate_size": "4096"}


def test_every_flag_in_both_spellings(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"vocab_size": 512, "context_length": 64, "d_model": 32, "num_layers": 2,
             "num_heads": 2, "d_ff": 64, "rope_theta": 5000, "batch_size": 4, "max_iters": 10,
             "learning_rate": 2e-4, "weight_decay": 0.05,
             "grad_clip": 0.5, "warmup_iters": 2, "lr_decay_iters": 8, "min_lr": 1e-6,
             "train_data_path": "a.txt", "val_data_path": "b.txt", "checkpoint_dir": "out",
             "checkpoint_interval": 5, "eval_interval": 3,
             "log_interval": 2, "wandb_project": "p", "wandb_name": "n", "wandb_entity": "e",
             "device": "cpu", "seed": 7}
    one = resolved("train transformer " + " ".join(f"--{k} {v}" for k, v in flags.items())
                   + " --no_wandb")
    two = resolved("train transformer " + " ".join(f"--{k.replace('_', '-')} {v}" for k,
                                                   v in flags.items()) + " --no-wandb")
    assert one == two
    assert one["sequence_length"] == ("64", "flag") and one["hidden_size"] == ("32", "flag")
    assert one["use_wandb"][0] == "false" and one["lr_decay_steps"][0] == "8"


def test_the_guide_from_text_to_a_resumed_model(tmp_path, monkeypatch):
    """Train a tokenizer, prepare a folder and a file, train on ids as text and on prepared files,
    resume: small, and for real."""
    monkeypatch.chdir(tmp_path)
    from sprout_lab.data.corpora import load_corpus
    from sprout_lab.data.tokenizers import Tokenizer, train_bpe
    text = "".join(load_corpus("shakespeare").documents("validation"))
    (tmp_path / "text_files").mkdir()
    (tmp_path / "text_files" / "one.txt").write_text(text[:30_000])
    (tmp_path / "text_files" / "two.txt").write_text(text[30_000:60_000])
    (tmp_path / "my_text.txt").write_text(text[:40_000])
    vocab, merges = train_bpe(tmp_path / "my_text.txt", 400, ["<|endoftext|>"])
    Tokenizer(vocab, merges, ["<|endoftext|>"]).save("vocab.json", "merges.txt")

    tokenizer = Tokenizer.from_files("vocab.json", "merges.txt")      # the guide's snippet
    tokens = tokenizer.encode(text[:40_000])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "tokens.txt").write_text(" ".join(map(str, tokens)))

    small = ("--d_model 32 --num_layers 2 --num_heads 2 --d_ff 64 --context_length 32 --batch_size 4 "
             "--warmup_iters 2 --eval_interval 5 --checkpoint_interval 5 --log_interval 1 "
             "--no_tensorboard --device cpu --sample_tokens 0")
    shell(f"train transformer --vocab_size 400 --train_data_path data/tokens.txt --max_iters 6 "
          f"--checkpoint_dir ids {small} --no-wandb")
    assert read_log(Run("ids").training_log)["step"][-1] == 6

    shell("prepare --vocab vocab.json --merges merges.txt --input text_files/ --output prepared/ "
          "--create-stats")
    assert (tmp_path / "prepared" / "stats.json").exists()
    shell("prepare --vocab vocab.json --merges merges.txt --input my_text.txt --output single/")
    shell(f"train transformer --data_dir prepared --max_iters 6 --checkpoint_dir checkpoints "
          f"{small}")
    facts = checkpoint_facts("checkpoints/latest.pt")
    assert facts["step"] == 6 and facts["bits_per_byte"] is not None
    shell("train transformer --resume_from checkpoints --max_iters 9")
    assert checkpoint_facts("checkpoints/latest.pt")["step"] == 9
    assert read_log(Run("checkpoints").training_log)["step"] == list(range(1, 10))
    written = shell("generate --model_path ./checkpoints/best.pt --prompt 'My lord' --max_tokens "
                    "20 --temperature 0.8 --seed 1")
    assert written.startswith("My lord")
    said = shell("evaluate --model_path ./checkpoints/best.pt --data_dir prepared --output_dir "
                 "evaluation_results")
    assert "bits" in said and (tmp_path / "evaluation_results" / "evaluation_results.json").exists()


def test_generation_from_files_and_many_samples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shell("train transformer --hidden_size 16 --num_layers 1 --num_heads 1 --sequence_length 16 "
          "--batch_size 2 --max_steps 2 --eval_batches 1 --no_tensorboard --device cpu "
          "--sample_tokens 0 --output_dir run")
    (tmp_path / "prompts.txt").write_text("ROMEO:\nJULIET:\n")
    shell("generate --model_path run --prompt_file prompts.txt --output_file outputs.txt "
          "--max_tokens 10 --seed 1")
    assert (tmp_path / "outputs.txt").read_text().count("\n---\n") == 1
    said = shell("generate --model_path run --prompt 'The story begins' --num_samples 5 "
                 "--max_tokens 10 --seed 1")
    assert said.count("The story begins") == 5
    seeded = "generate --model_path run --prompt A --num_samples 2 --max_tokens 8 --seed 3"
    assert shell(seeded) == shell(seeded)


def test_the_interactive_talk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shell("train transformer --hidden_size 16 --num_layers 1 --num_heads 1 --sequence_length 16 "
          "--batch_size 2 --max_steps 2 --eval_batches 1 --no_tensorboard --device cpu "
          "--sample_tokens 0 --output_dir run")
    monkeypatch.setattr("sys.stdin",
                        io.StringIO("/temp 0.5\n/topk 3\n/topp 2\n/banana\nHello\n/quit\n"))
    said = shell("generate --model_path run --interactive --max_tokens 5 --seed 1")
    for words in ("temperature is 0.5", "top_k is 3", "at most 1", "no such command", "Hello"):
        assert words in said
