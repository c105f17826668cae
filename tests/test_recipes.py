"""YAML recipes: what is read of them, what they inherit, what is refused, and that saved options come back."""

from dataclasses import dataclass, field
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import recipes
from recipes import JsonDict, changed_options, parse_options, save_options
from samplers import METHODS, resolve_method
from train_adaptive_ddpm import TrainingOptions, command_line
from training.methods import method_parts


@dataclass
class Options:
    """One option of every kind."""

    config: str | None = None
    output_dir: str = "out"
    cache_dir: str | None = None
    seed: int = 1
    steps: int | None = None
    learning_rate: float = 0.5
    use_ema: bool = True
    compile: bool = False
    mixed_precision: Literal["no", "bf16"] = "bf16"
    methods: list[str] = field(default_factory=lambda: ["ddpm"])
    seeds: list[int] = field(default_factory=lambda: [0])
    unet: JsonDict = field(default_factory=JsonDict)


@pytest.fixture
def recipe(tmp_path):
    """recipe("seed: 3") writes a recipe outside of every repository, and returns its path."""

    def write(content):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read(path, *flags):
    return parse_options(Options, ["--config", str(path), *flags])


def refusal(arguments, capsys):
    """The last line on stderr of a command line that is refused."""
    with pytest.raises(SystemExit) as exit:
        parse_options(Options, [str(argument) for argument in arguments])
    assert exit.value.code == 2
    usage, line = capsys.readouterr().err.splitlines()
    assert usage.startswith("usage: ")
    return line


# Values


@pytest.mark.parametrize("text", ["2026_11_25", "007", "no", "2026-11-25", "1e3", "1:30", "0x10", "1_000", "on", "é"])
@pytest.mark.parametrize("quote", ["", "'", '"'])
def test_a_string_option_is_what_is_written(recipe, text, quote):
    path = recipe(f"output_dir: {quote}{text}{quote}\nmethods: [{quote}{text}{quote}, x]\n")
    options = read(path)
    assert options.output_dir == text
    assert options.methods == [text, "x"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("seed: 010", {"seed": 10}),
        ("seed: '3'", {"seed": 3}),
        ("learning_rate: 2e-4", {"learning_rate": 2e-4}),
        ("learning_rate: 1", {"learning_rate": 1.0}),
        ("learning_rate: .inf", {"learning_rate": float("inf")}),
        ("learning_rate: -.Inf", {"learning_rate": float("-inf")}),
        *((f"use_ema: {text}", {"use_ema": False}) for text in ("false", "no", "off", "No", "OFF")),
        *((f"compile: {text}", {"compile": True}) for text in ("true", "yes", "on", "TRUE")),
        ("mixed_precision: no", {"mixed_precision": "no"}),
        ("methods: ddpm", {"methods": ["ddpm"]}),
        ("methods: [-x, --seed]", {"methods": ["-x", "--seed"]}),
        ("output_dir: -x", {"output_dir": "-x"}),
        ("output_dir: '--'", {"output_dir": "--"}),
        ("seeds: [1, 02]", {"seeds": [1, 2]}),
        ("unet: '{\"a\": 1}'", {"unet": {"a": 1}}),
        *((f"output_dir: {null}", {"output_dir": "out"}) for null in ("null", "~", "", "Null")),
        ("output_dir: 'null'", {"output_dir": "null"}),
        ("output_dir: ''", {"output_dir": ""}),
        ("# nothing", {}),
        ("", {}),
        ("\ufeffseed: 3", {"seed": 3}),
    ],
)
def test_values_go_through_the_flags_own_parsers(recipe, text, expected):
    assert vars(read(recipe(text))) == vars(Options()) | expected | {"config": str(recipe(text))}


def test_values_inside_a_mapping_are_typed_by_their_looks(recipe):
    unet = read(recipe("unet: {a: 2e-4, b: 010, c: no, d: 1:30, e: [1, 2.5, x], f: null, g: '1', h: {i: 2026-11-25}}"))
    expected = dict(a=2e-4, b=10, c=False, d="1:30", e=[1, 2.5, "x"], f=None, g="1", h={"i": "2026-11-25"})
    assert unet.unet == expected
    assert [type(value) for value in unet.unet.values()] == [type(value) for value in expected.values()]


