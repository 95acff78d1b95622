"""A family from a package outside this repository: installed, found, trained, resumed, drawn,
evaluated; a broken one is one line."""
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

root = Path(__file__).parent.parent

FAMILY = '''
"A family of another package: a recurrence whose gates see the input alone."
from typing import Annotated

from torch import nn

from sprout_lab.configs import setting
from sprout_lab.families import Family
from sprout_lab.kernels.scan import gated_scan
from sprout_lab.models.recurrent import RecurrentConfig, RecurrentForCausalLM, RecurrentModel
from sprout_lab.pictures import surprise


class LeakyConfig(RecurrentConfig):
    model_type = "leaky"
    vocab_size: Annotated[int, setting("Different tokens.", ge=2, le=2**24)] = 256
    hidden_size: Annotated[int, setting("Width.", ge=8, le=4096)] = 32
    num_hidden_layers: Annotated[int, setting("Layers.", ge=1, le=64)] = 2


class LeakyLayer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gate, self.value = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x, batch, state=None):
        z = self.gate(x).sigmoid()
        before = None if state is None else state.get("h")
        h, _ = gated_scan(1 - z, z * self.value(x), before, batch.starts)
        if state is not None: state.tensors = {"h": batch.last(h, before)}
        return x + h.to(x.dtype)


class LeakyModel(RecurrentModel):
    config_class = LeakyConfig
    def build_layer(self, layer_idx): return LeakyLayer(self.config.hidden_size)


class LeakyForCausalLM(RecurrentForCausalLM):
    config_class, base_model_class = LeakyConfig, LeakyModel


def family():
    return Family("leaky", "Leaky", "A leaky sum of what was read.", LeakyConfig, {"causal": LeakyForCausalLM},
                  pictures={"surprise": surprise}, own_presets={"nano": {"hidden_size": 32, "sequence_length": 32}},
                  top_settings=("hidden_size",))
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder on the path with two installed packages: one family, and one that cannot be imported."
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name, module, points in (("leaky-family", FAMILY, 'leaky = "leaky_family:family"'),
                                 ("torn-family", "import a_module_that_is_nowhere\n",
                                  'torn = "torn_family:family"')):
        folder = source / name
        folder.mkdir()
        (folder / f"{name.replace('-', '_')}.py").write_text(module)
        (folder / "pyproject.toml").write_text(textwrap.dedent(f"""
            [build-system]
            requires = ["setuptools"]
            build-backend = "setuptools.build_meta"
            [project]
            name = "{name}"
            version = "0.1"
            [tool.setuptools]
            py-modules = ["{name.replace('-', '_')}"]
            [project.entry-points."sprout_lab.families"]
            {points}
            """))
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-index",
                        "--no-deps",
                        "--no-build-isolation", "--target", str(target), str(folder)], check=True)
    return target


def lab(installed, folder, line: str, code: int = 0) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(installed), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", "from sprout_lab.cli import main; main()",
                           *line.split()], cwd=folder,
                          env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == code, done.stderr
    return done


def test_a_package_outside_adds_a_family(installed, tmp_path):
    listed = lab(installed, tmp_path, "families")
    assert "A leaky sum of what was read." in listed.stdout and "torn" not in listed.stdout
    loading, left_out = listed.stderr.splitlines()
    assert loading.startswith("loading PyTorch")
    assert "the family torn of torn_family:family is left out: No module" in left_out

    short = ("--batch_size 4 --eval_batches 1 --eval_interval 4 --save_interval 4 --tensorboard "
             "false --sample_tokens 8 --device cpu")
    lab(installed, tmp_path, f"train leaky --max_steps 8 "
                             f"{short.replace('--tensorboard false', '--no_tensorboard')} "
                             f"--output_dir run")
    lab(installed, tmp_path, "train leaky --resume_from run --max_steps 12")
    summary = json.loads((tmp_path / "run/experiment_summary.json").read_text())
    assert summary["step"] == 12 and summary["state"] == "finished"
    assert "bits per byte" in lab(installed, tmp_path, "evaluate --run run --max_batches 1").stdout
    assert (tmp_path / "run/results/surprise.png") == tmp_path / lab(installed, tmp_path,
                                                                     "draw run").stdout.strip()
    assert lab(installed, tmp_path,
               "generate --run run --prompt ROMEO: --max_tokens 5").stdout.startswith("ROMEO:")
    lab(installed, tmp_path, "export run --output out")
    wrong = lab(installed, tmp_path, "train leeky", code=2)
    assert "did you mean 'leaky'" in wrong.stderr
    said = lab(installed, tmp_path, "doctor").stdout
    assert "leaky" in said and "torn: No module" in said
