"""evaluate.py's refusals, in one line, before anything takes long."""

import json

import datasets
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from scoring_helpers import noise, save_model, save_npz, save_pngs, tiny_vit

import evaluate
from recipes import parse_options
from scoring.options import EvaluationOptions

pytest_plugins = ["scoring_fixtures"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--input1 a.npz --input2 digits", "--output_dir is required"),
        ("--metrics fid fdi", "--metrics fdi: must be of fid, kid, isc, prc"),
        ("--feature_extractor x --metrics isc", "--metrics isc: the Inception Score needs --feature_ex"),
        ("--batch_size 0", "--batch_size 0: must be in [1, inf)"),
        ("--prc_batch_size 0", "--prc_batch_size 0: must be in [1, inf)"),
        ("--prc_neighborhood -1", "--prc_neighborhood -1: must be in [1, inf)"),
        ("--seed -1", "--seed -1"),
        ("--device tpu", "--device tpu: must be cpu, cuda or cuda:N"),
        ("--device cuda:99", "--device cuda:99: this machine has"),
    ],
)
def test_options_that_are_not_allowed(flags, message, capsys):
    defaults = [] if "--input1" in flags else ["--input1", "a", "--input2", "b", "--output_dir", "c"]
    with pytest.raises(SystemExit):
        evaluate.main([*defaults, *flags.split()])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--metrics kid --kid_subset_size 21", "--kid_subset_size 21: --input1 gives 20 images only"),
        ("--metrics prc --prc_neighborhood 20", "--prc_neighborhood 20: --input1 gives 20 images only"),
        ("--metrics isc --isc_splits 21", "--isc_splits 21: --input1 gives 20 images only"),
        ("--num_images1 21", "--num_images1 21: --input1 has 20 images only"),
        ("--num_images2 1", "--input2 gives 1 images: at least 2 are needed"),
        ("--input1 {large}", "has images of 16x16 and --input2 {images} of 8x8: --resolution 8"),
        ("--input1 {empty}", "--input1 {empty} cannot be loaded: EmptyDatasetError"),
        ("--input2 {nowhere}", "--input2 {nowhere}: no such folder"),
        ("--input1 {nowhere}.npz", "--input1: {nowhere}.npz: no such file"),
        ("--input1 {floats}", "arr_0 must be uint8 [N, H, W, 1 or 3], not float64 [2, 3]"),
        ("--input1 {unfinished}", "holds 3 of 4 images: let generate.py finish"),
        ("--input1 {floating}", "--input1: {floating}: image 0: {floating}/1.tiff: grey levels 300..300 are"),
        ("--input1 {floating}", "--white_level1 300"),
        ("--input1 {images} --white_level1 0", "--input1: --white_level1 0.0 is not a positive number"),
        ("--input2 digits --split2 test", "--input2 digits has no split 'test'"),
        ("--input2 {parquet} --image_column2 picture", "--image_column2 picture: {parquet} has no such column"),
        ("--feature_extractor {empty}", "--feature_extractor {empty} is neither 'inception' nor"),
        ("--feature_extractor_weights {nowhere}", "--feature_extractor_weights {nowhere}: no such file"),
        ("--feature_extractor_weights {floats}", "{floats} is no state dict of torch-fidelity's InceptionV3"),
        ("--feature_extractor_weights {other}", "{other} is no state dict of torch-fidelity's InceptionV3"),
        ("--feature_extractor x --feature_extractor_weights y", "only for inception; x has its own"),
        ("--output_dir {done}", "has a metrics.json: --overwrite_output_dir replaces it"),
        ("--output_dir {images}", "--output_dir {images} is a file, not a folder"),
        ("--features_cache_dir {images}", "--features_cache_dir {images} is a file, not a folder"),
    ],
)
def test_one_line_says_what_is_wrong_before_anything_takes_long(flags, message, errors_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "calculate", lambda *_: pytest.fail("the expensive work began"))
    names = {path.stem: str(path) for path in errors_folder.iterdir()}
    names |= {name: str(errors_folder / name) for name in ("nowhere", "scores")}
    defaults = "--input1 {images} --input2 {images} --output_dir {scores} --metrics prc"
    with pytest.raises(SystemExit) as error:
        evaluate.main(f"{defaults} {flags}".format(**names).split())
    assert message.format(**names) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (errors_folder / "nowhere").exists()
    assert not (errors_folder / "scores").exists()


