"""The training guide of SPROUT: every command line, flag, default, snippet and line of its console,
with `sprout-lab train sprout` in place of its script and `sprout_lab` in place of `sprout`. At full
size as a dry run, at a small size for real."""
import json
import math
import re
import shutil

import pytest
import torch

from sprout_lab.runs import Run, checkpoint_facts, read_log

from shell import refused, shell

DRIVE = "drive/MyDrive/sprout/checkpoints/"
SMALL = ("--hidden_dim 32 --num_heads 2 --max_length 32 --batch_size 8 --learning_rate 3e-3 "
         "--warmup_steps 2 --growth_warmup 5 --growth_interval 5 --eval_every 10 --eval_batches 2 "
         "--save_every 10 --log_every 5 --no_tensorboard --sample_tokens 0 --device cpu")
STRUCTURE = re.compile(
    r"=== SPROUT Structure ===\n└── Node 0 \(depth=0, children=\d+, usage=\d+\)\n"
    r"(?:[│ ]*[├└]── Node \d+ \(depth=\d+, children=\d+, usage=\d+\)\n)+Total nodes: 5\n")
SUMMARY = re.compile(
    r"Epoch (\d+)/(\d+) Summary:\n  Loss: (\d+\.\d{4})\n  Accuracy: (\d+\.\d{2})%\n"
    r"  Total nodes: (\d)/5\n  Node limit reached: (True|False)\n")


def resolved(line: str) -> dict:
    "name → value as `--dry_run` prints it."
    row = re.compile(r"  (\S+)\s+(.*?)\s+((?:flag|file|preset|default|set aside|follows).*)")
    rows = [text for text in shell(f"{line} --dry_run").splitlines() if text.startswith("  ")]
    found = (row.fullmatch(text).groups() for text in rows)
    return {name: json.loads(value) for name, value, _ in found}


@pytest.fixture(scope="module")
def tales() -> str:
    from sprout_lab.data.corpora import load_corpus
    return next(iter(load_corpus("tales").documents("train")))[:40_000]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch, tales):
    "A folder of its own, with a short text in it, so that no run evaluates on a long one."
    monkeypatch.chdir(tmp_path)
    (tmp_path / "story.txt").write_text(tales)
    return tmp_path


# ---- at full size -------------------------------------------------------------------------------
DEFAULTS = {
    "hidden_size": 512, "max_depth": 2, "max_nodes": 5, "compatibility_threshold": 0.8,
    "num_attention_heads": 4, "ffn_mult": 4, "dropout": 0.1, "max_position_embeddings": 512,
    "routing": "sequence", "num_epochs": 3.0, "max_steps": None, "batch_size": 32,
    "learning_rate": 5e-5, "warmup_steps": 1000, "max_grad_norm": 1.0, "mixed_precision": "no",
    "max_samples": 50000, "sequence_length": 128, "mask_prob": 0.15, "save_interval": 5000,
    "eval_interval": 1000, "log_interval": 100, "visualize_structure": False}


def test_the_guides_defaults():
    rows = resolved("train sprout --preset guide")
    assert {name: rows[name] for name in DEFAULTS} == DEFAULTS
    assert rows["growth_warmup"] >= 1000, "growth waits until the routers have learned something"


SHOWN, MIXED = {"visualize_structure": True}, {"mixed_precision": "auto"}


