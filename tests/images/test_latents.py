"""A VAE's latents: what is in them, how training reads them, and samples of the posterior."""

import itertools
import os
import pickle

import numpy as np
import pytest
import torch
from image_helpers import batches, contents_with_bad_ones, open_source, rows_of, write_folder
from latents_helpers import contents, make_vae, open_in

import images.encoding
from images import BadImage, image_order, sample_posterior, training_batches

pytest_plugins = ["latents_fixtures"]


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
