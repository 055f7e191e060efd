"""A format for tests: NVFP4 layers under ModelOpt's names, with a label in the header by which it is recognised.

It is written in any dialect and always read in one: low nibble first, block scales linear, scales multiplied.
"""

import json
import math

import torch

from dmquant.activations import ActivationSpec
from dmquant.exchange import tensor_file
from dmquant.exchange.dialects import Reading, readings
from dmquant.exchange.interfaces import Exported, Foreign, ForeignFormat, ForeignLayer
from dmquant.gpu.blocked import to_blocked
from dmquant.qtensor import quantize_tensor

OWN = Reading("low first", "linear", "multiplied")
PARTS = ("weight", "weight_scale", "weight_scale_2")


def layer_tensors(weight, way=OWN):
    """Tensors of an NVFP4 layer of a float weight (out, in), by the parts' names, in a dialect."""
    q = quantize_tensor(weight, "nvfp4")
    codes, stored = q.codes.contiguous(), q.scales.stored.contiguous().view(torch.uint8)
    if way.nibbles == "high first":
        codes = (codes << 4) | (codes >> 4)
    if way.scales == "swizzled":
        rows, columns = stored.shape
        stored = to_blocked(stored).view(-(-rows // 128) * 128, -(-columns // 4) * 4)
    base = q.scales.base.view(torch.float32).reshape(())
    base = base.reciprocal() if way.globals == "divided" else base
    return dict(zip(PARTS, (codes, stored.view(torch.float8_e4m3fn), base), strict=True))


def write(path, backbone, names, *, way=OWN, activations="none", label="labelled", rest=True):
    """Write the linear layers `names` of a backbone in NVFP4, and the other tensors as they are."""
    entries, state = [], dict(backbone.state_dict())
    for name in names:
        made = layer_tensors(state.pop(f"{name}.weight").float(), way)
        entries += [tensor_file.stored(f"{name}.{part}", tensor) for part, tensor in made.items()]
    kept = state if rest else {}
    entries += [tensor_file.stored(name, tensor) for name, tensor in kept.items()]
    about = {"layers": list(names), "activations": activations}
    tensor_file.write(path, entries, {label: json.dumps(about)})
    return path


def export(source, path, progress):
    """Write what dmquant quantized in NVFP4, exactly."""
    entries = [tensor_file.stored(name, source.tensor(name)) for name in source.rest]
    for name, empty in source.layers.items():
        layer, rows = source.layer(name), empty.weight_shape[0]
        made = (
            layer.qweight,
            layer.scale.view(torch.float8_e4m3fn).view(rows, -1),
            layer.scale_base.view(torch.float32),
        )
        made = (*made[:2], made[2].reshape(()))
        entries += [tensor_file.stored(f"{name}.{part}", one.detach()) for part, one in zip(PARTS, made, strict=True)]
        if layer.bias is not None:
            entries.append(tensor_file.stored(f"{name}.bias", layer.bias.detach()))
    about = {"layers": list(source.layers), "activations": "none"}
    tensor_file.write(path, entries, {"labelled": json.dumps(about)}, progress)
    return Exported(path, {"nvfp4": len(source.layers)}, exact=True, notes=("its names are diffusers'",))


def recognises(found):
    return "labelled" in found.metadata


def read(found):
    about = json.loads(found.metadata["labelled"])
    spec = None if about["activations"] == "none" else ActivationSpec.parse(about["activations"])
    layers = {}
    for name in about["layers"]:
        rows, columns = found.tensors[f"{name}.weight"].shape
        parts = [found.tensors[f"{name}.{part}"] for part in PARTS]
        shape = (rows, 2 * columns)

        def decode(name=name, shape=shape):
            rows, columns = shape
            stored = found.tensor(f"{name}.weight_scale").reshape(-1)[: math.prod(shape) // 16]  # as its label says
            low = found.tensor(f"{name}.weight").view(torch.uint8)
            codes = torch.stack([low & 15, low >> 4], -1).reshape(shape)
            values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[(codes & 7).long()] * (1 - 2.0 * (codes >> 3))
            scales = stored.float().reshape(rows, columns // 16).repeat_interleave(16, 1)
            return values * scales * found.tensor(f"{name}.weight_scale_2")

        size = sum(part.end - part.begin for part in parts)
        layers[name] = ForeignLayer(name, "nvfp4", shape, size, decode, spec)
    taken = {f"{name}.{part}" for name in layers for part in PARTS}
    rest = tuple(name for name in found.tensors if name not in taken)
    return Foreign(FORMAT, found, dict(zip(("nibbles", "block scales", "scales"), OWN, strict=True)), layers, rest)


FORMAT = ForeignFormat("labelled", "labelled NVFP4, for tests", recognises, read, export)


def all_readings(found, name, shape):
    """What every reading of a layer gives."""
    return {way: decode() for way, decode in readings(found, name, shape).items()}
