"""generate.py with a class-conditional model: which class each image is of, in every format, and as others read it."""

import io
import json
import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from generation_helpers import FORMATS, contents, read_images, read_labels, record, run
from PIL import Image
from tiny_networks import CLASSES, tiny_dit, tiny_vae

from images import open_images
from pipelines import load_pipeline, make_pipeline, sample_images

pytest_plugins = ["generation_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")

BALANCED = [i % 3 for i in range(10)]


@pytest.mark.parametrize("fmt", FORMATS)
def test_formats_hold_what_the_pipeline_samples(conditional, tmp_path, fmt):
    options = {"seed": 7, "guidance_scale": 2.0, "guidance_interval": (0.2, 5.0)}
    folder = run(conditional, tmp_path, format=fmt, **options)
    pipeline = load_pipeline(str(conditional))
    blocks = [sample_images(pipeline, range(i, i + 4), num_inference_steps=4, **options) for i in (0, 4, 8)]
    assert np.array_equal(read_images(folder, fmt), torch.cat(blocks)[:10].permute(0, 2, 3, 1).numpy())
    assert read_labels(folder, fmt) == BALANCED


@pytest.mark.parametrize("fmt", FORMATS)
def test_classes_are_asked_for_in_turn(conditional, tmp_path, fmt):
    folder = run(conditional, tmp_path, format=fmt, class_labels=["frog", 0, "hound", "frog"])
    assert read_labels(folder, fmt) == [2, 0, 1, 2, 2, 0, 1, 2, 2, 0]


def test_names_and_numbers_are_the_same_setting(conditional, tmp_path):
    folder = run(conditional, tmp_path / "out", class_labels=["cat", "dog, hound", 2])
    run(conditional, folder, class_labels="balanced")
    run(conditional, folder)
    assert record(folder)["new_images"] == 10  # of the first run
    settings = record(folder)["settings"]
    assert (settings["class_labels"], settings["class_names"]) == ("balanced", ["cat", "dog, hound", "frog"])
    assert (settings["guidance_scale"], settings["guidance_interval"]) == (1.0, None)


def test_a_name_that_looks_like_a_number_is_a_name(conditional, tmp_path):
    shutil.copytree(conditional, tmp_path / "pipeline")
    index = tmp_path / "pipeline" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": {"0": "2", "1": "seven", "2": "9"}}))
    folder = run(tmp_path / "pipeline", tmp_path / "out", class_labels=["2", "1"])
    assert read_labels(folder, "png") == [0, 1] * 5


def test_images_of_one_number_are_of_one_noise(conditional, saved, tmp_path):
    """The classes take nothing from the random streams."""
    folders = [
        run(conditional, tmp_path / label, class_labels=label, num_inference_steps=1) for label in ("cat", "frog")
    ]
    first, second = (read_images(folder, "png").astype(int) for folder in folders)
    assert 0 < np.abs(first - second).mean() < np.abs(first - first[::-1]).mean()


@pytest.mark.parametrize("fmt", ["png", "parquet"])
def test_the_folder_of_images_loads_as_a_dataset_with_labels(conditional, tmp_path, fmt):
    folder = run(conditional, tmp_path / "out", format=fmt)
    rows = datasets.load_dataset(str(folder / "images"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(rows["label"]) == BALANCED
    assert np.array_equal([np.array(image)[..., None] for image in rows["image"]], read_images(folder, fmt))
    if fmt == "png":
        assert list(rows["label_name"][:3]) == ["cat", "dog, hound", "frog"]
    else:
        assert rows.features["label"].names == ["cat", "dog, hound", "frog"]


@pytest.mark.parametrize("fmt", FORMATS)
def test_our_own_reader_reads_all_images(conditional, tmp_path, fmt):
    folder = run(conditional, tmp_path / "out", format=fmt)
    for source in (folder, folder / ("images.npz" if fmt == "npz" else "images")):
        images = open_images(str(source), cache_dir=str(tmp_path / "cache"))
        assert len(images) == 10
        found = np.stack([np.asarray(images[i]) for i in range(10)])
        assert np.array_equal(found.transpose(0, 2, 3, 1), read_images(folder, fmt))


def test_npz_is_what_numpy_would_save(conditional, tmp_path):
    folder = run(conditional, tmp_path, format="npz")
    plain = io.BytesIO()
    np.savez(plain, read_images(folder, "npz"), np.array(BALANCED))
    assert (folder / "images.npz").read_bytes() == plain.getvalue()


@pytest.mark.parametrize(
    ("options", "columns"),
    [({}, 3), ({"class_labels": ["cat", "frog"]}, 2), ({"class_labels": "cat"}, 4), ({"grid_images": 5}, 3)],
)
def test_the_grid_has_a_column_a_class(conditional, tmp_path, options, columns):
    """Where each is there twice; else it is about a square."""
    folder = run(conditional, tmp_path, **options)
    rows = -(-options.get("grid_images", 10) // columns)
    assert Image.open(folder / "grid.png").size == (columns * 66 + 2, rows * 66 + 2)


@pytest.mark.parametrize("fmt", FORMATS)
def test_more_images_extend_the_folder(conditional, tmp_path, fmt):
    expected = contents(run(conditional, tmp_path / "ten", format=fmt))
    folder = run(conditional, tmp_path / "six", format=fmt, num_images=6)
    assert contents(run(conditional, folder, format=fmt)) == expected


@pytest.mark.parametrize(
    ("fmt", "renames"), [("png", 5), ("png", 11), ("png", 12), ("npz", 2), ("npz", 4), ("parquet", 2)]
)
def test_a_run_that_dies_in_a_write_resumes_to_the_same_files(conditional, tmp_path, monkeypatch, fmt, renames):
    """Of the 12th file of PNGs, which is metadata.jsonl, and the 5th of an npz, which is the merge, among others."""
    options = {"format": fmt, "guidance_scale": 2.0, "class_labels": ["frog", "cat"]}
    expected = contents(run(conditional, tmp_path / "whole", **options))
    replace, left = os.replace, [renames]

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            raise OSError("died")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(SystemExit, match="died"):
            run(conditional, tmp_path / "broken", **options)
    assert contents(run(conditional, tmp_path / "broken", **options)) == expected


def test_a_complete_folder_is_left_alone(conditional, tmp_path):
    folder = run(conditional, tmp_path)
    times = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    run(conditional, folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()} == times


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"class_labels": "cat"}, r"class_labels was 'balanced', now \[0\]"),
        ({"guidance_scale": 3}, r"guidance_scale was 2\.0, now 3\.0"),
        ({"guidance_interval": [0.2, "inf"]}, r"guidance_interval was None, now '\(0\.2, inf\]'"),
    ],
)
def test_other_classes_and_guidance_are_refused_by_name(conditional, tmp_path, options, match):
    folder = run(conditional, tmp_path / "out", guidance_scale=2)
    before, options = contents(folder), {"guidance_scale": 2} | options
    with pytest.raises(SystemExit, match=match):
        run(conditional, folder, **options)
    assert contents(folder) == before
    run(conditional, folder, overwrite_output_dir=True, **options)
    assert contents(folder) == contents(run(conditional, tmp_path / "fresh", **options))


