"""The card beside an exported model: what was measured, on what, with what; what was kept, and what is exact."""

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence

from torch import nn

from dmquant import __version__
from dmquant.diffusers.families import GENERIC, families, family_of_backbone
from dmquant.evaluation.metrics.lpips import LPIPS
from dmquant.evaluation.metrics.psnr import PSNR
from dmquant.evaluation.report import wording
from dmquant.evaluation.report.markdown import cell, code, fenced, markdown_table
from dmquant.exchange.interfaces import Exported, Foreign, ForeignFormat, ForeignLayer
from dmquant.exchange.layers import kind_of, rounded_by
from dmquant.exchange.source import Source
from dmquant.host.text import command_without_folders, visible, without_folders
from dmquant.pipelines.models.registry import registered_models
from dmquant.pipelines.runs.evidence import Evidence

GATE = 0.1
"""LPIPS against full precision up to which those who put quantized models into engines take one."""
MARK = "<!-- evidence card of dmquant -->"
MEASURED = ("images", "seed", "steps", "guidance", "size", "dtype", "device")
RECIPES_OWN = "the recipe's rules"


def evidence_card(
    source: Source,
    target: ForeignFormat,
    written: Exported,
    read: Foreign | None,
    evidence: Evidence | str,
    picture: str | None,
) -> str:
    """The card in Markdown, without a heading of its own level one.

    `read` is the export as its reader opens it, None where only its engine does; `evidence` the run or why there is
    none; `picture` the name of the picture of pairs, if there is one.
    """
    name = written.path.name
    parts = [
        MARK,
        f"## What {cell(name)} is",
        _identity(source, target, written, evidence),
        _exactness(source, written, read, name),
        "## Same prompt, seed and noise: full precision and quantized",
        *(_measured(evidence, name, picture) if isinstance(evidence, Evidence) else [_unmeasured(evidence, name)]),
        "## What was kept in high precision, and why",
        _kept(source),
        "## Versions",
        markdown_table(("package", "version"), _versions(evidence).items()),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _identity(source: Source, target: ForeignFormat, written: Exported, evidence: Evidence | str) -> str:
    model = evidence.report.model if isinstance(evidence, Evidence) else None
    base = str(evidence.report.settings.get("source", "")) if isinstance(evidence, Evidence) else ""
    spec = registered_models().get(model or "")
    rows = [
        ("engine and format", target.title),
        ("layers", ", ".join(f"{count} in {name}" for name, count in written.formats.items())),
        ("backbone", type(source.backbone).__name__),
        ("base model", f"{model} ({without_folders(base)})" if model else "not recorded in the folder"),
        ("licence of the base model", spec.license if spec and spec.license else "see the base model"),
        ("recipe", source.recipe.name),
        ("exported by", f"dmquant {__version__}"),
    ]
    return markdown_table(("", ""), rows)


def _exactness(source: Source, written: Exported, read: Foreign | None, name: str) -> str:
    """Whether scores of what dmquant saved are scores of the export."""
    lines = [
        "Weights are exact: what a reader decodes is, bit for bit, what dmquant computes with."
        if written.exact
        else f"Weights were **quantized again** for this format: scores below are of the model before that. "
        f"Those of the file itself: {code(f'dmquant compare MODEL --recipes file:{name}')}."
    ]
    if read is not None:
        ours, theirs = (Counter(map(_input, each.layers.values())) for each in (source, read))
        if set(ours) != set(theirs):
            lines.append(f"The engine's inputs: {_told(theirs)}. Those that the scores below are with: {_told(ours)}.")
    return "\n\n".join([*lines, *(f"Note: {cell(note)}." for note in written.notes)])


def _input(layer: nn.Module | ForeignLayer) -> str:
    engine = rounded_by(layer.activations)
    return (kind_of(layer.activations) or "not rounded") + (f" as {engine} rounds them" if engine else "")


def _told(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} in {count} layers" for name, count in counts.items())


def _unmeasured(why: str, name: str) -> str:
    command = f"dmquant compare MODEL --recipes file:{name} --metrics psnr,lpips"
    return (
        f"**Nothing was measured**: {cell(why)}. With MODEL for the base model, this measures it:\n\n{fenced(command)}"
    )


def _measured(evidence: Evidence, name: str, picture: str | None) -> list[str]:
    report, result = evidence.report, evidence.result
    given = {key: report.settings[key] for key in MEASURED if key in report.settings}
    rows = [
        (
            wording.metric_title(metric, found),
            wording.metric_value(metric, found),
            wording.metric_interval(metric, found),
            wording.metric_spread(metric, found),
            str(found.images),
            wording.backbone_text(found.backbone),
        )
        for metric, found in result.metrics.items()
        if found.value is not None
    ]
    header = ("metric", "value", "95 % interval", "median and worst", "images", "through")
    return [
        f"![Pairs: full precision and quantized]({picture})" if picture else "",
        markdown_table(header, rows),
        _gate(evidence, name),
        "; ".join(f"{key}: {cell(without_folders(str(value)))}" for key, value in given.items()) + ".",
        fenced(visible(command_without_folders(report.command, str(report.settings.get("source", ""))))),
        f"<details><summary>{len(report.prompts)} prompts</summary>\n\n{_prompts(report.prompts)}\n\n</details>",
    ]


def _gate(evidence: Evidence, name: str) -> str:
    """LPIPS against the gate: the mean, and the share of pairs above."""
    metric, values = evidence.result.metrics.get(LPIPS.name), evidence.values.get(LPIPS.name)
    if metric is None or metric.value is None or not values:
        why = metric.reason if metric is not None and metric.reason else "the run was not asked for it"
        command = f"dmquant compare MODEL --recipes file:{name} --metrics {PSNR.name},{LPIPS.name}"
        return f"LPIPS against the gate of {GATE}: not measured ({cell(str(why))}). {code(command)} measures it."
    above = sum(value > GATE for value in values)
    verdict = "below" if metric.value <= GATE else "**above**"
    return (
        f"LPIPS against the gate of {GATE} that integrators use: the mean is {verdict} it, "
        f"{above} of {len(values)} pairs ({above / len(values):.0%}) are above."
    )


def _prompts(prompts: Sequence[str]) -> str:
    return "\n".join(f"{number}. {cell(prompt)}" for number, prompt in enumerate(prompts))


def _kept(source: Source) -> str:
    """The layers that are not quantized, by the reason that the model's family gives for them."""
    backbone, family = source.backbone, family_of_backbone(type(source.backbone).__name__) or families()[GENERIC]
    reasons = family.known(backbone).keep
    rows: Counter[tuple[str, str]] = Counter()
    for name, module in backbone.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and name not in source.layers:
            glob = next((glob for glob in reasons if fnmatch.fnmatchcase(name, glob)), None)
            rows[glob or name, reasons.get(glob, RECIPES_OWN)] += 1
    table = [(layer, str(count), why) for (layer, why), count in rows.items()]
    return markdown_table(("layers", "count", "why"), table) or "Every linear layer and convolution is quantized."


def _versions(evidence: Evidence | str) -> Mapping[str, str]:
    return evidence.report.versions if isinstance(evidence, Evidence) else {"dmquant": __version__}
