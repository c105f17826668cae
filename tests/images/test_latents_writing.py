"""A folder of latents: encoded once, by any number of processes, in spite of kills."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from latents_helpers import BATCH_SIZE, Kill, contents, open_in

import images.encoding
import images.latent_files
from images import open_images

pytest_plugins = ["latents_fixtures"]


def test_what_is_there_is_not_encoded_again(dataset, vae, filled, encodings):
    before = contents(filled)
    open_in(filled, dataset, vae)
    assert encodings == []
    assert contents(filled) == before
    assert set(before) == {"index.json"} | {f"moments-{i:05}.{kind}" for i in range(14) for kind in ("npy", "json")}


@pytest.mark.parametrize("world_size", [2, 5])
@pytest.mark.parametrize("first_missing", [0, 9])
def test_any_number_of_processes_write_the_same_bytes(
    dataset, vae, filled, copied, world_size, first_missing, encodings
):
    for block in range(first_missing, 14):
        (copied / f"moments-{block:05}.npy").unlink()
    wait = threading.Barrier(world_size, timeout=60).wait

    def open_rank(rank):
        return open_in(copied, dataset, vae, rank=rank, world_size=world_size, wait=wait)

    with ThreadPoolExecutor(world_size) as pool:
        opened = list(pool.map(open_rank, range(world_size)))
    assert all(torch.equal(latents[54], opened[0][54]) for latents in opened)
    assert len(encodings) == 14 - first_missing
    assert contents(copied) == contents(filled)


@pytest.mark.parametrize(
    ("there_before", "refused_rank", "match"), [(False, 1, "index.json"), (True, 0, "moments-00001.npy")]
)
def test_folders_that_machines_do_not_share_are_refused(
    dataset, vae, filled, there_before, refused_rank, match, tmp_path, monkeypatch
):
    """Each of two processes has a folder of its own; a run on one machine alone may have filled that before."""
    monkeypatch.setattr(images.latent_files, "SECONDS_OUT_OF_SIGHT", 0.2)
    folders = [tmp_path / "first", tmp_path / "second"]
    if there_before:
        shutil.copytree(filled, folders[1])
    barrier = threading.Barrier(2, timeout=60)

    def open_rank(rank):
        try:
            return open_in(folders[rank], dataset, vae, rank=rank, world_size=2, wait=barrier.wait)
        except ValueError as error:
            barrier.abort()  # as the launcher ends the others
            return str(error)
        except threading.BrokenBarrierError:
            return None

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(open_rank, range(2)))[refused_rank]
    folder = folders[refused_rank]
    assert f"--latents_dir {folder}: must be on a file system that all machines share: {match}" in found
    assert set(contents(folders[1])) == (set(contents(filled)) if there_before else set())


def test_a_file_may_come_into_sight_late(dataset, vae, copied, tmp_path):
    """As on NFS."""
    index = copied / "index.json"
    hidden = index.rename(tmp_path / "hidden")
    threading.Timer(0.5, lambda: hidden.rename(index)).start()
    images.latent_files.LatentFiles(copied, (55, 2, 2, 3, 4, 4), BATCH_SIZE, {}).check_is_shared()


@pytest.mark.parametrize("batches_encoded", [0, 1, 6])
def test_a_killed_run_goes_on(dataset, vae, filled, batches_encoded, encodings, tmp_path, monkeypatch):
    encode = images.encoding.encode

    def encode_some(*args):
        if len(encodings) == batches_encoded:
            raise Kill
        return encode(*args)

    with monkeypatch.context() as patch:
        patch.setattr(images.encoding, "encode", encode_some)
        with pytest.raises(Kill):
            open_in(tmp_path, dataset, vae)
    assert len(list(tmp_path.glob("*.npy"))) == batches_encoded
    (tmp_path / ".partial.moments-00006.npy").write_bytes(b"half")  # as one killed while it writes leaves it
    (tmp_path / "moments-00006.json").write_text('{"crc32": 1, "bad_images": {}}')
    open_in(tmp_path, dataset, vae)
    assert encodings == [BATCH_SIZE] * 14  # the last one padded
    assert contents(tmp_path) == contents(filled)


def test_blocks_hold_whole_batches(dataset, vae, tmp_path):
    latents = open_in(tmp_path, open_images("digits"), vae, batch_size=8)
    assert [path.name for path in sorted(tmp_path.glob("*.npy"))] == [f"moments-{i:05}.npy" for i in range(75)]
    assert len(np.load(tmp_path / "moments-00000.npy")) == 24  # 1797 images in 64 would be 29
    assert len(latents.decode_all(show_progress=False)) == 1797
