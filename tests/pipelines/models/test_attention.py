"""Attention backends by environment variable: one that is not installed is told before any work, not in its middle."""

import pytest

from dmquant.errors import UserError
from dmquant.pipelines.models.attention import VARIABLE, check_attention
from tests.tiny import tiny_flux, tiny_sd


@pytest.mark.parametrize(("backend", "advice"), [("flash", "flash-attn"), ("xformers", "xformers")])
def test_a_backend_that_is_not_installed_is_one_line_with_what_to_install(backend, advice, monkeypatch):
    monkeypatch.setenv(VARIABLE, backend)
    transformer = tiny_flux().transformer
    with pytest.raises(UserError, match=f"{VARIABLE}={backend}: .*install.*{advice}.*unset {VARIABLE}") as refused:
        check_attention(transformer)
    assert "\n" not in str(refused.value)


def test_a_backend_that_is_there_is_taken(monkeypatch):
    monkeypatch.setenv(VARIABLE, "native")
    transformer = tiny_flux().transformer
    check_attention(transformer)
    backends = {module.processor._attention_backend for module in transformer.modules() if hasattr(module, "processor")}
    assert {backend.value for backend in backends} == {"native"}


def test_without_the_variable_or_with_a_backbone_that_does_not_read_it_nothing_is_checked(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    check_attention(tiny_flux().transformer)
    monkeypatch.setenv(VARIABLE, "flash")
    check_attention(tiny_sd().unet)