@pytest.mark.parametrize("line, changed", [
    (f"--checkpoint_dir /content/{DRIVE} --num_epochs 3 --batch_size 32 --max_samples 50000 "
     "--max_nodes 5 --visualize_structure", {"output_dir": f"/content/{DRIVE}", **SHOWN}),
    (f"--checkpoint_dir /content/{DRIVE} --num_epochs 3 --batch_size 32 --max_samples 50000 "
     "--hidden_dim 512 --max_depth 2 --max_nodes 5 --learning_rate 5e-5 --mixed_precision "
     "--visualize_structure", {"output_dir": f"/content/{DRIVE}", **SHOWN, **MIXED}),
    ("--hidden_dim 512 --max_depth 2 --max_nodes 5 --compatibility_threshold 0.8 --num_heads 4",
     {}),
    ("--num_epochs 3 --batch_size 32 --learning_rate 5e-5 --warmup_steps 1000 --gradient_clip 1.0 "
     "--mixed_precision", MIXED),
    ("--max_samples 50000 --max_length 128 --mask_prob 0.15", {}),
    ("--save_every 5000 --eval_every 1000 --log_every 100", {}),
    ("--batch_size 16", {"batch_size": 16}),
    ("--hidden_dim 256 --num_heads 2", {"hidden_size": 256, "num_attention_heads": 2}),
    ("--mixed_precision --max_samples 10000", {"max_samples": 10000, **MIXED}),
    ("--compatibility_threshold 0.9", {"compatibility_threshold": 0.9}),
    ("--compatibility_threshold 0.6", {"compatibility_threshold": 0.6}),
], ids=lambda value: value[:40] if isinstance(value, str) else "")
def test_full_size_as_a_dry_run(line, changed):
    rows = resolved(f"train sprout --preset guide {line}")
    expected = {**DEFAULTS, **changed}
    assert {name: rows[name] for name in expected} == expected


FLAGS = {
    "checkpoint_dir": "out", "num_epochs": 2, "batch_size": 4, "max_samples": 9, "hidden_dim": 32,
    "max_depth": 3, "max_nodes": 6, "compatibility_threshold": 0.7, "num_heads": 2,
    "learning_rate": 2e-4, "warmup_steps": 3, "gradient_clip": 0.5, "max_length": 64,
    "mask_prob": 0.2, "save_every": 7, "eval_every": 8, "log_every": 9}


def test_every_flag_in_both_spellings():
    def asked(separator):
        switches = "--mixed_precision --visualize_structure"
        flags = " ".join(f"--{name} {value}" for name, value in FLAGS.items())
        return resolved("train sprout --preset guide "
                        + f"{switches} {flags}".replace("_", separator))

    one, two = asked("_"), asked("-")
    assert one == two and one["visualize_structure"] is True
    names = ("output_dir", "hidden_size", "num_attention_heads", "max_grad_norm", "sequence_length",
             "save_interval", "eval_interval", "log_interval")
    assert [one[name] for name in names] == ["out", 32, 2, 0.5, 64, 7, 8, 9]


def test_debug_mode_is_a_preset_and_yields_to_flags():
    rows = resolved("train sprout --debug_mode --num_epochs 1 --batch_size 4")
    plain = resolved("train sprout --preset debug")
    assert rows["batch_size"] == 4 and rows["num_epochs"] == 1.0
    assert rows["hidden_size"] == plain["hidden_size"] < 512 and plain["max_samples"] is not None


# ---- for real -----------------------------------------------------------------------------------
def test_the_quick_test_and_its_console(here):
    "The guide's first command, as it stands."
    said = shell("train sprout --debug_mode --num_epochs 1 --batch_size 8 --visualize_structure")
    (epoch, epochs, loss, _, nodes, limit), = SUMMARY.findall(said)
    assert (epoch, epochs, nodes, limit) == ("1", "1", "5", "True")
    assert "⚠️  Node limit reached: 5/5 nodes\n" in said
    assert STRUCTURE.search(said), said
    run = Run(next((here / "runs").iterdir()))
    losses = read_log(run.eval_log)["loss"]
    assert losses[0] > 5 and losses[-1] < 3.5, "it learns"
    assert f"{losses[-1]:.4f}" == loss, "the summary says what the log says"
    # a masked model's loss is no bits per byte
    assert (run.results / "loss.png").exists() and not (run.results / "bits_per_byte.png").exists()
    assert all(b is None for b in read_log(run.eval_log)["bits_per_byte"])
    assert read_log(run.logs / "tree_log.csv")["nodes"][-1] == 5


