import pytest

from tests.tiny import tiny_pixart


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A tiny pipeline on disk, not to be changed."""
    folder = tmp_path_factory.mktemp("models") / "pixart"
    tiny_pixart(folder)
    return folder
