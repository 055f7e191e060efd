"""How long it takes to plan a recipe that names every layer, as a calibrated model's config.json does.

    python benchmarks/planning.py

The model is the skeleton of SDXL's UNet; the recipe names each layer under its format, its input's format and its
transforms. Patterns are matched as the recipe does it, and by fnmatch for each name and pattern, which keeps 256
compiled patterns in Python 3.10 and 32,768 from 3.11 on; --cache limits it to as many as Python 3.10 has.

--matching FILE measures the matching alone on the names and patterns in FILE, which --write makes, so that a Python
without torch can run it: `python3.10 benchmarks/planning.py --matching patterns.json`. By fnmatch only every twentieth
layer is matched there, since all would take minutes.
"""

import argparse
import fnmatch
import functools
import importlib.util
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PYTHON_310 = 256
SAMPLE = 20
MATCHING = Path(__file__).parents[1] / "dmquant" / "matching.py"


def matched_by_fnmatch(patterns: list[list[str]], names: list[str]) -> list[list[int]]:
    """Indices of the rules that match each name, every pattern asked."""
    return [
        [rule for rule, globs in enumerate(patterns) if any(fnmatch.fnmatchcase(name, glob) for glob in globs)]
        for name in names
    ]


def limit_cache(size: int) -> None:
    """Have fnmatch keep so many compiled patterns."""
    fnmatch._compile_pattern = functools.lru_cache(maxsize=size)(fnmatch._compile_pattern.__wrapped__)


def resolved_recipe(names: list[str]) -> Any:
    """A recipe with the formats and transforms of every layer named, in turn one of three."""
    from dmquant.recipe import Recipe
    from dmquant.settings import Rule

    def rules(key: str, *values: Any) -> list[Rule]:
        return [Rule(match=names[index :: len(values)], **{key: value}) for index, value in enumerate(values)]

    named = [
        *rules("weights", "fp4_e2m1", "fp4_e1m2", "fp4_e3m0"),
        *rules("activations", "fp6_e2m3", "fp6_e3m2"),
        *rules("transforms", [], [{"method": "rotate"}]),
    ]
    return Recipe(name="resolved", keep="none", rules=named)


def seconds(call: Callable[[], Any], repeats: int) -> float:
    """The least processor time of several calls."""
    best = float("inf")
    for _ in range(repeats):
        began = time.process_time()
        call()
        best = min(best, time.process_time() - began)
    return best


def measure_plan(cache: int | None, write: Path | None) -> None:
    """Print the time of dmquant.convert.plan with either way of matching."""
    from models import skeleton

    from dmquant.convert import layers_in, plan
    from dmquant.recipe import Recipe

    unet = skeleton("sdxl")
    names = list(layers_in(unet))
    recipe = resolved_recipe(names)
    if write:
        write.write_text(json.dumps({"names": names, "patterns": [rule.match for rule in recipe.rules]}))
    now = seconds(lambda: plan(unet, recipe), 5)

    def by_fnmatch(self: Recipe, names: list[str]) -> dict[str, Any]:
        names = list(names)
        matched = matched_by_fnmatch([rule.match for rule in self.rules], names)
        return {name: self._merged([self.rules[i] for i in rules]) for name, rules in zip(names, matched, strict=True)}

    if cache:
        limit_cache(cache)
    Recipe.settings_by_layer = by_fnmatch
    before = seconds(lambda: plan(unet, recipe), 1)
    print(f"{len(names)} layers: plan {now:.3f} s; by fnmatch {before:.2f} s, {before / now:.0f} times as long")


def measure_matching(file: Path) -> None:
    """Print the time of the matching alone, with the standard library only."""
    spec = importlib.util.spec_from_file_location("matching", MATCHING)
    matching = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(matching)
    content = json.loads(file.read_text())
    names, patterns = content["names"], content["patterns"]

    def matched() -> list[list[int]]:
        matcher = matching.Matcher(patterns)
        return [matcher.matching(name) for name in names]

    now, some = seconds(matched, 5), names[::SAMPLE]
    before = seconds(lambda: matched_by_fnmatch(patterns, some), 1) * len(names) / len(some)
    print(f"{len(names)} layers: matching {now:.4f} s; by fnmatch {before:.1f} s, {before / now:.0f} times as long")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cache", type=int, help=f"patterns that fnmatch keeps; {PYTHON_310} in Python 3.10")
    parser.add_argument("--write", type=Path, help="write names and patterns to this file")
    parser.add_argument("--matching", type=Path, help="measure the matching alone on those of this file")
    options = parser.parse_args()
    if options.matching:
        measure_matching(options.matching)
    else:
        measure_plan(options.cache, options.write)


if __name__ == "__main__":
    main()
