"""What readers of other engines' files share: parts checked by the header alone, codes and scales decoded."""

import torch
from torch import Tensor

from dmquant.errors import UserError
from dmquant.exchange.interfaces import Found
from dmquant.formats import get_format
from dmquant.host import weight_file
from dmquant.packing import unpack


def part(found: Found, name: str, dtype: str, *shapes: tuple[int, ...]) -> weight_file.Tensor:
    """The header of a tensor, of this dtype and of one of these shapes; UserError where it is missing or another."""
    header = found.tensors.get(name)
    if header is None:
        raise UserError(f"{found.path} lacks the tensor '{name}': get that file again")
    if header.dtype != dtype or (shapes and header.shape not in shapes):
        wanted = " or ".join(f"{dtype} {list(shape)}" for shape in shapes) or dtype
        raise UserError(f"'{name}' of {found.path} is {header.dtype} {list(header.shape)}, not {wanted}")
    return header


def matrix(found: Found, name: str, *dtypes: str) -> tuple[int, int]:
    """The shape of a tensor of two dimensions and one of these dtypes, by its header; UserError for another."""
    header = found.tensors.get(name)
    if header is None:
        raise UserError(f"{found.path} lacks the tensor '{name}': get that file again")
    if header.dtype not in dtypes or len(header.shape) != 2 or 0 in header.shape:
        raise UserError(
            f"'{name}' of {found.path} is {header.dtype} {list(header.shape)}, not a matrix of {' or '.join(dtypes)}"
        )
    return header.shape


def stored_bytes(found: Found, name: str) -> int:
    """Bytes of a tensor in the files, 0 where they have none of this name."""
    header = found.tensors.get(name)
    return 0 if header is None else header.end - header.begin


def swapped_nibbles(packed: Tensor) -> Tensor:
    """Bytes of two codes each with the codes in the other order; uint8, same shape."""
    return packed << 4 | packed >> 4


def e2m1(packed: Tensor) -> Tensor:
    """Values of E2M1 codes packed low nibble first, uint8 (rows, bytes), as float32 (rows, 2 bytes)."""
    return get_format("fp4_e2m1").decode(unpack(packed.view(torch.uint8), 4, 2 * packed.shape[1]))


def e8m0(scale: Tensor) -> Tensor:
    """Powers of two of their exponents in a byte, as float32 of the same shape; 255 is NaN."""
    return scale.view(torch.float8_e8m0fnu).float()


def scaled(values: Tensor, scale: Tensor) -> Tensor:
    """Values (rows, columns) times the scale of their block, float32 (rows of blocks, columns of blocks)."""
    rows, columns = values.shape
    tall, wide = rows // scale.shape[0], columns // scale.shape[1]
    blocks = values.float().view(scale.shape[0], tall, scale.shape[1], wide) * scale.view(scale.shape[0], 1, -1, 1)
    return blocks.view(rows, columns)
