"""A VAE's latents: encoded once, by any number of processes, in spite of kills; never those of something else."""

import itertools
import json
import os
import pickle
import shutil
import threading
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from image_helpers import batches, contents_with_bad_ones, open_source, rows_of, write_folder

import images.encoding
import images.latent_files
from images import BadImage, image_order, open_images, open_latents, sample_posterior, training_batches

BATCH_SIZE = 4
IDENTITY = {"sha256": "0123", "scaling_factor": 0.5}


def make_vae(channels=1, **config):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    config = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 3, "scaling_factor": 0.5, **config}
    return AutoencoderKL(in_channels=channels, out_channels=channels, **blocks, **config)


@pytest.fixture(scope="module")
def vae():
    return make_vae()


@pytest.fixture(scope="module")
def dataset():
    """55 digits: 14 blocks, and the last is not full."""
    return open_images("digits", split="train[:55]")


def open_in(folder, dataset, vae, **options):
    options = {"identity": IDENTITY, "mirrored": True, "device": "cpu", "batch_size": BATCH_SIZE, **options}
    return open_latents(dataset, vae, folder, show_progress=False, **options)


@pytest.fixture(scope="module")
def filled(dataset, vae, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "new" / "folder"
    open_in(folder, dataset, vae)
    return folder


@pytest.fixture
def copied(filled, tmp_path):
    """A folder of latents to do harm to."""
    return shutil.copytree(filled, tmp_path / "copied")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def encodings(monkeypatch):
    """The number of images in each batch that is encoded from now on."""
    sizes, encode = [], images.encoding.encode

    def counted(vae, batch, mirrored):
        sizes.append(len(batch))
        return encode(vae, batch, mirrored)

    monkeypatch.setattr(images.encoding, "encode", counted)
    return sizes


# ------------------------------------------------------------------------------------------- what is in them


@torch.no_grad()
def posteriors(vae, pixels):
    """[N, 2, C, h, w] one by one, as diffusers documents it."""
    found = [vae.encode(image[None] / 127.5 - 1).latent_dist for image in pixels.float()]
    return 0.5 * torch.stack([torch.cat([posterior.mean, posterior.std]) for posterior in found])


def test_they_are_what_the_vae_says(dataset, vae, filled):
    latents = open_in(filled, dataset, vae)
    moments = latents.decode_all(show_progress=False)
    pixels = dataset.decode_all(show_progress=False)
    assert moments.dtype == torch.float16
    assert moments.shape == (55, 2, 2, 3, 4, 4)
    assert torch.allclose(moments[:, 0].float(), posteriors(vae, pixels), rtol=2e-3, atol=1e-4)
    assert torch.allclose(moments[:, 1].float(), posteriors(vae, pixels.flip(-1)), rtol=2e-3, atol=1e-4)
    assert not torch.allclose(moments[:, 1], moments[:, 0].flip(-1), rtol=0.1, atol=0.01)  # no mirrored latents


def test_one_view(dataset, vae, filled, tmp_path):
    latents = open_in(tmp_path, dataset, vae, mirrored=False)
    assert latents[0].shape == (1, 2, 3, 4, 4)
    assert torch.equal(latents[7][0], open_in(filled, dataset, vae)[7][0])


def test_both_views_serve_a_run_without_flips(dataset, vae, filled, encodings, tmp_path):
    both = open_in(filled, dataset, vae)
    one = open_in(filled, dataset, vae, mirrored=False)
    assert encodings == []
    assert torch.equal(one.decode_all(show_progress=False), both.decode_all(show_progress=False)[:, :1])
    assert one.nbytes == both.nbytes / 2 == one.decode_all(show_progress=False).nbytes
    assert torch.equal(one.sample(), open_in(tmp_path, dataset, vae, mirrored=False).sample())
    assert not torch.equal(one.sample(), both.sample())
    assert torch.equal(pickle.loads(pickle.dumps(one))[7], both[7][:1])


def test_an_unfinished_folder_of_both_views_goes_on_with_both(dataset, vae, filled, copied):
    (copied / "moments-00005.npy").unlink()
    open_in(copied, dataset, vae, mirrored=False)
    assert contents(copied) == contents(filled)


def test_one_view_does_not_serve_flips(dataset, vae, tmp_path):
    open_in(tmp_path, dataset, vae, mirrored=False)
    with pytest.raises(
        ValueError, match=rf"--latents_dir {tmp_path}: has no mirror images' latents, which --random_flip needs"
    ):
        open_in(tmp_path, dataset, vae)


def test_the_data_set_is_as_the_images(dataset, vae, filled):
    latents = open_in(filled, dataset, vae)
    assert latents.pixels is dataset
    assert len(latents) == 55
    assert (latents.channels, latents.resolution, latents.image_shape) == (3, 4, (3, 4, 4))
    assert latents.nbytes == latents.decode_all(show_progress=False).nbytes
    assert latents.classes == dataset.classes
    assert torch.equal(latents.labels(), dataset.labels())
    assert latents.describe() == "latents 3x4x4 of " + dataset.describe()
    assert latents.contents() == dataset.contents()
    assert latents.bad_images == []
    assert torch.equal(latents[-1], latents[54])
    with pytest.raises(IndexError):
        latents[55]


def test_the_vae_is_used_in_float32_and_left_as_it_was(dataset, vae, filled, tmp_path):
    half = make_vae().to(torch.bfloat16).train()
    exact = make_vae().to(torch.bfloat16).float()
    with torch.autocast("cpu", torch.bfloat16):
        latents = open_in(tmp_path / "half", dataset, half)
    assert half.dtype == torch.bfloat16
    assert half.training
    assert contents(latents._files.folder) == contents(open_in(tmp_path / "exact", dataset, exact)._files.folder)


def test_the_global_random_state_and_precision_are_left_alone(dataset, vae, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    torch.set_float32_matmul_precision("high")
    try:
        open_in(tmp_path, dataset, vae).sample()
        assert torch.get_float32_matmul_precision() == "high"
        assert not torch.backends.cudnn.deterministic
    finally:
        torch.set_float32_matmul_precision("highest")
    assert torch.equal(torch.rand(3), expected)


def test_a_gpu_may_round_in_convolutions_alone(dataset, vae, tmp_path, monkeypatch):
    seen, encode = [], images.encoding.encode

    def spy(*args):
        seen.append((torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()))
        return encode(*args)

    monkeypatch.setattr(images.encoding, "encode", spy)
    with torch.backends.cudnn.flags(allow_tf32=False):
        open_in(tmp_path, dataset, vae)
        assert not torch.backends.cudnn.allow_tf32
    assert set(seen) == {(True, "highest")}


@pytest.mark.parametrize(
    ("row", "value", "match"),
    [(0, 2e5, "image 0: .* a mean of 100000, .* 65504"), (3, 28.0, "a standard deviation of .*"), (1, np.nan, "nan")],
)
def test_what_float16_cannot_hold_is_an_error(dataset, row, value, match, tmp_path):
    """Of the six outputs of the last layer three are means, and three log-variances."""
    vae = make_vae(scaling_factor=0.5 if row != 3 else 1e4)
    with torch.no_grad():
        vae.quant_conv.weight.zero_()
        vae.quant_conv.bias[row] = value
    with pytest.raises(ValueError, match=match):
        open_in(tmp_path, dataset, vae)
    assert list(contents(tmp_path)) == ["index.json"]


# ------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
def test_batches_are_in_the_order_of_the_images(dataset, vae, filled, placement):
    latents = open_in(filled, dataset, vae)
    expected = latents.decode_all(show_progress=False)[image_order(55, 0, 0, 80)]
    assert torch.equal(batches(latents, 4, batch_size=20, placement=placement).flatten(0, 1), expected)


def test_workers_stream_them(dataset, vae, filled):
    latents = open_in(filled, dataset, vae)
    assert torch.equal(batches(latents, 2, placement="stream", num_workers=1), batches(latents, 2))


def test_no_file_stays_open_and_none_is_written_to(dataset, vae, filled):
    """ImageNet has more blocks than a process may open files."""
    before, count = contents(filled), len(os.listdir("/proc/self/fd"))
    latents = open_in(filled, dataset, vae)
    assert len(os.listdir("/proc/self/fd")) == count
    latents[3].zero_()
    latents.decode_all(show_progress=False).zero_()
    assert not any(block.flags.writeable for block in latents._blocks)
    assert contents(filled) == before


def test_a_worker_is_not_sent_what_is_in_the_files(vae, filled, dataset):
    latents = open_in(filled, dataset, vae)
    pickled = pickle.dumps(latents)
    assert len(pickled) < len(pickle.dumps(dataset)) + latents.nbytes / 4
    assert torch.equal(pickle.loads(pickled)[50], latents[50])


@pytest.fixture
def with_bad_ones(tmp_path):
    """20 images, of which 3, 4 and 19 cannot be decoded; the label of each is its number."""
    pixels, _ = contents_with_bad_ones(20, bad=[3, 4, 19])
    rows_of(pixels).save_to_disk(tmp_path / "saved")
    return lambda **options: open_source(tmp_path / "saved", tmp_path, label_column="label", resolution=8, **options)


@pytest.mark.parametrize("placement", ["memory", "stream"])
def test_labels_stay_beside_their_images(with_bad_ones, placement, tmp_path, caplog):
    dataset, vae = with_bad_ones(on_bad_image="skip"), make_vae(channels=3)
    labels = torch.arange(20)
    latents = open_in(tmp_path / "latents", dataset, vae)
    assert latents.bad_images == dataset.bad_images == [3, 4, 19]
    assert latents.contents()["left_out"] == {"unreadable image": 3}
    assert sum("cannot decode 3 image(s), index 3, 4, 19" in message for message in caplog.messages) == 1
    assert latents.image_or_next(3)[1] == [3, 4]
    assert latents.image_or_next(-1)[1] == [19]
    assert torch.equal(latents[3], latents[5])
    assert torch.equal(latents[19], latents[0])
    assert latents.random_sample(100)[1] == with_bad_ones(on_bad_image="skip").random_sample(100)[1]

    examples = training_batches(latents, 20, seed=0, placement=placement, labels=labels, show_progress=False)
    seen = {}
    for moments, numbers in itertools.islice(examples, 3):
        seen |= dict(zip(numbers.tolist(), moments, strict=True))
    assert sorted(seen) == [i for i in range(20) if i not in (3, 4, 19)]
    assert examples.num_images == (20 if placement == "stream" else 17)
    assert examples.skipped == 3
    for i, moments in seen.items():
        mean = posteriors(vae, dataset[i][None])[0]
        assert torch.allclose(moments[0].float(), mean, rtol=2e-3, atol=1e-4)

    again = with_bad_ones(on_bad_image="skip")
    assert open_in(tmp_path / "latents", again, vae).bad_images == again.bad_images == [3, 4, 19]  # without decoding
    with pytest.raises(BadImage, match=r"cannot decode .* index 3"):  # of those who would not have them skipped
        open_in(tmp_path / "latents", with_bad_ones(), vae)


def test_bad_images_are_an_error(with_bad_ones, tmp_path):
    with pytest.raises(BadImage, match=r"cannot decode 1 image\(s\), index 3; .*--on_bad_image skip"):
        open_in(tmp_path / "latents", with_bad_ones(), make_vae(channels=3))


def test_nothing_but_bad_images(tmp_path):
    dataset = open_source(
        write_folder(tmp_path / "images", [b"", b"text"]), tmp_path, resolution=8, on_bad_image="skip"
    )
    with pytest.raises(BadImage, match="no image is left"):
        open_in(tmp_path / "latents", dataset, make_vae(channels=dataset.channels))


# ------------------------------------------------------------------------------------------- samples


def test_samples_of_the_posterior():
    generator = torch.Generator().manual_seed(0)
    moments = torch.tensor([[1.0, 0.5], [-2.0, 0.25]], dtype=torch.float16).view(1, 2, 2, 1, 1, 1)
    moments = moments.expand(40000, 2, 2, 3, 1, 1)
    noise = torch.randn(40000, 3, 1, 1, generator=generator)
    flips = torch.arange(40000) % 4 == 0
    latents = sample_posterior(moments, noise, flips)
    assert latents.dtype == torch.float32
    assert latents.shape == noise.shape
    for those, mean, std in [(~flips, 1, 0.5), (flips, -2, 0.25)]:
        assert latents[those].mean().item() == pytest.approx(mean, abs=0.01)
        assert latents[those].std().item() == pytest.approx(std, rel=0.02)
    assert torch.equal(sample_posterior(moments, noise), 1 + 0.5 * noise)
    with pytest.raises(ValueError, match="mirror"):
        sample_posterior(moments[:, :1], noise, flips)


def test_a_sample_is_spread_evenly_and_always_the_same(dataset, vae, filled):
    latents = open_in(filled, dataset, vae)
    sample = latents.sample(11)
    assert sample.dtype == torch.float32
    assert torch.equal(sample, open_in(filled, dataset, vae).sample(11))
    means, stds = latents.decode_all(show_progress=False)[::5, 0].float().unbind(1)
    noise = (sample - means) / stds
    assert noise.mean().abs() < 0.2
    assert noise.std() == pytest.approx(1, abs=0.1)
    assert latents.sample().shape == (55, 3, 4, 4)
    moments, indices = latents.random_sample(9)
    assert indices == dataset.random_sample(9)[1]
    assert torch.equal(moments, latents.decode_all(show_progress=False)[indices])


# ------------------------------------------------------------------------------------------- processes and kills


def test_what_is_there_is_not_encoded_again(dataset, vae, filled, encodings):
    before = contents(filled)
    open_in(filled, dataset, vae)
    assert encodings == []
    assert contents(filled) == before
    assert set(before) == {"index.json"} | {f"moments-{i:05}.{kind}" for i in range(14) for kind in ("npy", "json")}


class Kill(Exception):
    """Ends a process where it is."""


def kill():
    raise Kill


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


# ------------------------------------------------------------------------------------------- refusals


def flip_a_byte(path, place=-100):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def save(**array):
    return lambda path: np.save(path, **array)


DAMAGE = {
    "flipped": (flip_a_byte, "checksum"),
    "header": (lambda path: flip_a_byte(path, 20), "damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "longer": (lambda path: path.open("ab").write(b"0"), "behind its end"),
    "shape": (save(arr=np.zeros((4, 1, 2, 3, 4, 4), np.float16)), r"holds float16 \[4, 1, 2, 3, 4, 4\]"),
    "dtype": (save(arr=np.zeros((4, 2, 2, 3, 4, 4), np.float32)), "holds float32"),
    "objects": (save(arr=np.array([{}] * 4)), "damaged"),
    "record": (lambda path: flip_a_byte(path.with_suffix(".json"), 12), "damaged"),
    "bad": (lambda path: path.with_suffix(".json").write_text('{"crc32": 1, "bad_images": []}'), "something else"),
    "unnoted": (lambda path: path.with_suffix(".json").unlink(), "cannot be read"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_found_and_mended(dataset, vae, filled, copied, kind, encodings):
    harm, match = DAMAGE[kind]
    path = copied / "moments-00005.npy"
    harm(path)
    before = contents(copied)
    with pytest.raises(ValueError, match=rf"moments-00005\.npy is damaged: .*{match if match != 'damaged' else ''}"):
        open_in(copied, dataset, vae)
    assert contents(copied) == before
    path.unlink()  # as the message says
    open_in(copied, dataset, vae)
    assert encodings == [BATCH_SIZE]
    assert contents(copied) == contents(filled)


def test_what_nobody_wrote_to_is_not_read_again(dataset, vae, copied, monkeypatch):
    """All of ImageNet's latents would be 42 GB at each start."""
    checked, checksum = [], images.latent_files._checksum
    monkeypatch.setattr(images.latent_files, "_checksum", lambda *args: checked.append(args) or checksum(*args))
    open_in(copied, dataset, vae)
    assert checked == []
    for path, kind in [("moments-00003", "npy"), ("moments-00007", "json")]:
        (copied / f"{path}.{kind}").touch()
    open_in(copied, dataset, vae)
    assert len(checked) == 2
    open_in(copied, dataset, vae)  # which are noted to be intact then
    assert len(checked) == 2
    (copied / "moments-00004.npy").unlink()
    open_in(copied, dataset, vae)
    open_in(copied, dataset, vae)
    assert len(checked) == 3  # to be noted when it was written


def test_each_process_checks_its_share(dataset, vae, copied):
    flip_a_byte(copied / "moments-00005.npy")
    with pytest.raises(ValueError, match="moments-00005"):
        open_in(copied, dataset, vae, rank=1, world_size=2)
    open_in(copied, dataset, vae, rank=0, world_size=2)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"identity": {**IDENTITY, "sha256": "4567"}}, r"holds other latents: vae sha256 was 0123, now it is 4567\. "),
        ({"identity": {**IDENTITY, "name": "x"}}, "vae name was None, now it is x"),
        ({"batch_size": 2}, "batch_size was 4, now it is 2"),
        ({"dataset": {"split": "train[:54]"}}, "images was 55, now it is 54"),
        ({"dataset": {"split": "train[55:110]"}}, "fingerprint was 55-[0-9a-f]+, now it is 55-[0-9a-f]+. Choose"),
        ({"dataset": {"resolution": 16}}, r"image_shape was \[1, 8, 8\], now it is \[1, 16, 16\]"),
        ({"dataset": {"image_mode": "RGB"}}, r"image_shape was \[1, 8, 8\], now it is \[3, 8, 8\]"),
        ({"dataset": {"white_level": 300}}, "white_levels integers was 65535, now it is 300"),
    ],
)
def test_other_latents_are_refused(options, match, filled):
    dataset = open_images("digits", **{"split": "train[:55]", **options.pop("dataset", {})})
    before = contents(filled)
    with pytest.raises(ValueError, match=rf"--latents_dir {filled}: .*{match}"):
        open_in(filled, dataset, make_vae(channels=dataset.channels), **options)
    assert contents(filled) == before


def test_an_unfinished_folder_is_not_filled_with_other_latents(vae, dataset, tmp_path):
    with pytest.raises(Kill):
        open_in(tmp_path, dataset, vae, wait=kill)  # the index is there, and no block
    with pytest.raises(ValueError, match="holds other latents"):
        open_in(tmp_path, open_images("digits", split="train[55:110]"), vae)
    open_in(tmp_path, dataset, vae)


def test_parts_of_the_same_images_are_told_apart(vae, tmp_path):
    """Of 100 images one half or the other; held out, or trained on."""
    parts = open_images("digits", split="train[:100]").hold_out(0.5)
    latents = [open_in(tmp_path / str(i), part, vae) for i, part in enumerate(parts)]
    assert len({part.fingerprint() for part in latents}) == 2
    for i, part in enumerate(parts):
        with pytest.raises(ValueError, match="fingerprint was 50-"):
            open_in(tmp_path / str(1 - i), part, vae)


def test_another_vae_has_another_fingerprint(dataset, vae, filled, tmp_path):
    latents = open_in(filled, dataset, vae)
    other = open_in(tmp_path, dataset, vae, identity={**IDENTITY, "sha256": "4567"})
    assert latents.fingerprint() != other.fingerprint()
    assert latents.fingerprint() == open_in(filled, dataset, vae).fingerprint()
    assert dataset.fingerprint() in latents.fingerprint()


def test_folders_of_others_are_left_alone(dataset, vae, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(ValueError, match=rf"--latents_dir {tmp_path}: is not empty, .* holds photo\.png and no index"):
        open_in(tmp_path, dataset, vae)
    assert contents(tmp_path) == {"photo.png": b"mine"}
    with pytest.raises(ValueError, match=r"--latents_dir .*photo\.png"):
        open_in(tmp_path / "photo.png", dataset, vae)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"images": 1}', b'{"images', b"\xff"])
def test_an_index_of_something_else(dataset, vae, content, tmp_path):
    (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"--latents_dir {tmp_path}"):
        open_in(tmp_path, dataset, vae)
    assert contents(tmp_path) == {"index.json": content}


def test_files_of_others_in_a_folder_of_latents_stay(dataset, vae, filled, copied):
    (copied / "notes.txt").write_text("mine")
    (copied / "moments-00003.npy").unlink()
    open_in(copied, dataset, vae)
    assert contents(copied) == {**contents(filled), "notes.txt": b"mine"}


def test_too_little_space(dataset, vae, copied, tmp_path, monkeypatch):
    image = 2 * 2 * 3 * 4 * 4 * 2
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=55 * image - 1))
    with pytest.raises(ValueError, match=rf"--latents_dir {tmp_path}/new: .* need 0\.0 MB more, and 0\.0 MB are free"):
        open_in(tmp_path / "new", dataset, vae)
    assert contents(tmp_path / "new") == {}
    (copied / "moments-00003.npy").unlink()  # of a batch, which is all that is missing
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=BATCH_SIZE * image))
    open_in(copied, dataset, vae)


def test_a_disk_that_is_full_after_all(dataset, vae, filled, tmp_path, monkeypatch):
    def full(file, *args, **options):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "save", full)
        with pytest.raises(OSError, match=r"moments-00000\.npy could not be written: .*No space left"):
            open_in(tmp_path, dataset, vae)
    assert set(contents(tmp_path)) == {"index.json", "moments-00000.json"}
    open_in(tmp_path, dataset, vae)
    assert contents(tmp_path) == contents(filled)


def test_images_that_the_vae_cannot_encode(dataset, tmp_path):
    with pytest.raises(ValueError, match=r"--vae: .* 3 channel.* 1; pass --image_mode RGB"):
        open_in(tmp_path, dataset, make_vae(channels=3))
    with pytest.raises(ValueError, match=r"--resolution 7: is no multiple of 2"):
        open_in(tmp_path, open_images("digits", resolution=7), make_vae())


def test_the_index_is_readable(filled):
    index = json.loads((filled / "index.json").read_text())
    assert index["vae"] == IDENTITY
    assert index["images"] == 55
    assert index["dtype"] == "float16"
    assert index["moments"] == [2, 2, 3, 4, 4]
    assert index["images_per_file"] == index["batch_size"] == BATCH_SIZE
