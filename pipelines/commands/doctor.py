"""Examine this machine: its abilities, the weights at hand, and how to get what is missing."""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import constants

from dmquant import kernels
from dmquant.cpu.compiling import missing_to_compile
from dmquant.diffusers.families import families
from dmquant.diffusers.torchvision import ensure_torchvision_imports
from dmquant.errors import UserError
from dmquant.host.units import about_text
from dmquant.pipelines.commands import startup
from dmquant.pipelines.models import folders, hub
from dmquant.pipelines.models.loading import embedded_folder
from dmquant.pipelines.models.registry import EMBEDDED, ModelSpec, registered_models

LIBRARIES = ("diffusers", "transformers", "accelerate", "safetensors", "torchmetrics")
OPTIONAL = {
    "peft": "LoRA adapters: pip install peft",
    "sentencepiece": "tokenizers of PixArt models from the Hub: pip install sentencepiece",
}
ROOMY_BYTES = 5_000_000_000
HUB_ANSWER_SECONDS = 3


@dataclass(frozen=True)
class Check:
    """A line of the examination; `remedy` says how to get what is missing, and is empty where nothing is."""

    name: str
    status: Literal["ok", "missing", "warn"]
    detail: str
    remedy: str = ""


def examine() -> list[Check]:
    """Look at the machine, the libraries, the weights and the models; never raises for something missing."""
    return [check for section in (_machine, _startup, _libraries, _weights, _models) for check in section()]


def _machine() -> Iterator[Check]:
    yield Check("Python", "ok", f"{platform.python_version()}, {platform.system()} {platform.machine()}")
    features = [
        name
        for name, has in (
            ("bf16", "_is_avx512_bf16_supported"),
            ("VNNI", "_is_vnni_supported"),
            ("AMX", "_is_amx_tile_supported"),
        )
        if getattr(torch.cpu, has, bool)()
    ]
    instructions = ", ".join([torch.backends.cpu.get_cpu_capability(), *features])
    yield Check("torch", "ok", f"{torch.__version__}, CPU {instructions}, {torch.get_num_threads()} threads")
    yield _memory()
    yield _compiler()
    yield from _cuda()
    yield from _kernels()
    free = shutil.disk_usage(Path.cwd()).free
    status = "ok" if free > ROOMY_BYTES else "warn"
    remedy = "" if free > ROOMY_BYTES else "runs write images and models here: make room, or use --out on another disk"
    yield Check("disk", status, f"{free / 1e9:.1f} GB free in this folder", remedy)


def _memory() -> Check:
    try:
        pages = {name: os.sysconf(name) for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES", "SC_PAGE_SIZE")}
    except (AttributeError, ValueError, OSError):
        return Check("memory", "warn", "unknown on this system")
    total, free = (pages[name] * pages["SC_PAGE_SIZE"] / 1e9 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return Check("memory", "ok", f"{total:.1f} GB, {free:.1f} GB of it free")


def _compiler() -> Check:
    if missing := missing_to_compile():
        what, _, remedy = missing.partition(": ")
        return Check("torch.compile", "missing", f"cannot be used on the CPU, for want of {what}", remedy)
    return Check("torch.compile", "ok", "works on the CPU")


def _kernels() -> Iterator[Check]:
    for name in kernels.names():
        if missing := kernels.KERNELS[name].missing():
            what, _, remedy = missing.partition(": ")
            yield Check(f"kernel {name}", "missing", what, remedy or "layers run on the others")
        else:
            yield Check(f"kernel {name}", "ok", kernels.KERNELS[name].description)


def _cuda() -> Iterator[Check]:
    if not torch.cuda.is_available():
        build = "built without CUDA" if torch.version.cuda is None else "finds no GPU"
        remedy = "needs an NVIDIA GPU and a CUDA build of torch"
        yield Check("CUDA", "missing", f"torch {build}: everything runs on the CPU", remedy)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        detail = f"{device.name}, {device.total_memory / 1e9:.0f} GB, capability {device.major}.{device.minor}"
        yield Check(f"cuda:{index}", "ok", detail)
    if importlib.util.find_spec("triton"):
        yield Check("Triton", "ok", importlib.metadata.version("triton"))
    else:
        yield Check("Triton", "missing", "torch.compile cannot be used on the GPU", "pip install triton")


def _startup() -> Iterator[Check]:
    told = "apps load dmquant's folders without importing it" if startup.is_registered() else "apps `import dmquant`"
    yield Check("start-up line", "ok", f"{told} (dmquant register, dmquant unregister)")


def _libraries() -> Iterator[Check]:
    yield _torchvision()
    for name in LIBRARIES:
        yield Check(name, "ok", importlib.metadata.version(name))
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name):
            yield Check(name, "ok", importlib.metadata.version(name))
        else:
            purpose, remedy = use.split(": ")
            yield Check(name, "missing", f"for {purpose}", remedy)


def _torchvision() -> Check:
    if importlib.util.find_spec("torchvision") is None:
        return Check("torchvision", "missing", "for CLIP and FID", "pip install torchvision")
    try:
        ensure_torchvision_imports()
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).splitlines()[0]
        return Check("torchvision", "missing", f"does not import: {reason}", "install the build that matches torch")
    version = importlib.metadata.version("torchvision")
    if importlib.import_module("torchvision.extension")._has_ops():
        return Check("torchvision", "ok", version)
    return Check("torchvision", "ok", f"{version}; its operators do not load beside this torch, and none is needed")


