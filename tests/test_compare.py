"""Methods against each other in equal time."""

import json
import shlex
import sys

import pytest
from conftest import SHARED, TINY_UNET, fork_all_but_the_first
from PIL import Image

import compare
from comparison.options import ComparisonOptions
from comparison.results import open_results, parts_of_methods
from training.options import MethodOptions


def results_of(scores):
    """Results of runs {(method, seed): [score at 1 s, 2 s, 4 s]}; None for one that failed."""
    runs = {}
    for (method, seed), values in scores.items():
        run = runs[f"{method}-seed{seed}"] = {"method": method, "seed": seed, "scores": []}
        if values is None:
            run["failed"] = "exit status 1: no luck"
            continue
        for seconds, value in zip((1.0, 2.0, 4.0), values, strict=True):
            run["scores"].append({"budget": seconds, "seconds": seconds, "images": 100 * seconds, "score": value})
        run["density"] = run["weight"] = {"early": [0.5, 0.5], "late": [0.7, 0.3]}
    return {"runs": runs, "score": "fd", "device": "abacus", "command": "python compare.py"}


RESULTS = results_of(
    {
        ("ddpm", 0): [9.0, 5.0, 3.0],
        ("ddpm", 1): [9.0, 5.0, 5.0],
        ("adaptive", 0): [6.0, 2.0, 1.0],
        ("adaptive", 1): [6.0, 4.0, 3.0],
        ("p2", 0): [9.5, 8.0, 7.0],
        ("edm", 0): [3.0, 2.0, 2.0],
        ("speed", 0): None,
    }
)


def test_speed_up_is_over_the_time_at_which_the_baselines_last_score_is_reached():
    methods = compare.summarise(RESULTS)
    assert methods["ddpm"]["means"] == [9.0, 5.0, 4.0]
    assert methods["ddpm"]["speed_up"] == 1.0
    assert methods["adaptive"]["means"] == [6.0, 3.0, 2.0]
    assert methods["adaptive"]["speed_up"] == pytest.approx(4 / (1 + 2 / 3))  # 4.0 lies two thirds of the way to 3.0
    assert methods["p2"]["speed_up"] is None
    assert methods["edm"]["speed_up"] == 4.0  # from the first score on
    assert [name for name in methods if methods[name]["speed_up_is_lower_bound"]] == ["edm"]
    assert methods["adaptive"]["spreads"][2] == pytest.approx(2**0.5)
    assert methods["edm"]["spreads"] == [None] * 3
    assert methods["edm"]["images_per_second"] == 100


def test_the_table_ranks_methods_and_names_failures():
    lines = compare.table(RESULTS, compare.summarise(RESULTS)).splitlines()
    assert lines[0] == "| method | FD at 1 s | FD at 2 s | FD at 4 s | speed-up | images/s | seeds |"
    assert [line.split("`")[1] for line in lines[2:7]] == ["adaptive", "edm", "ddpm", "p2", "speed"]
    assert lines[2] == "| `adaptive` | 6.000 ± 0.000 | 3.000 ± 1.414 | 2.000 ± 1.414 | 2.40× | 100 | 2 |"
    assert lines[3] == "| `edm` | 3.000 | 2.000 | 2.000 | ≥4.00× | 100 | 1 |"
    assert lines[6].startswith("| `speed` | – | – | – |")
    assert "(1 failed)" in lines[6]
    assert any("no luck" in line for line in lines[7:])


@pytest.mark.parametrize(
    ("method", "score", "cell"),
    [("ddpm", 3.0, "1.00×"), ("adaptive", 2.0, "≥1.00×"), ("p2", 3.0, "1.00×"), ("edm", 4.0, "–")],
)
def test_of_a_single_score_a_speed_up_is_a_lower_bound_where_the_method_is_better(method, score, cell):
    runs = {
        name: {"method": name, "seed": 0, "scores": [{"budget": 4.0, "seconds": 4.0, "images": 9, "score": value}]}
        for name, value in {"ddpm": 3.0, method: score}.items()
    }
    results = {**RESULTS, "runs": runs}
    text = compare.table(results, compare.summarise(results))
    assert f"| `{method}` | {score:.3f} | {cell} |" in text


