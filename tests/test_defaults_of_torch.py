"""Codes, scales and outputs do not depend on torch's defaults of dtype and device, which apps set for large models."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dmquant
import dmquant.calib
import dmquant.cpu

FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "linspace", "logspace", "eye"}
OF_CPU = FACTORIES | {"tensor", "arange", "randint"}

HASHES = """
import hashlib, sys, torch, dmquant
from dmquant.recipe import Recipe

if sys.argv[1] != "meta":
    torch.set_default_dtype(getattr(torch, sys.argv[1]))
WEIGHTS = "fp4_e2m1", "nl4", "int8", "lut4_gaussian", "nvfp4"
INPUTS = "fp6_e2m3", "nvfp4", "int8", "fp8_e4m3", "none"
draw = torch.Generator().manual_seed(0)
weight, x = (torch.randn(rows, 96, generator=draw, dtype=torch.float32).bfloat16() for rows in (48, 40))
cases = [(w, a, scale, {}) for w, a in zip(WEIGHTS, INPUTS) for scale in ("absmax", "mse")]
for w, a, scale, more in [*cases, ("int4", "int8", "mse", {"store": "int"})]:
    layer = torch.nn.Linear(96, 48, dtype=torch.bfloat16)
    layer.weight.data, layer.bias.data = weight.clone(), weight[:, 0].clone()
    model, recipe = torch.nn.Sequential(layer), Recipe(name="x", keep="none", weights="none", scale=scale, **more)
    torch.set_default_device(sys.argv[1] if sys.argv[1] == "meta" else "cpu")  # as good as a GPU to be lost on
    dmquant.quantize_(model, recipe.in_formats(w, a))
    with torch.no_grad():
        tensors = [*model.state_dict().values(), model(x)]
    torch.set_default_device("cpu")
    parts = [one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for one in tensors]
    print(w, a, scale, hashlib.sha256(b"".join(parts)).hexdigest())
"""


def hashes(default):
    ran = subprocess.run([sys.executable, "-c", HASHES, default], capture_output=True, text=True)  # tables are cached
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_quantized_layers_are_the_same_bit_for_bit():
    expected = hashes("float32")
    assert len(set(expected.splitlines())) == 11
    assert hashes("bfloat16") == expected
    assert hashes("meta") == expected


@pytest.mark.parametrize(
    ("package", "factories", "keyword"),
    [(dmquant, FACTORIES, "dtype"), (dmquant.calib, FACTORIES, "dtype"), (dmquant.cpu, OF_CPU, "device")],
)
def test_new_tensors_name_their_dtype_and_compiled_code_their_device(package, factories, keyword):
    root, unnamed = Path(package.__file__).parent, []
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in factories:
                of_torch = isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"
                if of_torch and not any(each.arg == keyword for each in node.keywords):
                    unnamed.append(f"{path.name}:{node.lineno}")
    assert not unnamed
