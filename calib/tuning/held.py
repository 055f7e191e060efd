"""Tensors that learn while gradients arrive: by AdamW each takes its step once its own gradient is whole, which is then
freed; by Q-GaLore each part of a gradient is projected as it comes, and freed. One at most is held at a time."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmquant.calib.tuning.eight_bit import GROUP, Int8
from dmquant.calib.tuning.optimizers import Lean, follower, is_lean

Saved = tuple[dict[str, Tensor], dict[str, Any]]
_OWN = "held_"


class Held:
    """A tensor that learns; `rate` is that of its next step, and without one it takes none.

    By AdamW it is a float32 parameter; by Q-GaLore it is held in 8 bits (`Int8`) and in float only while it is used.
    """

    rate = 0.0
    broken = False
    """Whether a gradient was not finite; it changed nothing."""

    def __init__(self, values: Tensor, lean: Lean | None = None, seed: int = 0):
        self.shape, self._lean, self._device = tuple(values.shape), lean, values.device
        self._follower = follower(self.shape, lean, self._device)
        self._generator = torch.Generator(self._device).manual_seed(seed)
        self._weights = Int8.of(values.float(), self._generator) if is_lean(self.shape, lean) else None
        self._has_gradient = False
        self._anchor = torch.zeros((), requires_grad=True, dtype=torch.float32)
        self._parameter = None
        if self._weights is None:
            self._parameter = nn.Parameter(values.detach().float().clone())
            self._parameter.register_post_accumulate_grad_hook(self._arrived)

    def read(self) -> Tensor:
        """The values, float32, for one use, whose gradient this tensor takes when it arrives. By AdamW it then takes
        its step too, as autograd has added up the gradients of all uses; by Q-GaLore `step` is to be called."""
        return _Read.apply(self._anchor, self) if self._parameter is None else self._parameter

    def values(self) -> Tensor:
        """The values, float32, without gradient."""
        return self._weights.decode() if self._parameter is None else self._parameter.detach()

    def take(self, gradient: Tensor) -> None:
        """Add a part of the gradient of the next step, of any float dtype."""
        if not bool(torch.isfinite(gradient.sum())):
            self.broken = True
            return
        self._follower.take(gradient.detach().float())
        self._has_gradient = True

    def step(self) -> None:
        """Follow the gradient that was taken; without one nothing happens."""
        if not self._has_gradient:
            return
        update, self._has_gradient = self._follower.step().mul_(-self.rate), False
        if not self.rate:
            return
        if self._parameter is None:
            self._weights.assign(update.add_(self._weights.decode()), self._generator)
        else:
            self._parameter.data.add_(update)

    def _arrived(self, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        self.take(gradient)
        self.step()

    def forget(self) -> None:
        """Begin anew with the optimizer's state."""
        self._follower = follower(self.shape, self._lean, self._device)

    def snapshot(self) -> dict[str, Tensor]:
        """The values as they are held, to be given back to `restore`."""
        if self._parameter is None:
            return {name: getattr(self._weights, name).clone() for name in ("codes", "low", "step")}
        return {"values": self._parameter.detach().clone()}

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        """Take over the values of a snapshot."""
        if self._parameter is None:
            own = {name: tensor.clone().to(self._device) for name, tensor in snapshot.items()}
            self._weights = Int8(**own, shape=self.shape)
        else:
            self._parameter.data.copy_(snapshot["values"])

    def state(self) -> Saved:
        """All that the next steps depend on: tensors, and facts that JSON can hold."""
        tensors, facts = self._follower.state()
        own = self.snapshot() | {"generator": self._generator.get_state()}
        return tensors | {f"{_OWN}{name}": tensor for name, tensor in own.items()}, facts

    def load(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """The inverse of `state`."""
        own = {name.removeprefix(_OWN): tensor for name, tensor in tensors.items() if name.startswith(_OWN)}
        self._generator.set_state(own.pop("generator"))
        self.restore(own)
        of_follower = {name: tensor.to(self._device) for name, tensor in tensors.items() if not name.startswith(_OWN)}
        self._follower.load(of_follower, facts)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimizer's state as it is now, and of what is held of a gradient."""
        held = [*self._follower.state()[0].values(), self._follower.gradient]
        return sum(tensor.nbytes for tensor in held if tensor is not None)


class Mirrored(Held):
    """A parameter of a module that learns in float32 whatever its dtype, and is given what `dtype` can hold of that."""

    def __init__(self, parameter: nn.Parameter, dtype: torch.dtype):
        super().__init__(parameter)
        self._place, self._dtype = parameter.requires_grad_(True), dtype
        parameter.register_post_accumulate_grad_hook(self._arrived)

    def step(self) -> None:
        super().step()
        self._show()

    def restore(self, snapshot: Mapping[str, Tensor]) -> None:
        super().restore(snapshot)
        self._show()

    def _show(self) -> None:
        self._place.data.copy_(self.values().to(self._dtype))


class _Read(torch.autograd.Function):
    """The values of a tensor that is held in 8 bits; their gradient goes to its next step and no further."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, held: Held) -> Tensor:
        ctx.held = held
        return held.values()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:
        ctx.held.take(gradient)
        return None, None


def predicted_bytes(shape: tuple[int, ...], lean: Lean | None) -> int:
    """Bytes that a tensor of this shape and its optimizer will hold, without a gradient of full rank."""
    count = torch.Size(shape).numel()
    if not is_lean(shape, lean):
        return 12 * count
    smaller, larger = sorted((shape[0], count // shape[0]))
    rank = max(1, round(lean.rank * smaller))
    basis = rank * smaller
    return count + 8 * -(-count // GROUP) + (2 + 4) * rank * larger + basis // 2 + 8 * -(-basis // GROUP)


def storable(values: Tensor) -> torch.dtype:
    """The dtype of the fewest bits that holds these values exactly: what a file keeps them in."""
    narrow = (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(values, values.to(dtype).to(values)))
    return next(narrow, values.dtype)


def as_stored(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Float32 values as `dtype` holds them, with the gradient of the values themselves."""
    return values + (values.detach().to(dtype).float() - values.detach())
