"""Put what a file of another engine holds into a backbone in full precision, so that it computes as the engine does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec, fake_quantize, static_scale
from dmquant.errors import UserError
from dmquant.exchange.interfaces import Foreign, ForeignLayer

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.")
"""What files put before the names of the backbone's tensors."""
OTHER_PARTS = ("first_stage_model.", "vae.", "text_encoders.", "text_encoder", "cond_stage_model.", "conditioner.")
SHOWN = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a layer of a file goes: the backbone's modules whose rows, one after another, are the layer's."""

    layer: ForeignLayer
    modules: tuple[str, ...]


@dataclass(frozen=True)
class Applied:
    """What became of a backbone: by the names of its modules, the format and the bits a weight of each."""

    formats: Mapping[str, str]
    bits: Mapping[str, float]
    errors: Mapping[str, float]
    """Squared error of each weight over its squared full-precision weight; for layers that are more than a weight,
    of their outputs for random inputs."""
    elements: int
    """Elements of the tensors that the backbone saves in full precision, and how many of them the file lacks."""
    missing: int
    notes: tuple[str, ...]


class _Emulated:
    """A float layer of a decoded weight that rounds its input as the engine does."""

    channel_dim: int
    activations: ActivationSpec

    def forward(self, x: Tensor) -> Tensor:
        fitted = self.input_scale
        scale = None if fitted is None else static_scale(fitted, None, x, self.channel_dim, self.activations.split)
        return super().forward(fake_quantize(x, self.activations, self.channel_dim, scale))


class EmulatedLinear(_Emulated, nn.Linear):
    """`nn.Linear` of a decoded weight, with the input rounded."""

    channel_dim = -1


class EmulatedConv2d(_Emulated, nn.Conv2d):
    """`nn.Conv2d` of a decoded weight, with the input rounded."""

    channel_dim = -3


class _Rows(nn.Linear):
    """Some rows of a layer that is several of the backbone's at once, such as queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.joined[0](x)[..., self.rows]


EMULATED = {nn.Linear: EmulatedLinear, nn.Conv2d: EmulatedConv2d}


def places(foreign: Foreign, backbone: nn.Module, model: str) -> list[Place]:
    """Where each layer of the file goes; UserError, which names the `model`, where it does not fit the backbone."""
    modules = {name: one for name, one in backbone.named_modules() if type(one) in EMULATED}
    of_backbone = [name for name in foreign.layers if not name.startswith(OTHER_PARTS)]
    found = {name: _modules_of(name, modules) for name in of_backbone}
    if unknown := [name for name, names in found.items() if not names]:
        raise UserError(
            f"{foreign.found.path} holds {listed(unknown)}, which {model} lacks: it is of another base model, "
            "or its names are not known here"
        )
    for name, names in found.items():
        rows = sum(modules[each].weight.shape[0] for each in names)
        expected = (rows, *modules[names[0]].weight.shape[1:])
        if foreign.layers[name].shape != expected:
            raise UserError(
                f"{foreign.found.path} is of another base model than {model}: {name} is "
                f"{'x'.join(map(str, foreign.layers[name].shape))}, not {'x'.join(map(str, expected))}"
            )
    return [Place(foreign.layers[name], names) for name, names in found.items()]


def _modules_of(name: str, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    return next(((each,) for each in _without_prefix(name) if each in modules), ())


def _without_prefix(name: str) -> Iterator[str]:
    yield name
    yield from (name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix))


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def float_layer(place: Place, backbone: nn.Module) -> nn.Linear | nn.Conv2d:
    """The float layer that stands in the place: the backbone's own, or several linear ones joined by their rows."""
    first, *others = modules = [backbone.get_submodule(name) for name in place.modules]
    if not others:
        return first
    weight = torch.cat([one.weight for one in modules])
    joined = nn.Linear(weight.shape[1], weight.shape[0], bias=first.bias is not None, device="meta")
    joined.weight = nn.Parameter(weight, requires_grad=False)
    if first.bias is not None:
        joined.bias = nn.Parameter(torch.cat([one.bias for one in modules]), requires_grad=False)
    return joined


