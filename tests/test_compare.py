"""Methods against each other, in equal time and in equal images."""

import json
import shlex
import sys

import pytest
from conftest import TINY_UNET, fork_all_but_the_first
from matplotlib.colors import to_hex
from PIL import Image

import compare
import comparison.plots
import comparison.runs
from comparison.results import open_results
from comparison.summary import Curve

SECONDS, IMAGES = [1.0, 2.0, 4.0], [100, 400]


def results_of(scores):
    """Results of runs {(entrant, seed): [score at 1 s, 2 s, 4 s]}, which make 100 images a second; None for one that
    failed. By DDIM the last is better by a half."""
    runs = {}
    for (entrant, seed), values in scores.items():
        run = runs[f"{entrant}-seed{seed}"] = {"entrant": entrant, "seed": seed, "scores": []}
        if values is None:
            run["failed"] = "exit status 1: no luck"
            continue
        for seconds, value in zip(SECONDS, values, strict=True):
            at_images = {"images": 100 * seconds} if 100 * seconds in IMAGES else {}
            record = {"reached": {"seconds": seconds, **at_images}, "seconds": seconds, "images": 100 * seconds}
            run["scores"].append(record | {"scores": {"ddpm": value}})
        run["scores"][-1]["scores"]["ddim"] = value - 0.5
        run["density"] = run["weight"] = {"early": [0.5, 0.5], "late": [0.7, 0.3]}
    return {
        "runs": runs,
        "settings": {
            "ladders": {"seconds": SECONDS, "images": IMAGES},
            "score_samplers": ["ddpm", "ddim"],
            "eval_num_images": 640,
        },
        "feature_extractor": {"name": "eyes", "weights_sha256": "0123", "num_features": 512},
        "entrants": {name: {"options": {"method": name}} for name, _ in scores},
        "score": "fd",
        "device": "abacus",
        "commits": ["c0ffee"],
        "commands": ["python compare.py"],
    }


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


def table_of(results):
    return compare.table(results, compare.summarise(results)).splitlines()


def test_speed_up_is_over_the_time_at_which_the_baselines_last_score_is_reached():
    entrants = compare.summarise(RESULTS)
    curves = {name: summary["curves"]["seconds"] for name, summary in entrants.items()}
    assert curves["ddpm"].means == [9.0, 5.0, 4.0]
    assert curves["ddpm"].speed_up == 1.0
    assert curves["adaptive"].means == [6.0, 3.0, 2.0]
    assert curves["adaptive"].speed_up == pytest.approx(4 / (1 + 2 / 3))  # 4.0 lies two thirds of the way to 3.0
    assert curves["p2"].speed_up is None
    assert curves["edm"].speed_up == 4.0  # from the first score on
    assert [name for name in curves if curves[name].is_lower_bound] == ["edm"]
    assert curves["adaptive"].spreads[2] == pytest.approx(2**0.5)
    assert curves["edm"].spreads == [None] * 3
    assert curves["adaptive"].others == {"ddim": (1.5, pytest.approx(2**0.5))}
    assert entrants["edm"]["images_per_second"] == 100


@pytest.mark.parametrize(
    ("baseline", "method", "cell"),
    [
        ([9.0, 3.0, 4.0], [9.0, 3.0, 4.0], "1.00×"),  # it first had 4 after 1 5/6 s, not after 4
        ([9.0, 3.0, 4.0], [9.0, 9.0, 4.0], f"{(1 + 5 / 6) / 4:.2f}×"),
        ([9.0, 3.0, 4.0], [3.9, 9.0, 9.0], f"≥{1 + 5 / 6:.2f}×"),
        ([3.0, 5.0, 4.0], [3.5, 3.0, 3.0], "1.00×"),  # both had it by the first score, the baseline perhaps sooner
        ([3.0, 5.0, 4.0], [2.5, 3.0, 3.0], "≥1.00×"),
    ],
)
def test_a_baseline_that_is_not_monotone_has_a_speed_up_of_1_itself(baseline, method, cell):
    lines = table_of(results_of({("ddpm", 0): baseline, ("edm", 0): method}))
    cells = {line.split("`")[1]: line.split("|")[9].strip() for line in lines[4:6]}
    assert cells == {"ddpm": "1.00×", "edm": cell}


