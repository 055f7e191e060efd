"""Activation quantization: online, where a scale comes from the input itself, or static, where calibration fixed it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from dmquant.errors import UsageError, check_choice, unknown
from dmquant.formats import Format, get_format
from dmquant.registry import engine_of
from dmquant.scaling import BLOCK_FORMATS, ONLINE_RULES, Granularity, absmax, from_groups, to_groups
from dmquant.stores import STORES

SCHEDULE = 1000  # timesteps run from 0 to this, in diffusers also those of flow matching
PLAIN = "absmax"  # the rule of online scales that every kernel knows
CENTERS = ("none", "image")
FEWEST = 8  # tokens or pixels of a row whose mean is taken out: of fewer it would be much of the input itself


@dataclass(frozen=True)
class ActivationSpec:
    """The quantization of a layer's input.

    Online, `ranges` is None. `token`: one scale for the channels of an image patch, a text token, or (for a
    convolution) a pixel position. `group:N`: one for N consecutive channels of it. `image`: one for a row of the batch.
    `tensor`: one for everything in the call, the batch included.

    Static, the timesteps 0..SCHEDULE are cut into `ranges` equal ranges with scales of their own, in float32.
    `tensor`: one scale for all of an input. `channel`: one for each input channel. `group:N` in a store with a base for
    the tensor: the base is static, and the scales of groups are found online, relative to it.

    `engine` rounds in place of all this as the kernel of another engine does, bit for bit.

    `split`: the input is a concatenation; wherever a scale would cover channels before and after the first `split`,
    there are two. `rule`: how online scales are fitted. `center`: the mean of each channel over the tokens of a row, or
    pixels, stays as it is, and the differences to it are quantized.
    """

    fmt: Format
    granularity: Granularity
    store: str
    ranges: int | None = None
    split: int | None = None
    rule: str = PLAIN
    center: bool = False
    engine: Any = None

    @classmethod
    def parse(
        cls,
        format: str,
        granularity: str = "token",
        store: str = "fp32",
        scale: str = "online",
        split: int | None = None,
        rule: str = PLAIN,
        center: str = "none",
        engine: str | None = None,
    ) -> "ActivationSpec":
        """Parse and check, or raise UsageError; `scale` is `online` or `static:R`. A block format such as `mxfp6`
        brings its own granularity and store. `engine` is the name of one."""
        ranges = parse_ranges(scale)
        if block := BLOCK_FORMATS.get(format.lower()):
            format, granularity, store = block
        parsed = Granularity.parse(granularity)
        if parsed.kind == "product":
            raise UsageError("granularity 'product' is for recipes: for one layer's input use token or image")
        if ranges is None and parsed.kind == "channel":
            raise UsageError(
                "granularity 'channel' is for weights: use token, group:N, image or tensor for activations"
            )
        based = STORES[check_choice("scale storage", store, STORES)].base_of == "tensor" and parsed.kind == "group"
        if ranges is not None and parsed.kind not in ("tensor", "channel") and not based:
            raise UsageError(
                f"a static activation scale cannot be one per {parsed}, which is known only at run time: "
                "use granularity tensor or channel, nvfp4, or online scales"
            )
        centered = check_choice("center of activations", center, CENTERS) != "none"
        if (centered or check_choice("activation rule", rule, ONLINE_RULES) != PLAIN) and (ranges or engine):
            raise UsageError("activation_rule and activation_center are for online scales that no engine rounds by")
        halves = None if parsed.kind == "channel" or (based and ranges) else split
        spec = cls(get_format(format), parsed, store, ranges, halves, rule, centered)
        return spec if engine is None else engine_of(engine).taking(spec)

    @property
    def static_base(self) -> bool:
        """Whether static scales are the base of scales of groups."""
        return self.ranges is not None and self.granularity.kind == "group"

    @property
    def scale_by_row(self) -> bool:
        """Whether the scale of a token looks at the other tokens of its row."""
        by_row = STORES[self.store].base_of == "tensor" and self.granularity.kind != "tensor"
        return by_row or self.granularity.kind == "image"

    @property
    def refused(self) -> str | None:
        """Why no kernel but the reference's arithmetic fits these scales; None where others can."""
        if self.engine is not None:
            return f"its inputs are rounded as {self.engine.name} rounds them"
        if self.center:
            return "the mean of its inputs is not quantized"
        return None if self.rule == PLAIN else f"scales of its inputs are fitted by {self.rule}"

    def segments(self, channels: int) -> tuple[int, ...]:
        """Channels of the parts of a token that share no scale."""
        return (channels,) if self.split is None else (self.split, channels - self.split)

    def scale_shape(self, channels: int) -> tuple[int, int]:
        """Shape of static scales: (timestep ranges, n) with n input channels, or 2 with a split, or 1."""
        return self.ranges, channels if self.granularity.kind == "channel" else len(self.segments(channels))

    def __str__(self) -> str:
        static = "" if self.ranges is None else f"/static:{self.ranges}"
        engine = "" if self.engine is None else f"/{self.engine.name}"
        rule = "" if self.rule == PLAIN else f"/{self.rule}"
        return f"{self.fmt.name}/{self.granularity}{static}{rule}{'/center' if self.center else ''}{engine}"


