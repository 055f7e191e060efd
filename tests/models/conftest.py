"""One tiny pipeline and quick options, for the tests of what commands leave on disk."""

import pytest

from dmquant.pipelines.runs.settings import Options
from tests.tiny import tiny_pixart

PROMPTS = ["red apple, food", "blue cat"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """A pipeline folder, not to be changed."""
    folder = tmp_path_factory.mktemp("tiny-model") / "tiny"
    tiny_pixart(folder)
    return folder


@pytest.fixture(scope="session")
def quick(tiny_model, tmp_path_factory):
    """Options of a quick run, with some replaced."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))

    def build(**changes):
        given = {"model": str(tiny_model), "recipe": "rtn", "prompts": str(prompts), "steps": 1, "dtype": "fp32"}
        return Options(**(given | {"device": "cpu", "metrics": "psnr"} | changes))

    return build