def test_the_command_in_the_table_can_be_pasted(tmp_path, monkeypatch):
    words = ["--sampler_options", '{"clts": {"num_updates": 7}}', "--output_dir", "my runs/a"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    options = ComparisonOptions(output_dir=str(tmp_path), max_train_seconds=1.0)
    command = open_results(tmp_path, options, [], {})["command"]
    assert shlex.split(command) == ["python", "compare.py", *words]
    assert f"`{command}`" in compare.table({**RESULTS, "command": command}, compare.summarise(RESULTS))


def test_a_comparison_is_not_gone_on_with_after_a_method_has_become_another(tmp_path):
    options = ComparisonOptions(output_dir=str(tmp_path), max_train_seconds=1.0)
    parts = parts_of_methods(MethodOptions())
    results = open_results(tmp_path, options, [], parts) | {"runs": RESULTS["runs"]}
    (tmp_path / "results.json").write_text(json.dumps(results))
    assert open_results(tmp_path, options, [], parts) == results
    parts["adaptive"] = parts["adaptive"] | {"error_filter": "none"}
    with pytest.raises(
        ValueError, match=f"--output_dir {tmp_path}: its adaptive has the error_filter wiener, not none"
    ):
        open_results(tmp_path, options, [], parts)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--methods", "magic"], ["--methods magic", "adaptive"]),
        (["--score_at", "0.5"], ["--score_at", "0.5"]),
        (["--score_at", "nan", "1"], ["--score_at nan"]),
        (["--score_at", "0.5", "0.2", "1"], ["--score_at"]),
        (["--max_train_seconds", "0"], ["--max_train_seconds 0.0"]),
        (["--train_batch_size", "0"], ["--train_batch_size 0"]),
        (["--sampler_options", '{"magic": {}}'], ["--sampler_options magic", "adaptive"]),
        (["--sampler_options", '{"ddpm": 3}'], ["--sampler_options ddpm 3", "JSON object"]),
        (["--sampler_options", '{"adaptive": {"bogus": 1}}'], ["--timestep_sampler_options", "bogus"]),
        (["--seed", "5"], ["--seed", "--seeds"]),
        (["--method=p2"], ["--method", "--methods"]),
        (["--overwrite_output_dir"], ["--overwrite_output_dir"]),
        (["method=ddpm"], ["--method", "gives each run its own"]),
        (["seed=3"], ["--seed", "gives each run its own"]),
        (["output_dir=elsewhere"], ["--output_dir", "gives each run its own"]),
        (["--dry-run"], ["--dry_run", "gives each run its own"]),
        (["--resume-from-checkpoint", "latest"], ["--resume_from_checkpoint"]),
        (["--sampler_options", "1"], ["--sampler_options", "JSON object", "'1'"]),
    ],
)
def test_bad_flags_end_before_any_training(flags, parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        compare.main(["--output_dir", str(tmp_path / "out"), "--max_train_seconds", "1", *flags])
    message = f"{exit.value.code} {capsys.readouterr().err}"
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_two_methods_for_real_and_resumed(few_digits, tmp_path, capsys, monkeypatch):
    fork_all_but_the_first(compare, monkeypatch)
    regnet = SHARED / "metrics" / "cifar10-regnet"
    if not regnet.is_dir():
        pytest.skip("needs the feature extractor in ../shared/metrics/cifar10-regnet")
    folder = tmp_path / "out"
    flags = ["--output_dir", folder, "--max_train_seconds", 1, "--methods", "ddpm", "speed", "--score_at", 1]
    flags += ["--dataset_name", few_digits, "--resolution", 8, "--unet", json.dumps(TINY_UNET), "--logger", "none"]
    flags += ["--logging_steps", 5, "--eval_num_images", 330, "--eval_num_inference_steps", 2, "--train_batch_size", 8]
    flags += ["--ddpm_num_steps", 100, "--ddpm_num_inference_steps", 2]  # too few for SpeeD's boundary: a failure
    flags = [str(flag) for flag in [*flags, "--eval_feature_extractor", regnet]]
    compare.main(flags)
    results = json.loads((folder / "results.json").read_text())
    assert "SpeeD's boundary" in results["runs"]["speed-seed0"]["failed"]
    (score,) = results["runs"]["ddpm-seed0"]["scores"]
    assert score["score"] > 0
    assert 1 <= score["seconds"] < 3
    assert "`ddpm`" in (folder / "table.md").read_text()
    for picture in ("scores.png", "densities.png", "ddpm-seed0/samples/final.png"):
        Image.open(folder / picture).verify()

    compare.main(flags)  # nothing is left to do
    assert json.loads((folder / "results.json").read_text()) == results
    with pytest.raises(SystemExit) as exit:
        compare.main([*flags, "--max_train_seconds", "2"])
    assert "other settings" in str(exit.value.code)

    # Another seed, made elsewhere, is reported together with it; one with other settings is not
    flags[flags.index("--output_dir") + 1] = str(tmp_path / "elsewhere")
    clts = ["--methods", "clts", "--sampler_options", '{"clts": {"num_updates": 7}}']
    with pytest.raises(SystemExit) as exit:
        compare.main([*flags, *clts, "--join", str(folder)])
    assert f"--join {folder}: its settings" in str(exit.value.code)
    compare.main([*flags, "--methods", "ddpm", "--seeds", "1", "--join", str(folder)])
    joined = json.loads((tmp_path / "elsewhere" / "joined.json").read_text())
    assert set(joined["runs"]) == {"ddpm-seed0", "ddpm-seed1", "speed-seed0"}
    assert "± " in (tmp_path / "elsewhere" / "table.md").read_text()
