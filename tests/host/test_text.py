"""Text of others: shown and stored without what would act, back as it was, and without the folders of a machine."""

import json
import re

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from dmquant.host.text import (
    CONTROLS,
    bounded,
    command_without_folders,
    escaped,
    file_name,
    json_text,
    replaced,
    unescaped,
    visible,
    without_folders,
    yaml_text,
)

HARMFUL = re.compile(f"[{CONTROLS}]")
texts = st.text(st.characters(), max_size=20) | st.text("\\u0019\x1b\u202e\x9b", max_size=12)


@given(texts)
@example("\x1b]0;title\x07")
@example("\u202egnp.exe")
@example("\ud800")
def test_nothing_that_acts_is_left(text):
    assert not HARMFUL.search(visible(text) + escaped(text) + replaced(text))
    assert "\n" not in visible(text)
    assert len(replaced(text)) == len(text)


@given(texts)
@example("\\u001b")
@example("\\\\u001b\x1b")
def test_stored_text_comes_back_as_it_was(text):
    assert unescaped(escaped(text)) == text


@given(texts)
def test_json_and_yaml_hold_the_text_and_no_control_characters(text):
    assert json.loads(json_text({text: [text]})) == {text: [text]}
    assert not HARMFUL.search(json_text({text: text}, indent=1) + yaml_text({"x": text}))


def test_readable_text_stays_readable():
    assert json_text("größe 🍎") == '"größe 🍎"'
    assert yaml_text({"b": "größe", "a": 1}) == "b: größe\na: 1\n"
    assert yaml.safe_load(yaml_text({"b": "\u202e"})) == {"b": "\u202e"}


def test_a_long_message_keeps_its_ends():
    assert bounded("a" * 10_000 + "z", 20) == "aaaaaaaaaa ... aaaaaaaaaz"


COMMANDS = {
    "dmquant run /home/me/pipe --out=/home/me/o": "dmquant run pipe --out=o",
    "dmquant compare some/m --recipes rtn,/abs/mine.yaml:fp4": "dmquant compare m --recipes rtn,mine.yaml:fp4",
    "dmquant run m --prompts ~/x/c.csv:caption --real ~bob/y/": "dmquant run m --prompts c.csv:caption --real y",
    r"dmquant run 'C:\Users\me\x' --out '/home/me/my out'": "dmquant run x --out 'my out'",
    "dmquant run ../../home/me/x --out $HOME/y --real file:///home/me/z": "dmquant run x --out y --real file:z",
    "dmquant run A/B --clip hf-hub:C/D --out /home/me": "dmquant run A/B --clip hf-hub:C/D --out '~'",
    "dmquant run '/home/me/x": "dmquant run 'x",
}


@pytest.mark.parametrize(("command", "shared"), COMMANDS.items())
def test_a_command_names_files_without_their_folders(monkeypatch, command, shared):
    monkeypatch.setenv("HOME", "/home/me")
    assert command_without_folders(command, keep="A/B") == shared


SENTENCES = {
    "report: /home/me/r/report.html   grid: r/grid.png": "report: report.html   grid: r/grid.png",
    "no weights in ~/.cache/x.pt, nor in '/opt/a b'": "no weights in x.pt, nor in 'a b'",
    "see https://example.org/x/y, 3/4 of 1/255 and/or": "see https://example.org/x/y, 3/4 of 1/255 and/or",
    "/home/me": "~",
    "stopped: /home/me/a/b.json is damaged": "stopped: b.json is damaged",
}


@pytest.mark.parametrize(("sentence", "shared"), SENTENCES.items())
def test_a_sentence_names_files_without_their_folders(monkeypatch, sentence, shared):
    monkeypatch.setenv("HOME", "/home/me")
    assert without_folders(sentence) == shared


def test_where_there_is_no_home_paths_are_names_all_the_same(monkeypatch):
    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    assert without_folders("in /a/b/c") == "in c"
    assert file_name("/") == "."
