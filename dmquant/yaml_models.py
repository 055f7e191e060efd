"""YAML and JSON into pydantic models: what is wrong is one line that names the source, the place and the problem."""

import reprlib
import typing
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dmquant.errors import UsageError, unknown

_quoted = reprlib.Repr()  # a few hundred bytes of nested aliases are megabytes when written out
_quoted.maxlevel, _quoted.maxstring, _quoted.maxother = 2, 80, 80
MOST_BYTES, MOST_DIGITS, MOST_VALUES = 1_000_000, 400, 100_000  # values with aliases written out


class _Loader(yaml.SafeLoader):
    """Safe YAML in which no key is given twice, no number is endless and aliases make no large thing of a small one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        node = super().compose_node(parent, index)
        if hasattr(node, "size"):  # an alias
            return node
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        parts = [part for pair in pairs for part in pair] or node.value * isinstance(node, yaml.SequenceNode)
        node.size = 1 + sum(part.size for part in parts)
        keys = Counter(key.value for key, _ in pairs if isinstance(key, yaml.ScalarNode))
        str(node.value if isinstance(node, yaml.ScalarNode) else "").encode()  # ValueError for half a character
        wrong = f"the key {_quoted.repr(max(keys, key=keys.get))} is given twice" if keys.total() > len(keys) else None
        if node.size > MOST_VALUES or (node.tag.endswith(":int") and len(node.value) > MOST_DIGITS):
            wrong = "its aliases or its digits make too much of it"
        if wrong:
            raise yaml.MarkedYAMLError(problem=wrong, problem_mark=node.start_mark)
        return node


def read_yaml(model: type[BaseModel], path: Path, source: str) -> Any:
    """The file as a `model`; a UsageError names the source and the line that is wrong."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        loader = _Loader(data[:MOST_BYTES].decode())
        root = loader.get_single_node()
        content = None if root is None else loader.construct_document(root)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{source} cannot be read: {getattr(error, 'strerror', 'it is not UTF-8 text')}") from None
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        reason = next(filter(None, (getattr(error, name, None) for name in ("problem", "reason"))), error)
        raise UsageError(f"{source}{line}: not valid YAML: {str(reason)[:200]}") from None
    if not isinstance(content, dict) or len(data) > MOST_BYTES:
        raise UsageError(f"{source} holds no settings: write each on a line of its own, such as weights: fp4")
    return validated(model, content, lambda place: f"{source}, line {_line_of(root, place)}: ")


def validated(model: type[BaseModel], content: Any, source: Callable[[Sequence[str | int]], str]) -> Any:
    """The content as a `model`; a UsageError says what is wrong first, behind what `source` makes of its place."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise UsageError(f"{source(first['loc'])}{where[:200]}: {problem(first, model)}") from None


def problem(error: typing.Mapping[str, Any], model: type[BaseModel]) -> str:
    """An error of pydantic in words, without its place."""
    if error["type"] == "extra_forbidden":
        fields = _model_at(model, error["loc"][:-1]).model_fields
        return str(unknown("key", str(error["loc"][-1]), fields, f"known: {', '.join(fields) or 'none'}"))
    if error["type"] == "missing":
        return "this key is required"
    ours = error["type"] == "value_error"  # a UsageError, raised while checking
    return str(error["ctx"]["error"]) if ours else f"{error['msg']} (got {_quoted.repr(error['input'])})"


def _model_at(model: type[BaseModel], location: tuple[str | int, ...]) -> type[BaseModel]:
    """The model of the fields at a pydantic location, through fields of a model or of a list of them."""
    for step in location:
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        parts = (annotation, *typing.get_args(annotation))
        model = next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), model)
    return model


def _line_of(node: yaml.Node | None, location: tuple[str | int, ...]) -> int:
    """Line (from 1) of the node at a pydantic location, or of the deepest part of it that exists."""
    line = node.start_mark.line + 1 if node else 1
    for step in location:
        inside = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else ()
        pairs = inside if isinstance(node, yaml.MappingNode) else [(part, part) for part in inside]
        found = [pair for index, pair in enumerate(pairs) if step in (index, pair[0].value)]
        if not found:
            break
        line, node = found[0][0].start_mark.line + 1, found[0][1]
    return line
