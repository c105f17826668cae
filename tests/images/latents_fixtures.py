"""Latents of a few digits by a tiny VAE, for `pytest_plugins`."""

import shutil

import pytest
from latents_helpers import make_vae, open_in

import images.encoding
from images import open_images


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def dataset():
    """55 digits: 14 blocks, and the last is not full."""
    return open_images("digits", split="train[:55]")


@pytest.fixture(scope="module")
def filled(dataset, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "new" / "folder"
    open_in(folder, dataset, vae)
    return folder


@pytest.fixture
def copied(filled, tmp_path):
    """A folder of latents to do harm to."""
    return shutil.copytree(filled, tmp_path / "copied")


@pytest.fixture
def encodings(monkeypatch):
    """The number of images in each batch that is encoded from now on."""
    sizes, encode = [], images.encoding.encode

    def counted(vae, batch, mirrored):
        sizes.append(len(batch))
        return encode(vae, batch, mirrored)

    monkeypatch.setattr(images.encoding, "encode", counted)
    return sizes
