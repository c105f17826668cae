"""How the runs of a comparison take turns, from stop to stop; training and scores are played."""

import json
import time

import pytest

import compare
import comparison.entrants
import comparison.runs
from comparison.entrants import Entrant
from comparison.runs import next_stops, read_log, stops_left

RATES = {"ddpm": 1000, "edm": 500}  # images a second
TABLES = {"density": [0.5, 0.5], "weight": [1.0, 1.0]}
IN_TIME = ["--max_train_seconds", "2", "--score_at", "0.5", "1"]
IN_IMAGES = ["--score_at_images", "640", "1280"]  # by ddpm after 0.64 and 1.28 s, by edm after 1.28 and 2.56 s


class PlayedEvaluator:
    name = "fd"
    weights = "0123"

    def __init__(self, *_):
        self.feature_extractor = {"name": "eyes", "weights_sha256": self.weights}


@pytest.fixture
def race(tmp_path, monkeypatch):
    """race("--flag", value, ...) compares ddpm and edm, and returns results.json; `race.played` is what was played, in
    order: (run, where it had come to, in seconds and images)."""
    played = []

    def play_training(run, entrant, run_folder, training_flags, ladders):
        stops, rate = next_stops(run, ladders), RATES[entrant.options["method"]]
        seconds = min(stops["seconds"] or float("inf"), stops["images"] / rate if stops["images"] else float("inf"))
        run_folder.mkdir(exist_ok=True)
        summary = {"seconds": {"train": seconds}, "steps": 1, "images": round(seconds * rate), "stopped_by": "any"}
        (run_folder / "training_summary.json").write_text(json.dumps(summary))
        records = [{"step": 1, **TABLES, "grad_norm_clipped": 0.5}, {"step": 2, **TABLES, "grad_norm_clipped": 0.0}]
        (run_folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        played.append((run_folder.name, seconds, summary["images"]))

    monkeypatch.setattr(comparison.runs, "train", play_training)
    monkeypatch.setattr(
        comparison.runs, "score", lambda folder, sampler, evaluator: {"ddpm": 2.0, "ddim": 1.0}[sampler]
    )
    for module in (compare, comparison.entrants):  # networks and samplers are tried out elsewhere
        monkeypatch.setattr(module, "plan_run", lambda options: None)
    monkeypatch.setattr(compare, "Evaluator", PlayedEvaluator)
    monkeypatch.setattr(compare, "report", lambda results, folder: None)

    def run(*flags, folder="out"):
        compare.main(["--output_dir", str(tmp_path / folder), "--methods", "ddpm", "edm", *flags])
        return json.loads((tmp_path / folder / "results.json").read_text())

    run.played, run.folder = played, tmp_path
    return run


def test_each_run_stops_at_whichever_stop_comes_next_and_the_runs_take_turns(race):
    runs = race(*IN_TIME, *IN_IMAGES)["runs"]
    assert race.played == [
        ("ddpm-seed0", 0.64, 640),
        ("edm-seed0", 1.0, 500),
        ("edm-seed0", 1.28, 640),  # there and back, so that a steady drift of the machine's speed favours neither
        ("ddpm-seed0", 1.0, 1000),
        ("ddpm-seed0", 1.28, 1280),
        ("edm-seed0", 2.0, 1000),
        ("edm-seed0", 2.56, 1280),
        ("ddpm-seed0", 2.0, 2000),
    ]
    reached = [score["reached"] for score in runs["ddpm-seed0"]["scores"]]
    assert reached == [{"images": 640}, {"seconds": 1.0}, {"images": 1280}, {"seconds": 2.0}]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (IN_TIME, [("seed0", 1.0, 1000), ("seed1", 1.0, 1000), ("seed1", 2.0, 2000), ("seed0", 2.0, 2000)]),
        (IN_IMAGES, [("seed0", 0.64, 640), ("seed1", 0.64, 640), ("seed1", 1.28, 1280), ("seed0", 1.28, 1280)]),
    ],
)
def test_either_ladder_alone_and_several_seeds(flags, expected, race):
    race(*flags, "--methods", "ddpm", "--seeds", "0", "1")
    assert race.played == [(f"ddpm-{run}", *trained) for run, *trained in expected]


def test_a_stop_of_both_ladders_is_one_stop(race):
    (run,) = race(*IN_TIME, "--score_at_images", "1024", "--train_batch_size", "8", "--methods", "ddpm")[
        "runs"
    ].values()
    assert len(run["scores"]) == 3
    race.played.clear()
    flags = ["--score_at_images", "1000", "--train_batch_size", "8", "--methods", "ddpm"]
    (run,) = race(*IN_TIME, *flags, folder="other")["runs"].values()
    assert run["scores"][0]["reached"] == {"seconds": 1.0, "images": 1000}
    assert len(run["scores"]) == 2


