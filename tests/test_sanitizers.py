"""Every C kernel under AddressSanitizer and UndefinedBehaviorSanitizer.

A compiler that adds them takes the place of `$CC`, so that the kernels are built as always, into a cache of
their own. The tests of kernels, their misuse and the decoding engine then run unchanged; the first report ends the
process. Whether reports are made at all is tried first, on functions that are wrong."""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# compiles and runs whole test files at a fraction of their speed: several minutes
pytestmark = [pytest.mark.slow,
              pytest.mark.skipif(not shutil.which("gcc") or sys.platform != "linux",
                                 reason="needs gcc on Linux")]
root = Path(__file__).resolve().parent.parent
# each suite, and how many kernels it builds at least
LEAST = {"test_kernel_misuse.py": 8, "test_kernels.py": 3, "test_ternary_decode.py": 1,
         "test_engine.py": 1}


def found(library: str) -> str:
    "The sanitizer's library, as the compiler finds it."
    command = ["gcc", f"-print-file-name={library}"]
    path = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not Path(path).is_absolute(): pytest.skip(f"{library} is not installed")
    return str(Path(path).resolve())


@pytest.fixture
def sanitized(tmp_path) -> dict:
    "The environment in which kernels are built with sanitizers."
    cc = tmp_path / "sanitizing-cc"
    flags = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g"
    cc.write_text('#!/bin/sh\n[ "$1" = --version ] && exec gcc --version\n'
                  f'echo built >> {tmp_path}/built\nexec gcc "$@" {flags}\n')
    cc.chmod(0o755)
    # leaks are the interpreter's; what torch allocates goes through the sanitizer's malloc
    return {**os.environ, "CC": str(cc), "SPROUT_LAB_CACHE": str(tmp_path / "cache"),
            "LD_PRELOAD": f"{found('libasan.so')} {found('libubsan.so')}", "OMP_NUM_THREADS": "1",
            "PYTHONMALLOC": "malloc", "UBSAN_OPTIONS": "print_stacktrace=1",
            "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}


WRONG = {
    "heap-buffer-overflow": ("void f(float *x, int64_t n) { x[n] = 1; }",
                             "f(pointer(x), c_int64(x.numel()))"),
    "signed integer overflow": ("int64_t f(int64_t n) { return n * n; }", "f(c_int64(2**40))"),
    "division by zero": ("int64_t f(int64_t n) { return 1 / n; }", "f(c_int64(0))"),
}


@pytest.mark.parametrize("report", WRONG)
def test_a_wrong_function_is_reported(sanitized, report):
    source, call = WRONG[report]
    code = ("from ctypes import c_int64\nimport torch\nfrom sprout_lab.kernels.build import "
            "load_c, pointer\n"
            f"x = torch.zeros(5)\nload_c('#include <stdint.h>\\n{source}', 'wrong').{call}\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=sanitized,
                          capture_output=True, text=True)
    assert done.returncode and report in done.stderr


@pytest.mark.parametrize("suite", LEAST)
def test_no_report_from_the_kernels(sanitized, tmp_path, suite):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider",
               f"tests/{suite}"]
    done = subprocess.run(command, cwd=root, env=sanitized, capture_output=True, text=True)
    told = done.stdout + done.stderr
    assert done.returncode == 0 and not re.search(r"AddressSanitizer|runtime error",
                                                  told), told[-6000:]
    # the kernels were built with them, not taken from elsewhere
    assert len((tmp_path / "built").read_text().split()) >= LEAST[suite]
