"""What the tests of generate.py start from, for `pytest_plugins` and `pytest.mark.usefixtures`."""

import pytest
import torch
from tiny_networks import tiny_conditional_pipeline, tiny_pipeline


@pytest.fixture(scope="module")
def one_thread():
    """Bits are promised for equal numbers of threads; and tiny networks are faster on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder as training saves it: grey 8x8 images, 20 trained steps."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A class-conditional one: cat, dog (or hound) and frog."""
    folder = tmp_path_factory.mktemp("conditional")
    tiny_conditional_pipeline().save_pretrained(folder)
    return folder