def test_a_home_folder_is_expanded_in_every_string(recipe, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe("output_dir: ~/runs/x\nmethods: [~/a, b~]\ncache_dir: '~'\n")
    options = parse_options(Options, ["--config=~/recipe.yaml"])
    assert (options.output_dir, options.cache_dir) == (f"{tmp_path}/runs/x", str(tmp_path))
    assert options.methods == [f"{tmp_path}/a", "b~"]
    options = parse_options(
        Options, ["--output_dir=~/x", "--cache_dir=~nobody-of-this-name/x", "--methods", "~/a", "b"]
    )
    assert (options.output_dir, options.cache_dir) == (f"{tmp_path}/x", "~nobody-of-this-name/x")
    assert options.methods == [f"{tmp_path}/a", "b"]


# Refusals


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("seed: 1\nsteps: 2\nseed: 3\n", ["line 3", "'seed'", "line 1"]),
        ("unet:\n  a: 1\n  b: [{c: 1,\n    c: 2}]\n", ["line 4", "'c'", "line 3"]),
        ("seed: 1:30", ["line 1: seed", "'1:30'"]),
        ("\nseed: 1e3", ["line 2: seed", "'1e3'"]),
        ("seed: [1]", ["line 1: seed", "not a list"]),
        ("seed: {a: 1}", ["line 1: seed", "not a mapping"]),
        ("output_dir: [a]", ["line 1: output_dir", "not a list"]),
        ("methods: {a: 1}", ["line 1: methods", "not a mapping"]),
        ("methods: []", ["line 1: methods", "list of values"]),
        ("methods: [a, null]", ["line 1: methods", "null"]),
        ("methods: [a, [b]]", ["line 1: methods", "list of values"]),
        ("unet: [1]", ["line 1: unet", "not a list"]),
        ("unet: 3", ["line 1: unet", "JSON object", "'3'"]),
        ("unet: {a: .nan}", ["line 1: unet", "finite"]),
        ("compile: maybe", ["line 1: compile", "maybe"]),
        ("mixed_precision: fp8", ["line 1: mixed_precision", "'fp8'", "'bf16'"]),
        ("sed: 1", ["line 1", "no option 'sed'; did you mean 'seed'?"]),
        ("config: x.yaml", ["line 1", "no option 'config'"]),
        ("1: 2", ["line 1", "string, not 1"]),
        ("unet: {on: 2}", ["line 1", "string, not on"]),
        ("[a]: 2", ["line 1", "string, not a sequence"]),
        ("seed: &x 1\nsteps: *x", ["line 2", "aliases"]),
        ("unet: &x [*x]", ["line 1", "aliases"]),
        ("unet: {<<: {a: 1}}", ["line 1", "string, not <<"]),
        ("seed: !!python/name:os.system x", ["line 1", "tags"]),
        ("output_dir: !!binary aGk=", ["line 1", "tags"]),
        ("seed: 1\n\tsteps: 1", ["line 2", "not valid YAML"]),
        ("seed: [1", ["line 1", "not valid YAML"]),
        ("seed: 1\n---\nseed: 2\n", ["line 2", "one document"]),
        ("- seed", ["must be a mapping"]),
        ("just words", ["must be a mapping"]),
        (b"output_dir: \xff", ["not UTF-8"]),
        ("output_dir: \x00", ["not valid YAML"]),
        ("unet: " + 5000 * "[", ["not valid YAML"]),
        ("unet: {a: " + 5000 * "1" + "}", ["line 1: unet"]),
    ],
)
def test_a_bad_recipe_is_refused_by_file_and_line(recipe, capsys, content, parts):
    path = recipe(content)
    line = refusal(["--config", path], capsys)
    for part in (str(path), *parts):
        assert part in line