def test_in_images_it_is_over_the_number_of_images():
    curves = {name: summary["curves"]["images"] for name, summary in compare.summarise(RESULTS).items()}
    assert curves["ddpm"].stops == IMAGES
    assert curves["adaptive"].means == [6.0, 2.0]
    assert curves["adaptive"].speed_up == pytest.approx(400 / 250)  # 4.0 lies half-way from 6.0 to 2.0
    assert curves["edm"].speed_up == 4.0


def test_the_baseline_is_plain_ddpm_by_whatever_name():
    results = json.loads(json.dumps(RESULTS).replace('"ddpm"', '"uniform"').replace('{"uniform": ', '{"ddpm": '))
    results["settings"]["score_samplers"] = ["ddpm", "ddim"]
    results["entrants"] = {name: {"options": {"method": name}} for name in ("adaptive", "p2", "edm", "speed")}
    assert compare.summarise(results)["adaptive"]["curves"]["seconds"].speed_up is None
    results["entrants"]["uniform"] = {"options": {"method": "ddpm"}}
    assert compare.summarise(results)["adaptive"]["curves"]["seconds"].speed_up == pytest.approx(4 / (1 + 2 / 3))
    assert any("`uniform` first had its final mean score" in line for line in table_of(results))


def test_ddpm_with_a_learning_rate_of_its_own_is_the_baseline_where_no_other_is():
    results = json.loads(json.dumps(RESULTS))
    results["entrants"]["ddpm"]["options"]["learning_rate"] = 8e-3
    assert table_of(results) == table_of(RESULTS)
    results["entrants"]["edm"] = {"options": {"method": "ddpm"}}
    assert any("`edm` first had its final mean score" in line for line in table_of(results))


def test_the_table_ranks_entrants_and_names_failures():
    lines = table_of(RESULTS)
    assert lines[0] == "## Equal time"
    stops = "FD at 1 s | images | FD at 2 s | images | FD at 4 s | images"
    assert lines[2] == f"| method | {stops} | FD by DDIM at 4 s | speed-up | images/s | seeds |"
    assert [line.split("`")[1] for line in lines[4:9]] == ["adaptive", "edm", "ddpm", "p2", "speed"]
    scores = "6.000 ± 0.000 | 100 | 3.000 ± 1.414 | 200 | 2.000 ± 1.414 | 400 | 1.500 ± 1.414"
    assert lines[4] == f"| `adaptive` | {scores} | 2.40× | 100 | 2 |"
    assert lines[5] == "| `edm` | 3.000 | 100 | 2.000 | 200 | 2.000 | 400 | 1.500 | ≥4.00× | 100 | 1 |"
    assert lines[8] == "| `speed` | – | – | – | – | – | – | – | – | – | 0 (1 failed) |"
    assert lines[10] == "## Equal images"
    header = "| method | FD at 100 images | FD at 400 images | FD by DDIM at 400 images | speed-up | images/s | seeds |"
    assert lines[12] == header
    assert lines[14] == "| `adaptive` | 6.000 ± 0.000 | 2.000 ± 1.414 | 1.500 ± 1.414 | 1.60× | 100 | 2 |"
    assert any("no luck" in line for line in lines[19:])


def test_a_single_stop_tells_no_speed_up():
    results = json.loads(json.dumps(RESULTS))
    results["settings"]["ladders"] = {"seconds": [4.0], "images": IMAGES}
    in_time, in_images = "\n".join(table_of(results)).split("## Equal images")
    assert "speed-up" not in in_time
    assert "speed-up" in in_images
    assert "Speed-up: the time" in in_images
    del results["settings"]["ladders"]["images"]
    assert "speed-up" not in "\n".join(table_of(results)).lower()


