"""YAML by libyaml where PyYAML has it, which recurses without a limit of its own: nesting is bounded before that."""

from typing import Any

import yaml

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEEPEST = 100


def load_yaml(text: str, loader: type = LOADER, aliases: bool = True) -> Any:
    """The content of YAML text; raises yaml.YAMLError for what is none, is too deep, or may have no aliases."""
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > DEEPEST:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: nested more than {DEEPEST} deep")
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise yaml.YAMLError(f"line {event.start_mark.line + 1}: aliases have no place here: use quotes around a *")
    return yaml.load(text, Loader=loader)
