"""Results of other comparisons, gone on with or reported together with this one's."""

import json

import pytest

from comparison.entrants import Entrant
from comparison.options import ComparisonOptions
from comparison.results import check_same_extractor, join, joined_results, open_joined, open_results, settings_of
from training.options import TrainingOptions

PARTS = {"timestep_sampler": "adaptive", "loss_weighting": "spectral"}
ENTRANTS = {"adaptive": {"options": {"method": "adaptive"}, "parts": PARTS}}
RESULTS = {
    "settings": {"ladders": {"seconds": [1.0]}, "resolution": 8},
    "device": "abacus",
    "runs": {"adaptive-seed0": {"entrant": "adaptive", "seed": 0, "scores": []}},
    "commands": ["here"],
    "versions": [{"torch": "2.9", "numpy": "2.3"}],
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
    folder = write_results(versions=[{"torch": "2.8", "numpy": "2.3", "accelerate": "1.0"}])
    assert joined_results(folder, RESULTS)["versions"][0]["torch"] == "2.8"
    message = capsys.readouterr().err
    assert f"--join {folder}: its runs were made by other versions" in message
    assert "torch 2.8 (here 2.9), accelerate 1.0 (here None)" in message
    assert "numpy" not in message
    joined_results(write_results(versions=[{"torch": "2.9"}]), RESULTS)
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


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ({"device_name": "slide rule"}, "its device is abacus, not slide rule"),
        ({"library_versions": {"torch": "3.0"}}, None),
    ],
)
def test_a_comparison_is_gone_on_with_on_its_device_alone_and_other_versions_are_noted(
    now, message, tmp_path, capsys, monkeypatch
):
    machine = {"device_name": "abacus", "library_versions": {"torch": "2.9"}, "code_commit": "a0"}
    for name, value in machine.items():
        monkeypatch.setattr(f"comparison.results.{name}", lambda *_, value=value: value)
    results = open_results(tmp_path, {}, {})
    (tmp_path / "results.json").write_text(json.dumps(results))
    open_results(tmp_path, {}, {})
    assert capsys.readouterr().err == ""
    for name, value in now.items():
        monkeypatch.setattr(f"comparison.results.{name}", lambda *_, value=value: value)
    if message:
        with pytest.raises(ValueError, match=f"--output_dir {tmp_path}: {message}"):
            open_results(tmp_path, {}, {})
        return
    assert [versions["torch"] for versions in open_results(tmp_path, {}, {})["versions"]] == ["2.9", "3.0"]
    message = f"--output_dir {tmp_path}: its runs were made by other versions: torch 2.9 (here 3.0)"
    assert message in capsys.readouterr().err


def test_scores_by_ddim_of_an_earlier_version_are_refused_as_it_had_other_steps(write_results):
    score_samplers = {"score_samplers": ["ddpm", "ddim"]}
    settings = settings_of(
        ComparisonOptions(output_dir="here", max_train_seconds=1, **score_samplers), TrainingOptions()
    )
    assert settings["use_clipped_model_output"]
    earlier = {name: value for name, value in settings.items() if name != "use_clipped_model_output"}
    folder = write_results(settings=earlier)
    with pytest.raises(ValueError, match="its use_clipped_model_output is False, not True"):
        joined_results(folder, RESULTS | {"settings": settings})
    by_ddpm = settings_of(ComparisonOptions(output_dir="here", max_train_seconds=1), TrainingOptions())
    joined_results(write_results(settings=by_ddpm), RESULTS | {"settings": by_ddpm})


def test_every_command_that_a_comparison_was_given_is_noted_once(tmp_path, monkeypatch):
    for call in ("a.yaml", "a.yaml", "b.yaml"):
        monkeypatch.setattr("sys.argv", ["compare.py", "--config", call])
        results = open_results(tmp_path, {}, {})
        (tmp_path / "results.json").write_text(json.dumps(results))
    assert results["commands"] == [f"python compare.py --config {name}.yaml" for name in "ab"]


def test_what_is_joined_adds_runs_entrants_commits_versions_and_its_commands():
    results = json.loads(json.dumps(RESULTS))
    edm = {"entrant": "edm", "seed": 0, "scores": []}
    other = {"runs": {"edm-seed0": edm}, "commands": ["there", "here"], "versions": [{"torch": "3.0"}]}
    join(results, {"x": {**other, "entrants": {"adaptive": {}, "edm": {}}, "commits": ["a0", "b1"]}})
    assert results["runs"] == {**RESULTS["runs"], "edm-seed0": edm}
    assert results["entrants"] == {**ENTRANTS, "edm": {}}
    assert results["commits"] == ["a0", "b1"]
    assert results["commands"] == ["here", "there"]
    assert results["versions"] == [*RESULTS["versions"], {"torch": "3.0"}]