def apply_(foreign: Foreign, found: Sequence[Place], backbone: nn.Module, model: str, progress: Progress) -> Applied:
    """Fill the backbone with all that the file holds, in place; `progress` is told of layers done and in all.

    Tensors in high precision are taken from the file too; what it lacks stays as it is. Weights are dequantized in the
    backbone's dtype. UserError for tensors of other shapes than the backbone's.
    """
    held, notes = _load_rest(foreign, backbone, model)
    held |= {f"{name}.weight" for place in found for name in place.modules}
    sizes = {name: tensor.numel() for name, tensor in backbone.state_dict().items()}
    missing = sum(size for name, size in sizes.items() if name not in held)
    formats, bits, errors = {}, {}, {}
    for done, place in enumerate(found, start=1):
        errors |= dict.fromkeys(place.modules, _put(place, backbone))
        formats |= dict.fromkeys(place.modules, place.layer.format)
        size = 8 * place.layer.nbytes / torch.Size(place.layer.shape).numel()
        bits |= dict.fromkeys(place.modules, size)
        progress(done, len(found))
    return Applied(formats, bits, errors, sum(sizes.values()), missing, (*foreign.notes, *notes))


def _load_rest(foreign: Foreign, backbone: nn.Module, model: str) -> tuple[set[str], list[str]]:
    """Copy tensors in high precision and biases into the backbone; their names there, and a line on others."""
    own = backbone.state_dict(keep_vars=True)
    biases = [f"{name}.bias" for name in foreign.layers if f"{name}.bias" in foreign.found.tensors]
    held, left = set(), []
    for name in dict.fromkeys((*foreign.rest, *biases)):
        target = next((each for each in _without_prefix(name) if each in own), None)
        if target is None:
            left.append(name)
            continue
        tensor = foreign.found.tensor(name)
        if tensor.shape != own[target].shape:
            raise UserError(
                f"{foreign.found.path} is of another base model than {model}: {name} has shape {tuple(tensor.shape)}, "
                f"not {tuple(own[target].shape)}"
            )
        own[target].data.copy_(tensor)
        held.add(target)
    strangers = f"{len(left)} tensors of {foreign.found.path.name} are not of the backbone: {listed(left)}"
    return held, [strangers] if left else []


def _put(place: Place, backbone: nn.Module) -> float:
    """Put a layer in its place; returns its error."""
    layer, plain = place.layer, float_layer(place, backbone)
    if layer.build is not None:
        built = layer.build(plain)
        error = output_error(plain, built, layer)
        _put_built(place, backbone, built)
        return error
    weight = layer.weight()
    error = weight_error(weight, plain.weight)
    for name, rows in zip(place.modules, _split(weight, place, backbone), strict=True):
        _emulate_(backbone.get_submodule(name), rows, layer)
    return error


def _split(weight: Tensor, place: Place, backbone: nn.Module) -> tuple[Tensor, ...]:
    return weight.split([backbone.get_submodule(name).weight.shape[0] for name in place.modules])


def _emulate_(layer: nn.Linear | nn.Conv2d, weight: Tensor, foreign: ForeignLayer) -> None:
    layer.weight.data.copy_(weight)
    if foreign.activations is not None:
        layer.__class__ = EMULATED[type(layer)]
        layer.activations = foreign.activations
        scale = None if foreign.input_scale is None else foreign.input_scale().float().to(layer.weight.device)
        layer.register_buffer("input_scale", scale, persistent=False)


def _put_built(place: Place, backbone: nn.Module, built: nn.Module) -> None:
    if len(place.modules) == 1:
        backbone.set_submodule(place.modules[0], built)
        return
    start = 0
    for name in place.modules:
        layer = backbone.get_submodule(name)
        layer.__class__ = _Rows
        layer.joined = (built,) if start else nn.ModuleList([built])  # one of them owns it
        layer.rows = slice(start, start := start + layer.weight.shape[0])


def weight_error(weight: Tensor, exact: Tensor) -> float:
    """Squared error over the squared exact weight; 2 for weights that have nothing to do with one another."""
    exact = exact.detach().float()
    return ((weight.to(exact.device) - exact).square().sum() / exact.square().sum().clamp(min=1e-30)).item()


def output_error(plain: nn.Module, built: nn.Module, layer: ForeignLayer) -> float:
    """`weight_error` of the outputs for random inputs of the size that static scales are for."""
    weight, generator = plain.weight, torch.Generator().manual_seed(0)
    shape = (64, weight.shape[1]) if weight.ndim == 2 else (1, weight.shape[1] * plain.groups, 16, 16)
    x = torch.randn(shape, generator=generator).to(weight)
    if layer.input_scale is not None:
        x *= layer.input_scale().max().item() * layer.activations.fmt.max / 4
    with torch.inference_mode():
        return weight_error(built(x).float(), plain(x).float())
