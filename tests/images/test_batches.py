"""The order of the images, where they are kept, and what a stream meets on the way."""

import itertools
import types

import pytest
import torch
from image_helpers import batches, contents_with_bad_ones, decode, encoded, open_contents, random_pixels

import images.batches
from images import BadImage, ImageError, image_order, normalize, training_batches

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def test_every_image_once_in_every_epoch():
    epochs = image_order(10, seed=3, first=0, count=50).view(5, 10)
    assert torch.equal(epochs.sort().values, torch.arange(10).expand(5, 10))
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 5


def test_order_depends_on_nothing_but_the_number_of_the_image():
    whole = image_order(7, seed=0, first=0, count=40)
    for first, count in [(0, 0), (0, 7), (3, 4), (5, 20), (7, 7), (13, 2), (39, 1)]:
        part = image_order(7, seed=0, first=first, count=count)
        assert part.dtype == torch.int64
        assert torch.equal(part, whole[first : first + count])


def test_seeds_and_epochs_have_orders_of_their_own():
    orders = {
        tuple(image_order(50, seed, epoch * 50, 50).tolist())
        for seed in [*range(8), 2**31, 2**31 + 1]
        for epoch in range(8)
    }
    assert len(orders) == 80


def test_seeds_do_not_collide():
    seeds = range(1000)  # with 1e6 epochs each, if all are further apart than that
    mixed = sorted(images.batches._epoch_seed(seed, 0) for seed in seeds)
    gaps = [b - a for a, b in itertools.pairwise([*mixed, mixed[0] + 2**32])]
    assert min(gaps) > 1_000_000
    assert images.batches._epoch_seed(5, 7) - images.batches._epoch_seed(5, 0) == 7


def test_manual_seed_ignores_the_upper_bits():
    """Why `_epoch_seed` mixes into 32 bits. Should this fail one day, it may use 64."""
    low, high = (torch.randperm(100, generator=torch.Generator().manual_seed(s)) for s in (1, 1 + 2**32))
    assert torch.equal(low, high)


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
def test_batches_are_the_images_in_order(placement, digits):
    images = decode(digits)
    seen = batches(digits, 20, batch_size=100, placement=placement, seed=5)  # crosses an epoch: 2000 > 1797
    assert seen.dtype == torch.uint8
    assert torch.equal(seen.flatten(0, 1), images[image_order(1797, 5, 0, 2000)])


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
@pytest.mark.parametrize("num_images", [3, 8, 23])  # a step takes 8
def test_ranks_see_what_one_process_sees(num_images, placement, tmp_path):
    dataset = open_contents(tmp_path, [encoded(p) for p in random_pixels(num_images)])
    alone = batches(dataset, 7, batch_size=8, placement=placement)
    ranks = [batches(dataset, 7, batch_size=4, placement=placement, rank=r, world_size=2) for r in (0, 1)]
    assert torch.equal(ranks[0], alone[:, 0::2])
    assert torch.equal(ranks[1], alone[:, 1::2])


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
@pytest.mark.parametrize("steps", [1, 2, 5, 9])
def test_resuming_continues_the_run(steps, placement, tmp_path):
    dataset = open_contents(tmp_path, [encoded(p) for p in random_pixels(23)])
    share = {"placement": placement, "rank": 1, "world_size": 2}
    whole = batches(dataset, 12, **share)
    resumed = batches(dataset, 12 - steps, first_image=steps * 2 * 4, **share)
    assert torch.equal(resumed, whole[steps:])


def test_stream_with_workers_gives_the_same_batches(digits):
    seen = batches(digits, 20, batch_size=100, placement="stream", num_workers=2)
    assert torch.equal(seen, batches(digits, 20, batch_size=100))


@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
def test_batches_do_not_touch_the_global_generator(placement, digits):
    before = torch.random.get_rng_state()
    batches(digits, 2, placement=placement)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("placement", ["memory", "device"])
def test_writing_to_a_batch_leaves_the_images_alone(placement, digits):
    images = training_batches(digits, 1797, seed=0, placement=placement, show_progress=False)
    first = next(images).clone()
    next(images).zero_()
    third = next(images)
    assert third.sum() == first.sum()


# ------------------------------------------------------------------------------------------- placement


def available(monkeypatch, nbytes):
    memory = types.SimpleNamespace(available=nbytes)
    monkeypatch.setattr(images.batches.psutil, "virtual_memory", lambda: memory)


