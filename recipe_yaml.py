"""The language of recipes: YAML less its surprises."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import yaml


class RecipeLoader(yaml.SafeLoader):
    """YAML less its surprises: unique keys, which are strings; no aliases or tags; 010 is ten, and a date a string."""

    # Instead of YAML 1.1's, in which 1:30 is 90, 2026-11-25 a date and 1e-4 a string
    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            raise yaml.MarkedYAMLError(
                problem="aliases (*name) and tags (!name) are not allowed", problem_mark=event.start_mark
            )
        node = super().compose_node(parent, index)
        if isinstance(node, yaml.MappingNode):
            check_keys(node)
        return node


class RecipeDumper(yaml.SafeDumper):
    """Quotes every string that RecipeLoader, or any reader of YAML 1.1, would take for something else."""


NULL, BOOL, INT, FLOAT, STR, MERGE = (
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "merge")
)
for tag, pattern, first_characters in (
    (NULL, r"(~|null|Null|NULL|)\Z", ["~", "n", "N", ""]),
    (BOOL, r"(?i:true|false|yes|no|on|off)\Z", list("tTfFyYnNoO")),
    (INT, r"[-+]?[0-9]+\Z", list("-+0123456789")),
    (FLOAT, r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?\Z", list("-+.0123456789")),
    (MERGE, r"<<\Z", ["<"]),
    (FLOAT, r"([-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))\Z", list("-+.")),
):
    for yaml_class in (RecipeLoader, RecipeDumper):
        yaml_class.add_implicit_resolver(tag, re.compile(pattern), first_characters)


def check_keys(mapping: yaml.MappingNode) -> None:
    """Refuse a key that is no string, and one that stands there twice: YAML itself lets the last one win."""
    lines = {}
    for key, _ in mapping.value:
        if key.tag != STR:
            found = key.value if isinstance(key, yaml.ScalarNode) else f"a {key.id}"
            raise yaml.MarkedYAMLError(
                problem=f"a key must be a string, not {found} (quote it)", problem_mark=key.start_mark
            )
        if key.value in lines:
            raise yaml.MarkedYAMLError(
                problem=f"{key.value!r} is there already, on line {lines[key.value]}", problem_mark=key.start_mark
            )
        lines[key.value] = line_number(key.start_mark)


def line_number(mark: yaml.Mark) -> int:
    """As editors count: from 1."""
    return mark.line + 1


@lru_cache(maxsize=64)  # a race reads its recipe, and what this inherits, for each of its entrants
def parsed(text: str) -> yaml.Node | None:
    return RecipeLoader(text).get_single_node()


def read_yaml_mapping(file: Path) -> dict[str, yaml.Node]:
    """The mapping in a YAML file, its values as they are written; {} where it is empty."""
    try:
        node = parsed(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from error
    except yaml.MarkedYAMLError as error:
        problem = "one document is expected" if "single document" in str(error.context) else error.problem
        raise ValueError(f"{file}, line {line_number(error.problem_mark)} is not valid YAML: {problem}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if node is None or node.tag == NULL:
        return {}
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{file} must be a mapping of option names to values")
    return {key.value: value for key, value in node.value}


def read_yaml_value(text: str) -> yaml.Node:
    """A value as a recipe would have it behind a key. Raises ValueError."""
    try:
        return RecipeLoader(text).get_single_node() or yaml.ScalarNode(NULL, "")
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{text!r} is not a value as YAML has them") from error


def plain_value(node: yaml.Node) -> Any:
    """A node of a mapping, whose values no flag describes, by the look of them."""
    if isinstance(node, yaml.MappingNode):
        return {key.value: plain_value(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [plain_value(item) for item in node.value]
    return SCALAR_TYPES[node.tag](node.value)


def parse_float(text: str) -> float:
    """Python's float, and YAML's .inf and .nan."""
    return float(re.sub(r"\.(inf|nan)$", r"\1", text.lower()))


SCALAR_TYPES = {
    NULL: lambda text: None,
    BOOL: lambda text: text.lower() in ("true", "yes", "on"),
    INT: int,
    FLOAT: parse_float,
    STR: str,
    MERGE: str,
}
