"""generate.py interrupted and extended: a killed run ends with the same files."""

import errno
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import Forked
from generation_helpers import FORMATS, contents, flags, record, run

import generate

pytest_plugins = ["generation_fixtures"]
pytestmark = pytest.mark.usefixtures("one_thread", "on_cpu")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("renames", range(5))
def test_a_run_that_dies_in_a_write_resumes_to_the_same_files(saved, tmp_path, monkeypatch, fmt, renames):
    """Die at the n-th rename, leaving half a file behind: of the record, an image, a shard, the merge."""
    expected = contents(run(saved, tmp_path / "whole", format=fmt))
    folder, replace, left, halves = tmp_path / "broken", os.replace, [renames], {}

    def dying(source, target):
        left[0] -= 1
        if left[0] < 0:
            content = source.read_bytes()
            halves[source] = content[: len(content) // 2]
            raise OSError(errno.EIO, "died")
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", dying)
        with pytest.raises(SystemExit, match="died"):
            run(saved, folder, format=fmt)
    for source, half in halves.items():  # what a kill leaves, and an error clears away
        assert not source.exists()
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(half)
    assert contents(folder) != expected
    assert contents(run(saved, folder, format=fmt)) == expected
    assert record(folder)["status"] == "complete"


def test_a_killed_process_resumes_to_the_same_files(saved, tmp_path):
    options = {"num_images": 1200, "num_inference_steps": 1, "grid_images": 4}
    folder = tmp_path / "killed"
    process = Forked([sys.executable, generate.__file__, *flags(saved, folder, **options)])
    deadline = time.monotonic() + 60
    while not (folder / "images" / "000040.png").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill()
    assert process.wait().returncode == -signal.SIGKILL
    left = {name: data for name, data in contents(folder).items() if name.endswith(".png")}
    assert 40 < len(left) < 1200
    assert record(folder)["status"] == "running"

    run(saved, folder, **options)
    assert record(folder)["new_images"] <= 1200 - len(left) + 4 * 50  # it did go on
    uninterrupted = contents(run(saved, tmp_path / "whole", **options))
    assert uninterrupted == contents(folder)
    assert left.items() <= uninterrupted.items()


@pytest.mark.parametrize("fmt", FORMATS)
def test_more_images_extend_the_folder(saved, tmp_path, fmt):
    expected = contents(run(saved, tmp_path / "ten", format=fmt))
    folder = run(saved, tmp_path / "six", format=fmt, num_images=6)
    assert contents(run(saved, folder, format=fmt)) == expected
    assert record(folder)["new_images"] == 6  # the last block, half of which was there, and a new one


def test_what_a_kill_left_of_a_block_that_has_since_grown_is_deleted(saved, tmp_path):
    folder = run(saved, tmp_path / "nine", format="parquet", num_images=9)
    (folder / "images" / "000008-000008.parquet.tmp").write_bytes(b"half")
    run(saved, folder, format="parquet")
    assert contents(folder) == contents(run(saved, tmp_path / "ten", format="parquet"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_in_one_line(saved, tmp_path, number):
    options = {"num_images": 100_000, "num_inference_steps": 1}
    command = [sys.executable, generate.__file__, *flags(saved, tmp_path / "out", **options)]
    process = Forked(command)
    deadline = time.monotonic() + 60
    while not (tmp_path / "out" / "images" / "000040.png").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.kill(number)
    done = process.wait(timeout=30)
    output = done.stderr
    assert done.returncode == 128 + number
    assert "Traceback" not in output
    written = len([name for name in contents(tmp_path / "out") if name.endswith(".png")])
    line = re.search(r"stopped by (\w+): (\d+) of 100000 images are in .*; the same command goes on$", output)
    assert line[1] == number.name
    assert 0 <= written - int(line[2]) < 4  # whole blocks are counted


def test_a_complete_folder_is_left_alone(saved, tmp_path):
    folder = run(saved, tmp_path)
    before, known = contents(folder), record(folder)
    times = {path: path.stat().st_mtime_ns for path in (folder / "images").iterdir()}
    run(saved, folder)
    assert contents(folder) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert record(folder) == known  # the speed of the run that made the images


def test_the_same_command_with_overwrite_resumes(saved, tmp_path):
    """Equal settings make equal images: there is nothing to throw away."""
    folder = run(saved, tmp_path, overwrite_output_dir=True)
    (folder / "images" / "000005.png").unlink()
    run(saved, folder, overwrite_output_dir=True)
    assert record(folder)["new_images"] == 4


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_kill_while_overwriting_leaves_a_folder_that_is_ours(saved, tmp_path, monkeypatch, fmt):
    folder = run(saved, tmp_path / "out", format=fmt)
    unlink = Path.unlink

    def die(path, **options):
        if path.suffix != ".tmp":
            raise KeyboardInterrupt
        unlink(path, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KeyboardInterrupt):
            run(saved, folder, format=fmt, seed=1, overwrite_output_dir=True)
    assert (record(folder)["status"], record(folder)["settings"]["seed"]) == ("running", 0)
    run(saved, folder, format=fmt, seed=1, overwrite_output_dir=True)
    assert contents(folder) == contents(run(saved, tmp_path / "fresh", format=fmt, seed=1))
