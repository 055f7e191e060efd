"""What other quantizers of diffusers call the settings of a recipe, for those who come from them."""

import re
from collections.abc import Sequence
from typing import Any

from dmquant.errors import UsageError

_FLOAT = re.compile(r"float(?P<bits>\d)(_e(?P<exponent>\d)m(?P<mantissa>\d))?(fn|fnuz)?")


def format_of(dtype: Any) -> str:
    """The format that `weights_dtype` or `activations_dtype` of quanto and SDNQ names: `float8_e4m3fn` is `fp8_e4m3`.

    A torch.dtype is its name. What is no float keeps its name, which is a format's own, or unknown to it.
    """
    name = str(dtype).removeprefix("torch.")
    found = _FLOAT.fullmatch(name)
    if found is None:
        return name
    split = f"_e{found['exponent']}m{found['mantissa']}" if found["exponent"] else ""
    return f"fp{found['bits']}{split}"


def one_of(**names: Any) -> str | None:
    """The format that is given under our name, which is first, or under the other; UsageError where both are given."""
    ours, theirs = names.values()
    if ours is not None and theirs is not None:
        raise UsageError(f"{' and '.join(names)} are one setting: give one of them")
    return ours if theirs is None else format_of(theirs)


def globs_of(modules: str | Sequence[str]) -> tuple[str, ...]:
    """Globs of the layers that `modules_to_not_convert` names: modules, wherever they are, and all in them."""
    names = (modules,) if isinstance(modules, str) else tuple(modules)
    return tuple(glob for name in names for glob in (name, f"{name}.*", f"*.{name}", f"*.{name}.*"))


def granularity_of(group_size: Any) -> str:
    """The granularity that `group_size` of torchao, SDNQ and GGUF readers means; -1 and 0 are a scale a channel.

    Raises UsageError for what is no whole number from -1.
    """
    if type(group_size) is not int or group_size < -1:
        raise UsageError(f"group_size is {group_size!r}: give a whole number of weights, or -1 for a scale a channel")
    return "channel" if group_size < 1 else f"group:{group_size}"
