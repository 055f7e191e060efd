"""Every command in README.md and docs/ is one that there is: its options, model, recipes, files and targets."""

import argparse
import itertools
import re
import runpy
import shlex
import sys

import pytest
import typer

from dmquant.errors import UserError
from dmquant.pipelines.commands.app import app
from dmquant.pipelines.models.registry import registered_models
from dmquant.pipelines.runs.defaults import PURPOSES
from dmquant.recipe import Recipe
from tests.documentation.pages import PAGES, ROOT, commands

DMQUANT = typer.main.get_command(app)
LEFT_OPEN = re.compile(r"[A-Z_]+|.*[$/\\].*|\.\.\.|file:.*|.*\.(yaml|safetensors)")  # DIR, $R, a path: the reader's
OTHER_MODULES = ("pytest", "tests.faults", "accelerate.commands.launch")


class Parsed(BaseException):
    """Raised where a script has read its command line, so that it does nothing else."""


def faults(command):
    """Why a command would be refused, as a line; none where it would run."""
    check = {"dmquant": of_dmquant, "python": of_python, "make": of_make}[command.words[0]]
    return [f"{command}: {fault}" for fault in check(list(command.words[1:]))]


def of_dmquant(words):
    if words[0].startswith("-"):
        return
    if "--help" in words:
        words = words[:1]
    if words[0] not in DMQUANT.commands:
        yield f"there is no dmquant {words[0]}"
        return
    try:
        DMQUANT.commands[words[0]].make_context(words[0], words[1:])
    except Exception as error:
        if type(error).__name__ not in ("MissingParameter", "NoArgsIsHelpError"):  # running text leaves out the rest
            yield str(getattr(error, "message", error))
    if "model" in {parameter.name for parameter in DMQUANT.commands[words[0]].params}:
        model = next((word for word in words[1:2] if not word.startswith("-")), "MODEL")
        if model not in registered_models() and not LEFT_OPEN.fullmatch(model):
            yield f"{model} is no registered model"
    yield from of_recipes(words)
    for option, purpose in itertools.pairwise(words):
        if option == "--for" and purpose not in PURPOSES:
            yield f"nothing is made for {purpose}"


def of_recipes(words):
    for option, listed in itertools.pairwise(words):
        if option not in ("--recipe", "--recipes"):
            continue
        for entry in listed.split(","):
            name, *formats = entry.split(":")
            if LEFT_OPEN.fullmatch(entry) or LEFT_OPEN.fullmatch(name):
                continue
            try:
                Recipe.load(name, **dict(zip("wa", formats, strict=False)))
            except UserError as error:
                yield str(error)


def of_python(words):
    if words[0] == "-m":
        if words[1] not in OTHER_MODULES:
            yield f"{words[1]} is none of {', '.join(OTHER_MODULES)}"
        elif words[1] == "pytest":
            yield from (f"there is no {word}" for word in words[2:] if "/" in word and not (ROOT / word).exists())
        return
    if not words[0].endswith(".py"):
        return
    if not (ROOT / words[0]).is_file():
        yield f"there is no {words[0]}"
        return
    if len(words) > 1 and (fault := refused_by_argparse(words)):
        yield fault


def refused_by_argparse(words):
    """What the parser of a script of ours says of its arguments; the script goes no further than that."""
    read = argparse.ArgumentParser.parse_known_args

    def stop(self, args=None, namespace=None):
        left = read(self, args, namespace)[1]
        raise Parsed(f"unrecognized arguments: {shlex.join(left)}" if left else "")

    def refuse(self, message):
        raise Parsed(message)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [word for word in words if word != "..."])
        patched.setattr(sys, "path", [str(ROOT / words[0].rpartition("/")[0]), *sys.path])
        patched.setattr(argparse.ArgumentParser, "parse_args", stop)
        patched.setattr(argparse.ArgumentParser, "error", refuse)
        try:
            runpy.run_path(str(ROOT / words[0]), run_name="__main__")
        except Parsed as end:
            return str(end)
        except ModuleNotFoundError as error:
            if error.name.partition(".")[0] in ("dmquant", "benchmarks"):
                raise
            return ""  # another library, which is not installed here
    return "it reads no command line"


def of_make(words):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    return [f"make has no target {word}" for word in words if word not in targets]


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_taken(page):
    found = [fault for command in commands(page) for fault in faults(command)]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "words",
    [
        "dmquant run emoji-pixart --rcipe rtn",
        "dmquant run emoji-pixart --recipe no-such",
        "dmquant run emoji-pixel",
        "dmquant run emoji-pixart --for no-engine",
        "dmquant compare emoji-pixart --recipes default:fp4:fp99",
        "dmquant forget",
        "python benchmarks/methods.py --no-such 1",
        "python benchmarks/no_such.py",
        "make nothing",
    ],
)
def test_what_is_not_there_is_found(words):
    from tests.documentation.pages import Command

    assert faults(Command("page", 1, tuple(shlex.split(words))))


def test_commands_are_found_where_pages_have_them():
    assert len(commands("README.md")) >= 15
    assert sum(len(commands(page)) for page in PAGES) >= 200
