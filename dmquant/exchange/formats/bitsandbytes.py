"""bitsandbytes, read: NF4 and FP4 in blocks, their scales codes themselves or not (QLoRA), and LLM.int8's rows.

bitsandbytes 0.50.2: functional.py (QuantState), nn/modules.py. A block is 64 elements of the flattened weight, across
the ends of rows; of the two codes of a byte the one in the high bits is first.
"""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dmquant.errors import UserError
from dmquant.exchange.interfaces import Foreign, ForeignFormat, ForeignLayer, Found

STATE = ".weight.quant_state.bitsandbytes__"
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
ROWS, FORMAT_OF_ROWS = ".SCB", ".weight_format"


def recognises(found: Found) -> bool:
    config = found.config.get("quantization_config")
    named = isinstance(config, dict) and config.get("quant_method") == "bitsandbytes"
    return named or any(STATE in name or name.endswith(ROWS) for name in found.tensors)


def read(found: Found) -> Foreign:
    """The layers with a state of 4 bits or scales of rows; UserError for damaged ones."""
    fours = {name.partition(STATE)[0]: name for name in found.tensors if STATE in name}
    eights = [name.removesuffix(ROWS) for name in found.tensors if name.endswith(ROWS)]
    layers = {name: _of_four_bits(found, name, state) for name, state in fours.items()}
    layers |= {name: _of_eight_bits(found, name) for name in eights}
    own = {f"{name}.weight" for name in layers} | set(fours.values())
    own |= {f"{name}.weight.{part}" for name in fours for part in PARTS}
    own |= {f"{name}{end}" for name in eights for end in (ROWS, FORMAT_OF_ROWS)}
    notes = ("LLM.int8 rounds inputs as well, but for outliers, which is not emulated",) if eights else ()
    rest = tuple(name for name in found.tensors if name not in own)
    return Foreign(FORMAT, found, {"nibbles": "high first"}, layers, rest, notes)


def _of_four_bits(found: Found, name: str, state_name: str) -> ForeignLayer:
    state = _state(found, state_name)
    kind, shape, block = str(state.get("quant_type")), tuple(state["shape"]), state["blocksize"]
    nested = "nested_blocksize" in state
    names = {"weight": f"{name}.weight"} | {part: f"{name}.weight.{part}" for part in PARTS[: 4 if nested else 2]}
    missing = [each for each in names.values() if each not in found.tensors]
    if missing:
        raise UserError(f"{found.path} lacks {missing[0]}: get that file again")
    blocks = -(-math.prod(shape) // block)
    sizes = {part: math.prod(found.tensors[each].shape) for part, each in names.items()}
    expected = {"weight": -(-math.prod(shape) // 2), "absmax": blocks, "quant_map": 16}
    if nested:
        expected |= {"nested_absmax": -(-blocks // state["nested_blocksize"]), "nested_quant_map": 256}
    if sizes != expected:
        wrong = next(part for part in expected if sizes[part] != expected[part])
        raise UserError(
            f"{found.path}: {names[wrong]} has {sizes[wrong]} elements, and a weight of {list(shape)} in blocks of "
            f"{block} has {expected[wrong]}"
        )
    stored = [found.tensors[each] for each in (*names.values(), state_name)]
    nbytes = sum(one.end - one.begin for one in stored)
    return ForeignLayer(name, kind, shape, nbytes, functools.partial(_decoded, found, names, state))


def _state(found: Found, name: str) -> Mapping[str, Any]:
    """What a layer's state says of itself: a JSON object in a tensor of bytes."""
    try:
        state = json.loads(bytes(found.tensor(name).tolist()))
        whole = all(isinstance(one, int) and one > 0 for one in (*state["shape"], state["blocksize"]))
        whole &= "nested_blocksize" not in state or isinstance(state["nested_offset"], float | int)
    except (ValueError, LookupError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{found.path}: {name} holds no state of a layer: get that file again")
    return state


def _decoded(found: Found, names: Mapping[str, str], state: Mapping[str, Any]) -> Tensor:
    parts = {part: found.tensor(name) for part, name in names.items()}
    scale = parts["absmax"].flatten()
    if "nested_absmax" in parts:
        fine = parts["nested_quant_map"].flatten()[scale.int()]
        coarse = parts["nested_absmax"].flatten().repeat_interleave(state["nested_blocksize"])[: len(fine)]
        scale = fine * coarse + state["nested_offset"]
    packed, count = parts["weight"].flatten(), math.prod(state["shape"])
    codes = torch.stack([packed >> 4, packed & 15], 1).flatten()[:count]
    values = parts["quant_map"].flatten()[codes.int()].float()
    return values.mul_(scale.float().repeat_interleave(state["blocksize"])[:count]).view(*state["shape"])


def _of_eight_bits(found: Found, name: str) -> ForeignLayer:
    weight, scale = found.tensors.get(f"{name}.weight"), found.tensors[f"{name}{ROWS}"]
    if weight is None or weight.dtype != "I8" or len(weight.shape) != 2 or math.prod(scale.shape) != weight.shape[0]:
        raise UserError(f"{found.path}: '{name}' is no Linear of 8 bits with a scale for each row")

    def decoded() -> Tensor:
        rows = found.tensor(f"{name}{ROWS}").float().view(-1, 1)
        return found.tensor(f"{name}.weight").float().mul_(rows / 127)

    nbytes = sum(one.end - one.begin for one in (weight, scale))
    return ForeignLayer(name, "int8", tuple(weight.shape), nbytes, decoded)


FORMAT = ForeignFormat("bitsandbytes", "bitsandbytes, NF4, FP4 and LLM.int8", recognises, read)