def test_without_the_baseline_there_is_no_speed_up():
    results = json.loads(json.dumps(RESULTS).replace('"ddpm-seed', '"ddpm_0.001-seed'))
    for run in results["runs"].values():
        run["entrant"] = run["entrant"].replace("ddpm", "ddpm_0.001")
    results["entrants"] = {
        f"{name}_0.001": {"options": {"method": name, "learning_rate": 0.001}} for name in results["entrants"]
    }
    text = "\n".join(table_of(results))
    assert "`ddpm_0.001`" in text
    assert "speed-up" not in text.lower()


def test_a_stop_that_not_all_seeds_have_reached_is_not_shown_and_ranks_last():
    results = json.loads(json.dumps(RESULTS))
    results["runs"]["adaptive-seed1"]["scores"].pop()
    lines = table_of(results)
    assert lines[7] == "| `adaptive` | 6.000 ± 0.000 | 100 | 3.000 ± 1.414 | 200 | – | – | – | 2.40× | 100 | 2 |"
    assert [line.split("`")[1] for line in lines[4:9]] == ["edm", "ddpm", "p2", "adaptive", "speed"]


def test_images_in_equal_time_are_the_fewest_and_the_most_over_the_seeds():
    results = json.loads(json.dumps(RESULTS))
    results["runs"]["adaptive-seed1"]["scores"][0]["images"] = 1301  # 100 in the other
    (line,) = [line for line in table_of(results)[4:9] if "adaptive" in line]
    assert line.startswith("| `adaptive` | 6.000 ± 0.000 | 100 to 1,301 | 3.000 ± 1.414 | 200 |")


def test_a_run_that_failed_before_it_went_on_is_said_to_have():
    results = json.loads(json.dumps(RESULTS))
    results["runs"]["adaptive-seed1"]["failed_before"] = ["no luck"]
    assert "`adaptive`, seed 1: failed before it went on: no luck" in table_of(results)


def test_an_entrant_of_which_a_run_failed_ranks_behind_the_others():
    note = "An entrant of which a run failed is ranked last; its means are of its other runs."
    assert note in table_of(RESULTS)
    results = json.loads(json.dumps(RESULTS))
    del results["runs"]["speed-seed0"]
    assert note not in table_of(results)
    results["runs"]["adaptive-seed1"]["failed"] = "exit status 1: no luck"  # of the best
    lines = table_of(results)
    assert [line.split("`")[1] for line in lines[4:8]] == ["edm", "ddpm", "p2", "adaptive"]
    assert lines[7].endswith("| 1 (1 failed) |")
    assert note in lines


def test_how_biased_the_score_is_can_be_told_from_the_table():
    note = "FD of 640 images by 512 features is biased upwards: values compare within a table alone."
    assert note in table_of(RESULTS)


def test_how_often_gradients_were_clipped_is_a_column_where_it_is_known():
    assert "clipped" not in table_of(RESULTS)[2]
    results = json.loads(json.dumps(RESULTS))
    for run, share in (("adaptive-seed0", 0.25), ("adaptive-seed1", 0.5)):
        results["runs"][run]["clipped"] = share
    lines = table_of(results)
    assert lines[2].endswith("| images/s | clipped | seeds |")
    assert lines[4].endswith("| 100 | 37.5% | 2 |")
    assert lines[5].endswith("| 100 | – | 1 |")


@pytest.mark.parametrize(
    ("entrant", "score", "cell"),
    [("ddpm", 3.0, "1.00×"), ("adaptive", 2.0, "≥1.00×"), ("p2", 3.0, "1.00×"), ("edm", 4.0, "–")],
)
def test_a_speed_up_is_a_lower_bound_where_the_first_score_is_already_better(entrant, score, cell):
    stops = [2.0, 4.0]
    records = [{"reached": {"seconds": stop}, "seconds": stop, "images": 9} for stop in stops]
    runs = {
        name: {"entrant": name, "seed": 0, "scores": [record | {"scores": {"ddpm": value}} for record in records]}
        for name, value in {"ddpm": 3.0, entrant: score}.items()
    }
    settings = {**RESULTS["settings"], "ladders": {"seconds": stops}, "score_samplers": ["ddpm"]}
    text = "\n".join(table_of({**RESULTS, "runs": runs, "settings": settings}))
    assert f"| `{entrant}` | {score:.3f} | 9 | {score:.3f} | 9 | {cell} |" in text


