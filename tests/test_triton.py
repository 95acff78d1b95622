"""The Triton kernels: interpreted on a CPU, compiled for three generations of GPUs, run where there
is one."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sprout_lab.kernels.bitlinear import bit_linear
from sprout_lab.kernels.normgate import norm_gate, silu_gate
from sprout_lab.kernels.scan import gated_scan
from test_kernels import LENGTHS, WIDTHS, compare, scan_inputs

here = Path(__file__).resolve().parent


def run(script, **environment):
    """A script beside this file, in a process of its own: whether Triton interprets is decided at
    its import."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**inherited, "PYTHONPATH": str(here.parent), "OMP_NUM_THREADS": "1",
                   **environment}
    command = [sys.executable, str(here / script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_interpreted():
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run("triton_interpreted.py", TRITON_INTERPRET="1")
    assert done.returncode == 0 and "interpreted" in done.stdout, done.stderr[-3000:]


def test_compiles_for_each_generation(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed")
    done = run("triton_compiled.py", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


@pytest.mark.slow   # two compilers of 180 MB from the package index
@pytest.mark.parametrize("version", ("3.6.0", "3.7.1"))
def test_compiles_with_the_machines_versions(version, tmp_path):
    "The GPU machines' and this one's."
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-cache-dir",
               "--target", str(tmp_path / "packages"), f"triton=={version}"]
    if subprocess.run(install, capture_output=True).returncode:
        pytest.skip(f"triton {version} cannot be had here")
    path = os.pathsep.join([str(tmp_path / "packages"), str(here.parent)])
    done = run("triton_compiled.py", TRITON_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=path)
    assert (done.returncode == 0
            and f"compiled with triton {version}" in done.stdout), done.stderr[-3000:]


@pytest.mark.cuda
def test_on_a_gpu():
    for T in (*LENGTHS, 2048):
        for D in WIDTHS:
            f, i, h0, reset = (t.cuda() for t in scan_inputs(T, D))
            def scan(f, i, h0, backend): return gated_scan(f, i, h0, reset, backend)
            compare(scan, (f, i, h0), "triton", rtol=5e-4)
            g, gain, weight = i[0] + 0.1, torch.rand(D, device="cuda") + 0.5, 0.02 * torch.randn(24,
                                                                                                 D).cuda()
            def gate(g, h, w, backend): return (norm_gate(g, h, w, 1e-2, backend),)
            compare(gate, (g, f[0], gain), "triton", rtol=1e-3)
            def silu(x, backend): return (silu_gate(x, backend),)
            compare(silu, (torch.cat((g, f[0]), -1),), "triton", rtol=1e-3)
            def linear(x, w, gain, backend): return (bit_linear(x, w, gain, 1e-2, backend),)
            compare(linear, (g, weight, gain), "triton", rtol=5e-3)
