"""Weights quantized without data, at equal bits, beside other libraries' formats: one markdown table a model.

    python benchmarks/data_free.py --install PEERS       # other libraries, each into its folder
    python benchmarks/data_free.py --peers PEERS [--models emoji-pixart,emoji-sd] [--ways NL4,NF4] [--images 32]

Weights alone: the layers that the recipe rtn quantizes get the values that each way's codes mean, scales and minima
counted; everything else stays. Other libraries quantize by their own code, GGUF's formats by llama.cpp in rows of 256
weights, as SD's are stored in such files. The weight error is the squared error over the squared weight, the mean over
layers; PSNR is that of images before they are rounded to 8 bits, the mean over images. By chance one rounding draws
nearer than another that is no worse, so each way is measured with the input channels shifted by each of SHIFTS places
before they are cut into groups, and shifted back: figures are means, and the standard deviation is of PSNR over shifts.
What was measured is kept in OUT, and not done again. Without --peers the others are left out.
"""

import argparse
import ctypes
import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import fmean, stdev

import torch
from calibration import PROMPTS, Bench
from torch import Tensor
from ways import UnmeasuredError, reasons

import dmquant
from dmquant.convert import plan
from dmquant.host.files import fingerprint, write_text
from dmquant.qtensor import quantize
from dmquant.scaling import from_matrix, to_matrix

PACKAGES = (
    "bitsandbytes==0.50.2", "gguf==0.19.0", "hqq==0.2.8.post1", "termcolor==3.3.0", "torchao==0.18.0",
    "xllamacpp==2026.10.11549",
)  # fmt: skip
SHIFTS = (0, 5, 11, 21)
HEADER = ("weights", "bits a weight", "weight error", "PSNR, dB", "by shifts, ±", "least to most")
SUPER = 256  # weights of a row of GGUF
Decoded = tuple[Tensor, float]


def dmquant_way(format: str, granularity: str, store: str) -> Callable[..., Decoded]:
    def decode(weight: Tensor, spec: dmquant.qtensor.WeightSpec) -> Decoded:
        own = dmquant.qtensor.WeightSpec.parse(format, granularity, "mse", store, spec.split)
        quantized = quantize(weight, own)
        return quantized.dequantize(), 8 * quantized.nbytes / weight.numel()

    return decode


def in_rows(weight: Tensor, size: int, decode: Callable[[Tensor], Tensor]) -> Tensor:
    """What `decode` makes of the weight in rows of `size`, as a weight again; the last row is padded with zeros."""
    flat = weight.flatten()
    rows = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
    return decode(rows).flatten()[: len(flat)].view(weight.shape)


def gguf_way(name: str) -> Callable[..., Decoded]:
    """A format of GGUF by llama.cpp's quantizer, which gguf's own decoder reads."""

    def decode(weight: Tensor, spec: dmquant.qtensor.WeightSpec) -> Decoded:
        import gguf

        kind = gguf.GGMLQuantizationType[name]
        weights, size = gguf.GGML_QUANT_SIZES[kind]
        [path] = importlib.metadata.distribution("xllamacpp").locate_file("xllamacpp").glob("*.so")
        library = ctypes.CDLL(str(path))
        library.ggml_quantize_init(kind.value)
        pointer, count = ctypes.c_void_p, ctypes.c_int64
        library.ggml_quantize_chunk.argtypes = (ctypes.c_int, pointer, pointer, count, count, count, pointer)
        library.ggml_quantize_chunk.restype = ctypes.c_size_t

        def of_rows(rows: Tensor) -> Tensor:
            blocks = torch.empty(len(rows), SUPER // weights * size, dtype=torch.uint8)
            places = rows.contiguous().data_ptr(), blocks.data_ptr()
            done = library.ggml_quantize_chunk(kind.value, *places, 0, len(rows), SUPER, None)
            if done != blocks.numel():
                raise UnmeasuredError(f"llama.cpp filled {done} bytes, not {blocks.numel()}")
            return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), kind))

        return in_rows(weight, SUPER, of_rows), 8 * size / weights

    return decode


def nf4_way(double: bool) -> Callable[..., Decoded]:
    """bitsandbytes' NF4 in blocks of 64 along the weight as it lies, with absmax in float32 or quantized itself."""

    def decode(weight: Tensor, spec: dmquant.qtensor.WeightSpec) -> Decoded:
        from bitsandbytes import functional

        codes, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
        return functional.dequantize_4bit(codes, state), 4 + (8 + 32 / 256 if double else 32) / 64

    return decode


def hqq(weight: Tensor, spec: dmquant.qtensor.WeightSpec) -> Decoded:
    """HQQ's INT4 in groups of 64, scale and zero point in 16 bits."""
    from hqq.core.quantize import Quantizer

    def of_rows(rows: Tensor) -> Tensor:
        options = {"nbits": 4, "group_size": 64, "axis": 1, "device": "cpu", "compute_dtype": torch.float32}
        codes, meta = Quantizer.quantize(rows, **options)
        meta = meta | {name: meta[name].half().float() for name in ("scale", "zero")}
        return Quantizer.dequantize(codes, meta)

    return in_rows(weight, 64, of_rows), 4.5


