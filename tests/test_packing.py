import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmquant.packing import pack, packed_size, unpack


def random_codes(*shape: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 2**bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@given(
    st.integers(1, 8),
    st.lists(st.integers(0, 4), max_size=2),
    st.integers(0, 70),
    st.integers(0, 2**32 - 1),
)
@settings(deadline=None, max_examples=200)
def test_unpack_undoes_pack_and_the_size_is_what_is_claimed(bits, rows, n, seed):
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (*rows, n), dtype=np.uint8))
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*rows, (n * bits + 7) // 8)
    assert torch.equal(unpack(packed, bits, n), codes)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 7, 8, 13, 64])
def test_bytes_are_a_little_endian_bit_stream(bits, n):
    codes = random_codes(3, n, bits=bits)
    stream = np.unpackbits(codes.numpy()[..., None], axis=-1, bitorder="little")[..., :bits].reshape(3, -1)
    assert np.array_equal(pack(codes, bits).numpy(), np.packbits(stream, axis=-1, bitorder="little"))


def test_four_bits_put_the_low_nibble_first():
    codes = torch.tensor([0x1, 0x2, 0xF], dtype=torch.uint8)
    assert pack(codes, 4).tolist() == [0x21, 0x0F]


def test_six_bits_put_four_codes_in_three_bytes():
    codes = torch.tensor([0b000001, 0b000010, 0b000011, 0b111111], dtype=torch.uint8)
    assert pack(codes, 6).tolist() == [0b10_000001, 0b0011_0000, 0b111111_00]


@pytest.mark.parametrize("bits", range(1, 9))
def test_strided_input_packs_as_its_copy_does(bits):
    codes = random_codes(10, 12, bits=bits).t()
    packed = pack(codes, bits)
    assert torch.equal(packed, pack(codes.contiguous(), bits))
    assert torch.equal(unpack(packed.t().contiguous().t(), bits, 10), codes)


@pytest.mark.parametrize("bits", range(1, 8))
def test_packed_bytes_own_no_more_memory_than_they_show(bits):
    packed = pack(random_codes(5, 13, bits=bits), bits)
    assert packed.untyped_storage().nbytes() == packed.numel() == 5 * packed_size(13, bits)


@pytest.mark.parametrize("bits", [0, 9, -1])
def test_other_widths_are_refused(bits):
    codes = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        pack(codes, bits)
    with pytest.raises(ValueError, match="1 to 8 bits"):
        unpack(codes, bits, 4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_a_row_of_the_wrong_size_is_refused(bits):
    packed = pack(random_codes(2, 20, bits=bits), bits)
    for wrong in (packed[..., :-1], torch.cat([packed, packed], dim=-1)):
        with pytest.raises(ValueError, match="20 codes of"):
            unpack(wrong, bits, 20)


def round_trip(codes: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    packed = pack(codes, bits)
    return packed, unpack(packed, bits, codes.shape[-1])


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_compiled_equals_eager(bits):
    codes = random_codes(4, 37, bits=bits)
    torch.compiler.reset()
    for eager, compiled in zip(
        round_trip(codes, bits), torch.compile(round_trip, fullgraph=True)(codes, bits), strict=True
    ):
        assert torch.equal(eager, compiled)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("bits", range(1, 9))
def test_cuda_equals_cpu(bits):
    codes = random_codes(4, 37, bits=bits)
    for cpu, cuda in zip(round_trip(codes, bits), round_trip(codes.cuda(), bits), strict=True):
        assert cuda.is_cuda
        assert torch.equal(cpu, cuda.cpu())
