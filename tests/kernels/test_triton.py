"""Triton's kernels: the operations of torch that define them, bit for bit, by its interpreter; and that they compile.

Triton comes with torch for CUDA and not with torch for the CPU: `.ci/run` installs it apart and runs this file alone.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="installed apart from what the other tests need, see .ci/run")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1: there is no GPU here", allow_module_level=True)

from dmquant.formats import get_format
from dmquant.gpu import ops
from dmquant.gpu.fused import integers
from dmquant.gpu.operands import E4M3, unit
from dmquant.packing import pack

FORMATS = ["fp4", "fp4_e1m2", "fp4_e3m0", "fp6", "fp6_e3m2", "fp6_e1m4", "fp8", "int4", "int6", "int8"]
TARGETS = (75, 80, 89, 90, 100, 120)
COMPILING = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dmquant.gpu.fused import finishing, integers, rows, weights

ROUNDING = dict(GIVEN=False, NARROW=False, INTEGER=False, PARITY=False, LOWEST_BINADE=1.0, HIGHEST_BINADE=4.0)
ROUNDING |= dict(ANCHOR=1.5 * 2**20, LOW=-7.5, HIGH=7.5, UNIT=0.125, TINY=2.0**-126, LIMIT=4e37)
ROUNDING |= dict(BLOCK_R=1, BLOCK_C=2048)
SIZES = dict(BIAS=True, BLOCK_R=8, BLOCK_C=256)

def binary(kernel, capability, pointers, constants):
    types = {one.name: "constexpr" if one.name in constants else pointers.get(one.name, "i32") for one in kernel.params}
    source = ASTSource(kernel, types, constexprs=constants)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8}).asm["cubin"]

for capability in map(int, sys.argv[1:]):
    operands = ["*i8"] + ["*fp8e4nv"] * (capability >= 89)
    for x in ("*bf16", "*fp16", "*fp32"):
        for out in [*operands, x]:
            pointers = dict(x=x, out=out, scales="*fp32", given="*fp32")
            assert binary(rows._quantize_rows, capability, pointers, ROUNDING | dict(FAKE=out == x))
    for out in [*operands, "*bf16"]:
        pointers = dict(codes="*u8", table="*fp32", stored="*u8", base="*fp32", out=out, scale_table="*fp32")
        assert binary(weights._expand, capability, pointers, dict(BITS=4, KIND="table", BLOCK=1024))
    pointers = dict(sums="*i32", token="*fp32", channel="*fp32", bias="*bf16", out="*bf16")
    assert binary(finishing._finish, capability, pointers, SIZES)
    pointers = dict(a="*i8", b="*i8", token="*fp32", channel="*fp32", bias="*bf16", out="*bf16")
    tile = dict(BIAS=True, BLOCK_R=64, BLOCK_O=64, BLOCK_K=64, TOGETHER=8)
    assert capability < 80 or binary(integers._multiply, capability, pointers, tile)
print("compiled")
"""


def both(monkeypatch, operator, *arguments):
    """The results of an operator by Triton and by torch."""
    assert ops.takes_triton(torch.ones(1))
    fused = operator(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(ops, "takes_triton", lambda x: False)
        return fused, operator(*arguments)


def inputs(rows, columns, dtype, seed):
    """Tokens of all magnitudes, with ties, zeros, NaN and infinity among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, columns, generator=generator)
    x[::3] = (x[::3] * 8).round() / 8
    x = x * torch.randn(rows, 1, generator=generator).mul_(8).exp2()
    x[-1], x[rows // 2, columns // 2], x[rows // 3, 0] = 0, torch.nan, torch.inf
    return x.to(dtype)


def same(a, b):
    return torch.equal(a.float().nan_to_num(0.25), b.float().nan_to_num(0.25)) and torch.equal(a.isnan(), b.isnan())


SHAPES = (st.integers(1, 40), st.integers(1, 70), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
ALWAYS = settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@ALWAYS
@given(st.sampled_from(FORMATS), st.sampled_from(["fp32", "bf16", "pow2"]), st.booleans(), *SHAPES, st.integers(0, 99))
def test_tokens_become_the_same_operands(monkeypatch, fmt, store, given_scale, rows, columns, dtype, seed):
    x, narrow = inputs(rows, columns, dtype, seed), [one for one in (torch.int8, E4M3) if unit(get_format(fmt), one)]
    scale = torch.rand(rows) + 0.01 if given_scale else None
    for operand in narrow:
        arguments = x, scale, fmt, store, operand, rows + 7, columns + 5
        (codes, scales), (expected, of_torch) = both(monkeypatch, ops.quantize_tokens, *arguments)
        assert same(scales, of_torch)
        assert torch.equal(codes[:rows].float(), expected[:rows].float())


@ALWAYS
@given(st.sampled_from(FORMATS), st.sampled_from(["token", "group:8"]), *SHAPES, st.integers(0, 99))
def test_tokens_are_rounded_alike(monkeypatch, fmt, granularity, rows, columns, dtype, seed):
    x = inputs(2 * rows, columns * 8, dtype, seed)
    for store in ("fp32", "bf16", "e4m3"):
        assert same(*both(monkeypatch, ops.round_tokens, x, fmt, granularity, store, 2))


@settings(ALWAYS, max_examples=8)
@given(st.integers(2, 8), st.integers(1, 9), st.integers(1, 80), st.integers(1, 20), st.integers(0, 99))
def test_codes_are_expanded_alike(monkeypatch, bits, rows, columns, size, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = pack(torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8), bits)
    table, groups = torch.randn(1 << bits, generator=generator), -(-columns // size)
    places = torch.randint(0, 256, (rows, groups), generator=generator, dtype=torch.uint8)
    scales = torch.rand(rows, groups, generator=generator)
    ways = [(None, None, None), (scales, None, None), (scales[:1].bfloat16(), None, None)]
    ways += [(places, base, torch.rand(256, generator=generator)) for base in (torch.rand(rows), torch.rand(1))]
    for stored, base, scale_table in ways:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            end = bits, columns, size, dtype, rows + 2, columns + 3
            assert torch.equal(*both(monkeypatch, ops.expand, codes, table, stored, base, scale_table, *end))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_products_are_finished_alike(monkeypatch, dtype):
    sums = torch.randint(-(1 << 20), 1 << 20, (40, 304), dtype=torch.int32)
    for bias in (None, torch.randn(299).to(dtype)):
        for one in (sums, sums.float()):
            assert torch.equal(*both(monkeypatch, ops.finish, one, torch.rand(37), torch.rand(299), bias, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_tiles_are_those_of_two_steps(monkeypatch, dtype):
    a, b = (torch.randint(-127, 128, (rows, 136), dtype=torch.int8) for rows in (152, 304))
    scales, bias = (torch.rand(150), torch.rand(299)), torch.randn(299).to(dtype)
    for with_bias, way in itertools.product((None, bias), range(len(integers.TILES))):
        out = torch.empty(150, 299, dtype=dtype)
        integers.multiply(a, b, *scales, with_bias, out, way)
        sums = (a.long() @ b.long().T).int()
        assert torch.equal(out, both(monkeypatch, ops.finish, sums, *scales, with_bias, dtype)[1])


def test_they_compile_for_every_generation_of_gpus():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILING, *map(str, TARGETS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.stdout.endswith("compiled\n"), done.stderr[-2000:]