def test_full_training_in_small_and_its_checkpoint(here, tales):
    """The guide's second command with its intervals and sizes cut down, three epochs; then its look
    into the checkpoint."""
    (here / "books").mkdir()
    for number in range(6):
        (here / "books" / f"{number}.txt").write_text(tales[number * 1500:(number + 1) * 1500])
    said = shell(f"train sprout --preset guide --dataset_name books --checkpoint_dir {DRIVE} "
                 "--num_epochs 3 --batch_size 32 --max_samples 50000 --max_nodes 5 --mixed_precision "
                 f"--visualize_structure {SMALL}")
    summaries = SUMMARY.findall(said)
    assert [summary[:2] for summary in summaries] == [("1", "3"), ("2", "3"), ("3", "3")]
    assert STRUCTURE.search(said)
    nodes = [int(summary[4]) for summary in summaries]
    assert nodes == sorted(nodes) and nodes[-1] == 5
    assert [summary[5] for summary in summaries] == [str(n == 5) for n in nodes]

    checkpoint = checkpoint_facts(f"{DRIVE}sprout_mlm_best.pt")   # the guide's torch.load
    best = min(read_log(Run(DRIVE).eval_log)["loss"])
    known = checkpoint["model_info"]
    assert f"{checkpoint['loss']:.4f}" == f"{best:.4f}" and 0 < checkpoint["accuracy"] < 1
    assert 0 < checkpoint["epoch"] < 3.1   # the last step may reach into the next epoch
    from sprout_lab.families import load_model
    model, _ = load_model(f"{DRIVE}sprout_mlm_best.pt", log=lambda words: None)
    info = model.get_model_info()
    for name in ("total_nodes", "total_params"): assert known[name] == info[name]
    assert known["max_nodes"] == 5

    assert len(shell("runs list --root drive/MyDrive/sprout").splitlines()) == 2
    said = shell(f"evaluate --model_path {DRIVE}")
    for words in ("nats per token", "hidden tokens", "pseudo bits per byte"): assert words in said
    assert not re.search(r"^\s*bits per byte", said, re.MULTILINE)
    prompt = "'To be, or [MASK]ot to be'"
    filled = shell(f"generate --model_path {DRIVE} --prompt {prompt} --temperature 0")
    assert re.fullmatch(r"To be, or \[.\]ot to be\n", filled, re.DOTALL)
    no_gap = refused(f"generate --model_path {DRIVE} --prompt 'To be'")
    assert "[MASK] where a token is missing" in no_gap
    assert "fills gaps" in refused(f"generate --model_path {DRIVE}")


def test_max_samples_of_many_documents(here, tales):
    (here / "many").mkdir()
    for number in range(8):
        (here / "many" / f"{number}.txt").write_text(tales[number * 900:(number + 1) * 900])

    def count(more):
        said = shell(f"train sprout --dataset_name many --num_epochs 1 {more} {SMALL} --growth "
                     f"none "
                     "--batch_size 2 --eval_every 1000 --save_every 1000")
        return int(re.search(r": ([\d,]+) steps", said).group(1).replace(",", ""))

    assert count("--output_dir few --max_samples 3") < count("--output_dir all")


def test_a_higher_threshold_grows_more_nodes(here):
    grown = {}
    for threshold in (0.2, 0.9):
        shell(f"train sprout --dataset_name story.txt --max_steps 24 --output_dir at_{threshold} "
              f"--compatibility_threshold {threshold} {SMALL} --eval_every 100 --save_every 100")
        grown[threshold] = checkpoint_facts(f"at_{threshold}")["model_info"]["total_nodes"]
    # a chain down to max_depth whatever the threshold, and branches above it
    assert grown == {0.2: 3, 0.9: 5}


