"""generate.py's output folder: what is of other settings or of others is refused by name, and never deleted."""

import json

import pytest
from generation_helpers import FORMATS, contents, record, run
from tiny_networks import tiny_pipeline

pytest_plugins = ["generation_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"num_images": 6}, "num_images was 10, now 6"),
        ({"batch_size": 5}, "batch_size was 4, now 5"),
        ({"num_inference_steps": 5}, "num_inference_steps was 4, now 5"),
        ({"sampler": "ddim"}, "sampler was 'ddpm', now 'ddim'"),
        ({"format": "npz"}, "format was 'png', now 'npz'"),
    ],
)
def test_other_settings_are_refused_by_name(saved, tmp_path, options, match):
    folder = run(saved, tmp_path / "out")
    before = contents(folder)
    with pytest.raises(SystemExit, match=match):
        run(saved, folder, **options)
    assert contents(folder) == before
    foreign = {"notes.txt": b"mine", "images/notes.txt": b"mine"}
    for name, data in foreign.items():
        (folder / name).write_bytes(data)
    run(saved, folder, overwrite_output_dir=True, **options)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", **options)) | foreign


def test_other_weights_are_refused(saved, tmp_path):
    for seed in (1, 2):
        tiny_pipeline(seed=seed).save_pretrained(tmp_path / "pipeline")
        if seed == 1:
            run(tmp_path / "pipeline", tmp_path / "out")
    with pytest.raises(SystemExit, match="weights was"):
        run(tmp_path / "pipeline", tmp_path / "out")


def test_foreign_folders_are_left_alone(saved, tmp_path):
    (tmp_path / "photo.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"is not empty \(photo.png"):
        run(saved, tmp_path)
    run(saved, tmp_path, overwrite_output_dir=True)
    assert (tmp_path / "photo.png").read_bytes() == b"mine"

    other = tmp_path / "other"
    (other / "images").mkdir(parents=True)
    (other / "images" / "photo.png").write_bytes(b"mine")
    with pytest.raises(SystemExit, match=r"has images, which generate.py did not write"):
        run(saved, other, overwrite_output_dir=True)
    assert contents(other) == {"images/photo.png": b"mine"}
    with pytest.raises(SystemExit, match="is a file"):
        run(saved, tmp_path / "photo.png")


FOREIGN = {
    "png": ("images/999999.png", "images/000010.png", "images/0.png", "images.npz", "images/000001.npz.tmp"),
    "npz": ("images/000000-000099.npz", "images/000000.png", "images/000000-000003.parquet"),
    "parquet": ("images/000008-000011.parquet", "images.npz", "images/000000-000003.npz"),
}


@pytest.mark.parametrize("fmt", FORMATS)
def test_overwriting_deletes_only_what_the_record_names(saved, tmp_path, fmt):
    folder = run(saved, tmp_path / "out", format=fmt)
    foreign = {name: b"mine" for name in FOREIGN[fmt]}
    (folder / "images").mkdir(exist_ok=True)
    for name, data in foreign.items():
        (folder / name).write_bytes(data)
    run(saved, folder, format=fmt, seed=1, overwrite_output_dir=True)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", format=fmt, seed=1)) | foreign


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("images/000011.png", {"num_images": 12}),
        ("images/000011.png.tmp", {"num_images": 12}),
        ("images/000012.png", {"num_images": 16, "seed": 1, "overwrite_output_dir": True}),
        ("images.npz", {"format": "npz", "overwrite_output_dir": True}),
        ("images/000008-000009.parquet", {"format": "parquet", "overwrite_output_dir": True}),
        ("grid.png", {"grid_images": 4}),
    ],
)
def test_foreign_files_are_not_written_over(saved, tmp_path, name, options):
    folder = run(saved, tmp_path / "out", grid_images=0)
    (folder / name).write_bytes(b"mine")
    before, known = contents(folder), record(folder)
    with pytest.raises(SystemExit, match=f"has {name}, which generate.py did not write"):
        run(saved, folder, **{"grid_images": 0} | options)
    assert (contents(folder), record(folder)) == (before, known)


def test_a_folder_in_the_place_of_an_image_is_not_deleted(saved, tmp_path):
    folder = run(saved, tmp_path / "out")
    (folder / "images" / "000003.png").unlink()
    (folder / "images" / "000003.png").mkdir()
    with pytest.raises(SystemExit, match=r"has images/000003\.png, which generate\.py did not write"):
        run(saved, folder, seed=1, overwrite_output_dir=True)
    assert len(contents(folder)) == 10  # nine images and the grid


def test_the_grid_is_ours_only_if_we_drew_it(saved, tmp_path):
    folder = run(saved, tmp_path / "out", grid_images=0)
    (folder / "grid.png").write_bytes(b"mine")
    run(saved, folder, grid_images=0, num_images=12)
    assert (folder / "grid.png").read_bytes() == b"mine"
    (folder / "grid.png").unlink()
    run(saved, folder, num_images=12)
    run(saved, folder, num_images=12, grid_images=0)
    assert not (folder / "grid.png").exists()


def test_links_are_not_followed(saved, tmp_path):
    folder = run(saved, tmp_path / "out")
    (tmp_path / "mine").write_bytes(b"mine")
    for name in ("images/000002.png", "images/000003.png.tmp", "grid.png.tmp", "generation.json.tmp"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(tmp_path / "mine")
    run(saved, folder, seed=1, overwrite_output_dir=True)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", seed=1))
    assert (tmp_path / "mine").read_bytes() == b"mine"

    (folder / "images").rename(tmp_path / "elsewhere")
    (folder / "images").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path / "elsewhere")
    with pytest.raises(SystemExit, match=r"--overwrite_output_dir: .*/images is a link"):
        run(saved, folder, seed=2, overwrite_output_dir=True)
    assert contents(tmp_path / "elsewhere") == before
    run(saved, folder, seed=1)  # going on is as good there as anywhere


@pytest.mark.parametrize("settings", [[], {}, {"format": "gif", "batch_size": 4}, {"format": "png", "batch_size": "4"}])
def test_a_broken_record_is_named(saved, tmp_path, settings):
    folder = run(saved, tmp_path)
    (folder / "generation.json").write_text(json.dumps(record(folder) | {"settings": settings}))
    with pytest.raises(SystemExit, match=r"generation\.json is broken"):
        run(saved, folder)
