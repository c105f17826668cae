"""Options of the scripts: a typed dataclass, filled from a YAML recipe and from flags."""

import difflib
import json
import math
import os
import re
import sys
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, is_dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from recipe_yaml import (
    NULL,
    RecipeDumper,
    line_number,
    parse_float,
    plain_value,
    read_yaml_mapping,
    read_yaml_value,
)

Options = TypeVar("Options")

ASSIGNMENT = re.compile(r"([A-Za-z]\w*)((?:\.\w+)*)=(.*)", re.DOTALL)
BLOCKS = ("train", "generate", "evaluate", "compare")  # of a recipe, each for the script of that kind
OPTIONAL_BLOCK = "compare"  # its script takes recipes of training alone, too
BASE = "base.yaml"  # inherited by all recipes beside and below it
INHERITS = "inherits"  # beside the blocks: another recipe, by its path from this one's folder


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """argparse's that tells defaults, where they tell anything."""

    def _get_help_string(self, action: Action) -> str:
        if action.const is False:  # --no_use_ema, to which `HfArgumentParser` gives the help and default of --use_ema
            return f"The same as --{action.dest} false."
        return action.help if action.default in (None, {}, []) else super()._get_help_string(action)


class JsonDict(dict):
    """A dataclass field written as JSON on the command line and as a mapping in a recipe."""

    def __init__(self, value: Any = ()):
        if isinstance(value, str):
            value = parse_json_object(value)
        super().__init__(value or ())
        try:
            json.dumps(self, allow_nan=False)
        except ValueError as error:
            raise ArgumentTypeError(
                "expected finite numbers, not NaN or infinity (where it stands for an option that takes infinity: inf)"
            ) from error


def parse_json_object(text: str) -> dict[str, Any]:
    """The JSON object in `text`; ArgumentTypeError (argparse adds the flag's name) where it is anything else."""
    try:
        value = json.loads(text, object_pairs_hook=unique_pairs)
    except (ValueError, RecursionError) as error:
        raise ArgumentTypeError(f"expected a JSON object, not {text!r} ({error})") from error
    if not isinstance(value, dict):
        raise ArgumentTypeError(f"expected a JSON object, not {text!r}")
    return value


def unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object of these pairs; json itself would let the last of two equal keys win."""
    value = {}
    for key, item in pairs:
        if key in value:
            raise ArgumentTypeError(f"the key {key!r} is given twice")
        value[key] = item
    return value


def parse_options(options_class: type[Options], argv: Sequence[str] | None = None) -> Options:
    """Fill `options_class` from `--config recipe.yaml` and flags; flags win, and mappings are merged key by key.

    A recipe may have a block for each script: that of `options_class._recipe_block` is taken. Beside flags there may be
    assignments of single keys, `unet.dropout=0.2`, values as in a recipe.

    A string that starts with ~ or ~user, a home folder, is expanded, whichever way it came. The recipe's files are
    printed to stderr, by the main process. Exits with status 2 and one line on stderr that names the flag, or the
    recipe's line, for anything that is not allowed.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        options, _ = read_options(options_class, argv, takes_others=False)
        files = recipe_files(config_flag(argv))
    except ValueError as error:
        option_parser(options_class).error(" ".join(str(error).split()))
    if files and is_main_process():
        print("options from", ", ".join(map(os.path.relpath, files)), file=sys.stderr)
    return options


def read_options(
    options_class: type[Options], argv: Sequence[str], takes_others: bool = True
) -> tuple[Options, list[str]]:
    """(Options, words of `argv` that are none of theirs), as `parse_options` has them. Prints nothing.

    Raises:
        ValueError: naming the flag, or the recipe's line; or, unless it `takes_others`, the first of these words. What
            argparse itself refuses exits with status 2.
    """
    parser = option_parser(options_class)
    flags = option_flags(parser, options_class)
    recipe = load_recipes(recipe_files(config_flag(argv)), flags, getattr(options_class, "_recipe_block", None))
    parser.set_defaults(**recipe)
    argv, assignments = split_assignments(list(argv), flags)
    namespace, others = parser.parse_known_args(argv)
    if others and not takes_others:  # first of all: a misspelt flag is not one that is missing
        raise unrecognized(others[0], flags)
    values = vars(namespace)
    for name, value in recipe.items():
        if isinstance(value, JsonDict):
            values[name] = JsonDict({**value, **values[name]})
    for name, value in (read_assignment(text, flags) for text in assignments):
        values[name] = JsonDict(merged(values[name], value)) if isinstance(value, JsonDict) else value
    given = {name: value for name, value in values.items() if value is not None}  # null: the option's default
    return options_class(**{name: expand_home(value) for name, value in given.items()}), others


