"""Online activation quantization: every token's scale comes from the token itself, at run time."""

from dataclasses import dataclass

from torch import Tensor

from dmquant.errors import UsageError
from dmquant.formats import Format, get_format
from dmquant.scaling import BLOCK_FORMATS, STORES, Granularity, check_choice, fit_absmax, from_groups, to_groups


@dataclass(frozen=True)
class ActivationSpec:
    """How a layer's input is quantized when it arrives.

    `token`: one scale for the channels of an image patch, a text token, or (for a convolution) a pixel position.
    `group:N`: one for N consecutive channels of it. `tensor`: one for everything in the call, the batch included.
    """

    fmt: Format
    granularity: Granularity
    store: str

    @classmethod
    def parse(cls, format: str, granularity: str = "token", store: str = "fp32") -> "ActivationSpec":
        """Checked; a block format such as `mxfp6` brings its own granularity and store."""
        if block := BLOCK_FORMATS.get(format.lower()):
            format, granularity, store = block.format, block.granularity, block.store
        if granularity == "channel":
            raise UsageError("granularity 'channel' is for weights: use token, group:N or tensor for activations")
        return cls(get_format(format), Granularity.parse(granularity), check_choice("scale storage", store, STORES))


def fake_quantize(x: Tensor, spec: ActivationSpec, dim: int = -1) -> Tensor:
    """Round `x` to values that `spec` can represent, channels along `dim`; same dtype and shape.

    Scale, quotient and product are float32. NaN stays NaN; a token of zeros stays zero.
    """
    channels_last = x.movedim(dim, -1)
    tokens = channels_last.reshape(-1, channels_last.shape[-1]).float()
    groups = to_groups(tokens, spec.granularity)
    scale = fit_absmax(groups, spec.fmt, spec.store).decode().unsqueeze(-1)
    rounded = spec.fmt.round(groups / scale).mul_(scale)
    return from_groups(rounded, *tokens.shape).reshape(channels_last.shape).movedim(-1, dim).to(x.dtype)