def parse_ranges(text: str) -> int | None:
    """The timestep ranges of an activation scale: R for `static:R`, None for `online`; else a UsageError."""
    kind, _, count = text.partition(":")
    if kind == "static" and count.isdecimal() and len(count) < 5 and int(count) > 0:
        return int(count)
    if text == "online":
        return None
    raise unknown("activation scale", text, ["online", "static:1"], "use online, or static:R for R timestep ranges")


def ranges_of(timesteps: Tensor, count: int) -> Tensor:
    """Index of the nearest of `count` equal ranges of 0..SCHEDULE to each timestep; int64, same shape.

    The edges below a timestep are counted in whole numbers: a quotient may round differently on another device.
    """
    edges = torch.arange(1, count, device=timesteps.device) * SCHEDULE
    return (timesteps.float().unsqueeze(-1) * count >= edges).sum(-1)


class TimestepRanges:
    """The timestep ranges of the backbone call in progress, shared by the static layers of one model.

    `counts` are the numbers of ranges in use. Whoever runs the layers calls `set` first: for a whole backbone that is
    the hook of `diffusers.timesteps`. A model serves one call at a time.
    """

    def __init__(self, counts: Iterable[int]):
        self.counts = frozenset(counts)
        self.of_rows: dict[int, Tensor] = {}

    def set(self, timesteps: Tensor | float) -> None:
        """Set the timesteps of the coming call: (rows,), one for each row of the batch, or a scalar for all."""
        given = timesteps if isinstance(timesteps, Tensor) else torch.tensor(timesteps, dtype=torch.float32)
        rows = given.reshape(-1)
        self.of_rows = {count: ranges_of(rows, count) for count in self.counts}


