"""Put what a file of another engine holds into a backbone in full precision, so that it computes as the engine does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dmquant.activations import ActivationSpec, fake_quantize, static_scale
from dmquant.errors import UserError
from dmquant.exchange.interfaces import Foreign, ForeignLayer
from dmquant.exchange.keys import Target, original

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.", "model.")
"""What files put before the names of the backbone's tensors."""
OTHER_PARTS = ("first_stage_model.", "vae.", "text_encoders.", "text_encoder", "cond_stage_model.", "conditioner.")
SHOWN = 3

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Where a layer of a file goes: the backbone's modules whose rows, in the order of the target, are the layer's."""

    layer: ForeignLayer
    modules: tuple[str, ...]
    target: Target

    def weight(self) -> Tensor:
        """The weight that the layer stands for, float32 with the rows in the modules' order."""
        return self.target.in_order(self.layer.weight())


@dataclass(frozen=True)
class Applied:
    """What became of a backbone: by the names of its modules, the format and the bits a weight of each."""

    formats: Mapping[str, str]
    bits: Mapping[str, float]
    errors: Mapping[str, float]
    """Squared error of each weight over its squared full-precision weight."""
    elements: int
    """Elements of the tensors that the backbone saves in full precision, and how many of them the file lacks."""
    missing: int
    notes: tuple[str, ...]


class _Emulated:
    """A float layer of a decoded weight that rounds its input as the engine does."""

    channel_dim: int
    activations: ActivationSpec

    def forward(self, x: Tensor) -> Tensor:
        scale = self.input_scale
        if scale is not None:
            shape = self.activations.scale_shape(x.shape[self.channel_dim])
            scale = static_scale(scale.view(shape), None, x, self.channel_dim, self.activations.split)
        return super().forward(fake_quantize(x, self.activations, self.channel_dim, scale))


class EmulatedLinear(_Emulated, nn.Linear):
    """`nn.Linear` of a decoded weight, with the input rounded."""

    channel_dim = -1


class EmulatedConv2d(_Emulated, nn.Conv2d):
    """`nn.Conv2d` of a decoded weight, with the input rounded."""

    channel_dim = -3


class _Rows(nn.Linear):
    """Some rows of an engine's layer that is several of the backbone's at once, such as queries, keys and values."""

    def forward(self, x: Tensor) -> Tensor:
        return self.whole[0](x)[..., self.rows]


EMULATED = {nn.Linear: EmulatedLinear, nn.Conv2d: EmulatedConv2d}


def places(foreign: Foreign, backbone: nn.Module, model: str) -> list[Place]:
    """Where each layer of the file goes; UserError, which names the `model`, where it does not fit the backbone."""
    modules = {f"{name}.weight": one.weight for name, one in backbone.named_modules() if type(one) in EMULATED}
    target_of = _targets(backbone)
    of_backbone = [name for name in foreign.layers if not name.startswith(OTHER_PARTS)]
    found = {name: target for name in of_backbone if (target := target_of(f"{name}.weight"))}
    unknown = [name for name in of_backbone if name not in found or not modules.keys() >= {*found[name].sources}]
    if unknown:
        raise UserError(
            f"{foreign.found.path} holds {listed(unknown)}, which {model} lacks: it is of another base model, "
            "or its names are not known here"
        )
    for name, target in found.items():
        weights = [modules[source] for source in target.sources]
        expected = (sum(map(len, weights)), *weights[0].shape[1:])
        if foreign.layers[name].shape != expected:
            raise _of_another_model(foreign, model, name, foreign.layers[name].shape, expected)
    return [
        Place(foreign.layers[name], tuple(source.removesuffix(".weight") for source in target.sources), target)
        for name, target in found.items()
    ]


def _of_another_model(
    foreign: Foreign, model: str, name: str, shape: Sequence[int], expected: Sequence[int]
) -> UserError:
    given, wanted = ("x".join(map(str, sizes)) or "a number" for sizes in (shape, expected))
    return UserError(f"{foreign.found.path} is of another base model than {model}: {name} is {given}, not {wanted}")


def _targets(backbone: nn.Module) -> Callable[[str], Target | None]:
    """What finds, for a name in a file, the backbone's tensors that it stands for: by diffusers' names or originals."""
    own, config = backbone.state_dict().keys(), getattr(backbone, "config", {})
    known = {target.name: target for target in original(type(backbone).__name__, config, own) or ()}
    known |= {bare: target for name, target in known.items() for bare in _without_prefix(name)}

    def find(name: str) -> Target | None:
        for bare in _without_prefix(name):
            if bare in own:
                return Target(bare, (bare,))
            if bare in known:
                return known[bare]
        return None

    return find


def _without_prefix(name: str) -> Iterator[str]:
    yield name
    yield from (name.removeprefix(prefix) for prefix in PREFIXES if name.startswith(prefix))


