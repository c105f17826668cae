"""A recipe with a block for each script, and assignments of single keys beside flags."""

from dataclasses import dataclass, field

import pytest
from conftest import REPOSITORY

from generation.options import GenerationOptions
from recipes import JsonDict, parse_options, read_options
from scoring.options import EvaluationOptions
from train_adaptive_ddpm import command_line

CONFIGS = REPOSITORY / "configs"
RECIPES = [
    path
    for path in sorted(CONFIGS.rglob("*.yaml"))  # those of races: see tests/comparison/test_races.py
    if path.stem != "base" and "races" not in path.relative_to(CONFIGS).parts
]


@dataclass
class ComparisonOptions:
    """Of the script that takes recipes of training alone, too."""

    _recipe_block = "compare"

    config: str | None = None
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass
class Options:
    """Of a script that takes the block `train`."""

    _recipe_block = "train"

    config: str | None = None
    output_dir: str = "out"
    seed: int = 1
    steps: int | None = 7
    use_ema: bool = True
    seeds: list[int] = field(default_factory=lambda: [0])
    unet: JsonDict = field(default_factory=JsonDict)


def write(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    return str(path)


def refusal(arguments, capsys):
    with pytest.raises(SystemExit) as exit:
        parse_options(Options, arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


# Blocks


def test_a_script_takes_its_own_block(tmp_path):
    path = write(tmp_path / "r.yaml", "train:\n  seed: 3\n  unet: {dropout: 0.1}\ngenerate:\n  nonsense: 1\n")
    options = parse_options(Options, ["--config", path, "--output_dir", "there"])
    assert (options.seed, options.unet, options.output_dir) == (3, {"dropout": 0.1}, "there")


def test_an_empty_block_is_as_an_empty_file(tmp_path):
    assert parse_options(Options, ["--config", write(tmp_path / "r.yaml", "train:\n")]) == Options(
        config=str(tmp_path / "r.yaml")
    )


def test_what_it_inherits_may_have_blocks_too_or_none(tmp_path):
    write(tmp_path / "base.yaml", "train:\n  seed: 3\n  steps: 5\n")
    path = write(tmp_path / "r.yaml", "train:\n  steps: 6\ngenerate: {}\n")
    assert parse_options(Options, ["--config", path]).seed == 3
    assert parse_options(Options, ["--config", path]).steps == 6
    flat = write(tmp_path / "flat.yaml", "steps: 9\n")
    assert (parse_options(Options, ["--config", flat]).seed, parse_options(Options, ["--config", flat]).steps) == (3, 9)
    write(tmp_path / "base.yaml", "generate:\n  num_images: 3\n")
    assert parse_options(Options, ["--config", flat]).seed == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("generate:\n  num_images: 3\n", "has no block 'train', but generate"),
        ("train:\n  seed: 3\nsteps: 4\n", "line 3: 'steps' stands outside of the blocks (train)"),
        ("train: 3\n", "line 1: train must be a mapping of option names to values"),
        ("train:\n  sed: 3\n", "line 2: there is no option 'sed'; did you mean 'seed'?"),
        ("train:\n  seed: x\n", "line 2: seed: invalid int value: 'x'"),
        ("train:\n  seed: 3\n  seed: 4\n", "line 3 is not valid YAML: 'seed' is there already, on line 2"),
    ],
)
def test_a_bad_block_is_refused_by_file_and_line(content, message, tmp_path, capsys):
    path = write(tmp_path / "r.yaml", content)
    line = refusal(["--config", path], capsys)
    assert message in line
    assert path in line


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_of_ours_is_the_whole_protocol(path):
    """Train, generate, score: each takes up what the one before has left."""
    trained = command_line(["--config", str(path)])
    generated = parse_options(GenerationOptions, ["--config", str(path)])
    scored = parse_options(EvaluationOptions, ["--config", str(path)])
    references = {"ILSVRC/imagenet-1k": "VIRTUAL_imagenet256_labeled.npz"}  # of ADM's evaluator
    assert scored.input2 == references.get(trained.dataset_name, trained.dataset_name)
    assert (trained.dataset_name == "digits") == path.stem.startswith("digits")  # which is the default
    assert trained.adam_beta1 == 0.9  # of base.yaml
    assert trained.output_dir == generated.pipeline
    assert generated.output_dir == scored.input1
    assert generated.num_images > 2048  # the features of Inception


# A recipe that names the one it inherits


def test_a_recipe_inherits_another_with_all_that_this_inherits_and_then_what_is_nearer(tmp_path, capsys, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "base.yaml", "train:\n  seed: 2\n  unet: {a: 1}\n")
    write(tmp_path / "plain.yaml", "train:\n  seed: 3\n  steps: 4\n  output_dir: plain\n  unet: {b: 2}\n")
    write(tmp_path / "races" / "base.yaml", "train:\n  steps: 5\n  unet: {c: 3}\n")
    path = write(tmp_path / "races" / "race.yaml", "inherits: ../plain.yaml\ntrain:\n  output_dir: race\n")
    options = parse_options(Options, ["--config", path])
    assert (options.seed, options.steps, options.output_dir) == (3, 5, "race")
    assert options.unet == {"a": 1, "b": 2, "c": 3}
    assert capsys.readouterr().err == "options from base.yaml, plain.yaml, races/base.yaml, races/race.yaml\n"


def test_a_flat_recipe_may_inherit_another(tmp_path):
    write(tmp_path / "plain.yaml", "train:\n  seed: 3\n")
    path = write(tmp_path / "flat.yaml", "inherits: plain.yaml\nsteps: 4\n")
    options = parse_options(Options, ["--config", path])
    assert (options.seed, options.steps) == (3, 4)


