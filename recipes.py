"""Options of the scripts: a typed dataclass, filled from a YAML recipe and from flags."""

import difflib
import json
import math
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


class JsonDict(dict):
    """A dataclass field written as JSON on the command line and as a mapping in a recipe."""

    def __init__(self, value=()):
        value = json.loads(value) if isinstance(value, str) else value
        if isinstance(value, (str, int, float, list)):
            raise ValueError(f"expected a JSON object, not {value!r}")
        super().__init__(value or ())


def parse_options(options_class, argv=None):
    """Fill `options_class` from `--config recipe.yaml` and flags; flags win, and mappings are merged key by key.

    Exits with status 2 and one line on stderr that names the flag, for anything that is not allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = HfArgumentParser(options_class, allow_abbrev=False)
    parser.usage = f"{parser.prog} [--config RECIPE.yaml] [--flag value ...]   (--help lists the flags)"
    try:
        recipe = load_recipe(config_flag(argv), {field.name for field in fields(options_class)})
        recipe_options = vars(parser.parse_args(recipe_to_flags(recipe)))
        parser.set_defaults(**recipe_options)
        values = vars(parser.parse_args(argv))
        for name, value in recipe_options.items():
            if isinstance(value, JsonDict):
                values[name] = JsonDict({**value, **values[name]})
        return options_class(**values)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))


@contextmanager
def one_line_errors(*kinds):
    """Exit with status 1 and one line on stderr where the block raises an error that the user can mend.

    With ADAPTIVE_DDPM_TRACEBACK in the environment, the error comes with its traceback."""
    try:
        yield
    except kinds as error:
        if "ADAPTIVE_DDPM_TRACEBACK" in os.environ:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


def config_flag(argv):
    """The value of `--config`, wherever it stands among the flags; None without one."""
    for flag, value in zip(argv, [*argv[1:], None], strict=False):
        if flag == "--config":
            return value
        if flag.startswith("--config="):
            return flag.partition("=")[2]
    return None


def load_recipe(path, allowed):
    """Read a recipe over every `base.yaml` in its folder and the folders above, the nearest last.

    Raises:
        ValueError: the file is absent, not a mapping, or names an option that is not among `allowed`.
    """
    if path is None:
        return {}
    path = Path(path).resolve()
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file")
    bases = [folder / "base.yaml" for folder in reversed(path.parents)]
    recipe = {}
    for file in [*(base for base in bases if base.is_file() and base != path), path]:
        for name, value in read_yaml_mapping(file).items():
            if name not in allowed or name == "config":
                close = difflib.get_close_matches(str(name), allowed, 1)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise ValueError(f"{file}: there is no option {name!r}{hint}")
            if isinstance(value, dict) and isinstance(recipe.get(name), dict):
                value = {**recipe[name], **value}
            recipe[name] = value
    return recipe


class RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, except that 2e-4 is a number although it has no dot."""


RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+"), "-+0123456789"
)


def read_yaml_mapping(file):
    """The mapping in a YAML file, {} where it is empty."""
    try:
        content = yaml.load(file.read_text(), Loader=RecipeLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if not isinstance(content, (dict, type(None))):
        raise ValueError(f"{file} must be a mapping of option names to values")
    return content or {}


def recipe_to_flags(recipe):
    """A recipe as command-line flags, so that its values pass the same checks. null means the option's default."""
    flags = []
    for name, value in recipe.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags


def save_options(options, path, leave_out=()):
    """Write resolved options as a recipe that repeats them; without `--config` and those named in `leave_out`."""
    path.write_text(yaml.safe_dump(plain_values(options, leave_out), sort_keys=False))


def changed_options(options, path, leave_out=()):
    """{name: (value saved at `path`, value now)} of the options that differ; nothing where nothing was saved."""
    if not path.exists():
        return {}
    saved, now = read_yaml_mapping(path), plain_values(options, leave_out)
    return {name: (saved.get(name), value) for name, value in now.items() if saved.get(name) != value}


def plain_values(options, leave_out):
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in asdict(options).items()}
    return {name: value for name, value in values.items() if name not in ("config", *leave_out)}


def check_ranges(options: Any, ranges: dict[str, str]) -> None:
    """Refuse numbers outside their range; None is an option that was not given.

    Args:
        options: an object with an attribute for each option.
        ranges: {option: interval}, as it is written on paper: "[0, 2**32)", "(0, inf)". NaN is in no interval.

    Raises:
        ValueError: naming the flag, the value and the interval.
    """
    for name, interval in ranges.items():
        value = getattr(options, name)
        least, most = (bound.strip() for bound in interval[1:-1].split(","))
        least, most = (math.inf if bound == "inf" else eval_power(bound) for bound in (least, most))
        above = value is None or (value >= least if interval[0] == "[" else value > least)
        below = value is None or (value <= most if interval[-1] == "]" else value < most)
        if not (above and below):
            raise ValueError(f"--{name} {value}: must be in {interval}")


def eval_power(bound: str) -> int:
    """An integer, or a power as Python writes it: "2**32"."""
    base, _, exponent = bound.partition("**")
    return int(base) ** int(exponent or 1)