def option_parser(options_class: type) -> HfArgumentParser:
    """The parser of the flags of `options_class`."""
    parser = HfArgumentParser(
        option_groups(options_class),
        allow_abbrev=False,
        formatter_class=HelpFormatter,
        description=(sys.modules["__main__"].__doc__ or "").partition("\n")[0],
        epilog="Options may also be given as in a recipe: output_dir=runs/mine",
    )
    if any(action.type is JsonDict for action in parser._actions):
        parser.epilog += "; and single keys of those that are JSON: unet.dropout=0.2"
    parser.usage = f"{parser.prog} [--config RECIPE.yaml] [--flag value ...]   (--help lists the flags)"
    return parser


def option_flags(parser: HfArgumentParser, options_class: type) -> dict[str, Action]:
    """{option: its flag}."""
    return {field.name: parser._option_string_actions[f"--{field.name}"] for field in fields(options_class)}


def option_groups(options_class: type) -> list[type]:
    """The dataclasses that one of options is made up of, which then has no fields of its own: a heading of `--help`
    each, under `_argument_group_name`. Itself, where it is not made up of any."""
    bases = [base for base in options_class.__bases__ if is_dataclass(base)]
    return [group for base in bases for group in option_groups(base)] or [options_class]


@contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Exit with status 1 and one line on stderr where the block raises an error that the user can mend.

    With ADAPTIVE_DDPM_TRACEBACK in the environment, the error comes with its traceback."""
    try:
        yield
    except kinds as error:
        if "ADAPTIVE_DDPM_TRACEBACK" in os.environ:
            raise
        sys.exit(f"{Path(sys.argv[0]).name}: error: {' '.join(str(error).split())}")


def is_main_process() -> bool:
    """By the launcher's environment, so also before the processes have found each other."""
    return os.environ.get("RANK", "0") == "0"


def expand_home(value: Any) -> Any:
    """~ and ~user at the start of a string, or of a list's strings, as the shell expands them; the rest as it is.

    The shell does not: in `--output_dir=~/x`, and in a recipe. A ~user that does not exist stays."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


# Which files


def config_flag(argv: Sequence[str]) -> str | None:
    """The value of `--config`, wherever it stands among the flags; None without one."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return expand_home(parser.parse_known_args(argv)[0].config)


def recipe_files(path: str | None) -> list[Path]:
    """The recipe and all that it inherits, the farthest first; [] where `path` is None.

    Inherited is the recipe that its key `inherits` names, with all that this one inherits; and nearer than that, each
    base.yaml from the recipe's folder up to the root of its git repository. Outside of one, those of its folder and of
    as many folders above as have one without a gap: there is no other sign of where the recipes end.

    Raises:
        ValueError: there is no such file, or it inherits itself.
    """
    return [] if path is None else inherited_files(Path(os.path.realpath(path)), f"--config {path}", ())


def inherited_files(recipe: Path, named: str, heirs: tuple[Path, ...]) -> list[Path]:
    """`recipe_files` of one that is `named` so, for an error, and that these `heirs` inherit."""
    if not os.path.isfile(recipe):
        raise ValueError(f"{named}: {'is not a file' if os.path.exists(recipe) else 'no such file'}")
    if recipe in heirs:
        raise ValueError(f"{named}: inherits itself")
    inherited = []
    if (node := read_yaml_mapping(recipe).get(INHERITS)) is not None:
        value = plain_value(node)
        named = f"{recipe}, line {line_number(node.start_mark)}: {INHERITS} {value}"
        if not isinstance(value, str):
            raise ValueError(f"{named}: must be the path of a recipe")
        inherited = inherited_files(Path(os.path.realpath(recipe.parent / value)), named, (*heirs, recipe))
    bases = [base for base in base_files(recipe) if base not in inherited and base != recipe]
    return [*inherited, *bases, recipe]


def base_files(recipe: Path) -> list[Path]:
    """Each base.yaml of the recipe's folder and above, the farthest first."""
    recipe_folder, *folders_above = recipe.parents
    roots = [folder for folder in recipe.parents if os.path.exists(folder / ".git")]
    if roots:
        folders = [folder for folder in recipe.parents if folder.is_relative_to(roots[0])]
    else:
        folders = [recipe_folder, *takewhile(lambda above: os.path.isfile(above / BASE), folders_above)]
    bases = [folder / BASE for folder in reversed(folders)]
    return [base for base in bases if os.path.isfile(base)]