def test_a_run_resumed_from_its_folder_goes_on_as_the_same_tree(here):
    shell("train sprout --preset guide --dataset_name story.txt --checkpoint_dir whole "
          f"--max_steps 30 --keep_checkpoints 9 {SMALL}")
    shutil.copytree("whole", "torn", symlinks=True)
    for left in ("step_20", "step_30"):   # as a kill after step 10 leaves it
        shutil.rmtree(f"torn/checkpoints/{left}")
    for link in (here / "torn/checkpoints").iterdir():
        if link.is_symlink() and not link.exists(): link.unlink()
    (here / "torn/experiment_summary.json").unlink(missing_ok=True)
    before = json.loads((here / "torn/checkpoints/step_10/config.json").read_text())["tree"]
    said = shell("train sprout --resume_from torn")
    assert "resumed from step_10" in said and len(before) == 3
    one, two = ({file: (here / run / file).read_bytes() for file in (
        "checkpoints/step_30/config.json", "checkpoints/step_30/model.safetensors",
        "logs/tree_log.csv")} for run in ("whole", "torn"))
    for file in one: assert one[file] == two[file], file
    tree = json.loads(two["checkpoints/step_30/config.json"])["tree"]
    assert len(tree) == 5 and tree[:3] == before
    shell("train sprout --resume_from torn --max_steps 34")
    facts = checkpoint_facts("torn")
    assert facts["step"] == 34 and facts["model_info"]["total_nodes"] == 5
    assert "already holds a run" in refused("train sprout --checkpoint_dir whole --max_steps 30")


def test_a_causal_tree_is_measured_in_bits_per_byte_and_writes(here):
    said = shell("train sprout --objective causal --dataset_name story.txt --max_steps 24 "
                 f"--output_dir causal {SMALL}")
    assert "bits per byte" in said and "5/5 nodes" in said
    assert (here / "causal/results/bits_per_byte.png").exists()
    facts = checkpoint_facts("causal")
    assert 2 < facts["bits_per_byte"] < 8
    assert abs(facts["bits_per_byte"] - facts["loss"] / math.log(2)) < 1e-6
    said = shell("evaluate --model_path causal --max_batches 8")
    assert re.search(r"bits per byte\s+\d\.\d{3}", said) and "hidden tokens" not in said
    write = "generate --model_path causal --prompt 'My lord' --max_tokens 12 --seed 1"
    one, two = shell(write), shell(write)
    assert one == two and one.startswith("My lord") and len(one) > len("My lord\n")


@pytest.mark.parametrize("switch", ["--whole_word_masking", ""])
def test_wordpiece_from_the_command_line(here, switch):
    shell(f"train sprout --tokenizer wordpiece --vocab_size 200 --dataset_name story.txt {switch} "
          f"--max_steps 20 --output_dir words {SMALL}")
    config = json.loads((here / "words/checkpoints/best/config.json").read_text())
    assert config["vocab_size"] == 200 and config["whole_word_masking"] is bool(switch)
    said = shell("evaluate --model_path words")
    assert "hidden tokens" in said
    filled = shell("generate --model_path words --prompt 'the [MASK] rabbit' --temperature 0")
    assert "[" in filled


# ---- the snippet --------------------------------------------------------------------------------
SNIPPET = '''
import torch
from transformers import BertTokenizer
from sprout_lab import SproutLanguageModel

# Setup
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
tokenizer = BertTokenizer.from_pretrained("bert-base-uncased")

# Create model
model = SproutLanguageModel(
    vocab_size=len(tokenizer),
    hidden_dim=512,
    max_depth=2,
    max_nodes=5,
    compatibility_threshold=0.8
).to(device)

# Example forward pass
text = "The quick brown fox jumps over the lazy [MASK]."
encoding = tokenizer(text, return_tensors="pt")
input_ids = encoding["input_ids"].to(device)

# Forward
outputs = model(input_ids=input_ids)
logits = outputs["logits"]
path_log = outputs["path_log"]

print(f"Logits shape: {logits.shape}")
print(f"Routing decisions: {len(path_log)}")
print(f"Total nodes: {model.sprout.count_total_nodes()}")

# Visualize structure
model.visualize_structure()
'''