def listed(names: Sequence[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def float_weight(place: Place, backbone: nn.Module) -> Tensor:
    """The float weight that stands in the place: of one module, or of several joined by their rows."""
    weights = [backbone.get_submodule(name).weight.detach() for name in place.modules]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def apply_(foreign: Foreign, found: Sequence[Place], backbone: nn.Module, model: str, progress: Progress) -> Applied:
    """Fill the backbone with all that the file holds, in place; `progress` is told of layers done and in all.

    Tensors in high precision are taken from the file too; what it lacks stays as it is. Weights are dequantized in the
    backbone's dtype. UserError for tensors of other shapes than the backbone's.
    """
    sizes = {name: tensor.numel() for name, tensor in backbone.state_dict().items()}
    held, notes = _load_rest(foreign, backbone, model)
    held |= {source for place in found for source in place.target.sources}
    formats, bits, errors = {}, {}, {}
    for done, place in enumerate(found, start=1):
        weight = place.weight()
        error = weight_error(weight, float_weight(place, backbone))
        _put(place, weight, backbone)
        errors |= dict.fromkeys(place.modules, error)
        formats |= dict.fromkeys(place.modules, place.layer.format)
        size = 8 * place.layer.nbytes / torch.Size(place.layer.shape).numel()
        bits |= dict.fromkeys(place.modules, size)
        progress(done, len(found))
    missing = sum(size for name, size in sizes.items() if name not in held)
    return Applied(formats, bits, errors, sum(sizes.values()), missing, (*foreign.notes, *notes))


@torch.no_grad()
def decode_(foreign: Foreign, found: Sequence[Place], backbone: nn.Module, model: str) -> None:
    """Fill a backbone, in place, with the float weights that what the file holds stands for; inputs are not rounded.

    UserError for tensors of other shapes than the backbone's, and for a file that lacks some.
    """
    held, _ = _load_rest(foreign, backbone, model)
    held |= {source for place in found for source in place.target.sources}
    if lacking := [name for name in backbone.state_dict() if name not in held]:
        raise UserError(f"{foreign.found.path} lacks {listed(lacking)} of {model}: get the model again")
    for place in found:
        modules = [backbone.get_submodule(name) for name in place.modules]
        parts = place.weight().split([len(module.weight) for module in modules])
        for module, rows in zip(modules, parts, strict=True):
            module.weight.copy_(rows)


def _load_rest(foreign: Foreign, backbone: nn.Module, model: str) -> tuple[set[str], list[str]]:
    """Copy tensors in high precision and biases into the backbone; their names there, and a line on others."""
    own, target_of = backbone.state_dict(keep_vars=True), _targets(backbone)
    biases = [f"{name}.bias" for name in foreign.layers if f"{name}.bias" in foreign.found.tensors]
    held, left = set(), []
    for name in dict.fromkeys((*foreign.rest, *biases)):
        if name.startswith(OTHER_PARTS) or (target := target_of(name)) is None:
            left.append(name)
            continue
        if name not in foreign.found.tensors:  # labels may list what the file lacks
            raise UserError(f"{foreign.found.path} lacks {name} of {model}: get that file again")
        given, parts = foreign.found.tensors[name].shape, [own[source] for source in target.sources]
        expected = (sum(map(len, parts)), *parts[0].shape[1:]) if parts[0].ndim else ()
        if tuple(given) != expected:
            raise _of_another_model(foreign, model, name, given, expected)
        tensor = target.in_order(foreign.found.tensor(name))
        for part, rows in zip(parts, tensor.split(list(map(len, parts))) if parts[0].ndim else [tensor], strict=True):
            part.data.copy_(rows)
        held |= {*target.sources}
    strangers = f"{len(left)} tensors of {foreign.found.path.name} are not of the backbone: {listed(left)}"
    return held, [strangers] if left else []


def _put(place: Place, weight: Tensor, backbone: nn.Module) -> None:
    layer, modules = place.layer, [backbone.get_submodule(name) for name in place.modules]
    sizes = [len(module.weight) for module in modules]
    if layer.build is None:
        for module, rows in zip(modules, weight.split(sizes), strict=True):
            _emulate_(module, rows, layer)
    elif len(modules) == 1 and not place.target.swapped:
        backbone.set_submodule(place.modules[0], layer.build(modules[0]))
    else:
        whole = layer.build(_joined(modules, place.target))
        rows = place.target.in_order(torch.arange(sum(sizes), device=modules[0].weight.device)).split(sizes)
        for module, own in zip(modules, rows, strict=True):
            module.__class__, module.whole = _Rows, nn.ModuleList([whole])
            module.register_buffer("rows", own, persistent=False)


def _joined(modules: Sequence[nn.Module], target: Target) -> nn.Linear:
    """The float layer that several are in the file, in its order of rows."""
    first, has_bias = modules[0].weight, modules[0].bias is not None
    joined = nn.Linear(first.shape[1], sum(len(module.weight) for module in modules), bias=has_bias, device="meta")
    joined.weight = nn.Parameter(target.rows([module.weight.detach() for module in modules]), requires_grad=False)
    if has_bias:
        joined.bias = nn.Parameter(target.rows([module.bias.detach() for module in modules]), requires_grad=False)
    return joined


def _emulate_(module: nn.Linear | nn.Conv2d, weight: Tensor, layer: ForeignLayer) -> None:
    module.weight.data.copy_(weight)
    if layer.activations is not None:
        module.__class__, module.activations = EMULATED[type(module)], layer.activations
        scale = None if layer.input_scale is None else layer.input_scale().float().to(module.weight.device)
        module.register_buffer("input_scale", scale, persistent=False)


def weight_error(weight: Tensor, exact: Tensor) -> float:
    """Squared error over the squared exact weight; 2 for weights that have nothing to do with one another."""
    exact = exact.float()
    return ((weight.to(exact.device) - exact).square().sum() / exact.square().sum().clamp(min=1e-30)).item()