# What is in them


def load_recipes(files: Sequence[Path], flags: dict[str, Action], block: str | None = None) -> dict[str, Any]:
    """The values of recipes, typed by the `flags` of their options; a later file wins, mappings are merged.

    Args:
        files: the last is the recipe itself, the others are those that it inherits.
        block: of a file that has one for each script, the one to take.

    Raises:
        ValueError: a file that cannot be read or is no mapping, an option that does not exist, or a value that it
            does not take; with the file and the line. Or neither the recipe nor one that it names has the block.
    """
    recipe, contents = {}, {file: read_block(file, block) for file in files}
    named = [file for file in files if file == files[-1] or file.name != BASE]
    if named and all(contents[file] is None for file in named):
        blocks = [name for name in read_yaml_mapping(files[-1]) if name in BLOCKS]
        raise ValueError(f"{files[-1]} has no block {block!r}, but {', '.join(blocks)}")
    for file in files:
        for name, node in (contents[file] or {}).items():
            where = f"{file}, line {line_number(node.start_mark)}"
            if name not in flags or name == "config":
                raise ValueError(f"{where}: there is no option {name!r}{did_you_mean(name, flags)}")
            try:
                value = option_value(node, flags[name])
            except ValueError as error:
                raise ValueError(f"{where}: {name}: {error}") from error
            if isinstance(value, JsonDict) and isinstance(recipe.get(name), JsonDict):
                value = JsonDict({**recipe[name], **value})
            recipe[name] = value
    return {name: value for name, value in recipe.items() if value is not None}  # null: the option's default


def read_block(file: Path, block: str | None) -> dict[str, yaml.Node] | None:
    """The options in a recipe: all of a flat one; of one that has blocks, those of this block; None where it has others
    only.

    Raises:
        ValueError: there are options outside of the blocks.
    """
    mapping = read_yaml_mapping(file)
    mapping.pop(INHERITS, None)
    blocks = [name for name in mapping if name in BLOCKS]
    if block == OPTIONAL_BLOCK and block not in blocks:
        return {}
    if block is None or not blocks:
        return mapping
    for name in (name for name in mapping if name not in blocks):
        line = line_number(mapping[name].start_mark)
        raise ValueError(f"{file}, line {line}: {name!r} stands outside of the blocks ({', '.join(blocks)})")
    if block not in blocks:
        return None
    node = mapping[block]
    if node.tag == NULL:
        return {}
    if not isinstance(node, yaml.MappingNode):
        line = line_number(node.start_mark)
        raise ValueError(f"{file}, line {line}: {block} must be a mapping of option names to values")
    return {key.value: value for key, value in node.value}


def split_assignments(argv: list[str], flags: dict[str, Action]) -> tuple[list[str], list[str]]:
    """(The other words, those of a command line that are assignments).

    A word behind a flag that takes one value is that value, whatever it looks like; argparse would take it for one also
    behind a switch, or a flag with a list of values."""
    takes_one = {string for action in flags.values() if action.nargs is None for string in action.option_strings}
    others, assignments = [], []
    for before, word in zip(["", *argv], argv, strict=False):
        match = ASSIGNMENT.fullmatch(word)
        is_one = match is not None and match[1] in flags and before not in takes_one
        (assignments if is_one else others).append(word)
    return others, assignments


def read_assignment(text: str, flags: dict[str, Action]) -> tuple[str, Any]:
    """(option, value) of "max_train_steps=100", or of "unet.dropout=0.2": then a mapping of that key alone.

    Raises:
        ValueError: it is none, or not of an option that there is, or a value that the option does not take.
    """
    match = ASSIGNMENT.fullmatch(text)
    if not match or match[1] not in flags or match[1] == "config":
        raise unrecognized(text, flags)
    name, keys = match[1], match[2].split(".")[1:]
    try:
        node = read_yaml_value(match[3])
        if not keys:
            return name, option_value(node, flags[name])
        if flags[name].type is not JsonDict:
            raise ValueError("it has no keys")
        value = plain_value(node)
        for key in reversed(keys):
            value = {key: value}
        return name, JsonDict(value)
    except (ValueError, ArgumentTypeError) as error:
        raise ValueError(f"{text}: {error}") from error


