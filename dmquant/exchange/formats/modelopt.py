"""ModelOpt: a diffusers folder as its export_hf_checkpoint writes it, for vLLM-Omni, SGLang and whatever reads these.

Names, dtypes, shapes and the configuration are those of nvidia-modelopt 0.47 (export/unified_export_hf.py,
export/convert_hf_config.py), written here side by side with its own export of the same model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dmquant import __version__
from dmquant.activations import ActivationSpec
from dmquant.exchange import folder, named_scales
from dmquant.exchange.decoding import matrix, part
from dmquant.exchange.interfaces import Exported, Foreign, ForeignFormat, ForeignLayer, Found, Progress
from dmquant.exchange.layers import (
    check,
    check_class,
    check_pair,
    counted,
    high_precision,
    input_notes,
    kind_of,
    kind_of_weights,
    unquantized,
)
from dmquant.exchange.source import Source
from dmquant.layers import QuantLinear
from dmquant.qtensor import QuantizedTensor, WeightSpec
from dmquant.scaling import Scales
from dmquant.transforms import create

NAME = "modelopt"
SVD = ("smooth", "lowrank")
USAGE = """
# Readers of ModelOpt's folders load it, such as vLLM-Omni and SGLang; diffusers itself reads no such folder.
"""
FLOAT8 = {"dynamic": False, "num_bits": 8, "type": "float"}
FLOAT4 = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
GROUPS: Mapping[str, Mapping[str, Any]] = {
    "NVFP4": {"input_activations": FLOAT4, "weights": FLOAT4},
    "NVFP4_SVD": {
        "input_activations": FLOAT4,
        "weights": FLOAT4,
        "has_zero_point": False,
        "pre_quant_scale": True,
    },
    "W4A16_NVFP4": {"weights": FLOAT4},
    "FP8": {"input_activations": FLOAT8, "weights": FLOAT8},
    "FP8_PER_CHANNEL_PER_TOKEN": {"input_activations": FLOAT8, "weights": {**FLOAT8, "strategy": "channel"}},
    "MXFP8": {"input_activations": {**FLOAT8, "group_size": 32}, "weights": {**FLOAT8, "group_size": 32}},
    "W8A16": {"weights": {"dynamic": False, "num_bits": 8, "type": "int"}},
}
"""What the configuration says of each algorithm."""
ALGORITHMS = {
    ("nvfp4", "static nvfp4"): "NVFP4",
    ("nvfp4", None): "W4A16_NVFP4",
    ("mxfp8", "mxfp8"): "MXFP8",
    ("fp8_e4m3 a tensor", "static fp8_e4m3 a tensor"): "FP8",
    ("fp8_e4m3 a channel", "fp8_e4m3 a token"): "FP8_PER_CHANNEL_PER_TOKEN",
    ("int8 a channel", None): "W8A16",
}


def refuses(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """Why ModelOpt's layouts cannot hold a layer in these formats; None where they can."""
    taken = [inputs for weights, inputs in ALGORITHMS if weights == kind_of_weights(spec)]
    return check_pair(spec, activations, taken) or check_class(layer, spec.granularity.size or 1)


def _layer(source: Source, name: str) -> tuple[str, list]:
    """The algorithm of a layer and its entries."""
    layer = source.layers[name]
    algorithm = ALGORITHMS[kind_of_weights(layer.weight_spec), kind_of(layer.activations)]
    if algorithm.endswith("NVFP4"):
        entries = named_scales.nvfp4(source, name)
    elif algorithm == "MXFP8":
        entries = named_scales.mxfp8(source, name)
    else:
        dtype = torch.int8 if algorithm == "W8A16" else torch.float8_e4m3fn
        entries = named_scales.bytewise(source, name, dtype)
    if layer.is_static:
        entries.append(named_scales.static_input(source, name))
    if layer.transforms:
        algorithm = "NVFP4_SVD"
        entries += named_scales.branch(source, name)
    return algorithm, entries


def _check_branch(layer: nn.Module, spec: WeightSpec, activations: ActivationSpec | None) -> str | None:
    """As `refuses`, and why a layer's transforms cannot go along."""
    held = [one.name for one in layer.transforms]
    if held and (ALGORITHMS.get((kind_of_weights(spec), kind_of(activations))) != "NVFP4" or "lowrank" not in held):
        return (
            f"has the transform {layer.transforms[0]}, whose place is beside NVFP4 inputs and a low-rank branch alone"
        )
    return refuses(layer, spec, activations)


