"""Results of other comparisons, gone on with or reported together with this one's."""

import json

import pytest

from comparison.entrants import Entrant
from comparison.options import ComparisonOptions
from comparison.results import check_same_extractor, join, joined_results, open_results, settings_of
from training.options import TrainingOptions

PARTS = {"timestep_sampler": "adaptive", "loss_weighting": "spectral"}
ENTRANTS = {"adaptive": {"options": {"method": "adaptive"}, "parts": PARTS}}
RESULTS = {
    "settings": {"ladders": {"seconds": [1.0]}, "resolution": 8},
    "device": "abacus",
    "runs": {"adaptive-seed0": {"entrant": "adaptive", "seed": 0}},
    "command": "here",
    "versions": {"torch": "2.9", "numpy": "2.3"},
    "commits": ["a0"],
    "entrants": ENTRANTS,
}


@pytest.fixture
def write_results(tmp_path):
    def write(**changes):
        (tmp_path / "results.json").write_text(json.dumps(RESULTS | changes))
        return str(tmp_path)

    return write


def test_runs_made_by_other_versions_or_commits_are_announced(write_results, capsys):
    joined_results(write_results(), RESULTS)
    assert capsys.readouterr().err == ""
    folder = write_results(versions={"torch": "2.8", "numpy": "2.3", "accelerate": "1.0"})
    assert joined_results(folder, RESULTS)["versions"]["torch"] == "2.8"
    message = capsys.readouterr().err
    assert f"--join {folder}: its runs were made by other versions" in message
    assert "torch 2.8 (here 2.9), accelerate 1.0 (here None)" in message
    assert "numpy" not in message
    joined_results(write_results(versions={"torch": "2.9"}), RESULTS)
    assert "other versions: numpy None (here 2.3)" in capsys.readouterr().err
    joined_results(write_results(commits=["a0", "b1"]), RESULTS)
    assert f"--join {folder}: its runs were made by commit a0, b1 (here a0)" in capsys.readouterr().err


def test_runs_of_an_entrant_that_is_another_are_refused(write_results):
    folder = write_results(entrants={"adaptive": ENTRANTS["adaptive"] | {"parts": PARTS | {"loss_weighting": "bell"}}})
    with pytest.raises(ValueError, match=f"--join {folder}: its adaptive has the loss_weighting bell, not spectral"):
        joined_results(folder, RESULTS)
    options = {"method": "adaptive", "learning_rate": 1.0}
    write_results(entrants={"adaptive": {"options": options, "parts": PARTS}})
    with pytest.raises(ValueError, match=r"its adaptive has the options .*'learning_rate': 1.0.*, not .*'adaptive'}"):
        joined_results(folder, RESULTS)
    edm = {"options": {"method": "edm"}, "parts": {}}
    joined_results(write_results(entrants={**ENTRANTS, "edm": edm}), RESULTS | {"entrants": {**ENTRANTS, "edm": {}}})
    runs = {"edm-seed0": {"entrant": "edm", "seed": 0}}  # of one that does not take part here
    joined_results(write_results(entrants={"edm": edm}, runs=runs), RESULTS)


