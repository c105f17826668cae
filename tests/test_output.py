"""The folder of a run: whose files are deleted, and who may write."""

import functools
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, TINY_UNET, Run
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from huggingface_hub.utils import filter_repo_objects

from training import hub
from training.checkpoints import discard_checkpoints_after
from training.folder_lock import LOCK_FILE, folder_lock
from training.options import HubOptions
from training.output import CHECKPOINTS, LIST_FILE, OPTIONS_FILE, RESULTS, OutputDir, check_output_dir


def snapshot(folder):
    """{path: content} of a folder, links unfollowed."""
    paths = sorted(path for path in folder.rglob("*") if path.name != LOCK_FILE)
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if path.is_symlink() or path.is_file()
    }


def write(folder, *names):
    """Files of somebody else."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")


FOREIGN = ["notes.txt", "unet/notes.txt", "checkpoint-12/notes.txt", "checkpoint-6/deep/notes.txt", "logs/notes.txt",
           "samples/mine.png", "figures/plot.png", "checkpoint-99.zip", "images/000000.png"]  # fmt: skip


# The list of what was written


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return OutputDir(folder)


def test_what_is_listed_is_deleted_and_nothing_else(output):
    write(output.folder, *FOREIGN)
    for name in ("metrics.jsonl", "unet/config.json", "checkpoint-12/manifest.json", "gone.json"):
        path = output.path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text("ours")
    (output.folder / "gone.json").unlink()
    before = snapshot(output.folder)
    again = OutputDir(output.folder)  # as a later run reads it
    again.delete_results()
    after = snapshot(output.folder)
    assert set(after) == set(FOREIGN)
    assert all(after[name] == before[name] for name in after)
    assert not again.is_of_a_run


def test_the_list_goes_last(output, monkeypatch):
    for name in ("a.json", "b.json"):
        output.path(name).write_text("ours")
    unlinked = []
    unlink = type(output.folder).unlink
    monkeypatch.setattr(
        type(output.folder), "unlink", lambda path, **kwargs: (unlinked.append(path.name), unlink(path, **kwargs))
    )
    output.delete_results()
    assert unlinked[-1] == LIST_FILE
    assert {"a.json", "b.json"} < set(unlinked)


def test_no_link_is_followed_and_none_is_deleted(output, tmp_path):
    output.path("samples/final.png")
    output.path("metrics.jsonl")
    write(tmp_path / "elsewhere", "final.png", "metrics.jsonl")
    (output.folder / "samples").symlink_to(tmp_path / "elsewhere")
    (output.folder / "metrics.jsonl").symlink_to(tmp_path / "elsewhere" / "metrics.jsonl")
    before = snapshot(output.folder), snapshot(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="behind a link"):
        check_output_dir(output, resume=False, overwrite=True, checkpoints=False)
    output.delete({"samples/final.png", "metrics.jsonl"})
    assert (snapshot(output.folder), snapshot(tmp_path / "elsewhere")) == before


def test_a_file_of_others_is_not_written_over(output):
    write(output.folder, "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl is not of this run"):
        output.path("metrics.jsonl")
    assert "metrics.jsonl" not in OutputDir(output.folder).written


PATTERNS = f"{RESULTS} {CHECKPOINTS}".split()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_files_of_others_are_seen_wherever_a_run_writes(output, pattern):
    output.path("metrics.jsonl" if pattern != "metrics.jsonl" else "README.md").touch()
    name = pattern.replace("*", "7")
    write(output.folder, name)
    assert output.foreign() == [name]
    with pytest.raises(ValueError, match=f"{name} would be written over"):
        check_output_dir(output, resume=False, overwrite=True, checkpoints=False)


def test_a_line_cut_short_by_a_full_disk_spoils_no_other(output):
    (output.folder / LIST_FILE).write_text("metrics.jsonl\nREADM")
    output.path("unet/config.json")
    assert OutputDir(output.folder).written == {"metrics.jsonl", "READM", "unet/config.json"}


def test_a_given_up_checkpoint_behind_a_link_is_refused(output, tmp_path):
    for step in (2, 4):
        output.path(f"checkpoint-{step}/manifest.json")
        write(output.folder, f"checkpoint-{step}/manifest.json")
    (output.folder / "checkpoint-4").rename(tmp_path / "moved")
    (output.folder / "checkpoint-4").symlink_to(tmp_path / "moved")
    with pytest.raises(ValueError, match="checkpoint-4: is given up, but is a link"):
        discard_checkpoints_after(output, 1)
    assert (output.folder / "checkpoint-2" / "manifest.json").exists()


def test_files_of_others_are_not_uploaded(output, monkeypatch):
    asked = {}
    monkeypatch.setattr(hub, "upload_folder", lambda **arguments: asked.update(arguments))
    output.path("unet/config.json")
    write(output.folder, "unet/config.json", "notes.txt")
    hub.HubUpload(HubOptions(push_to_hub=True), output, "logs").upload()
    uploaded = filter_repo_objects(
        ["unet/config.json", "notes.txt"],
        allow_patterns=asked["allow_patterns"],
        ignore_patterns=asked["ignore_patterns"],
    )
    assert list(uploaded) == ["unet/config.json"]


def test_a_list_that_somebody_edited_leads_out_of_the_folder_nowhere(output, tmp_path):
    write(tmp_path, "precious.txt")
    (output.folder / LIST_FILE).write_text(f"../precious.txt\n{tmp_path / 'precious.txt'}\n\n")
    OutputDir(output.folder).delete_results()
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_a_run_without_a_list_is_known_by_its_names(output):
    """It is older than the lists, or was copied by `cp *`, which leaves hidden files behind."""
    ours = [OPTIONS_FILE, "unet/config.json", "samples/step-0000004.png", "checkpoint-4/manifest.json",
            "checkpoint-4/optimizer.bin"]  # fmt: skip
    write(output.folder, *ours, *FOREIGN)
    assert output.written == set(ours)
    output.path("metrics.jsonl")
    assert OutputDir(output.folder).written == {*ours, "metrics.jsonl"}


# Whole runs


def test_overwriting_leaves_the_files_of_others_wherever_they_are(train):
    first = train("run", "--max_train_steps", 12, "--logger", "tensorboard").wait()
    write(first.folder, *FOREIGN)
    foreign = {name: digest for name, digest in snapshot(first.folder).items() if name in FOREIGN}
    train("run", "--max_train_steps", 6, "--overwrite_output_dir", "--logger", "tensorboard").wait()
    after = snapshot(first.folder)
    assert {name: after[name] for name in FOREIGN} == foreign
    ours = set(after) - set(FOREIGN)
    assert len([name for name in ours if "tfevents" in name]) == 1
    assert not [name for name in ours if name.startswith("checkpoint-12/")]
    assert "checkpoint-6/manifest.json" in ours
    # and from it a run goes on, although checkpoint-12 is there with a file of others in it
    train("run", "--max_train_steps", 12, "--resume_from_checkpoint", "latest", "--logger", "tensorboard").wait()
    assert len(first.metrics) == 3
    assert (first.folder / "checkpoint-12" / "manifest.json").exists()
    assert (first.folder / "checkpoint-12" / "notes.txt").read_text() == "mine"


LATE_REFUSALS = {
    "eval_num_images": ["--eval_steps", 5, "--eval_num_images", 10],
    "resolution": ["--resolution", 9],
    "another network": ["--resume_from_checkpoint", "latest", "--unet", '{"block_out_channels": [8, 32]}'],
    "another sampler": ["--resume_from_checkpoint", "latest", "--method", "ddpm", "--timestep_sampler_options", "{}"],
    "another run's checkpoint": ["--resume_from_checkpoint", "{other}/checkpoint-6"],
    "samples from steps that are not there": ["--noise_scheduler", '{"steps_offset": 1}'],
    "labels": ["--unet", '{"num_class_embeds": 3}'],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two runs with different data orders."""
    folder = tmp_path_factory.mktemp("finished")
    runs = [Run(folder / name, ("--max_train_steps", 12, "--seed", seed)) for seed, name in enumerate(("run", "other"))]
    return [run.wait() for run in runs]


