"""The recipes of races: each can be run as it is, and its entrants are what their names say."""

import pytest
from conftest import REPOSITORY

from comparison.entrants import plan_entrants
from comparison.options import read_command_line
from samplers import METHODS
from train_adaptive_ddpm import command_line

RACES = sorted(path for path in (REPOSITORY / "configs" / "races").glob("*.yaml") if path.stem != "base")
every_race = pytest.mark.parametrize("path", RACES, ids=lambda path: path.stem)


@every_race
def test_every_race_can_be_run_as_its_recipe_has_it(path):
    options, flags = read_command_line(["--config", str(path)])
    entrants = plan_entrants(options, flags)
    assert list(entrants) == options.methods
    assert options.score_samplers == ["ddpm", "ddim"]
    assert len(options.seeds) >= 3
    assert options.output_dir == f"runs/races/{path.stem}"


@every_race
def test_a_race_is_one_on_the_data_and_the_network_of_the_recipe_that_it_inherits(path):
    raced = command_line(["--config", str(path)])
    plain = command_line(["--config", str(path.parent.parent / f"{path.stem.removeprefix('ablation_')}.yaml")])
    for name in ("dataset_name", "resolution", "unet", "train_batch_size", "learning_rate", "adam_beta1"):
        assert getattr(raced, name) == getattr(plain, name), name


@pytest.mark.parametrize("name", ["cifar10_16x16", "digits"])
def test_all_methods_race(name):
    options, _ = read_command_line(["--config", str(REPOSITORY / "configs" / "races" / f"{name}.yaml")])
    assert set(METHODS) <= set(options.methods)
    assert options.ladders.keys() == {"seconds", "images"}


def test_entrants_are_made_of_what_their_options_say():
    options, flags = read_command_line(["--config", str(REPOSITORY / "configs" / "races" / "ablation_digits.yaml")])
    entrants = plan_entrants(options, flags)
    assert entrants["uniform"].parts == METHODS["ddpm"]._asdict()
    assert entrants["filter_objective"].parts == METHODS["adaptive"]._replace(timestep_sampler="uniform")._asdict()
    assert entrants["learned"].parts == entrants["adaptive"].parts == METHODS["adaptive"]._asdict()
    assert entrants["adaptive"].options == {"method": "adaptive"}
    assert entrants["adaptive"].images_per_step == 64
    assert options.ladders.keys() == {"images"}
