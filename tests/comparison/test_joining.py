"""Results of other comparisons, reported together with this one's."""

import json

import pytest

from comparison.options import ComparisonOptions
from comparison.results import joined_results

PARTS = {"adaptive": {"timestep_sampler": "adaptive", "loss_weighting": "spectral"}}
RESULTS = {
    "settings": {},
    "device": "abacus",
    "runs": {"adaptive-seed0": {"method": "adaptive"}},
    "command": "",
    "versions": {"torch": "2.9", "numpy": "2.3"},
    "parts": PARTS,
}


@pytest.fixture
def write_results(tmp_path):
    def write(**changes):
        (tmp_path / "results.json").write_text(json.dumps(RESULTS | changes))
        return str(tmp_path)

    return write


def test_runs_made_by_other_versions_are_announced(write_results, capsys):
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


def test_runs_of_a_method_that_is_made_of_other_parts_are_refused(write_results):
    folder = write_results(parts={"adaptive": {"timestep_sampler": "adaptive", "loss_weighting": "bell"}})
    with pytest.raises(ValueError, match=f"--join {folder}: its adaptive has the loss_weighting bell, not spectral"):
        joined_results(folder, RESULTS)
    folder = write_results(runs={"magic-seed0": {"method": "magic"}}, parts={"magic": {"timestep_sampler": "hat"}})
    with pytest.raises(ValueError, match="its magic has the timestep_sampler hat, not None"):
        joined_results(folder, RESULTS)
    joined_results(write_results(parts={**PARTS, "edm": {"loss_weighting": "none"}}), RESULTS)  # of which it has no run


def test_runs_of_methods_of_unknown_parts_are_announced(write_results, tmp_path, capsys):
    folder = write_results()
    results = json.loads((tmp_path / "results.json").read_text())
    del results["parts"]
    (tmp_path / "results.json").write_text(json.dumps(results))
    joined_results(folder, RESULTS)
    assert f"--join {folder}: it is not known whether the methods are made of the same parts" in capsys.readouterr().err


@pytest.mark.parametrize("changes", [{"device": "slide rule"}, {"settings": {"max_train_seconds": 1}}])
def test_runs_on_another_device_or_with_other_settings_are_refused(write_results, changes):
    folder = write_results(**changes)
    with pytest.raises(ValueError, match=f"--join {folder}: its {next(iter(changes))} is"):
        joined_results(folder, RESULTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [0, -1]}, r"--seeds -1: must be in \[0, 2\*\*32\)"),
        ({"seeds": [2**32]}, r"--seeds 4294967296: must be in \[0, 2\*\*32\)"),
        ({"score_at": [0.5, float("nan"), 1.0]}, r"--score_at nan: must be in \(0, 1\]"),
        ({"max_train_seconds": float("inf")}, r"--max_train_seconds inf: must be in \(0, inf\)"),
    ],
)
def test_numbers_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ComparisonOptions(**{"output_dir": "out", "max_train_seconds": 1.0, **options})