@pytest.mark.parametrize("refusal", LATE_REFUSALS)
def test_what_is_refused_leaves_the_earlier_run_as_it_was(train, finished, tmp_path, refusal, request):
    shutil.copytree(finished[0].folder, tmp_path / "run")
    before = snapshot(tmp_path / "run")
    flags = [str(flag).replace("{other}", str(finished[1].folder)) for flag in LATE_REFUSALS[refusal]]
    if "--eval_steps" in flags:
        flags += ["--eval_feature_extractor", request.getfixturevalue("regnet")]
    overwrite = [] if "--resume_from_checkpoint" in flags else ["--overwrite_output_dir"]
    run = train("run", *flags, *overwrite).wait(1)
    assert "Traceback" not in run.output
    assert run.output.splitlines()[-1].startswith("train_adaptive_ddpm.py: error: ")
    assert snapshot(tmp_path / "run") == before


def test_another_network_is_refused_by_the_setting_that_differs(train, finished, tmp_path):
    flags = ("--resume_from_checkpoint", finished[0].folder / "checkpoint-12", "--unet", '{"layers_per_block": 2}')
    run = train("new", *flags).wait(1)
    assert "layers_per_block was 1, now 2" in run.output.splitlines()[-1]
    assert not run.folder.exists()


@pytest.mark.parametrize("content", ["a run", "files of others"])
def test_another_runs_checkpoint_goes_on_in_an_empty_folder_alone(train, finished, tmp_path, content):
    if content == "a run":
        shutil.copytree(finished[1].folder, tmp_path / "run")
    else:
        write(tmp_path / "run", "README.md", "unet/mine.bin")
    before = snapshot(tmp_path / "run")
    run = train("run", "--resume_from_checkpoint", finished[0].folder / "checkpoint-12").wait(1)
    assert f"--output_dir {run.folder}" in run.output.splitlines()[-1]
    assert snapshot(tmp_path / "run") == before