def test_all_samplers_but_the_first_score_at_the_last_stop_of_each_ladder(race):
    runs = race(*IN_TIME, *IN_IMAGES, "--score_samplers", "ddpm", "ddim")["runs"]
    for run in runs.values():
        for score in run["scores"]:
            is_last = score["reached"].get("seconds") == 2.0 or score["reached"].get("images") == 1280
            assert score["scores"] == ({"ddpm": 2.0, "ddim": 1.0} if is_last else {"ddpm": 2.0})


def test_the_share_of_clipped_gradients_is_taken_from_the_log(race):
    assert race(*IN_IMAGES)["runs"]["edm-seed0"]["clipped"] == 0.25


def test_after_stop_after_the_same_command_goes_on_with_the_turns(race, capsys, monkeypatch):
    whole = race(*IN_TIME, *IN_IMAGES)
    turns = race.played.copy()
    race.played.clear()
    clock = iter(range(100))  # the first number is when the comparison began; then each turn takes a second
    monkeypatch.setattr(compare, "time", type("Clock", (), {"monotonic": lambda: next(clock)}))
    capsys.readouterr()
    race(*IN_TIME, *IN_IMAGES, "--stop_after", "3", folder="parts")
    assert race.played == turns[:3]
    assert "5 of 8 stops are left" in capsys.readouterr().out
    assert not (race.folder / "parts" / "joined.json").exists()
    monkeypatch.setattr(compare, "time", time)
    parts = race(*IN_TIME, *IN_IMAGES, folder="parts")
    assert race.played == turns
    assert parts["runs"] == whole["runs"]
    race(*IN_TIME, *IN_IMAGES, folder="parts")  # nothing is left to do
    assert race.played == turns


def test_a_call_comes_one_stop_farther_however_short_its_time(race, capsys, monkeypatch):
    for left in (3, 2, 1):
        race(*IN_TIME, "--stop_after", "1e-9")
        assert f"{left} of 4 stops are left" in capsys.readouterr().out
    race(*IN_TIME, "--stop_after", "1e-9")
    assert len(race.played) == 4
    train = comparison.runs.train
    fail = lambda run, *args: "no luck" if run["entrant"] == "ddpm" else train(run, *args)  # noqa: E731
    monkeypatch.setattr(comparison.runs, "train", fail)
    race(*IN_TIME, "--stop_after", "1e-9", folder="other")  # what fails comes nowhere: the next one has its turn
    assert race.played[4][0] == "edm-seed0"


