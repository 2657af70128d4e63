import functools
import os
import sys
from pathlib import Path

import pytest

os.environ["TQDM_DISABLE"] = "1"  # before the first import of tqdm, which reads it then; torch imports tqdm
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Hostile:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def write_as_a_gpu(path):
    """Gives Adam's moments in a checkpoint the memory format that training on a GPU gives them."""
    import torch

    ckpt = torch.load(path, weights_only=True)
    for state in ckpt["optim"]["state"].values():
        for key, value in state.items():
            if value.ndim == 4:
                state[key] = value.contiguous(memory_format=torch.channels_last)
    torch.save(ckpt, path)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that are marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; runs with --slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; runs with --slow"))


@pytest.fixture(autouse=True, scope="session")
def private_cache(tmp_path_factory):
    """The decoded-image cache of the tests is not the user's."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True, scope="session")
def built_in_digits_once():
    """Two seconds for each training that a test starts."""
    import common

    common.builtin_digits = functools.cache(common.builtin_digits)


@pytest.fixture
def error(capsys):
    """error(call, *arguments): the call must exit with code 2 and one line on standard error; returns it."""

    def check(call, *arguments):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*arguments)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
        return lines[0]

    return check