def test_the_block_may_be_in_the_recipe_that_it_names_but_not_in_a_base_alone(tmp_path, capsys):
    write(tmp_path / "base.yaml", "train:\n  seed: 2\n")
    write(tmp_path / "plain.yaml", "train:\n  steps: 4\n")
    path = write(tmp_path / "race.yaml", "inherits: plain.yaml\ncompare:\n  seeds: [1]\n")
    options = parse_options(Options, ["--config", path])
    assert (options.seed, options.steps) == (2, 4)
    capsys.readouterr()
    path = write(tmp_path / "other.yaml", "generate: {}\n")
    assert f"{path} has no block 'train', but generate" in refusal(["--config", path], capsys)
    write(tmp_path / "plain.yaml", "generate: {}\n")
    assert "race.yaml has no block 'train', but compare" in refusal(["--config", str(tmp_path / "race.yaml")], capsys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("inherits: none.yaml\ntrain: {}\n", "line 1: inherits none.yaml: no such file"),
        ("train: {}\ninherits: [r.yaml]\n", "line 2: inherits ['r.yaml']: must be the path of a recipe"),
        ("inherits:\n", "line 1: inherits None: must be the path of a recipe"),
        ("inherits: r.yaml\ntrain: {}\n", "line 1: inherits r.yaml: inherits itself"),
        ("inherits: .\n", "line 1: inherits .: is not a file"),
        ("inherits: other.yaml\n", "line 1: inherits r.yaml: inherits itself"),
    ],
)
def test_what_cannot_be_inherited_is_refused_by_file_and_line(content, message, tmp_path, capsys):
    write(tmp_path / "other.yaml", "inherits: r.yaml\n")
    assert message in refusal(["--config", write(tmp_path / "r.yaml", content)], capsys)


@pytest.mark.parametrize("content", ["train:\n  seed: 3\n", "seed: 3\n", ""])
def test_a_comparison_takes_a_recipe_of_training_alone(content, tmp_path):
    options, others = read_options(ComparisonOptions, ["--config", write(tmp_path / "r.yaml", content), "--seed", "4"])
    assert options.seeds == [0]
    assert others == ["--seed", "4"]


def test_a_comparison_takes_its_block(tmp_path):
    path = write(tmp_path / "r.yaml", "train:\n  seed: 3\ncompare:\n  seeds: [4, 5]\n")
    assert read_options(ComparisonOptions, ["--config", path])[0].seeds == [4, 5]
    assert parse_options(Options, ["--config", path]).seed == 3


# Assignments


@pytest.mark.parametrize(
    ("assignments", "expected"),
    [
        (["seed=3"], {"seed": 3}),
        (["unet.dropout=0.2", "unet.layers_per_block=1"], {"unet": {"a": 1, "dropout": 0.2, "layers_per_block": 1}}),
        (["unet.a=[1, x, null]"], {"unet": {"a": [1, "x", None]}}),
        (["unet.b.c=1", "unet.b.d=2"], {"unet": {"a": 1, "b": {"c": 1, "d": 2}}}),
        (["unet={b: 2}"], {"unet": {"a": 1, "b": 2}}),
        (["output_dir=007", "seeds=[4, 5]", "use_ema=no"], {"output_dir": "007", "seeds": [4, 5], "use_ema": False}),
        (["steps=null"], {"steps": 7}),
        (["output_dir=a=b.c=d"], {"output_dir": "a=b.c=d"}),
        (["output_dir="], {"output_dir": "out"}),
    ],
)
def test_single_keys_are_assigned(assignments, expected):
    options = parse_options(Options, ["--unet", '{"a": 1}', *assignments])
    for name, value in expected.items():
        assert getattr(options, name) == value
        assert type(getattr(options, name)) in (type(value), JsonDict)


def test_a_flag_keeps_a_value_that_looks_like_an_assignment():
    assert parse_options(Options, ["--output_dir", "unet.dropout=0.2"]).output_dir == "unet.dropout=0.2"


def test_behind_a_switch_or_a_list_an_assignment_is_one():
    options = parse_options(Options, ["--use_ema", "seed=5", "--seeds", "1", "2", "unet.a=3"])
    assert (options.use_ema, options.seed, options.seeds, options.unet) == (True, 5, [1, 2], {"a": 3})


def test_assignments_go_over_flags_and_flags_over_the_recipe(tmp_path):
    path = write(tmp_path / "r.yaml", "train:\n  unet: {a: 1, b: 1, c: 1}\n")
    options = parse_options(Options, ["unet.c=3", "--config", path, "--unet", '{"b": 2, "c": 2}'])
    assert options.unet == {"a": 1, "b": 2, "c": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("unet.dropout", "unrecognized arguments: unet.dropout"),
        ("dropout=0.1", "unrecognized arguments: dropout=0.1"),
        ("config=r.yaml", "unrecognized arguments: config=r.yaml"),
        ("--nothing", "unrecognized arguments: --nothing"),
        ("seed.x=1", "seed.x=1: it has no keys"),
        ("seed=x", "seed=x: invalid int value: 'x'"),
        ("unet.a=[1", "unet.a=[1"),
        ("unet.a=.nan", "unet.a=.nan: expected finite numbers"),
        ("unet.a=.inf", "not NaN or infinity (where it stands for an option that takes infinity: inf)"),
        ("unet=3", "unet=3: "),
    ],
)
def test_what_is_no_assignment_is_refused(text, message, capsys):
    assert message in refusal([text], capsys)


def test_data_by_an_assignment_are_not_the_digits_recipe():
    assert command_line(["dataset_name=somewhere"]).train_batch_size == 16
    assert command_line(["train_batch_size=3"]).max_train_seconds == 120
    assert command_line(["dataset_name=digits"]).max_train_seconds == 120