@pytest.mark.parametrize(
    ("host_nbytes", "processes", "expected"), [(201, 1, "memory"), (200, 1, "stream"), (399, 2, "stream")]
)
def test_auto_placement_leaves_half_of_the_memory(host_nbytes, processes, expected, monkeypatch):
    available(monkeypatch, host_nbytes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert images.batches._placement_that_fits(100, torch.device("cpu")) == expected


@pytest.mark.parametrize(("gpu_nbytes", "expected"), [(401, "device"), (400, "memory")])
def test_auto_placement_leaves_most_of_the_gpu(gpu_nbytes, expected, monkeypatch):
    available(monkeypatch, 1000)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (gpu_nbytes, 10**9))
    assert images.batches._placement_that_fits(100, torch.device("cuda", 0)) == expected


def test_auto_placement_is_used(digits, monkeypatch):
    images = training_batches(digits, 4, seed=0, show_progress=False)
    assert (images.placement, images.num_images, images.skipped) == ("memory", 1797, 0)
    available(monkeypatch, digits.nbytes)
    streamed = training_batches(digits, 4, seed=0)
    assert streamed.placement == "stream"
    assert torch.equal(next(streamed), next(images))


def test_unknown_placement_and_rank(digits):
    with pytest.raises(ValueError, match=r"--data_placement disk"):
        training_batches(digits, 4, seed=0, placement="disk")
    with pytest.raises(ValueError, match=r"rank 2"):
        training_batches(digits, 4, seed=0, rank=2, world_size=2)


@needs_cuda
@pytest.mark.parametrize("placement", ["memory", "device", "stream"])
def test_no_synchronisation_with_the_gpu(placement, digits):
    expected = batches(digits, 20, batch_size=100)
    images = training_batches(digits, 100, seed=0, placement=placement, device="cuda", show_progress=False)
    seen = [next(images)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen += [next(images) for _ in range(19)]
        normalize(seen[0], torch.ones(100, dtype=torch.bool, device="cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen[0].is_cuda
    assert torch.equal(torch.stack(seen).cpu(), expected)


# ------------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("num_workers", [0, 1])
def test_stream_counts_what_it_skips(num_workers, tmp_path):
    contents, pixels = contents_with_bad_ones(10, [1, 6])
    dataset = open_contents(tmp_path, contents, on_bad_image="skip")
    options = {"seed": 0, "placement": "stream", "num_workers": num_workers}
    images = training_batches(dataset, 5, **options)
    seen = torch.cat([next(images) for _ in range(4)])  # two epochs: each bad image twice, yet counted once
    stand_in = torch.tensor([0, 2, 2, 3, 4, 5, 7, 7, 8, 9])
    assert torch.equal(seen, pixels[stand_in[image_order(10, 0, 0, 20)]])
    assert (images.num_images, images.skipped, dataset.bad_images) == (10, 2, [1, 6])


@pytest.mark.parametrize("placement", ["memory", "device"])
def test_skipped_images_are_never_drawn(placement, tmp_path):
    contents, pixels = contents_with_bad_ones(10, [1, 6])
    dataset = open_contents(tmp_path, contents, on_bad_image="skip")
    images = training_batches(dataset, 4, seed=0, placement=placement, show_progress=False)
    assert (images.num_images, images.skipped) == (8, 2)
    seen = torch.cat([next(images) for _ in range(2)])
    assert torch.equal(seen, pixels[[0, 2, 3, 4, 5, 7, 8, 9]][image_order(8, 0, 0, 8)])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_under_a_worker_is_the_same_single_line(num_workers, tmp_path):
    contents = [encoded(p) for p in random_pixels(203, channels=1)]
    contents[1] = encoded(random_pixels(1)[0])  # in colour, after a sample that was all grey
    contents[2] = b"not an image"
    dataset = open_contents(tmp_path, contents, "saved")
    errors = set()
    for seed in range(2):
        for first in (1, 2):  # reach one, then the other
            where = (image_order(203, seed, 0, 203) == first).nonzero().item()
            options = {"seed": seed, "placement": "stream", "num_workers": num_workers, "first_image": where}
            with pytest.raises(ImageError) as error:
                next(training_batches(dataset, 1, **options))
            errors.add((type(error.value), str(error.value).partition(": ")[2]))
    assert {kind for kind, _ in errors} == {ImageError, BadImage}
    for _, message in errors:
        assert "\n" not in message
        assert "worker" not in message
        assert message.startswith(
            ("image 1 is in colour", "cannot decode 1 image(s), index 2; the first: not an image")
        )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_files_that_vanish_are_bad_images_that_name_the_path(num_workers, tmp_path):
    dataset = open_contents(tmp_path, [encoded(p) for p in random_pixels(3)], "images")
    (tmp_path / "images" / "0001.png").unlink()
    images = training_batches(dataset, 3, seed=0, placement="stream", num_workers=num_workers)
    with pytest.raises(BadImage, match=r"0001\.png: FileNotFoundError"):
        next(images)