def export(source: Source, out: Path, progress: Progress) -> Exported:
    """Write a pipeline folder with ModelOpt's tensors; UserError for a layer that they cannot hold."""
    check(source, NAME, _check_branch, SVD)
    layers = {name: _layer(source, name) for name in source.layers}
    algorithms = {name: algorithm for name, (algorithm, _) in layers.items()}
    entries = [entry for _, own in layers.values() for entry in own] + unquantized(source)
    config = _config(algorithms, {name: source.layers[name] for name in layers}, high_precision(source))
    folder.write(source, out, folder.Folder(NAME, "ModelOpt", entries, config, USAGE), progress)
    notes = ("diffusers itself loads no folder of ModelOpt's; readers such as vLLM-Omni and SGLang do",)
    return Exported(out, counted(source, algorithms.values()), exact=True, notes=notes + input_notes(source, NAME))


def _config(algorithms: Mapping[str, str], layers: Mapping[str, QuantLinear], ignored: list[str]) -> dict[str, Any]:
    """`quantization_config` as convert_hf_config.py makes it, of one algorithm or of several."""
    used = sorted(set(algorithms.values()))
    common = {"producer": {"name": "dmquant", "version": __version__}, "quant_method": NAME}
    ranks = {one.rank for layer in layers.values() for one in layer.transforms if one.name == "lowrank"}
    rank = {"lora_rank": ranks.pop()} if len(ranks) == 1 and used == ["NVFP4_SVD"] else {}
    if len(used) == 1:
        groups = {"group_0": {**GROUPS[used[0]], **rank, "targets": ["Linear"]}}
        return {"config_groups": groups, "ignore": ignored, "quant_algo": used[0], **common}
    of_groups = [[name for name, one in algorithms.items() if one == algorithm] for algorithm in used]
    groups = {
        f"group_{index}": {**GROUPS[algorithm], "targets": sorted(names)}
        for index, (algorithm, names) in enumerate(zip(used, of_groups, strict=True))
    }
    detailed = {name: {"quant_algo": algorithm} for name, algorithm in algorithms.items()}
    mixed = {"quantized_layers": detailed, "ignore": ignored, "quant_algo": "MIXED_PRECISION"}
    return {"config_groups": groups, **mixed, **common}


def recognises(found: Found) -> bool:
    """Whether a folder says that it is ModelOpt's."""
    config = found.config.get("quantization_config")
    return isinstance(config, dict) and config.get("quant_method") == NAME


def read(found: Found) -> Foreign:
    """Open a folder of ModelOpt's; UserError for layers whose tensors do not go together."""
    layers = {name: _read_layer(found, name) for name in named_scales.names(found)}
    parts = {f"{name}.{one}" for name in layers for one in named_scales.PARTS}
    rest = tuple(name for name in found.tensors if name not in parts)
    return Foreign(FORMAT, found, {"nibbles": "low first", "block scales": "linear"}, layers, rest)


def _read_layer(found: Found, name: str) -> ForeignLayer:
    layer = named_scales.read(found, name, NAME)
    down, up = f"{name}.{named_scales.DOWN}", f"{name}.{named_scales.UP}"
    if down not in found.tensors:
        return layer
    rank, columns = matrix(found, down, "BF16", "F16", "F32")
    part(found, up, found.tensors[down].dtype, (layer.shape[0], rank))
    smooth = f"{name}.{named_scales.SMOOTH}"
    part(found, smooth, found.tensors[smooth].dtype if smooth in found.tensors else "BF16", (columns,))

    def weight() -> Tensor:
        return (layer.weight() + found.tensor(up).float() @ found.tensor(down).float()) * found.tensor(smooth).float()

    def build(plain: nn.Module) -> nn.Module:
        """Weights in NVFP4, inputs smoothed and rounded, and the branch on what is not rounded."""
        spec = WeightSpec.parse("nvfp4")
        transforms = create([("smooth", {}), ("lowrank", {"rank": rank})], plain, None)
        made = QuantLinear.like(plain, spec, layer.activations, "cpu", transforms)
        stored = [found.tensor(f"{name}.{one}") for one in (named_scales.WEIGHT, named_scales.SCALE, named_scales.BASE)]
        scales = Scales(stored[1].view(torch.uint8), stored[2].reshape(1, 1), spec.store)
        made.load_quantized(QuantizedTensor(stored[0], scales, spec, layer.shape), plain.bias, layer.input_scale())
        factor = found.tensor(smooth).bfloat16().reshape(1, -1)
        branch = {"down": found.tensor(down).bfloat16(), "up": found.tensor(up).bfloat16()}
        made.load_parts({"smooth": {"factor": factor}, "lowrank": branch})
        return made

    return ForeignLayer(**{**vars(layer), "format": "nvfp4 with a branch", "weight": weight, "build": build})


FORMAT = ForeignFormat(NAME, "ModelOpt", recognises, read, export, folder=True, refuses=refuses)