@pytest.fixture(scope="module")
def errors_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    save_npz(noise(20), folder / "images.npz")
    save_npz(noise(20, 16), folder / "large.npz")
    np.savez(folder / "floats.npz", np.zeros((2, 3)))
    (folder / "empty").mkdir()
    (folder / "done").mkdir()
    (folder / "done" / "metrics.json").write_text("{}")
    (folder / "unfinished").mkdir()
    save_pngs(noise(3), folder / "unfinished" / "images")
    record = {"status": "running", "num_images": 4, "settings": {"format": "png"}}
    (folder / "unfinished" / "generation.json").write_text(json.dumps(record))
    (folder / "floating").mkdir()
    Image.new("F", (8, 8), 300).save(folder / "floating" / "1.tiff")
    datasets.Dataset.from_dict({"x": [1]}).to_parquet(folder / "parquet.parquet")
    torch.save({"weight": torch.zeros(2)}, folder / "other.pth")
    return folder


def test_a_frechet_distance_needs_more_images_than_features(random_inception, errors_folder, tmp_path):
    images = str(errors_folder / "images.npz")
    flags = ["--input1", images, "--input2", images, "--output_dir", str(tmp_path), "--metrics", "fid"]
    with pytest.raises(SystemExit, match=r"--input1 gives 20 images, but .* 2048 features needs more than 2048"):
        evaluate.main([*flags, "--feature_extractor_weights", random_inception])


def test_a_recipe_is_overridden_by_flags(tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("input1: a\ninput2: b\noutput_dir: c\nmetrics: prc\nseed: 1\ndevice: cpu\n")
    options = parse_options(EvaluationOptions, ["--config", str(recipe), "--input2", "digits"])
    assert (options.input1, options.input2, options.metrics, options.seed) == ("a", "digits", ["prc"], 1)
    recipe.write_text("input: a")
    with pytest.raises(SystemExit):
        evaluate.main(["--config", str(recipe)])
    assert "there is no option 'input'; did you mean 'input" in capsys.readouterr().err


def test_an_old_result_is_replaced_only_on_request(tmp_path, cache_dir):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    save_npz(noise(20), tmp_path / "images.npz")
    flags = ["--input1", str(tmp_path / "images.npz"), "--input2", str(tmp_path / "images.npz"), "--metrics", "prc"]
    flags += ["--feature_extractor", model, "--output_dir", str(tmp_path / "out"), "--features_cache_dir", cache_dir]
    evaluate.main(flags)
    with pytest.raises(SystemExit, match="--overwrite_output_dir replaces it"):
        evaluate.main(flags)
    evaluate.main([*flags, "--overwrite_output_dir"])
    (tmp_path / "out" / "metrics.json").write_text('{"accuracy": 0.9}')
    with pytest.raises(SystemExit, match=r"metrics\.json is not one of evaluate\.py's"):
        evaluate.main([*flags, "--overwrite_output_dir"])
    assert (tmp_path / "out" / "metrics.json").read_text() == '{"accuracy": 0.9}'


def test_few_images_are_scored_on_request(tmp_path, score):
    model = save_model(transformers.ViTModel(tiny_vit()), tmp_path / "vit")
    few = save_npz(noise(8), tmp_path / "few.npz")
    flags = ["--input1", few, "--input2", "digits", "--metrics", "fid", "--feature_extractor", model]
    with pytest.raises(SystemExit, match="of 8 features needs more than 8"):
        score(*flags)
    assert score(*flags, "--allow_few_images")["values"]["fd"] > 0
