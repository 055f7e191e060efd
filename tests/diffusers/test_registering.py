"""`import dmquant` costs later imports nothing, and lets through no error that they would not raise without it."""

import importlib.util
import subprocess
import sys
from types import ModuleType

import pytest

from dmquant.diffusers import registering
from dmquant.diffusers.torchvision import execute_with_operators

HEAVY = {"torch", "torchvision", "diffusers"}


def imported_by(statement):
    script = f"{statement}; import sys; print(*({HEAVY!r} & sys.modules.keys()))"
    return set(
        subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    )


def test_transformers_imports_no_more_after_dmquant_than_before():
    after = imported_by("import dmquant, transformers")
    assert not after or after <= imported_by("import transformers")


def test_asking_whether_torchvision_is_there_imports_nothing():
    assert imported_by("import dmquant, importlib.util as util; util.find_spec('torchvision')") == set()


def test_torchvision_and_clip_import_after_dmquant():
    pytest.importorskip("torchvision")
    script = "import dmquant, torchvision; from transformers import CLIPImageProcessor; import open_clip"
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", script], check=True)


@pytest.mark.parametrize("code", ["raise RuntimeError('other')", "raise ImportError('other')", "import no_such_module"])
def test_what_stops_torchvision_otherwise_is_raised_as_without_dmquant(tmp_path, code):
    (tmp_path / "torchvision.py").write_text(code)
    spec = registering._Finder().find_spec("torchvision", [str(tmp_path)])
    module = importlib.util.module_from_spec(spec)
    with pytest.raises((RuntimeError, ImportError), match=r"other|no_such_module"):
        spec.loader.exec_module(module)
    assert module.__spec__.loader is module.__loader__
    assert not isinstance(module.__loader__, registering._Watching)


def test_a_module_that_is_not_there_is_left_to_others(tmp_path):
    assert registering._Finder().find_spec("torchvision", [str(tmp_path)]) is None
    assert registering._Finder().find_spec("transformers") is None


def test_torchvision_is_executed_again_once_its_operators_are_declared(monkeypatch):
    from dmquant.diffusers import torchvision

    declared = []
    monkeypatch.setattr(torchvision, "_library", None)
    monkeypatch.setattr(
        torchvision.torch.library, "Library", lambda *name: type("Fragment", (), {"define": declared.append})
    )
    monkeypatch.setattr(torchvision, "sys", type("sys", (), {"modules": {"torchvision.half": None, "torch": None}}))

    def execute(module):
        if not declared:
            raise RuntimeError("operator torchvision::nms does not exist")

    execute_with_operators(execute, ModuleType("torchvision"))
    assert [schema.partition("(")[0] for schema in declared] == ["nms", "qnms"]
    assert torchvision.sys.modules == {"torch": None}