def _weights() -> Iterator[Check]:
    from dmquant.evaluation.networks import inception

    try:
        found = inception.find_weights()
    except UserError as error:
        detail, _, remedy = str(error).partition(": ")
        yield Check("Inception weights", "missing", f"FID is not computed; {detail}", remedy)
    else:
        yield Check("Inception weights", "ok", f"{found.backbone.name}, {found.path}")
    yield from _text_weights()


def _text_weights() -> Iterator[Check]:
    from dmquant.evaluation.networks import CLIP, clip, preference_score

    source = clip.find(CLIP)
    if path := source.cached():
        yield Check("CLIP weights", "ok", f"{source.name}, {path}")
    else:
        remedy = f"downloaded when first used ({about_text(source.weights.size)}); or --clip with a local folder"
        yield Check("CLIP weights", "missing", f"{source.name} is not in the local cache", remedy)
    for version in preference_score.FILES:
        name = f"HPSv2 {version} weights"
        file, remedy = preference_score.on_hub(version), preference_score.remedy(version)
        try:
            path = preference_score.find_given(version) or file.cached()
        except UserError as error:
            yield Check(name, "missing", str(error), remedy)
        else:
            if path:
                yield Check(name, "ok", str(path))
            else:
                remedy = f"downloaded when first used ({about_text(file.size)}); or {remedy}"
                yield Check(name, "missing", "not in the local cache", remedy)


def _models() -> Iterator[Check]:
    yield _hub()
    for spec in registered_models().values():
        yield (_embedded if spec.source.startswith(EMBEDDED) else _cached)(spec)
    others = set(hub.cached_pipelines()) - {spec.source for spec in registered_models().values()}
    if others:
        yield Check("other pipelines", "ok", f"in the local cache: {', '.join(sorted(others))}")


def _hub() -> Check:
    cache = f"cache in {constants.HF_HUB_CACHE}"
    if constants.HF_HUB_OFFLINE:
        return Check("Hub", "warn", f"offline by HF_HUB_OFFLINE; {cache}", "unset it to download")
    if hub.reachable(HUB_ANSWER_SECONDS):
        return Check("Hub", "ok", f"reachable; {cache}")
    return Check("Hub", "missing", f"not reachable; {cache}", "embedded models and local folders work without it")


def _embedded(spec: ModelSpec) -> Check:
    folder = embedded_folder(spec.source)
    try:
        folders.check_whole(folder)
    except UserError as error:
        return Check(spec.name, "missing", f"not intact: {error}", "reinstall dmquant")
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return Check(spec.name, "ok", f"in the package, {size / 1e6:.1f} MB")


def _cached(spec: ModelSpec) -> Check:
    folder = hub.cached(spec.source)
    if folder is None:
        remedy = f"downloaded when first used ({about_text(spec.download_bytes)})"
        return Check(spec.name, "missing", f"{spec.source} is not in the local cache", remedy)
    missing = folders.missing_parts(folder, frozenset(families()[spec.family].without))
    if missing:
        remedy = "the rest is downloaded when first used"
        return Check(spec.name, "warn", f"{folder} lacks {', '.join(missing)}", remedy)
    return Check(spec.name, "ok", str(folder))
