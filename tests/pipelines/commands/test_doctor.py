import shutil

import huggingface_hub
import pytest

from dmquant.cpu import compiling, floating
from dmquant.pipelines.commands import doctor
from dmquant.pipelines.models import hub
from dmquant.pipelines.models.registry import registered_models


@pytest.fixture
def checks(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub, "reachable", lambda seconds: False)
    return {check.name: check for check in doctor.examine()}


def test_every_model_library_and_weight_has_its_line(checks):
    assert {"Python", "torch", "memory", "disk", "torchvision", "Hub", "Inception weights"} <= checks.keys()
    assert {*doctor.LIBRARIES, *registered_models()} <= checks.keys()


def test_every_kernel_has_its_line_and_what_it_lacks(checks, monkeypatch):
    assert (checks["kernel cpu"].status, checks["kernel reference"].status) == ("ok", "ok")
    monkeypatch.setattr(floating.Cpu, "missing", lambda self: "no CPU: buy one")
    found = {check.name: check for check in doctor._kernels()}["kernel cpu"]
    assert (found.status, found.detail, found.remedy) == ("missing", "no CPU", "buy one")


def test_without_pythons_headers_torch_compile_is_not_said_to_work(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    compiling.missing_to_compile.cache_clear()
    try:
        assert compiling.missing_to_compile()
        found = doctor._compiler()
        assert (found.name, found.status) == ("torch.compile", "missing")
        assert "install" in found.remedy
    finally:
        monkeypatch.undo()
        compiling.missing_to_compile.cache_clear()


def test_what_is_missing_comes_with_a_remedy_and_what_is_there_without(checks):
    for check in checks.values():
        assert (check.status == "ok") == (not check.remedy), check
        assert "\n" not in check.detail + check.remedy


def test_a_model_that_is_not_cached_says_what_its_download_takes(checks):
    assert checks["pixart-sigma"].status == "missing"
    assert "21.8 GB" in checks["pixart-sigma"].remedy


def test_the_embedded_model_is_intact(checks):
    assert checks["emoji-pixart"].status == "ok", checks["emoji-pixart"].detail


def test_a_damaged_embedded_model_is_reported_and_not_raised(tmp_path, monkeypatch):
    spec = registered_models()["emoji-pixart"]
    damaged = shutil.copytree(doctor.embedded_folder(spec.source), tmp_path / "emoji")
    weights = next(damaged.glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    monkeypatch.setattr(doctor, "embedded_folder", lambda source: damaged)
    check = doctor._embedded(spec)
    assert check.status == "missing"
    assert weights.name in check.detail


def test_weights_of_text_metrics_say_how_big_they_are_and_where_they_are_found(checks, tmp_path, monkeypatch):
    assert "1.71 GB" in checks["CLIP weights"].remedy
    assert "3.94 GB" in checks["HPSv2 2.1 weights"].remedy
    (tmp_path / "HPS_v2.1_compressed.pt").touch()
    monkeypatch.setenv("DMQUANT_HPSV2", str(tmp_path))
    found = {check.name: check for check in doctor.examine()}
    assert (found["HPSv2 2.1 weights"].status, found["HPSv2 2.0 weights"].status) == ("ok", "missing")
    monkeypatch.setenv("DMQUANT_HPSV2", str(tmp_path / "absent"))
    broken = {check.name: check for check in doctor.examine()}["HPSv2 2.1 weights"]
    assert "not a folder" in broken.detail