def torchao_nvfp4(weight: Tensor, spec: dmquant.qtensor.WeightSpec) -> Decoded:
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale

    matrix = to_matrix(weight, spec.split).contiguous()
    columns = matrix.shape[1]
    padded = torch.nn.functional.pad(matrix, (0, -columns % 16))
    made = NVFP4Tensor.to_nvfp4(padded, per_tensor_scale=per_tensor_amax_to_scale(matrix.abs().max()))
    return from_matrix(made.dequantize()[:, :columns], tuple(weight.shape), spec.split), 4.5


WAYS = {
    "FP4, group:64, bf16": dmquant_way("fp4", "group:64", "bf16"),
    "FP4, group:32, e3m4": dmquant_way("fp4", "group:32", "e3m4"),
    "INT4, group:32, e3m4": dmquant_way("int4", "group:32", "e3m4"),
    "NL4, group:64, e3m4": dmquant_way("nl4", "group:64", "e3m4"),
    "NL4, group:32, e3m4": dmquant_way("nl4", "group:32", "e3m4"),
    "NVFP4, mse": dmquant_way("nvfp4", "group:16", "e4m3"),
    "NL4, group:16, e3m4": dmquant_way("nl4", "group:16", "e3m4"),
    "NF4, absmax in 8 bits (bitsandbytes)": nf4_way(True),
    "NF4 (bitsandbytes)": nf4_way(False),
    "IQ4_XS (llama.cpp)": gguf_way("IQ4_XS"),
    "IQ4_NL (llama.cpp)": gguf_way("IQ4_NL"),
    "Q4_0 (llama.cpp)": gguf_way("Q4_0"),
    "Q4_K (llama.cpp)": gguf_way("Q4_K"),
    "HQQ INT4, group:64": hqq,
    "NVFP4 (torchao)": torchao_nvfp4,
}


@torch.no_grad()
def measure(bench: Bench, decode: Callable[..., Decoded], shift: int) -> dict[str, float]:
    """Bits, the weight error, and PSNR."""
    backbone, errors, bits = bench.copy(), [], []
    for layer in plan(backbone, bench.settings.recipe_for(backbone)):
        weight = backbone.get_submodule(layer.name).weight
        exact = weight.detach().float()
        decoded, of_weight = decode(exact.roll(shift, 1), layer.weights)
        errors.append(((decoded.roll(-shift, 1) - exact).square().sum() / exact.square().sum()).item())
        weight.copy_(decoded.roll(-shift, 1))
        bits.append((of_weight, weight.numel()))
    total = sum(each * count for each, count in bits) / sum(count for _, count in bits)
    return {"bits": total, "error": fmean(errors), "psnr": fmean(bench.psnr(backbone))}


def rows_of(bench: Bench, names: list[str]) -> Iterator[tuple[str, list[dict[str, float]] | str]]:
    """What was measured at every shift, by name, from OUT where it is there; why not, for one that failed."""
    for name in names:
        rows = []
        try:
            for shift in SHIFTS:
                parts = {"way": name, "shift": shift, "packages": PACKAGES, "prompts": bench.settings.prompts}
                path = bench.out / "rows" / f"{fingerprint(dmquant=dmquant.__version__, **parts)[:12]}.json"
                if not path.exists():
                    with reasons():
                        write_text(path, json.dumps(measure(bench, WAYS[name], shift)))
                rows.append(json.loads(path.read_text()))
        except UnmeasuredError as error:
            yield name, str(error)
        else:
            yield name, rows


def table(rows: dict[str, list[dict[str, float]] | str]) -> str:
    """Markdown, by bits and then by PSNR."""
    lines, measured = [HEADER, ["---"] * len(HEADER)], []
    for name, row in rows.items():
        if isinstance(row, str):
            lines.append([name, f"not measured: {row}", *[""] * (len(HEADER) - 2)])
            continue
        bits, error, psnr = ([each[key] for each in row] for key in ("bits", "error", "psnr"))
        cells = [f"{fmean(bits):.3f}", f"{fmean(error):.5f}", f"{fmean(psnr):.2f}", f"{stdev(psnr):.2f}"]
        measured.append(((round(fmean(bits), 2), fmean(psnr)), [name, *cells, f"{min(psnr):.2f} to {max(psnr):.2f}"]))
    lines[2:2] = [cells for _, cells in sorted(measured)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="emoji-pixart,emoji-sd", help="with commas")
    parser.add_argument("--ways", default="", help="parts of names, with commas; by default all that are there")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--peers", type=Path, help="the folder of --install")
    parser.add_argument("--install", type=Path, metavar="PEERS", help="install the other libraries there, and end")
    parser.add_argument("--out", type=Path, default=Path("runs/data-free"))
    options = parser.parse_args()
    if options.install:
        target = ["--no-deps", "--target", str(options.install)]
        sys.exit(subprocess.run([sys.executable, "-m", "pip", "install", *target, *PACKAGES]).returncode)
    if options.peers:
        sys.path.append(str(options.peers))  # now: diffusers has looked already which of them there are
    parts = [part for part in options.ways.split(",") if part]
    names = [name for name in WAYS if not parts or any(part in name for part in parts)]
    if not options.peers:
        names = [name for name in names if WAYS[name].__qualname__.startswith(dmquant_way.__name__)]
    for model in options.models.split(","):
        bench = Bench(options.out.resolve() / model, options.images, model, PROMPTS)
        rows = dict(rows_of(bench, names))
        print(f"\n{model}, {options.images} images of {PROMPTS}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
