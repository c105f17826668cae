"""The recipes of races: each can be run as it is, and its entrants are what their names say."""

from functools import cache

import pytest
from conftest import REPOSITORY
from tiny_networks import tiny_vae

from comparison.entrants import plan_entrants
from comparison.options import read_command_line
from samplers import METHODS
from train_adaptive_ddpm import command_line

CONFIGS = REPOSITORY / "configs"
RACES = sorted(path for path in (CONFIGS / "races").rglob("*.yaml") if path.stem != "base")
every_race = pytest.mark.parametrize("path", RACES, ids=lambda path: f"{path.parent.name}-{path.stem}")
RACED = {
    "ablation": ["cifar10_16x16", "digits_dit"],
    "learning_rate": ["cifar10_16x16", "cifar10_dit", "cifar10_latents", "digits_dit"],
    "long": ["cifar10_16x16"],
    "methods": ["cifar10_16x16", "digits_dit"],
    "strongest": [
        "cifar10",
        "cifar10_16x16",
        "cifar10_16x16_1m",
        "cifar10_dit",
        "cifar10_latents",
        "cifar10_small",
        "digits_dit",
    ],
}


@cache
def planned(kind, data):
    """(options, {name: entrant}) of the recipe of that kind, on those data."""
    options, flags = read_command_line(["--config", str(CONFIGS / "races" / kind / f"{data}.yaml")])
    return options, plan_entrants(options, flags)


def test_these_are_all_races():
    kinds = {}
    for path in RACES:
        kinds.setdefault(path.parent.name, []).append(path.stem)
    assert kinds == RACED


@every_race
def test_every_race_can_be_run_as_its_recipe_has_it(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_vae(3, 4).save_pretrained("runs/vae_cifar10_f4")  # which a user has trained before a race in its latents
    options, entrants = planned(path.parent.name, path.stem)
    assert list(entrants) == list(options.entrants)
    if path.parent.name == "learning_rate":  # a search, which no race reports
        assert max(options.seeds) < 1000
    else:
        assert options.score_samplers == ["ddpm", "ddim"]
        assert len(options.seeds) >= 3
        assert min(options.seeds) >= 1000
    assert options.output_dir.removeprefix("runs/races/") in (path.stem, f"{path.parent.name}_{path.stem}")


def test_no_two_races_share_a_folder():
    folders = [read_command_line(["--config", str(path)])[0].output_dir for path in RACES]
    assert len(set(folders)) == len(folders)


def test_a_recipe_takes_back_the_images_that_it_inherits_by_null(tmp_path):
    inherited = CONFIGS / "races" / "strongest" / "cifar10_16x16_1m.yaml"
    path = tmp_path / "in_time.yaml"
    path.write_text(f"inherits: {inherited}\ncompare:\n  score_at_images: null\n")
    assert set(planned("strongest", "cifar10_16x16_1m")[0].ladders) == {"seconds", "images"}
    assert set(read_command_line(["--config", str(path)])[0].ladders) == {"seconds"}


@every_race
def test_a_race_is_one_on_the_data_and_the_network_of_the_recipe_that_it_inherits(path):
    raced = command_line(["--config", str(path)])
    plain = command_line(["--config", str(CONFIGS / path.name)])
    own_rate = path in (CONFIGS / "races" / kind / "digits_dit.yaml" for kind in ("ablation", "strongest"))
    for name in (
        "dataset_name",
        "resolution",
        "model",
        "unet",
        "dit",
        "vae",
        "train_batch_size",
        *([] if own_rate else ["learning_rate"]),
        "adam_beta1",
    ):
        assert getattr(raced, name) == getattr(plain, name), name


@pytest.mark.parametrize("data", RACED["methods"])
def test_all_methods_race(data):
    options, _ = planned("methods", data)
    assert set(METHODS) <= set(options.methods)
    assert options.ladders.keys() == {"seconds", "images"}


@pytest.mark.parametrize("data", RACED["methods"])
def test_the_families_of_edm_and_of_the_flow_race_with_v_and_their_own_schedules(data):
    _, entrants = planned("methods", data)
    for name in ("edm", "edm2", "info_noise", "logit_normal", "mode", "cosmap", "curriculum"):
        more = {"loss_weighting": "edm"} if name == "edm2" else {}
        assert entrants[f"{name}_v"].options == {**entrants[name].options, "prediction_type": "v_prediction", **more}
    for name in ("laplace_v", "ddpm_v_plain", "ddpm_v_plain_cosine"):
        assert entrants[name].parts["loss_weighting"] == "v"
        assert entrants[name].options["prediction_type"] == "v_prediction"


def test_the_search_for_the_learning_rate_has_each_method_by_five():
    options, entrants = planned("learning_rate", "cifar10_16x16")
    rates = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    assert list(entrants) == [f"{method}_{rate}" for method in options.methods for rate in rates]
    by_own, flags = read_command_line(["--config", str(CONFIGS / "races" / "strongest" / "cifar10_16x16.yaml")])
    own = plan_entrants(by_own, flags)["min_snr"]  # which has a rate of its own there
    assert own.options["learning_rate"] == 8e-3
    assert entrants["min_snr_0.002"] == own._replace(options={**own.options, "learning_rate": 2e-3})


def test_entrants_are_made_of_what_their_options_say():
    options, entrants = planned("ablation", "digits_dit")
    assert entrants["uniform"].parts == METHODS["ddpm"]._asdict()
    no_density = METHODS["adaptive"]._replace(timestep_sampler="uniform", noise_coupling="independent")
    assert entrants["objective"].parts == no_density._asdict()
    assert entrants["filter"].parts == no_density._replace(loss_weighting="none")._asdict()
    assert entrants["learned"].parts == METHODS["adaptive"]._replace(noise_coupling="independent")._asdict()
    assert entrants["frozen"].parts == entrants["learned"].parts
    assert entrants["adaptive"].options == {"method": "adaptive"}
    assert entrants["adaptive"].images_per_step == 64
    assert options.ladders.keys() == {"images"}
