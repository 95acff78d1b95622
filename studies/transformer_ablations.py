"""What each part of the Transformer is worth: the classic ablations, at equal tokens, three seeds.

    python studies/transformer_ablations.py            (about six minutes on one CPU core)

Writes studies/transformer_ablations.json: bits per byte on all of Shakespeare's held-out text, per
variant and seed, with the settings."""
import json
import os
import tempfile
from pathlib import Path

import torch

from sprout_lab.configs import DataConfig
from sprout_lab.data.prepare import load_data
from sprout_lab.families import configure, make_trainer

SETTINGS = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "sequence_length": 128, "batch_size": 16, "max_steps": 300, "optimizer": "muon",
            "learning_rate": 0.02, "warmup_steps": 30, "scheduler": "linear",
            "zero_init_output": True, "min_learning_rate": 0.0, "log_interval": 50, "device": "cpu"}
VARIANTS = {
    "baseline": {}, "no norm": {"norm": "none"}, "post-norm": {"norm": "post"},
    "no positions": {"position": "none"}, "half-split RoPE": {"position": "rope_half"},
    "SiLU instead of SwiGLU": {"activation": "silu"}, "tied head": {"tie_word_embeddings": True},
    "one key-value head": {"num_key_value_heads": 1}, "QK-norm": {"qk_norm": True},
}
SEEDS = (0, 1, 2)
RESULT = Path(__file__).with_suffix(".json")


def score(variant: dict, seed: int, data) -> float:
    "Bits per byte of a fresh model on all held-out text."
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(configure("transformer",
                                         {**SETTINGS, **variant, "seed": seed,
                                          "output_dir": f"{folder}/run"}), data=data, callbacks=[])
        trainer.train()
        return trainer.evaluate()["bits_per_byte"]


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    data, results = load_data(DataConfig()), {}
    for name, variant in VARIANTS.items():
        results[name] = [score(variant, seed, data) for seed in SEEDS]
        print(f"{name:<24}", " ".join(f"{s:.4f}" for s in results[name]), flush=True)
        RESULT.write_text(json.dumps({"what": "bits per byte on Shakespeare's held-out text",
                                      "settings": SETTINGS, "seeds": SEEDS, "variants": VARIANTS,
                                      "results": results}, indent=1) + "\n")
