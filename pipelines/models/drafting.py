"""A draft of a model family for a pipeline that none knows, written from its configuration and its classes' code."""

import fnmatch
import inspect
import os
import re
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import nn

from dmquant.convert import layers_in
from dmquant.errors import UserError
from dmquant.models import USUAL
from dmquant.pipelines.models import folders, hub
from dmquant.pipelines.models.registry import HUB_ID, backbone_part, embedded_folder, registered_models
from dmquant.pipelines.models.skeleton import skeleton

_ROWS = re.compile(r"torch\.cat\(\s*\[\s*latents\s*\]\s*\*\s*2|cat\(\[latents, latents\]")
_CALLS = re.compile(r"true_cfg_scale|noise_pred_uncond\s*=\s*self\.transformer|do_true_cfg|cond=.uncond")
_IDS = re.compile(r".*_ids$|.*rotary_emb$|freqs_cis.*")


def unknown_parts(text: str) -> tuple[Path, str, str]:
    """The folder of a pipeline that a folder or a Hub id stands for, its backbone's name, and its class.

    Raises UserError as `resolve_model` does.
    """
    folder = Path(os.path.expanduser(text))
    if not folder.is_dir():
        known = registered_models().get(text)
        if known is not None and known.is_embedded:
            folder = embedded_folder(known.source)
        elif known is None and not HUB_ID.fullmatch(text):
            raise UserError(f"there is no folder {text}")
        else:
            folder = hub.configuration(known.source if known else text)[0]
    return folder, backbone_part(folder), folders.pipeline_class(folder)


def draft(folder: Path, component: str, pipeline: str) -> str:
    """A Python file with a `Family` for the backbone in the folder of a pipeline; reads no weights.

    `component` is the name of the backbone, `pipeline` the class. Raises UserError for a backbone without blocks in
    lists.
    """
    backbone = skeleton(folder / component)
    kind = type(backbone).__name__
    blocks = _lists(backbone)
    if not blocks:
        raise UserError(
            f"the {kind} in {folder} has no list of blocks, which calibration goes by: use --family generic"
        )
    outside = [name for name in layers_in(backbone) if not name.startswith(tuple(f"{one}." for one in blocks))]
    parameters = inspect.signature(type(backbone).forward).parameters
    fields = {
        "name": f'"{_name(kind)}"',
        "component": f'"{component}"',
        "backbones": f'("{kind}",)',
        "pipelines": f'("{pipeline}",)',
        "keep": _keep(outside),
        "blocks": "blocks_in({})".format(", ".join(f'"{one}"' for one in blocks)),
        "guidance": f'"{_guidance(parameters, pipeline)}"',
    }
    if "true_cfg_scale" in _code(pipeline):
        fields["guidance_argument"] = '"true_cfg_scale"'
    if shared := [name for name in parameters if _IDS.fullmatch(name)]:
        fields["shared"] = "({},)".format(", ".join(f'"{one}"' for one in shared))
    body = "\n".join(f"    {name}={value}," for name, value in fields.items())
    imported = "from dmquant.diffusers.families import Family, blocks_in"
    return f"{_about(kind, blocks, parameters)}\n{imported}\n\nFAMILY = Family(\n{body}\n)\n"


def _name(kind: str) -> str:
    """A family's name by its backbone's class, not that of a family that is known."""
    short = re.sub(r"(Transformer|UNet)?(2D|3D)?(Condition)?Model$", "", kind).lower()
    return f"my_{short or kind.lower()}"


def _lists(backbone: nn.Module) -> list[str]:
    """Lists of modules that hold layers and stand in no other such list, in the model's order."""
    found: list[str] = []
    for name, module in backbone.named_modules():
        inside = any(name.startswith(f"{one}.") for one in found)
        if isinstance(module, nn.ModuleList) and not inside and len(module) and all(map(layers_in, module)):
            found.append(name)
    return found


def _keep(names: Iterable[str]) -> str:
    """Globs of the layers outside of all blocks, by the module at the top that they stand in, and why they may stay."""
    globs: dict[str, str] = {}
    for name in names:
        top, inside, _ = name.partition(".")
        usual = next((why for pattern, why in USUAL.items() if fnmatch.fnmatchcase(name, pattern)), None)
        globs.setdefault(f"{top}.*" if inside else top, usual or "stands outside of the blocks")
    return "{\n" + "".join(f'        "{glob}": "{why}",\n' for glob, why in globs.items()) + "    }"


def _code(pipeline: str) -> str:
    import diffusers

    kind = getattr(diffusers, pipeline, None)
    return "" if kind is None else inspect.getsource(kind.__call__)


def _guidance(parameters: Mapping[str, inspect.Parameter], pipeline: str) -> str:
    """How guidance seems to be computed, by what the pipeline's call looks like."""
    code = _code(pipeline)
    if _CALLS.search(code):
        return "calls"
    if _ROWS.search(code):
        return "rows"
    return "embedded" if "guidance" in parameters else "rows"


def _about(kind: str, blocks: list[str], parameters: Mapping[str, inspect.Parameter]) -> str:
    """The head of the file: what to check before anybody relies on it."""
    takes = [name for name in parameters if name not in ("self", "return_dict", "attention_kwargs")]
    lists = [name for name in takes if "list" in str(parameters[name].annotation).lower()]
    points = [
        f"blocks: {', '.join(blocks)} are in the order of the model's attributes; put them in the order in which "
        f"{kind}.forward runs them.",
        "keep: each layer that stays in high precision, with its reason; `dmquant sensitivity` measures what it costs.",
        "guidance: rows (one call with and without the prompt), calls (two calls a step), or embedded (an input).",
        f"shared: those of {', '.join(takes)} that all rows of a call share, without a batch dimension.",
        "padded, listed, lengths, concatenations, joint: what the model has of these (see `Family`).",
    ]
    if lists:
        points.append(f"{', '.join(lists)} may be lists: calibration cuts tensors into rows, so look at how these go.")
    listed = "\n".join(textwrap.fill(point, 118, initial_indent="- ", subsequent_indent="  ") for point in points)
    return (
        f'"""{kind}: say in a sentence what the architecture is.\n\nA draft, by `dmquant draft-family`. Check:\n'
        f'{listed}\n"""\n'
    )
