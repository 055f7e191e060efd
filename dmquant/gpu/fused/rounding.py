"""Float32 to a narrower dtype."""

import triton
import triton.language as tl


@triton.jit
def rounded(y, dtype: tl.constexpr):
    """Float32 `y`, finite or NaN, in `dtype`; to bfloat16 by hand, because Triton's interpreter would truncate."""
    if dtype == tl.bfloat16:
        bits = y.to(tl.int32, bitcast=True)
        even = bits + 0x7FFF + ((bits >> 16) & 1)
        y = tl.where(y == y, even & -0x10000, bits).to(tl.float32, bitcast=True)
    return y.to(dtype)
