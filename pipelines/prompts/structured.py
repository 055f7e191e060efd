"""JSON and YAML as prompts come in them: one line says what is wrong, and nothing in them is lost or multiplied."""

import json
from collections import Counter
from typing import Any

import yaml

from dmquant.errors import UserError
from dmquant.host.yaml_loading import LOADER, load_yaml

SHOWN = 200  # characters of a parser's own message


class _Loader(LOADER):
    """Safe YAML in which keys are text, and one that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        mapping = {str(key): value for key, value in super().construct_mapping(node, deep).items()}
        if len(mapping) < len(node.value):
            raise ValueError(f"a key is given twice from line {node.start_mark.line + 1} on")
        return mapping


def parse_json(text: str, where: str) -> Any:
    """The content of JSON text; UserError for text that is none, is nested too deeply or gives a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as JSON: {_first_line(error)}") from None


def parse_yaml(text: str, where: str) -> Any:
    """The content of YAML text; UserError as for JSON, and for aliases, by which a few bytes stand for many."""
    try:
        return load_yaml(text, _Loader, aliases=False)
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise UserError(f"{where} cannot be read as YAML: {line}{_first_line(error.problem)}") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{where} cannot be read as YAML: {_first_line(error)}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key '{twice[:SHOWN]}' is given twice")
    return made


def _first_line(error: Any) -> str:
    return " ".join(str(error).split())[:SHOWN]
