"""The design space: which formats of how many bits meet in a trial, and with which techniques."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from dmquant.errors import UsageError
from dmquant.formats import FloatFormat, IntFormat, get_format
from dmquant.pipelines.runs.defaults import SWEEP_BITS, SWEEP_TECHNIQUES
from dmquant.pipelines.runs.settings import Options, Settings, resolve, with_recipe
from dmquant.pipelines.sweep.costs import BITS_LEFT_ALONE, bits_of

FLOAT, INTEGER, LEFT_ALONE = "fp", "int", "none"
KINDS = {FloatFormat: FLOAT, IntFormat: INTEGER}
FEWEST, MOST = 2, 8
_RANGE = re.compile(r"(\d{1,3})(?:-(\d{1,3}))?")


@dataclass(frozen=True)
class Choice:
    """The part of the design space to try, as typed; the two lists of bits stand in place of `bits`."""

    bits: str = SWEEP_BITS
    weight_bits: str | None = None
    activation_bits: str | None = None
    formats: str | None = None
    techniques: str = SWEEP_TECHNIQUES
    everything: bool = False


@dataclass(frozen=True)
class Trial:
    """A point of the space: a technique with the formats of weights and activations, all named in `settings`."""

    technique: str
    settings: Settings

    @property
    def name(self) -> str:
        return self.settings.recipe.name

    @property
    def kind(self) -> str:
        """`fp`, `int`, or `mixed` where the two formats are of different kinds."""
        kinds = {kind_of(name) for name in self.settings.formats} - {LEFT_ALONE}
        return kinds.pop() if len(kinds) == 1 else "mixed"


@dataclass(frozen=True)
class Space:
    """The trials in the order in which they are done, and the combinations that no recipe allows, with the reason."""

    trials: list[Trial]
    left_out: dict[str, str]


def design_space(options: Options, choice: Choice) -> Space:
    """Every trial that was asked for; the first ones are of every technique, so that their time is soon known.

    Raises UsageError for what cannot be read, an unknown recipe or format, and where nothing is left.
    """
    pairs = format_pairs(choice)
    sources = dict.fromkeys(source.strip() for source in choice.techniques.split(",") if source.strip())
    if not sources:
        raise UsageError("--techniques is empty: name at least one recipe, such as rtn")
    bases = {source: resolve(replace(options, recipe=source)) for source in sources}
    names = [base.recipe.name for base in bases.values()]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UsageError(f"two of the techniques are called '{twice.pop()}': give one another name in its file")
    first = next(iter(bases.values()))
    trials, left_out = [], {}
    for (weights, activations), (source, base) in product(pairs, bases.items()):
        try:
            trials.append(Trial(base.recipe.name, with_recipe(first, source, weights, activations)))
        except UsageError as error:
            left_out[f"{base.recipe.name}-{weights}-{activations}"] = str(error)
    if not trials:
        raise UsageError(f"no trial is left: {next(iter(left_out.values()))}")
    return Space(trials, left_out)


def format_pairs(choice: Choice) -> list[tuple[str, str]]:
    """Formats of weights and activations that meet: of one kind, activations of no fewer bits; or all of them."""
    weight_bits = parse_bits(choice.weight_bits or choice.bits, "--w-bits" if choice.weight_bits else "--bits")
    activation_bits = (
        parse_bits(choice.activation_bits, "--a-bits", BITS_LEFT_ALONE)
        if choice.activation_bits
        else parse_bits(choice.bits, "--bits")
    )
    weights, activations = (formats_of(bits, choice.formats) for bits in (weight_bits, activation_bits))
    pairs = [pair for pair in product(weights, activations) if choice.everything or _is_sensible(*pair)]
    if not pairs:
        raise UsageError(
            "no pair of formats is left: weights and activations of one kind meet where the activations have no "
            "fewer bits; widen --w-bits, --a-bits or --formats, or add --all"
        )
    return pairs


def formats_of(bits: Sequence[int], listed: str | None = None) -> list[str]:
    """Every fpN_eXmY and intN of these bits, or those of them that `listed` names: `fp`, `int`, or formats."""
    every = [name for count in bits for name in _formats(count)]
    if listed is None:
        return every
    names = [name.strip().lower() for name in listed.split(",") if name.strip()]
    if not names:
        raise UsageError("--formats is empty: name fp, int or formats such as fp4_e2m1,int4")
    wanted = {name if name in KINDS.values() else get_format(name).name for name in names}
    kept = [name for name in every if name == LEFT_ALONE or name in wanted or kind_of(name) in wanted]
    more = [name for name in wanted if name not in KINDS.values() and get_format(name).bits in bits]
    return [*kept, *sorted(set(more) - set(kept))]


def parse_bits(text: str, option: str, besides: int | None = None) -> tuple[int, ...]:
    """Numbers of bits from `3-8`, `4` or `3,4,6-8`, ascending; `besides` is allowed as well."""
    found: set[int] = set()
    for part in filter(None, (part.strip() for part in text.split(","))):
        match = _RANGE.fullmatch(part)
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not (FEWEST <= low <= high <= MOST or low == high == besides):
            also = f", or {besides} for activations that are left alone" if besides else ""
            raise UsageError(f"{option} '{text[:40]}': write bits from {FEWEST} to {MOST} as 3-8 or 4,6,8{also}")
        found |= set(range(low, high + 1))
    if not found:
        raise UsageError(f"{option} is empty: write bits as 3-8 or 4,6,8")
    return tuple(sorted(found))


def kind_of(name: str) -> str:
    """`fp`, `int`, `none`, or the format's own name where it is neither."""
    return LEFT_ALONE if name == LEFT_ALONE else KINDS.get(type(get_format(name)), name)


def bits_in(name: str) -> int:
    """Bits of a format; 16 for `none`."""
    return bits_of(None if name == LEFT_ALONE else get_format(name))


def _formats(bits: int) -> list[str]:
    if bits == BITS_LEFT_ALONE:
        return [LEFT_ALONE]
    return [*(f"fp{bits}_e{exponent}m{bits - 1 - exponent}" for exponent in range(1, bits)), f"int{bits}"]


def _is_sensible(weights: str, activations: str) -> bool:
    same_kind = activations == LEFT_ALONE or kind_of(weights) == kind_of(activations)
    return same_kind and bits_in(activations) >= bits_in(weights)