def test_a_killed_comparison_goes_on(race, monkeypatch):
    played_training, calls = comparison.runs.train, iter(range(100))

    def killed(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        return played_training(*args)

    monkeypatch.setattr(comparison.runs, "train", killed)
    with pytest.raises(SystemExit) as exit:
        race(*IN_TIME)
    assert "the same command goes on" in str(exit.value.code)
    race(*IN_TIME)
    assert [run for run, *_ in race.played] == ["ddpm-seed0", "edm-seed0", "edm-seed0", "ddpm-seed0"]


def test_what_failed_is_left_out_of_the_turns_and_tried_again_by_the_next_command(race, monkeypatch):
    played_training = comparison.runs.train
    fail = lambda run, *args: "exit status 1: no luck" if run["entrant"] == "edm" else played_training(run, *args)  # noqa: E731
    monkeypatch.setattr(comparison.runs, "train", fail)
    runs = race(*IN_TIME)["runs"]
    assert runs["edm-seed0"]["failed"] == "exit status 1: no luck"
    assert len(runs["ddpm-seed0"]["scores"]) == 2
    monkeypatch.setattr(comparison.runs, "train", played_training)
    runs = race(*IN_TIME)["runs"]
    assert "failed" not in runs["edm-seed0"]
    assert len(runs["edm-seed0"]["scores"]) == 2
    assert runs["edm-seed0"]["failed_before"] == ["exit status 1: no luck"]


def test_images_that_are_not_finite_fail_their_run_alone(race, monkeypatch):
    def score(run_folder, sampler, evaluator):
        if run_folder.name.startswith("edm"):
            raise FloatingPointError("image 3 is not finite")
        return 2.0

    monkeypatch.setattr(comparison.runs, "score", score)
    runs = race(*IN_TIME)["runs"]
    assert runs["edm-seed0"]["failed"] == "image 3 is not finite"
    assert len(runs["ddpm-seed0"]["scores"]) == 2


def test_a_folder_keeps_its_settings_and_others_may_take_part(race):
    race(*IN_TIME, "--methods", "ddpm")
    with pytest.raises(SystemExit) as exit:
        race(*IN_TIME, "--learning_rate", "3")
    assert f"--output_dir {race.folder / 'out'}: has other settings: its learning_rate is 0.004, not 3.0" in str(
        exit.value
    )
    race(*IN_TIME, "--methods", "edm_v", "--variants", '{"edm_v": {"method": "edm"}}', "--seeds", "1")
    assert {run for run, *_ in race.played} == {"ddpm-seed0", "edm_v-seed1"}


def test_the_commits_that_made_the_runs_are_noted(race, capsys, monkeypatch):
    for commit, commits in (("a0", ["a0"]), ("a0", ["a0"]), ("b1+", ["a0", "b1+"])):
        monkeypatch.setattr("comparison.results.code_commit", lambda commit=commit: commit)
        assert race(*IN_TIME)["commits"] == commits
        assert ("goes on by commit b1+, after a0" in capsys.readouterr().err) == (commit == "b1+")


def test_every_score_has_the_commit_that_its_run_was_at(race, monkeypatch):
    commits = iter(["a0", "b1"])
    monkeypatch.setattr(comparison.runs, "code_commit", lambda: next(commits))
    (run,) = race(*IN_TIME, "--methods", "ddpm")["runs"].values()
    assert [score["commit"] for score in run["scores"]] == ["a0", "b1"]


def test_parts_are_joined_and_another_extractor_is_not(race, monkeypatch):
    race(*IN_TIME, *IN_IMAGES, "--seeds", "1", folder="elsewhere")
    race(*IN_TIME, *IN_IMAGES, "--join", str(race.folder / "elsewhere"))
    joined = json.loads((race.folder / "out" / "joined.json").read_text())
    assert set(joined["runs"]) == {"ddpm-seed0", "edm-seed0", "ddpm-seed1", "edm-seed1"}
    assert joined["feature_extractor"] == {"name": "eyes", "weights_sha256": "0123"}
    monkeypatch.setattr(PlayedEvaluator, "weights", "4567")
    for folder, flag in (("third", "--join"), ("elsewhere", "--output_dir")):
        with pytest.raises(SystemExit) as exit:
            race(*IN_TIME, *IN_IMAGES, "--seeds", "1", "--join", str(race.folder / "elsewhere"), folder=folder)
        flag = f"{flag} {race.folder / 'elsewhere'}"
        assert f"{flag}: its feature extractor is eyes, SHA-256 0123, not eyes, SHA-256 4567" in str(exit.value.code)
    assert not [
        path for path in (race.folder / "out").rglob("*") if "seed1" in path.name
    ]  # the runs stay where they are


def test_how_many_stops_are_left():
    ladders = {"seconds": [1.0, 2.0], "images": [64]}
    run = {"scores": []}
    assert (stops_left(run, ladders), next_stops(run, ladders)) == (3, {"seconds": 1.0, "images": 64})
    run["scores"].append({"reached": {"seconds": 2.0}})  # a step so long that it passed two
    assert (stops_left(run, ladders), next_stops(run, ladders)) == (1, {"seconds": None, "images": 64})


# What is read of a run


def write_log(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_of_a_log_without_densities_there_are_none(tmp_path):
    assert read_log(write_log(tmp_path / "log")) == {}
    assert read_log(write_log(tmp_path / "log", {"step": 1, "eval/fd": 3.0})) == {}
    assert read_log(write_log(tmp_path / "log", {"step": 4, "grad_norm_clipped": 0.5})) == {"clipped": 0.5}


def test_the_share_of_clipped_gradients_is_one_of_updates_and_not_of_records(tmp_path):
    shares = [(50, 1.0), (100, 0.0), (110, 1.0), (110, 1.0), (160, None), (210, 0.0)]
    records = [{"step": step, "grad_norm_clipped": share} for step, share in shares]
    log = write_log(tmp_path / "log", *records[:2], {"step": 105, "eval/fd": 3.0}, *records[2:])
    assert read_log(log)["clipped"] == pytest.approx((50 + 10) / 160)  # of 50 nothing is known


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "exit status -9: it said nothing"),
        ("import sys; print(); print('no luck'); print(); sys.exit(3)", "exit status 3: no luck"),
    ],
)
def test_why_training_failed_is_what_it_said_last_in_this_slice(script, failure, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "ddpm-seed0.log").write_text("error of an earlier slice\n")
    monkeypatch.setattr(comparison.runs, "TRAINING_SCRIPT", tmp_path / "script.py")
    run, entrant = {"entrant": "ddpm", "seed": 0, "scores": []}, Entrant({"method": "ddpm"}, {}, 8)
    assert comparison.runs.train(run, entrant, tmp_path / "ddpm-seed0", [], {"images": [8]}) == failure


@pytest.mark.parametrize("stop", [("--score_at_images", "640"), ("--max_train_seconds", "2", "--score_at", "1")])
def test_the_learning_rate_may_fall_where_runs_are_scored_once(race, stop):
    runs = race(*stop, "--lr_scheduler", "cosine", folder="once")["runs"]
    assert [len(run["scores"]) for run in runs.values()] == [1, 1]
    with pytest.raises(SystemExit, match="--lr_scheduler cosine: falls to the end of a run"):
        race(*stop, "--score_at_images", "640", "1280", "--lr_scheduler", "cosine", folder="twice")
