"""Shared by the tests: flags for slow and GPU checks, optional data, a cache of their own."""
import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the checks that take minutes")
    parser.addoption("--cuda", action="store_true", help="run the checks that need a GPU")


def pytest_collection_modifyitems(config, items):
    import torch
    for item in items:
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: run with --slow"))
        if "cuda" in item.keywords and not (config.getoption("--cuda")
                                            and torch.cuda.is_available()):
            item.add_marker(pytest.mark.skip(reason="needs a GPU: run with --cuda on a machine "
                                                    "that has one"))


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Prepared corpora go to a folder of this session's own, so that no earlier run can make a test
    pass."""
    before = os.environ.get("SPROUT_LAB_CACHE")
    os.environ["SPROUT_LAB_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    yield
    if before is None: os.environ.pop("SPROUT_LAB_CACHE")
    else: os.environ["SPROUT_LAB_CACHE"] = before


@pytest.fixture(scope="session")
def lab_data():
    "lab_data('gpt2/vocab.bpe') → Path below $SPROUT_LAB_DATA, or a visible skip."
    def find(name: str) -> Path:
        root = os.environ.get("SPROUT_LAB_DATA")
        path = Path(root or "", name)
        if not root or not path.exists():
            pytest.skip(f"needs {name} below $SPROUT_LAB_DATA, which is optional large data")
        return path
    return find