def test_metadata_of_others_is_not_written_over(saved, conditional, tmp_path):
    folder = run(saved, tmp_path / "out")
    (folder / "images" / "metadata.jsonl").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"has images/metadata\.jsonl, which generate\.py did not write"):
        run(conditional, folder, overwrite_output_dir=True)
    run(saved, folder, seed=1, overwrite_output_dir=True)
    assert (folder / "images" / "metadata.jsonl").read_bytes() == b"mine"


def test_metadata_goes_with_the_images_it_speaks_of(saved, conditional, tmp_path):
    folder = run(conditional, tmp_path / "out")
    run(saved, folder, overwrite_output_dir=True)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh"))


# Transformers and latents


@pytest.fixture(scope="module")
def saved_dit(tmp_path_factory):
    """A folder of a `DiTPipeline` of three classes."""
    folder = tmp_path_factory.mktemp("dit")
    scheduler = DDPMScheduler(num_train_timesteps=20, clip_sample=False)
    make_pipeline(tiny_dit(channels=4), scheduler, CLASSES, tiny_vae(latent_channels=4)).save_pretrained(folder)
    return folder


def test_a_transformer_in_latents_makes_images_of_classes(saved_dit, tmp_path):
    run(saved_dit, tmp_path / "out", guidance_scale=2, class_labels=["frog", "hound"])
    assert read_images(tmp_path / "out", "png").shape == (10, 16, 16, 1)
    assert read_labels(tmp_path / "out", "png") == [2, 1] * 5
    settings = record(tmp_path / "out")["settings"]
    assert len(settings["vae"]) == len(settings["weights"]) == 64
    before = contents(tmp_path / "out")
    run(saved_dit, tmp_path / "out", guidance_scale=2, class_labels=["frog", "hound"])
    assert contents(tmp_path / "out") == before


def test_guiding_some_channels_is_another_setting(saved_dit, tmp_path, capsys):
    run(saved_dit, tmp_path / "all", guidance_scale=3)
    run(saved_dit, tmp_path / "three", guidance_scale=3, guidance_channels=3)
    run(saved_dit, tmp_path / "four", guidance_scale=3, guidance_channels=4)
    images = {name: read_images(tmp_path / name, "png") for name in ("all", "three", "four")}
    assert (images["all"] == images["four"]).all()
    assert (images["all"] != images["three"]).any()
    assert record(tmp_path / "three")["settings"]["guidance_channels"] == 3
    with pytest.raises(SystemExit) as error:
        run(saved_dit, tmp_path / "three", guidance_scale=3)
    assert "guidance_channels was 3, now None" in f"{error.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_channels": 5, "guidance_scale": 2}, "--guidance_channels 5: the network has 4"),
        ({"guidance_channels": 3}, "--guidance_channels 3 needs a --guidance_scale other than 1"),
        ({"guidance_channels": 0, "guidance_scale": 2}, "--guidance_channels 0: must be in"),
    ],
)
def test_channels_that_cannot_be_guided_are_refused(saved_dit, tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as error:
        run(saved_dit, tmp_path / "out", **options)
    assert message in f"{error.value} {capsys.readouterr().err}"
    assert not (tmp_path / "out").exists()