def test_a_recipe_that_cannot_be_read_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name, reason in (("absent.yaml", "no such file"), ("", "is not a file"), ("loop", "no such file")):
        path = tmp_path / name
        assert f"--config {path}: {reason}" in refusal(["--config", path], capsys)
    assert "no such file" in refusal(["--config", 5000 * "x"], capsys)
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 1")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(recipes.Path, "read_text", refuse)
    assert f"{path}: Permission denied" in refusal(["--config", path], capsys)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' is given twice"),
        ('{"b": [{"a": 1, "a": 2}]}', "the key 'a' is given twice"),
        ('{"a": NaN}', "expected finite numbers"),
        ('{"a": [-Infinity]}', "expected finite numbers"),
        ('{"a": 1e999}', "expected finite numbers"),
        ("{", "expected a JSON object, not '{'"),
        ("[1]", "expected a JSON object, not '[1]'"),
        ("1", "expected a JSON object, not '1'"),
        ("null", "expected a JSON object, not 'null'"),
        ("", "expected a JSON object, not ''"),
    ],
)
def test_a_bad_json_option_is_refused_by_its_flag(capsys, value, message):
    assert f"--unet: {message}" in refusal(["--unet", value], capsys)


# Inheritance


@pytest.fixture
def tree(tmp_path):
    """A recipe with a base.yaml beside it and another one above."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "base.yaml").write_text("learning_rate: 1e-3\nseed: 1\nunet: {dropout: 0.1, layers_per_block: 1}\n")
    (tmp_path / "deep" / "base.yaml").write_text("seed: 2\ntrain_batch_size: 7\n")
    (tmp_path / "deep" / "recipe.yaml").write_text("train_batch_size: 9\nunet: {dropout: 0.2}\nlogger: none\n")
    return tmp_path / "deep" / "recipe.yaml"


def test_a_recipe_inherits_every_base_above_it_and_flags_override_it(tree):
    options = command_line(["--config", str(tree)])
    assert (options.learning_rate, options.seed, options.train_batch_size) == (1e-3, 2, 9)
    assert options.unet == {"dropout": 0.2, "layers_per_block": 1}
    options = command_line([f"--config={tree}", "--seed", "3", "--unet", '{"dropout": 0.3}'])
    assert (options.learning_rate, options.seed, options.train_batch_size) == (1e-3, 3, 9)
    assert options.unet == {"dropout": 0.3, "layers_per_block": 1}


def test_null_in_a_recipe_is_the_default_and_not_what_is_inherited(tree):
    tree.write_text("learning_rate: null\n")
    assert command_line(["--config", str(tree)]).learning_rate == TrainingOptions().learning_rate


@pytest.mark.parametrize("git", ["folder", "file"])
def test_nothing_above_the_repository_is_inherited(tree, git):
    """A worktree's .git is a file."""
    if git == "folder":
        (tree.parent / ".git").mkdir()
    else:
        (tree.parent / ".git").write_text("gitdir: /elsewhere")
    options = command_line(["--config", str(tree)])
    assert (options.seed, options.learning_rate) == (2, TrainingOptions().learning_rate)


def test_a_repository_may_have_folders_without_a_base(tree):
    (tree.parent.parent / ".git").mkdir()
    (tree.parent / "base.yaml").unlink()
    assert command_line(["--config", str(tree)]).seed == 1
    (tree.parent / "deeper").mkdir()
    deeper = tree.rename(tree.parent / "deeper" / "recipe.yaml")
    assert command_line(["--config", str(deeper)]).seed == 1


def test_outside_of_a_repository_a_folder_without_a_base_ends_the_recipes(tree):
    (tree.parent / "deeper" / "deepest").mkdir(parents=True)
    deeper = tree.rename(tree.parent / "deeper" / "recipe.yaml")
    assert command_line(["--config", str(deeper)]).seed == 2  # its own folder need not have one
    deepest = deeper.rename(tree.parent / "deeper" / "deepest" / "recipe.yaml")
    assert command_line(["--config", str(deepest)]).seed == 0


