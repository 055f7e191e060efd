"""`dmquant register` and `unregister`: apps without an import, nothing imported early, nothing left behind."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from dmquant.pipelines.commands import startup
from dmquant.pipelines.commands.app import app

SCRIPT = """
import site, sys
site.addsitedir(sys.argv[1])
assert not {"dmquant", "torch", "diffusers"} & sys.modules.keys()
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert sys.argv[2] == ("dmquant" if "dmquant" in AUTO_QUANTIZER_MAPPING else "nothing"), sys.argv[2]
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder that stands for the environment's packages."""
    monkeypatch.setattr(startup.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    return tmp_path


def run(*command):
    return CliRunner().invoke(app, command)


def in_an_app(place, expected):
    subprocess.run([sys.executable, "-c", SCRIPT, str(place), expected], check=True)


def test_an_app_without_an_import_finds_the_quantizer_and_after_unregistering_does_not(place):
    assert run("register").exit_code == 0
    assert startup.is_registered()
    in_an_app(place, "dmquant")
    assert run("register").exit_code == 0  # again: nothing changes
    assert run("unregister").output == f"removed: {place / startup.NAME}\n"
    assert not list(place.iterdir())
    in_an_app(place, "nothing")
    assert "there is no start-up line" in run("unregister").output


def test_a_start_up_line_whose_dmquant_is_gone_disturbs_nobody(place):
    startup.register()
    gone = "import sys; sys.modules['dmquant'] = None\n"  # as if it were not installed
    subprocess.run([sys.executable, "-c", gone + SCRIPT.replace('"dmquant", ', ""), str(place), "nothing"], check=True)


def test_an_environment_that_cannot_be_written_is_said_in_one_line(place, monkeypatch):
    (place / startup.NAME).mkdir()
    said = run("register")
    assert said.exit_code == 1
    assert said.output.count("\n") == 1
    assert said.output.startswith("error: cannot write ")