def test_a_comparison_is_not_gone_on_with_after_a_method_has_become_another(tmp_path):
    entrants = {"adaptive": Entrant({"method": "adaptive"}, PARTS, images_per_step=8)}
    results = open_results(tmp_path, {}, entrants) | {"runs": RESULTS["runs"]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert open_results(tmp_path, {}, entrants) == results
    entrants["adaptive"] = entrants["adaptive"]._replace(parts=PARTS | {"loss_weighting": "bell"})
    with pytest.raises(
        ValueError, match=f"--output_dir {tmp_path}: its adaptive has the loss_weighting spectral, not bell"
    ):
        open_results(tmp_path, {}, entrants)
    (tmp_path / "results.json").write_text(json.dumps(results | {"runs": {}}))
    assert open_results(tmp_path, {}, entrants)["entrants"]["adaptive"]["parts"]["loss_weighting"] == "bell"


def test_what_is_joined_adds_runs_entrants_commits_and_its_command():
    results = json.loads(json.dumps(RESULTS))
    other = {"runs": {"adaptive-seed0": {"entrant": "other"}, "edm-seed0": {"entrant": "edm"}}, "command": "there"}
    join(results, [{**other, "entrants": {"adaptive": {}, "edm": {}}, "commits": ["a0", "b1"]}])
    assert results["runs"] == {**RESULTS["runs"], "edm-seed0": {"entrant": "edm"}}
    assert results["entrants"] == {**ENTRANTS, "edm": {}}
    assert results["commits"] == ["a0", "b1"]
    assert results["command"] == "here; there"


def test_results_of_an_earlier_version_are_refused(write_results, tmp_path):
    folder = write_results()
    results = json.loads((tmp_path / "results.json").read_text())
    del results["entrants"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"--join {folder}: its results.json is of an earlier version"):
        joined_results(folder, RESULTS)
    with pytest.raises(ValueError, match=f"--output_dir {folder}: its results.json is of an earlier version"):
        open_results(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "slide rule"}, "its device is slide rule, not abacus"),
        ({"settings": {"ladders": {"seconds": [2.0]}}}, "has other settings: its ladders is {'seconds': [2.0]}, not"),
        ({"settings": {"resolution": 16}}, "has other settings: its resolution is 16, not 8"),
    ],
)
def test_runs_on_another_device_or_with_other_settings_are_refused(changes, message, write_results):
    folder = write_results(**changes)
    with pytest.raises(ValueError, match="--join") as error:
        joined_results(folder, RESULTS)
    assert f"--join {folder}: {message}" in str(error.value)


def test_settings_that_an_earlier_version_did_not_know_are_not_compared(write_results):
    joined_results(write_results(settings={"resolution": 8}), RESULTS)


def test_settings_are_those_of_the_runs_and_not_where_things_are():
    options = ComparisonOptions(output_dir="out", max_train_seconds=3.0, score_at=[1 / 3, 1.0], score_at_images=[16])
    first, second = (
        settings_of(options, TrainingOptions(output_dir=name, seed=i, eval_feature_extractor=name))
        for i, name in enumerate(("a", "b"))
    )
    assert first == second == json.loads(json.dumps(first))
    assert first["ladders"] == {"seconds": [1.0, 3.0], "images": [16]}
    assert first["score_samplers"] == ["ddpm"]
    assert first != settings_of(options, TrainingOptions(eval_num_images=7))


def test_scores_by_another_extractor_are_refused_and_the_same_one_elsewhere_is_not():
    now = {"name": "eyes", "weights_sha256": "0123"}
    check_same_extractor("--join x", RESULTS, now)  # nothing is scored yet
    check_same_extractor("--join x", RESULTS | {"feature_extractor": now | {"name": "/elsewhere/eyes"}}, now)
    with pytest.raises(
        ValueError, match="--join x: its feature extractor is eyes, SHA-256 4567, not eyes, SHA-256 0123"
    ):
        check_same_extractor("--join x", RESULTS | {"feature_extractor": now | {"weights_sha256": "4567"}}, now)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [0, -1]}, r"--seeds -1: must be in \[0, 2\*\*32\)"),
        ({"seeds": [2**32]}, r"--seeds 4294967296: must be in \[0, 2\*\*32\)"),
        ({"score_at": [0.5, float("nan"), 1.0]}, r"--score_at nan: must be in \(0, 1\]"),
        ({"max_train_seconds": float("inf")}, r"--max_train_seconds inf: must be in \(0, inf\)"),
        ({"score_at_images": [0]}, r"--score_at_images 0: must be in \[1, 2\*\*53\]"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonOptions(**{"output_dir": "out", "max_train_seconds": 1.0, **options})