def test_the_command_in_the_table_can_be_pasted(tmp_path, monkeypatch):
    words = ["--variants", '{"clts": {"timestep_sampler_options": {"num_updates": 7}}}', "--output_dir", "my runs/a"]
    monkeypatch.setattr(sys, "argv", ["compare.py", *words])
    (command,) = open_results(tmp_path, {}, {})["commands"]
    assert shlex.split(command) == ["python", "compare.py", *words]
    assert any(f"`{command}`; `b`" in line for line in table_of({**RESULTS, "commands": [command, "b"]}))


@pytest.mark.parametrize("kinds", [["seconds"], ["images"], ["seconds", "images"]])
def test_plots_of_either_ladder_and_of_both(kinds, tmp_path):
    ladders = {kind: RESULTS["settings"]["ladders"][kind] for kind in kinds}
    compare.report({**RESULTS, "settings": RESULTS["settings"] | {"ladders": ladders}}, tmp_path)
    widths = {}
    for picture in ("scores.png", "densities.png"):
        with Image.open(tmp_path / picture) as image:
            widths[picture] = image.width
    assert widths["scores.png"] == (7 if len(kinds) == 1 else 12) * 110  # a panel a ladder


def test_an_entrant_looks_the_same_in_all_plots(tmp_path, monkeypatch):
    """Also where the first run of one has no density, and there is one that has none at all."""
    results, figures = json.loads(json.dumps(RESULTS)), []
    del results["runs"]["ddpm-seed0"]["density"], results["runs"]["p2-seed0"]["density"]
    monkeypatch.setattr(comparison.plots.plt, "close", figures.append)
    compare.report(results, tmp_path)
    points, (density, *others) = figures[0].axes[0].containers, figures[1].axes
    scores = {container.get_label(): look(container[0]) for container in points}
    densities = {line.get_label(): look(line) for line in density.lines}
    assert scores.keys() - densities.keys() == {"p2", "speed"}
    assert densities.items() <= scores.items()
    assert len(set(scores.values())) == len(scores)
    for axis in others:
        assert [look(line) for line in axis.lines] == list(densities.values())


def test_with_a_single_stop_the_plot_is_a_ranking(tmp_path, monkeypatch):
    figures, only = [], {"seconds": [4.0]}
    monkeypatch.setattr(comparison.plots.plt, "close", figures.append)
    compare.report({**RESULTS, "settings": RESULTS["settings"] | {"ladders": only}}, tmp_path)
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["adaptive", "edm", "ddpm", "p2"]
    assert [container[0].get_xdata()[0] for container in axis.containers] == [2.0, 2.0, 4.0, 7.0]
    assert [look(container[0])[0] == "#000000" for container in axis.containers] == [True, False, False, False]
    assert axis.yaxis_inverted()


def look(line):
    """(colour, style) of a line."""
    return to_hex(line.get_color()), line.get_linestyle()


def test_of_many_entrants_the_best_and_our_own_are_told_apart():
    names = [*(f"entrant {i}" for i in range(40)), "adaptive", "ddpm", "failed"]
    curves = [Curve([1.0], [float(i)], [None], [(1, 1)], {}) for i in range(42)] + [Curve([], [], [], [], {})]
    entrants = {name: {"curves": {"seconds": curve}} for name, curve in zip(names, curves, strict=True)}
    looks = comparison.plots.looks(entrants)
    labels = [label for label, _ in looks.values() if label]
    assert labels == [*(f"entrant {i}" for i in range(10)), "others", "adaptive", "ddpm"]
    told_apart = [style for label, style in looks.values() if label not in (None, "others")]
    assert len({(style["color"], style["linestyle"]) for style in told_apart}) == 12
    assert {style["color"] for label, style in looks.values() if not label} == {looks["entrant 10"][1]["color"]}
    few = dict(list(entrants.items())[:20])
    assert [label for label, _ in comparison.plots.looks(few).values()] == list(few)


