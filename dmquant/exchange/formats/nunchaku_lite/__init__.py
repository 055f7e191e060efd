"""Nunchaku's W4A4 kernels as diffusers loads them: SVDQuant in INT4 and NVFP4, quant_method nunchaku_lite."""

from dmquant.exchange.formats.nunchaku_lite.exporting import NAME, export, refuses
from dmquant.exchange.formats.nunchaku_lite.reading import open_folder, recognises
from dmquant.exchange.interfaces import ForeignFormat

FORMAT = ForeignFormat(
    name=NAME,
    title="Nunchaku's kernels in diffusers (nunchaku_lite)",
    recognises=recognises,
    read=lambda found: open_folder(FORMAT, found),
    export=export,
    folder=True,
    refuses=refuses,
)