def run_with(*seconds, **more):
    """A run that has been scored there."""
    scores = [{"reached": {"seconds": stop}, "scores": {"ddpm": 1.0}} for stop in seconds]
    return {"entrant": "adaptive", "seed": 0, "scores": scores, **more}


FAILED = {"failed": "exit status 1: no luck"}


@pytest.mark.parametrize(
    ("mine", "theirs", "taken", "message"),
    [
        (run_with(), run_with(1.0), "theirs", None),  # begun here, and not yet run
        (run_with(**FAILED), run_with(1.0, 2.0), "theirs", None),
        (run_with(1.0, 2.0), run_with(**FAILED), "mine", None),
        (run_with(), run_with(**FAILED), "mine", None),
        (run_with(1.0), run_with(1.0, 2.0), "theirs", "that one is reported"),
        (run_with(2.0), run_with(1.0, 2.0, **FAILED), "mine", "the other is reported"),
        (run_with(1.0, **FAILED), run_with(1.0), "theirs", "that one is reported"),
        (run_with(1.0, 2.0), run_with(1.0, 2.0), "mine", "the other is reported"),
    ],
)
def test_of_two_runs_by_the_same_name_the_one_that_came_farther_is_joined(mine, theirs, taken, message, capsys):
    mine["is"], theirs["is"] = "mine", "theirs"
    results = {**json.loads(json.dumps(RESULTS)), "settings": {"ladders": {"seconds": [1.0, 2.0]}}}
    other = {**json.loads(json.dumps(results)), "runs": {"adaptive-seed0": theirs}}
    results["runs"] = {"adaptive-seed0": mine}
    join(results, {"x": other})
    assert results["runs"]["adaptive-seed0"]["is"] == taken
    said = f"--join x: has another run of adaptive-seed0; {message}\n" if message else ""
    assert capsys.readouterr().err == said


def test_entrants_that_differ_among_the_joined_are_refused_too(tmp_path):
    folders = []
    for name, weighting in (("a", "edm"), ("b", "bell")):
        (tmp_path / name).mkdir()
        folders.append(str(tmp_path / name))
        entrants = {**ENTRANTS, "edm": {"options": {"method": "edm"}, "parts": {"loss_weighting": weighting}}}
        runs = {"edm-seed0": {"entrant": "edm", "seed": 0, "scores": []}}
        (tmp_path / name / "results.json").write_text(json.dumps({**RESULTS, "entrants": entrants, "runs": runs}))
    assert list(open_joined(folders[:1], RESULTS)) == folders[:1]
    with pytest.raises(ValueError, match=f"--join {folders[1]}: its edm has the loss_weighting bell, not edm"):
        open_joined(folders, RESULTS)


@pytest.mark.parametrize("missing", ["entrants", "commands"])
def test_results_of_an_earlier_version_are_refused(missing, write_results, tmp_path):
    folder = write_results()
    results = json.loads((tmp_path / "results.json").read_text())
    del results[missing]
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"--join {folder}: its results.json is of an earlier version"):
        joined_results(folder, RESULTS)
    with pytest.raises(ValueError, match=f"--output_dir {folder}: its results.json is of an earlier version"):
        open_results(tmp_path, {}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"device": "slide rule"}, "its device is slide rule, not abacus"),
        (
            {"settings": {"ladders": {"seconds": [2.0]}}},
            "has other settings: its ladders (--max_train_seconds, --score_at, --score_at_images) is {'seconds': [2.0]",
        ),
        ({"settings": {"resolution": 16}}, "has other settings: its resolution is 16, not 8"),
    ],
)
def test_runs_on_another_device_or_with_other_settings_are_refused(changes, message, write_results):
    folder = write_results(**changes)
    with pytest.raises(ValueError, match="--join") as error:
        joined_results(folder, RESULTS)
    assert f"--join {folder}: {message}" in str(error.value)


def test_options_that_an_earlier_version_did_not_know_had_their_defaults_there(write_results):
    folder = write_results(settings={"resolution": 8})
    joined_results(folder, RESULTS)
    defaults, others = (
        {**RESULTS, "settings": {**RESULTS["settings"], "loss_weighting_options": options}}
        for options in ({}, {"s": 1.0})
    )
    joined_results(folder, defaults)
    with pytest.raises(ValueError, match=r"its loss_weighting_options is {}, not {'s': 1\.0}"):
        joined_results(folder, others)


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
