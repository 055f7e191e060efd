"""What is asked of a choice of formats: a size, or a quality."""

from dataclasses import dataclass

from dmquant.errors import UsageError
from dmquant.pipelines.runs.bounds import parse_size

LEAST_BITS, MOST_BITS = 1.0, 16.0
BY_OPTION = {"bits": "--target-bits", "size": "--target-size", "psnr": "--min-psnr", "lpips": "--max-lpips"}


@dataclass(frozen=True)
class Target:
    """One of: `bits` a quantized weight, scales included; `size` of the backbone's file in bytes; the least `psnr` in
    dB, or the largest `lpips`, of images to those of full precision."""

    bits: float | None = None
    size: int | None = None
    psnr: float | None = None
    lpips: float | None = None

    @classmethod
    def of(cls, bits: float | None, size: str | None, psnr: float | None, lpips: float | None) -> "Target | None":
        """The target of a command line, None where nothing is asked; UsageError for two, and for impossible values."""
        given = {"bits": bits, "size": size, "psnr": psnr, "lpips": lpips}
        asked = [name for name, value in given.items() if value is not None]
        if not asked:
            return None
        if len(asked) > 1:
            both = " and ".join(BY_OPTION[name] for name in asked)
            raise UsageError(f"{both} are targets of their own: give one of them")
        if bits is not None and not LEAST_BITS <= bits <= MOST_BITS:
            raise UsageError(
                f"--target-bits {bits:g} is no number of bits: give one from {LEAST_BITS:g} to {MOST_BITS:g}"
            )
        if psnr is not None and not 0 < psnr < 100:
            raise UsageError(f"--min-psnr {psnr:g} is no PSNR of images in dB: give one from 0 to 100, such as 30")
        if lpips is not None and not 0 < lpips < 1:
            raise UsageError(f"--max-lpips {lpips:g} is no distance of images: give one from 0 to 1, such as 0.1")
        return cls(bits, None if size is None else parse_size(size, "--target-size"), psnr, lpips)

    @property
    def words(self) -> str:
        """The target as a recipe's name has it."""
        if self.bits is not None:
            return f"{self.bits:g}bits"
        if self.size is not None:
            return f"{self.size / 1e6:g}MB"
        return f"{self.psnr:g}dB" if self.psnr is not None else f"lpips{self.lpips:g}"