@pytest.mark.parametrize("name", ["checkpoint-99", "unet", "README.md"])
def test_files_of_others_in_the_way_are_named_before_any_work(train, finished_run, tmp_path, name):
    run_folder = finished_run(tmp_path / "run", "--max_train_steps", 6)
    if (run_folder / name).exists():
        (run_folder / LIST_FILE).write_text((run_folder / LIST_FILE).read_text().replace(f"{name}\n", ""))
    if name == "unet":
        OutputDir(run_folder).delete_under("unet")
    write(run_folder, name)
    before = snapshot(run_folder)
    run = train("run", "--resume_from_checkpoint", "latest").wait(1)
    assert f"{name} would be written over" in run.output.splitlines()[-1]
    assert snapshot(run_folder) == before


def test_a_refused_start_leaves_no_folder(train, tmp_path):
    run = train("run", "--output_dir", tmp_path / "deep" / "er", "--noise_scheduler", '{"thresholding": true}').wait(1)
    assert "thresholding" in run.output.splitlines()[-1]
    assert not (tmp_path / "deep").exists()


# Two runs, one folder

HOLD = """
import sys, time
from training.folder_lock import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder):
    """Another process that holds a folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_folder_is_held_by_one_process_which_is_named(tmp_path):
    holder = hold(tmp_path / "out")
    try:
        with pytest.raises(ValueError, match=rf"--output_dir .*out: is in use by process {holder.pid} on host "):
            folder_lock(tmp_path / "out").__enter__()
    finally:
        holder.kill()
        holder.wait()
    with folder_lock(tmp_path / "out"):  # what a killed process leaves does not block
        assert json.loads((tmp_path / "out" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "out" / LOCK_FILE).exists()


def test_folders_made_for_nothing_go_again(tmp_path):
    with folder_lock(tmp_path / "a" / "b"):
        pass
    assert not (tmp_path / "a").exists()
    with folder_lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "result").touch()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["result"]


@pytest.mark.parametrize("kind", ["file", "below a file", "dangling link"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, kind):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    folder = {"file": "file", "below a file": "file/out", "dangling link": "dangling"}[kind]
    with pytest.raises(ValueError, match=rf"--output_dir .*{folder}:? "):
        folder_lock(tmp_path / folder).__enter__()


def test_without_record_locks_the_note_in_the_file_counts(tmp_path, monkeypatch):
    """On the same host it says whether its process lives; of another host there can only be a warning."""
    import training.folder_lock as module

    def no_locks(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(module.fcntl, "lockf", no_locks)
    holder = hold(tmp_path)
    try:
        with pytest.raises(ValueError, match=f"in use by process {holder.pid}"):
            folder_lock(tmp_path).__enter__()
    finally:
        holder.kill()
        holder.wait()
    with folder_lock(tmp_path):
        pass


@pytest.mark.parametrize("script", ["evaluate", "compare", "generate"])
def test_every_script_holds_the_folder_that_it_writes_to(script, tmp_path):
    holder = hold(tmp_path / "out")
    flags = {
        "evaluate": ["--input1", "digits", "--input2", "digits"],
        "compare": ["--max_train_seconds", "1", "--dataset_name", "digits"],
        "generate": ["--pipeline", str(tmp_path / "pipeline")],
    }[script]
    if script == "generate":
        unet = UNet2DModel(**TINY_UNET, sample_size=8, in_channels=1, out_channels=1)
        DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path / "pipeline")
    try:
        with pytest.raises(SystemExit, match=f"in use by process {holder.pid} on host"):
            importlib.import_module(script).main([*flags, "--output_dir", str(tmp_path / "out")])
    finally:
        holder.kill()
        holder.wait()
    assert [path.name for path in (tmp_path / "out").iterdir()] == [LOCK_FILE]


def slow_steps(script, seconds):
    from training.denoiser import Denoiser

    original = Denoiser.epsilon_errors
    Denoiser.epsilon_errors = lambda *args: (time.sleep(seconds), original(*args))[1]


@pytest.mark.parametrize("second", [(), ("--resume_from_checkpoint", "latest"), ("--overwrite_output_dir",)])
def test_a_second_run_in_the_folder_is_refused_and_the_first_undisturbed(train, finished, tmp_path, second):
    first = train("run", "--max_train_steps", 12, tamper=functools.partial(slow_steps, seconds=0.3))
    while not (first.folder / "checkpoint-6").is_dir():
        time.sleep(0.02)
    again = train("again", "--output_dir", first.folder, *second).wait(1)
    assert f"is in use by process {first.process.pid} on host" in again.output.splitlines()[-1]
    assert first.wait().metrics == finished[0].metrics


def test_a_killed_run_does_not_block_the_next(train, finished):
    """At once, although the data workers of the killed one may still be there."""
    flags = ("--max_train_steps", 12, "--data_placement", "stream", "--dataloader_num_workers", 1)
    first = train("run", *flags, tamper=functools.partial(slow_steps, seconds=0.3))
    while not (first.folder / "checkpoint-6").is_dir():
        time.sleep(0.02)
    os.kill(first.process.pid, signal.SIGKILL)
    first.wait(-signal.SIGKILL)
    assert train("run", *flags, "--resume_from_checkpoint", "latest").wait().metrics == finished[0].metrics