def test_our_own_stand_out_by_whatever_output_and_learning_rate():
    ours = ["adaptive", "adaptive_v", *(f"adaptive_v_{rate}" for rate in range(6))]
    names = [*ours, "adaptive_log_snr", "ddpm_0.001"]
    entrants = {name: {"curves": {"seconds": Curve([1.0], [1.0], [None], [(1, 1)], {})}} for name in names}
    styles = {name: style for name, (_, style) in comparison.plots.looks(entrants).items()}
    assert [name for name in names if styles[name]["color"] in ("black", "0.45")] == ours
    assert len({(styles[name]["color"], styles[name]["linestyle"]) for name in ours}) == len(ours)


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--methods", "magic"], ["--methods magic", "adaptive"]),
        (["--score_at", "0.5"], ["--score_at", "0.5"]),
        (["--score_at", "nan", "1"], ["--score_at nan"]),
        (["--score_at", "0.5", "0.2", "1"], ["--score_at"]),
        (["--max_train_seconds", "0"], ["--max_train_seconds 0.0"]),
        (["--max_train_seconds=1", "max_train_seconds=null"], ["--max_train_seconds or --score_at_images is required"]),
        (["--score_at_images", "128", "64"], ["--score_at_images 128 64: must rise"]),
        (["--learning_rates", "1e-3", "0"], ["--learning_rates 0.0: must be in (0, inf)"]),
        (["--learning_rates", "1e-3", "0.001"], ["--learning_rates 0.001 0.001: must hold each once"]),
        (["--score_at_images", "64", "100"], ["--score_at_images 100", "multiple of the 64 images of an update"]),
        (["--score_samplers", "ddpm", "magic"], ["--score_samplers magic", "ddpm, ddim"]),
        (["--score_samplers", "ddim", "ddim"], ["--score_samplers ddim ddim", "each once"]),
        (["--stop_after", "0"], ["--stop_after 0.0"]),
        (["--train_batch_size", "0"], ["--train_batch_size 0"]),
        (["--variants", '{"magic": {}}'], ["--variants magic", "needs a method", "adaptive"]),
        (["--variants", '{"ddpm": 3}'], ["--variants ddpm", "mapping"]),
        (["--variants", '{"../x": {"method": "ddpm"}}'], ["--variants ../x", "folder's name"]),
        (["--variants", '{"x": {"method": "magic"}}'], ["--variants x", "method", "'magic'", "'adaptive'"]),
        (["--variants", '{"x": {"method": "edm", "predict": 1}}'], ["--variants x", "'predict'", "prediction_type"]),
        (["--variants", '{"x": {"method": "edm", "--seed": 1}}'], ["--variants x", "no option '--seed'"]),
        (["--variants", '{"edm": {"prediction_type": "w"}}'], ["--variants edm", "prediction_type", "'w'"]),
        (["--variants", '{"edm": {"seed": 1}}'], ["--variants edm", "seed", "comparison decides"]),
        (["--variants", '{"edm": {"eval_num_images": 1}}'], ["--variants edm", "eval_num_images"]),
        (["--variants", '{"edm": {"dataset_name": "x"}}'], ["--variants edm", "dataset_name", "comparison decides"]),
        (["--variants", '{"edm": {"validation_split": 0.1}}'], ["--variants edm", "validation_split"]),
        (["--variants", '{"edm": {"resolution": 4}}'], ["--variants edm", "resolution", "comparison decides"]),
        (["--variants", '{"adaptive": {"timestep_sampler_options": {"bogus": 1}}}'], ["--variants adaptive", "bogus"]),
        (["--variants", '{"edm": {"loss_weighting": "magic"}}'], ["--variants edm", "--loss_weighting magic"]),
        (["--variants", '{"edm": {"train_batch_size": 48}}', "--score_at_images", "64"], ["--variants edm", "the 48"]),
        (["--variants", '{"edm": {"lr_scheduler": "cosine"}}'], ["--variants edm", "--lr_scheduler cosine"]),
        (["--variants", "1"], ["--variants", "JSON object", "'1'"]),
        (
            ["--ddpm_num_steps", "100", "--ddpm_num_inference_steps", "9", "--methods", "ddpm", "speed"],
            ["--methods speed", "SpeeD's boundary"],
        ),
        (["--lr_scheduler", "linear", "--methods", "ddpm"], ["--lr_scheduler linear"]),
        (["--checkpointing_steps", "0"], ["--checkpointing_steps 0", "checkpoints"]),
        (["--seed", "5"], ["--seed", "--seeds"]),
        (["--method=p2"], ["--method", "--methods"]),
        (["--max_train_steps", "9"], ["--max_train_steps", "--score_at_images"]),
        (["--overwrite_output_dir"], ["--overwrite_output_dir"]),
        (["method=ddpm"], ["--method", "gives each run its own"]),
        (["seed=3"], ["--seed", "gives each run its own"]),
        (["--dry-run"], ["--dry_run", "gives each run its own"]),
        (["--resume-from-checkpoint", "latest"], ["--resume_from_checkpoint"]),
        (["--sampler_options", "{}"], ["unrecognized arguments: --sampler_options"]),
    ],
)
def test_bad_flags_end_before_any_training(flags, parts, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit:
        compare.main(["--methods", "edm", "--output_dir", str(tmp_path / "out"), "--max_train_seconds", "1", *flags])
    message = f"{exit.value.code} {capsys.readouterr().err}"
    for part in parts:
        assert part in message
    assert not (tmp_path / "out").exists()


def test_the_output_folder_is_required(capsys):
    with pytest.raises(SystemExit) as exit:
        compare.main(["--max_train_seconds", "1"])
    assert "--output_dir is required" in str(exit.value.code)


def test_two_entrants_for_real(few_digits, regnet, tmp_path, monkeypatch):
    fork_all_but_the_first(comparison.runs, monkeypatch)
    (tmp_path / "race.yaml").write_text(f"""
train:
  dataset_name: {few_digits}
  resolution: 8
  unet: {json.dumps(TINY_UNET)}
  train_batch_size: 8
  ddpm_num_inference_steps: 2
  logging_steps: 5
  logger: none
  eval_num_images: 330
  eval_num_inference_steps: 2
compare:
  methods: [ddpm, bursting]
  variants:
    bursting: {{method: ddpm, learning_rate: 1e30, lr_warmup_steps: 0, max_nonfinite_steps: 1}}
  score_samplers: [ddpm, ddim]
  max_train_seconds: 1
  score_at: [1]
  score_at_images: [32]
""")
    folder = tmp_path / "out"
    flags = ["--config", tmp_path / "race.yaml", "--eval_feature_extractor", regnet, "--output_dir", folder]
    flags = [str(flag) for flag in flags]
    compare.main(flags)
    results = json.loads((folder / "results.json").read_text())
    assert len(results["feature_extractor"]["weights_sha256"]) == 64
    assert 0 < results["feature_extractor"]["num_features"] < results["settings"]["eval_num_images"]
    assert "not finite" in results["runs"]["bursting-seed0"]["failed"]
    images, seconds = sorted(results["runs"]["ddpm-seed0"]["scores"], key=lambda score: "seconds" in score["reached"])
    assert images["reached"] == {"images": 32}
    assert (images["images"], images["steps"]) == (32, 4)
    assert seconds["reached"] == {"seconds": 1.0}
    assert 1 <= seconds["seconds"] < 3
    assert all(
        value > 0 for score in (images, seconds) for value in (score["scores"][name] for name in ("ddpm", "ddim"))
    )
    assert images["scores"]["ddpm"] != images["scores"]["ddim"]
    assert "`ddpm`" in (folder / "table.md").read_text()
    for picture in ("scores.png", "densities.png", "ddpm-seed0/samples/final.png"):
        Image.open(folder / picture).verify()