def unrecognized(text: str, names: Iterable[str]) -> ValueError:
    """The error of a word that is no flag, and no assignment, of the options with these names."""
    word = text.lstrip("-").partition("=")[0].partition(".")[0].replace("-", "_")
    return ValueError(f"unrecognized arguments: {text}{did_you_mean(word, names)}")


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The end of an error: the options whose names hold this one as words, nearest first, three at most; else the one
    whose name is nearest; nothing where none is near."""
    names = list(names)
    holding = [other for other in names if f"_{name}_" in f"_{other}_"]
    close = difflib.get_close_matches(name, holding if len(name) > 2 else [], 3, cutoff=0) or difflib.get_close_matches(
        name, names, 1
    )
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """`new` over `old`, also within mappings that both have."""
    both = {key for key in old.keys() & new.keys() if isinstance(old[key], dict) and isinstance(new[key], dict)}
    return {**old, **new, **{key: merged(old[key], new[key]) for key in both}}


def option_value(node: yaml.Node, flag: Action) -> Any:
    """What a recipe says of an option, as its flag would have it: scalars go through the flag's own parser.

    None for null. ValueError for what the flag does not take."""
    if node.tag == NULL:
        return None
    if isinstance(node, yaml.MappingNode):
        if flag.type is not JsonDict:
            raise ValueError("expected a value, not a mapping")
        return parse_value(flag, plain_value(node))
    if flag.nargs != "+":
        if isinstance(node, yaml.SequenceNode):
            raise ValueError("expected a value, not a list")
        return parse_value(flag, node.value)
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not items or any(item.tag == NULL or not isinstance(item, yaml.ScalarNode) for item in items):
        raise ValueError("expected a list of values, none of them null, a list or a mapping")
    return [parse_value(flag, item.value) for item in items]


def parse_value(flag: Action, value: Any) -> Any:
    """A value as argparse would convert and check it: it keeps its own way of doing so to itself."""
    if flag.type is string_to_bool:
        value = {"on": "true", "off": "false"}.get(value.lower(), value)
    convert = parse_float if flag.type is float else flag.type
    try:
        parsed = convert(value)
    except ArgumentTypeError as error:
        raise ValueError(error) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"invalid {flag.type.__name__} value: {value!r}") from error
    if flag.choices is not None and parsed not in flag.choices:
        raise ValueError(f"invalid choice: {value!r} (choose from {', '.join(map(repr, flag.choices))})")
    return parsed


# Saved options


def save_options(options: Any, path: Path, leave_out: Sequence[str] = ()) -> None:
    """Write resolved options as a recipe that repeats them; without `--config` and those named in `leave_out`."""
    text = yaml.dump(plain_values(options, leave_out), Dumper=RecipeDumper, sort_keys=False, width=sys.maxsize)
    path.write_text(text, encoding="utf-8")


def changed_options(options: Any, path: Path, leave_out: Sequence[str] = ()) -> dict[str, tuple[Any, Any]]:
    """{name: (value saved at `path`, value now)} of the options that differ; nothing where nothing was saved."""
    if not path.exists():
        return {}
    saved, now = read_yaml_mapping(path), plain_values(options, leave_out)
    saved = {name: plain_value(node) for name, node in saved.items()}
    return {name: (saved[name], value) for name, value in now.items() if name in saved and saved[name] != value}


def plain_values(options: Any, leave_out: Sequence[str]) -> dict[str, Any]:
    """{option: value} in plain types, in the order of `--help`."""
    values = {name: dict(value) if isinstance(value, dict) else value for name, value in asdict(options).items()}
    names = (field.name for group in option_groups(type(options)) for field in fields(group))
    return {name: values[name] for name in names if name not in ("config", *leave_out)}


def check_ranges(options: Any, ranges: dict[str, str]) -> None:
    """Refuse numbers outside their range; None is an option that was not given.

    Args:
        options: an object with an attribute for each option.
        ranges: {option: interval}, as it is written on paper: "[0, 2**32)", "(0, inf)". NaN is in no interval. Of a
            list, each number must be in it.

    Raises:
        ValueError: naming the flag, the value and the interval.
    """
    for name, interval in ranges.items():
        value = getattr(options, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not is_in_interval(number, interval):
                raise ValueError(f"--{name} {number}: must be in {interval}")


def is_in_interval(number: float, interval: str) -> bool:
    """Whether a number is in an interval such as "[0, 2**32)"."""
    least, most = (math.inf if bound.strip() == "inf" else eval_power(bound) for bound in interval[1:-1].split(","))
    above = number >= least if interval[0] == "[" else number > least
    below = number <= most if interval[-1] == "]" else number < most
    return above and below


def eval_power(bound: str) -> int:
    """An integer, or a power as Python writes it: "2**32"."""
    base, _, exponent = bound.partition("**")
    return int(base) ** int(exponent or 1)
