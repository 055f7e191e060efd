"""The order in which Blackwell's tensor cores read scales of blocks: tiles of 128 rows and 4 columns.

cuBLAS 12.9, "1D Block Scaling Factors Layout": in a tile, row r and column c lie at 16 (r mod 32) + 4 (r div 32) + c;
tiles follow one another along the columns, then along the rows.
"""

import torch.nn.functional as F
from torch import Tensor

_ROWS, _COLUMNS, _LINE = 128, 4, 32


def in_tiles(rows: int, columns: int) -> tuple[int, int]:
    """Shape of scales (rows, columns) padded to whole tiles."""
    return rows + -rows % _ROWS, columns + -columns % _COLUMNS


def to_blocked(scales: Tensor) -> Tensor:
    """Scales (rows, columns) of any dtype of one byte, padded with zero bytes to whole tiles, as one dimension."""
    rows, columns = scales.shape
    padded = F.pad(scales, (0, -columns % _COLUMNS, 0, -rows % _ROWS))
    tiles = padded.unflatten(1, (-1, _COLUMNS)).unflatten(0, (-1, _ROWS // _LINE, _LINE))
    return tiles.permute(0, 3, 2, 1, 4).flatten()


def from_blocked(blocked: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `to_blocked`: the scales (rows, columns); same dtype."""
    across = -(-columns // _COLUMNS)
    tiles = blocked.view(-1, across, _LINE, _ROWS // _LINE, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1, across * _COLUMNS)[:rows, :columns]
