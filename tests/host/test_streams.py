"""Standard streams that cannot show or take what is printed: the command goes on, and its end says so."""

import subprocess
import sys

import pytest

SAY = """
import sys
from dmquant.pipelines.commands.app import main
from dmquant.pipelines.commands.command import command

@command()
def say():
    from dmquant.host.console import Console
    console = Console()
    for number in range(2000):
        console.say(f"\u2191 größe\u2026 {number}")
    open("made", "w").write("made")

sys.argv = ["dmquant", "say"]
main()
"""


@pytest.fixture
def run(tmp_path):
    def start(where, encoding="utf-8"):
        environment = {"PYTHONIOENCODING": encoding, "HOME": "/nowhere", "SAY": SAY}
        shell = ["/bin/sh", "-c", f'{sys.executable} -c "$SAY" {where}']
        done = subprocess.run(shell, env=environment, cwd=tmp_path, capture_output=True)
        assert (tmp_path / "made").read_text() == "made"
        return done

    return start


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_characters_that_a_terminal_lacks_are_replaced(run, encoding):
    done = run("", encoding)
    assert (done.returncode, done.stderr) == (0, b"")
    shown = done.stdout.decode(encoding).splitlines()[0]
    assert shown == {"ascii": "^ gr??e... 0", "latin-1": "^ größe... 0", "cp1252": "^ größe… 0"}[encoding]


def test_output_that_is_closed_ends_nothing(run):
    done = run(">&-")
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_full_disk_behind_the_output_is_said_at_the_end(run):
    done = run(">/dev/full")
    assert done.returncode == 1
    assert done.stderr.startswith(b"error: standard output cannot be written: No space left on device")
    assert done.stderr.count(b"\n") == 1


def test_a_reader_that_has_gone_is_no_error_to_speak_of(run):
    done = run("| :; true")
    assert (done.returncode, done.stderr) == (0, b"")


def test_errors_that_nobody_can_read_do_no_harm(run):
    assert run("2>&-").returncode == 0