def vocabulary(where: str, request, here, tales):
    """A folder ./bert-base-uncased with a vocab.txt: BERT's own, or a WordPiece that was trained here.
    From transformers' side both are loaded by name."""
    file = here / "bert-base-uncased/vocab.txt"
    file.parent.mkdir()
    if where == "bert":
        lab_data = request.getfixturevalue("lab_data")
        shutil.copyfile(lab_data("bert-base-uncased/vocab.txt"), file)
        return
    from sprout_lab.data.tokenizers import train_wordpiece
    trained = train_wordpiece([tales], vocab_size=300)
    file.write_text("\n".join(trained.convert_ids_to_tokens(range(len(trained)))) + "\n")


@pytest.mark.parametrize("where, size", [("bert", 30522), ("trained here", 300)])
def test_the_custom_training_loop(where, size, request, here, tales, capsys):
    vocabulary(where, request, here, tales)
    names = {}
    exec(SNIPPET, names)   # noqa: S102
    said, ids = capsys.readouterr().out, names["input_ids"]
    shape = f"Logits shape: torch.Size([1, {ids.shape[1]}, {size}])"
    assert f"{shape}\nRouting decisions: 0\nTotal nodes: 1\n" in said
    assert "└── Node 0 (depth=0, children=0, usage=1)" in said
    assert (ids == names["tokenizer"].mask_token_id).sum() == 1, "[MASK] is one token"

    model = names["model"].train()   # and what makes it a loop: growth, as a step of it
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    labels = torch.where(ids == names["tokenizer"].mask_token_id, 7, -100)
    for step in range(2):
        outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        outputs["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        model.grow(optimizer=optimizer, step=step)
    outputs = model(input_ids=ids)
    assert outputs["num_nodes"] == model.sprout.count_total_nodes() == 3
    assert len(outputs["path_log"]) == 2 and outputs["path_log"][0]["action"] == "routed"
    info = model.get_model_info()
    assert info["total_nodes"] == 3 and {
        "max_nodes", "node_limit_reached", "total_params", "trainable_params",
        "sprout_stats"} <= set(info)
    assert model.sprout.get_structure()["children"]
    assert model.sprout.get_statistics()["total_nodes"] == 3
    assert model.sprout.is_converged(window=100, threshold=0.001) is False


# ---- what is wrong is said in a line ------------------------------------------------------------
@pytest.mark.parametrize("line, words", [
    ("--max_dept 3", "did you mean 'max_depth'"),
    ("--objective causl", "did you mean 'causal'"),
    ("--objective causal --routing sequence", "use routing=token"),
    ("--max_nodes 0", "at least 1"),
    ("--compatibility_threshold 1.5", "at least 0 and at most 1"),
    ("--compatibility_threshold high", "a number"),
    ("--mask_prob 0", "above 0 and below 1"),
    ("--hidden_dim 30 --num_heads 4", "not a multiple"),
    ("--debug_mode --preset guide", "keep one of them"),
    ("--growth plato", "did you mean 'plateau'"),
    ("--routing tokens", "did you mean 'token'"),
    ("--mixed_precision fp8", "one of no, bf16, fp16, auto"),
    ("--tokenizer bpe --vocab_size 300 --max_steps 1 --dataset_name story.txt", "no mask token"),
    ("--resume_from nowhere", "nowhere"),
    ("--history grown", "history: event 0 is 'grown'"),
    ("--history '[{\"step\": 1}]'", "history: event 0 has no node_id"),
])
def test_wrong_flags_are_answered_in_one_line(line, words):
    assert words in refused(f"train sprout {line}")


@pytest.mark.parametrize("routing", ["sequence", "batch"])
def test_a_dry_run_sees_that_a_causal_tree_routes_by_token(routing):
    line = "train sprout --objective causal --dry_run"
    assert "use routing=token" in refused(f"{line} --routing {routing}")
    shell(f"{line} --routing token")
    shell(f"train sprout --dry_run --routing {routing}")


def test_another_routing_on_resume_is_said(here):
    train = f"train sprout --dataset_name story.txt --output_dir run {SMALL}"
    shell(f"{train} --max_steps 12")
    said = shell("train sprout --resume_from run --routing token --max_steps 16")
    assert "routing=token: step_12 was trained with routing=sequence" in said
    assert "routing=" not in shell("train sprout --resume_from run --max_steps 18")