def test_the_files_used_are_printed_by_the_main_process(tree, capsys, monkeypatch):
    monkeypatch.chdir(tree.parent.parent)
    command_line(["--config", "deep/recipe.yaml"])
    expected = "options from base.yaml, deep/base.yaml, deep/recipe.yaml\n"
    assert capsys.readouterr() == ("", expected)
    monkeypatch.setenv("RANK", "0")
    command_line(["--config", "deep/base.yaml"])
    assert capsys.readouterr().err == "options from base.yaml, deep/base.yaml\n"
    monkeypatch.setenv("RANK", "1")
    command_line(["--config", "deep/recipe.yaml"])
    monkeypatch.setenv("RANK", "0")
    parse_options(Options, [])
    assert capsys.readouterr() == ("", "")


def test_the_last_config_counts_as_for_every_flag(tree):
    options = command_line(["--config", "absent.yaml", f"--config={tree}"])
    assert (options.config, options.train_batch_size) == (str(tree), 9)


# Saved options


def test_saved_options_repeat_the_run_and_hold_no_secret(tree, tmp_path):
    options = command_line(["--config", str(tree), "--hub_token", "hf_secret", "--max_train_steps", "5"])
    save_options(options, tmp_path / "saved.yaml", leave_out=("hub_token",))
    again = command_line(["--config", str(tmp_path / "saved.yaml")])
    differences = {k for k, v in vars(again).items() if v != vars(options)[k]}
    assert differences == {"config", "hub_token"}
    assert "hf_secret" not in (tmp_path / "saved.yaml").read_text()


def test_a_saved_recipe_can_be_trained_by_another_method(tmp_path):
    save_options(command_line(["--method", "adaptive", "--max_train_steps", "5"]), tmp_path / "saved.yaml")
    options = command_line(["--config", str(tmp_path / "saved.yaml"), "--method", "ddpm"])
    assert resolve_method(options.method, **method_parts(options)) == METHODS["ddpm"]


LOOKALIKES = st.sampled_from(
    [
        "007",
        "no",
        "2026_11_25",
        "2026-11-25",
        "~x",
        "null",
        "",
        "a: b",
        "1e3",
        "08",
        "1:30",
        "0x1",
        "=",
        "<<",
        "--",
        "#",
    ]
)
STRINGS = st.one_of(LOOKALIKES, st.text(st.characters(codec=None)))  # with surrogates: a file's name may have them
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES = st.recursive(
    st.one_of(STRINGS, NUMBERS, st.booleans(), st.none()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(STRINGS, inner, max_size=3)),
    max_leaves=6,
)


@given(
    st.builds(
        Options,
        output_dir=STRINGS,
        cache_dir=st.one_of(st.none(), STRINGS),
        seed=st.integers(),
        learning_rate=st.floats(allow_nan=False),
        compile=st.booleans(),
        methods=st.lists(STRINGS, min_size=1, max_size=3),
        unet=st.dictionaries(STRINGS, VALUES, max_size=3).map(JsonDict),
    )
)
def test_saved_options_come_back_as_they_were(tmp_path_factory, options):
    options.output_dir, options.methods = recipes.expand_home(options.output_dir), recipes.expand_home(options.methods)
    options.cache_dir = recipes.expand_home(options.cache_dir)
    path = tmp_path_factory.mktemp("saved") / "training_options.yaml"
    save_options(options, path)
    assert vars(read(path)) == vars(options) | {"config": str(path)}
    assert changed_options(options, path) == {}


def test_changed_options_are_named_with_both_values(tmp_path):
    path = tmp_path / "saved.yaml"
    assert changed_options(Options(), path) == {}
    save_options(Options(), path)
    changed = Options(output_dir="007", seed=2, learning_rate=1e-4, config="x")
    assert changed_options(changed, path, leave_out=("seed",)) == {
        "output_dir": ("out", "007"),
        "learning_rate": (0.5, 1e-4),
    }
