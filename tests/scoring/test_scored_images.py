"""What evaluate.py scores, keeps and notes: every source of images, cached features, and the record."""

import json

import datasets
import pytest
import torch
import transformers
from PIL import Image
from scoring_helpers import noise, save_model, save_npz, save_pngs, tiny_vit

import evaluate
from evaluate import EvaluationOptions
from feature_extractors import TransformersExtractor
from images import open_images

pytest_plugins = ["scoring_fixtures"]


def test_one_set_of_images_in_every_format(tmp_path, score):
    """PNGs, parquet, npz and what generate.py leaves, grid included, are the same images."""
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    images = noise(20, 16)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))

    save_pngs(images, tmp_path / "png")
    save_npz(images, tmp_path / "images.npz")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train-00000.parquet")

    for kind in ("png", "npz", "parquet"):
        folder = tmp_path / f"generated-{kind}"
        folder.mkdir()
        record = {"status": "complete", "num_images": 20, "settings": {"format": kind}}
        (folder / "generation.json").write_text(json.dumps(record))
        Image.new("RGB", (64, 64)).save(folder / "grid.png")
    save_pngs(images, tmp_path / "generated-png" / "images")
    save_npz(images, tmp_path / "generated-npz" / "images.npz")
    shards = tmp_path / "generated-parquet" / "images"
    shards.mkdir()
    rows.select(range(12)).to_parquet(shards / "000000-000011.parquet")
    rows.select(range(12, 20)).to_parquet(shards / "000012-000019.parquet")

    sources = ["png", "images.npz", "parquet", "generated-png", "generated-npz", "generated-parquet"]
    sources += ["generated-png/images", "generated-npz/images.npz", "generated-parquet/images"]
    records = [
        score(
            "--input1", tmp_path / source, "--input2", tmp_path / "png",
            "--feature_extractor", model, "--kid_subset_size", 10,
        )
        for source in sources
    ]  # fmt: skip
    for record in records:
        assert record["input1"]["num_images"] == 20
        assert record["input1"]["sha256"] == records[0]["input2"]["sha256"]
        assert record["values"] == records[0]["values"]
    assert records[0]["values"]["fd"] == pytest.approx(0, abs=1e-6)


def test_a_resolution_resizes_every_source_alike(tmp_path):
    save_pngs(noise(3, 12), tmp_path / "png")
    flags = {"input2": "digits", "output_dir": "x", "resolution": 8, "image_mode": "L"}
    npz = EvaluationOptions(input1=save_npz(noise(3, 12), tmp_path / "images.npz"), **flags)
    png = EvaluationOptions(input1=str(tmp_path / "png"), **flags)
    images = [evaluate.open_input(options, 1).decode_all() for options in (npz, png)]
    assert images[0].shape == (3, 1, 8, 8)
    assert torch.equal(*images)


def test_a_random_subset_depends_on_the_seed_alone(tmp_path):
    save_npz(noise(30), tmp_path / "images.npz")
    images = open_images(str(tmp_path / "images.npz"))
    subset = evaluate.read_images(images, 10, seed=1)
    assert torch.equal(subset, evaluate.read_images(images, 10, seed=1))
    assert not torch.equal(subset, evaluate.read_images(images, 10, seed=2))
    assert len({image.numpy().tobytes() for image in subset}) == 10


def test_reference_features_are_cached_until_anything_changes(tmp_path, score, monkeypatch):
    extracted = []
    forward = TransformersExtractor.forward
    monkeypatch.setattr(TransformersExtractor, "forward", lambda self, x: extracted.append(len(x)) or forward(self, x))

    def num_extracted(*flags):
        extracted.clear()
        flags = ["--input2", tmp_path / "b", "--feature_extractor", tmp_path / "vit", "--kid_subset_size", 9, *flags]
        score("--input1", tmp_path / "a", *flags)
        return sum(count for count in extracted if count > 2)  # without the two examples

    torch.manual_seed(0)
    save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    save_pngs(noise(10), tmp_path / "a")
    save_pngs(noise(12, seed=1), tmp_path / "b")
    assert num_extracted() == 10 + 12
    assert num_extracted() == 10
    assert num_extracted("--num_images2", 11) == 10 + 11
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "000000.png")
    assert num_extracted() == 10 + 12
    save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")  # other weights
    assert num_extracted() == 10 + 12
    transformers.ViTImageProcessor(size={"height": 64, "width": 64}, resample=0).save_pretrained(tmp_path / "vit")
    assert num_extracted() == 10 + 12
    assert num_extracted() == 10


def test_the_record_says_how_to_repeat_it(tmp_path, score, capsys):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    flags = ["--input1", "digits", "--input2", "digits", "--num_images1", "40", "--feature_extractor", model]
    record = score(*flags, "--metrics", "fid", "kid", "--kid_subset_size", "30")
    output = capsys.readouterr().out
    assert "fd" in output
    assert "fewer than 10,000 images (40 here) is biased" in output
    assert record["command"].endswith("--metrics fid kid --kid_subset_size 30")
    assert record["options"]["seed"] == 2020
    assert (record["input1"]["num_images"], record["input2"]["num_images"]) == (40, 1797)
    assert record["feature_extractor"]["features"] == "pooler_output"
    assert len(record["feature_extractor"]["weights_sha256"]) == 64
    assert record["input2"]["contents"]["images"] == 1797
    assert "--input2: 1,797 images of digits (8x8)" in output
    assert {"device", "versions", "seconds", "torch_fidelity"} <= record.keys()


def test_mixed_sizes_of_an_input_are_announced(tmp_path, score, caplog):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    save_pngs(noise(8), tmp_path / "mixed")
    Image.new("RGB", (32, 32)).save(tmp_path / "mixed" / "000007.png")
    flags = ["--input1", tmp_path / "mixed", "--input2", "digits", "--num_images2", 8, "--metrics", "prc"]
    record = score(*flags, "--feature_extractor", model)
    note = "images differ in size (of 8 images: 7 of 8x8, 1 of 32x32): all are resized and cropped to 8x8"
    assert note in caplog.text
    assert record["input1"]["contents"]["notes"][0].startswith(note)