def static_scale(scale: Tensor, ranges: TimestepRanges | None, x: Tensor, dim: int, split: int | None = None) -> Tensor:
    """The static scales of the rows of `x`, float32, shaped to broadcast to it; channels along `dim`.

    `scale` is float32 (ranges, 1 or channels), or with `split` (ranges, 2), for the first `split` channels and the
    others. The rows of the call divide the first dimension of `x`; each row's scale is repeated. Raises RuntimeError
    where they do not, or where several ranges are told apart and `ranges` has no timestep.
    """
    count = len(scale)
    if count > 1:
        if ranges is None or count not in ranges.of_rows:
            raise RuntimeError(
                "this layer differs by timestep range and was not told the timestep: "
                "call the whole backbone, with its timestep"
            )
        scale = scale[ranges.of_rows[count].to(scale.device)]
    if split is not None:
        first, rest = scale.split(1, 1)
        scale = torch.cat([first.expand(-1, split), rest.expand(-1, x.shape[dim] - split)], 1)
    rows, columns = scale.shape
    shape = [1] * x.ndim
    if rows > 1:
        if dim % x.ndim == 0 or len(x) % rows:
            raise RuntimeError(f"an input of shape {tuple(x.shape)} does not divide into the {rows} rows of the call")
        scale = scale.repeat_interleave(len(x) // rows, 0)
        shape[0] = len(x)
    shape[dim] = columns
    return scale.view(shape)


def in_parts(quantize: Callable[..., Tensor], x: Tensor, spec: ActivationSpec, dim: int) -> Tensor:
    """Quantize the differences to the mean, or the halves of a concatenation, each on its own; dtype, shape of `x`."""
    if spec.center:
        plain, positions = replace(spec, center=False), [one for one in range(1, x.ndim) if one != dim % x.ndim]
        if prod(x.shape[one] for one in positions) < FEWEST:
            return quantize(x, plain, dim)
        mean = x.float().mean(positions, keepdim=True)
        return quantize(x.float() - mean, plain, dim).add_(mean).to(x.dtype)
    each = replace(spec, split=None)
    return torch.cat([quantize(half, each, dim) for half in x.split(spec.segments(x.shape[dim]), dim)], dim)


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int = -1, scale: Tensor | None = None) -> Tensor:
    """Round `x` to values that `spec` can represent, channels along `dim`; same dtype and shape.

    The first dimension of `x` is the rows of the batch; an online scale covers several rows only with granularity
    `tensor`. `scale`, for a static spec alone, is float32 and broadcasts to `x`. Scale, quotient and product are
    float32. NaN stays NaN; a token of zeros stays zero.
    """
    if spec.engine is not None:
        return spec.engine.fake_quantize(x, spec, dim, scale)
    if spec.center or (spec.split is not None and spec.ranges is None):
        return in_parts(fake_quantize, x, spec, dim)
    if spec.granularity.kind == "image":
        rows = (x if dim % x.ndim else x.unsqueeze(0)).flatten(1).unsqueeze(1).float()
        scale = ONLINE_RULES[spec.rule](rows, spec.fmt, spec.store).decode().view(-1, *(1,) * (x.ndim - 1))
    if scale is not None and not spec.static_base:
        return spec.fmt.round(x.float() / scale).mul_(scale).to(x.dtype)
    channels_last = x.movedim(dim, -1)
    tokens = channels_last.reshape(-1, channels_last.shape[-1]).float()
    groups = to_groups(tokens, spec.granularity)
    scale = online_scale(groups, 1 if dim % x.ndim == 0 else len(x), spec, scale).unsqueeze(-1)
    rounded = from_groups(spec.fmt.round(groups / scale).mul_(scale), spec.granularity, (tokens.shape[1],))
    return rounded.reshape(channels_last.shape).movedim(-1, dim).to(x.dtype)


def online_scale(groups: Tensor, rows: int, spec: ActivationSpec, base: Tensor | None = None) -> Tensor:
    """Scales of groups (tokens of all rows, groups of a token, elements), float32, without the last dimension.

    The base of a store that has one for a tensor is fitted to each row, so that no row depends on the others; or it is
    given, float32, one for each of equal parts of the tokens.
    """
    if base is not None:
        base = base.reshape(-1, 1).repeat_interleave(len(groups) // base.numel(), 0)
    elif spec.scale_by_row:
        of_rows = absmax(groups).unflatten(0, (-1, max(1, len(groups) // max(1, rows))))
        base = STORES[spec.store].base(of_rows, spec.fmt).expand(-1, of_rows.shape[1], -1).flatten(0, 1)
    return ONLINE_RULES[spec.rule](groups, spec.fmt, spec.store, base).decode()
