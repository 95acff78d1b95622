"""Real weights: llama2.c files in, Hugging Face Llamas out."""

import struct

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from sprout_lab.configs import ConfigError
from sprout_lab.data.tokenizers import read_llama2c_tokenizer
from sprout_lab.decoding.sampling import generate_text
from sprout_lab.models.llama2c import export_llama, import_llama2c, read_llama2c
from sprout_lab.models.transformer import TransformerConfig, TransformerForCausalLM


def write(path, version=0, dim=16, ff=24, layers=2, heads=4, kv_heads=2, vocabulary=13, length=32, tied=True, cut=None):
    draw = np.random.default_rng(0).standard_normal
    kv = dim // heads * kv_heads
    embed, head = draw((vocabulary, dim)), draw((vocabulary, dim))
    norms = [draw((layers, dim)), draw((layers, dim)), draw(dim)]
    attention = [draw((layers, dim, dim)), draw((layers, kv, dim)), draw((layers, kv, dim)), draw((layers, dim, dim))]
    forward = [draw((layers, ff, dim)), draw((layers, dim, ff)), draw((layers, ff, dim))]
    if version == 0:
        header = struct.pack("<7i", dim, ff, layers, heads, kv_heads, vocabulary if tied else -vocabulary, length)
        parts = [embed, norms[0], *attention, norms[1], *forward, norms[2], draw((2, length, dim // heads // 2))]
    else:
        header = (struct.pack("<Ii7iB", 0x616B3432, version, dim, ff, layers, heads, kv_heads, vocabulary, length, tied)).ljust(256, b"\0")
        parts = [*norms, embed, *attention, *forward]
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


def test_saved_and_loaded(tmp_path):
    model = import_llama2c(write(tmp_path / "m.bin"), output_dir=tmp_path / "out")
    again = TransformerForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.randint(13, (2, 9))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name, content", {
    "empty": b"", "short": b"abc", "text": b"Once upon a time, there was a little girl named Lily. " * 9, "zeros": bytes(4000), "zip": b"PK\x03\x04" + bytes(300),
    "quantized": struct.pack("<Ii", 0x616B3432, 2) + bytes(300), "future": struct.pack("<Ii", 0x616B3432, 9) + bytes(300), "header only": struct.pack("<7i", 16, 24, 2, 4, 2, 13, 32),
    "uneven heads": struct.pack("<7i", 16, 24, 2, 3, 3, 13, 32) + bytes(5000), "huge": struct.pack("<7i", 2**30, 24, 2, 4, 2, 13, 32) + bytes(5000)}.items())
def test_foreign_files_in_one_line(tmp_path, name, content):
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


@pytest.mark.parametrize("switches", [{}, {"position": "rope_half"}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}, {"rope_theta": 500.0}])
def test_export_has_the_same_logits(switches, tmp_path):
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    model = TransformerForCausalLM(TransformerConfig(vocab_size=29, hidden_size=32, num_attention_heads=4, num_hidden_layers=2, max_position_embeddings=64, **switches)).eval()
    ids = torch.randint(29, (2, 40))
    llama = export_llama(model)
    with torch.no_grad():
        assert (llama(ids).logits - model(ids).logits).abs().max() < 1e-4
        llama.save_pretrained(tmp_path)
        assert (LlamaForCausalLM.from_pretrained(tmp_path)(ids).logits - model(ids).logits).abs().max() < 1e-4


def test_stories15M(lab_data, tmp_path):
    folder = lab_data("stories15M")
    model = import_llama2c(folder / "stories15M.bin", folder / "tokenizer.bin", tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert read_llama2c_tokenizer(folder / "tokenizer.bin").encode("Once upon a time") == tokenizer.encode("Once upon a time")
    story = generate_text(model, tokenizer, "", max_tokens=40, temperature=0)[0]
    assert story.strip().startswith("Once upon a time, there was a little girl named Lily")
    ids = torch.tensor([tokenizer.encode("Once upon a time, there was a little girl named Lily. She loved to play outside.")])
    with torch.no_grad():
        ours, theirs = model(ids, labels=ids), export_llama(model)(ids)
    assert (ours.logits - theirs.logits).abs().max() < 1e-4 * max(1, theirs.logits.abs().max())
    assert ours.loss < 2.0
