"""YAML and JSON into pydantic models: what is wrong is one line that names the source, the place and the problem."""

import reprlib
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from dmquant.errors import UsageError, unknown

_quoted = reprlib.Repr()  # a few hundred bytes of nested aliases are megabytes when written out
_quoted.maxlevel, _quoted.maxstring = 2, 80


def read_yaml(model: type[BaseModel], path: Path, source: str) -> Any:
    """The file as a `model`; a UsageError names the source and the line that is wrong."""
    try:
        text = path.read_text("utf-8")
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        return model.model_validate(yaml.safe_load(text))
    except OSError as error:
        raise UsageError(f"{source} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{source} cannot be read: it is not UTF-8 text") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UsageError(f"{source}, line {line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        reason = getattr(error, "reason", error)  # a character that YAML does not allow; it has no mark
        raise UsageError(f"{source}: not valid YAML: {reason}") from None
    except ValidationError as error:
        line = _line_of(root, error.errors()[0]["loc"])
        raise UsageError(f"{source}, line {line}: {in_words(error, model)}") from None


def parse_content(model: type[BaseModel], content: Any, source: str) -> Any:
    """The content of a JSON file as a `model`; a UsageError names the source and the key that is wrong."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        raise UsageError(f"{source}: {in_words(error, model)}") from None


def in_words(error: ValidationError, model: type[BaseModel]) -> str:
    """The first of the things that are wrong, for people: its place and the problem."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    return f"{where}: {problem(first, model)}"


def problem(error: typing.Mapping[str, Any], model: type[BaseModel]) -> str:
    """An error of pydantic in words, without its place."""
    if error["type"] == "extra_forbidden":
        fields = _model_at(model, error["loc"][:-1]).model_fields
        return str(unknown("key", str(error["loc"][-1]), fields, f"known: {', '.join(fields) or 'none'}"))
    if error["type"] == "missing":
        return "this key is required"
    if error["type"] == "value_error":  # a UsageError of ours, raised while checking
        return str(error["ctx"]["error"])
    return f"{error['msg']} (got {_quoted.repr(error['input'])})"


def _model_at(model: type[BaseModel], location: tuple[str | int, ...]) -> type[BaseModel]:
    """The model of the fields at a pydantic location."""
    for step in location:
        if isinstance(step, str) and step in model.model_fields:
            model = next(_models_in(model.model_fields[step].annotation), model)
    return model


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    """The models that a type annotation such as `list[Model] | None` is made of."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)


def _line_of(node: yaml.Node | None, location: tuple[str | int, ...]) -> int:
    """Line (from 1) of the node at a pydantic location, or of the deepest part of it that exists."""
    line = node.start_mark.line + 1 if node else 1
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pair = next(((key, value) for key, value in node.value if key.value == str(step)), None)
            if pair is None:
                break
            line, node = pair[0].start_mark.line + 1, pair[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
    return line
