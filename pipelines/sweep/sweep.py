"""A sweep: every trial of a design space against one set of full-precision images, side by side, in one folder."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmquant.convert import plan
from dmquant.diffusers.calling import final_latents
from dmquant.errors import UserError
from dmquant.evaluation.metrics.registry import METRICS
from dmquant.evaluation.pictures import opened_inputs
from dmquant.evaluation.report.pareto_plot import Point, draw_pareto
from dmquant.host import owned, processes
from dmquant.host.console import Console
from dmquant.host.files import write_text
from dmquant.host.memory import default_budget
from dmquant.host.text import without_folders
from dmquant.host.units import time_text
from dmquant.pipelines.models.skeleton import skeleton
from dmquant.pipelines.runs import runfolder
from dmquant.pipelines.runs.calibration import calibration_data
from dmquant.pipelines.runs.model_stage import to_quantize
from dmquant.pipelines.runs.published import published
from dmquant.pipelines.runs.run import images_line, save_settings
from dmquant.pipelines.runs.runfolder import RunFolder, is_full_disk
from dmquant.pipelines.runs.settings import Settings
from dmquant.pipelines.runs.sides import FullPrecision, shared_parts
from dmquant.pipelines.runs.source import resumed_source
from dmquant.pipelines.sweep.costs import Costs, counting, fans_in, model_costs
from dmquant.pipelines.sweep.engines import ENGINES, Crew, check_alone
from dmquant.pipelines.sweep.results import BITS, VERSION, Row, as_csv, pareto_fronts, sorted_rows
from dmquant.pipelines.sweep.space import Space, Trial
from dmquant.pipelines.sweep.tables import memory_line, page, terminal_table
from dmquant.pipelines.sweep.trial import Failure, Task, run_trial, with_shared_data

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

AXES = {
    BITS: "bits a weight, scales included",
    "bit_operations": "billion bit operations a backbone call, scales left out",
    "area": "area of a multiply-accumulate, full adders, scales left out",
}
UNITS = {"bit_operations": 1e9}


class Sweep:
    """The trials of `space` in a run folder; `keep_images` keeps the images of each as well."""

    def __init__(
        self,
        space: Space,
        source: Path,
        folder: RunFolder,
        console: Console,
        engine: str,
        crew: Crew,
        keep_images: bool,
    ):
        check_alone(processes.current().count)
        self.space, self.folder, self.console = space, folder, console
        self.engine, self.crew, self.keep_images = engine, crew, keep_images
        self.common = space.trials[0].settings
        self.source = resumed_source(self.common, source, folder, console)
        self.reference = FullPrecision(self.common, self.source, folder, console)

    def finish(self) -> None:
        """Every trial, from where an earlier sweep stopped; one that fails does not stop the others.

        Raises UserError at the end if any failed.
        """
        trials = {trial.name: trial for trial in self.space.trials}
        tasks = {name: self._task(trial) for name, trial in trials.items()}
        done = {name: record for name, task in tasks.items() if (record := task.done())}
        waiting = [task for name, task in tasks.items() if name not in done]
        recipes = {name: trial.settings.recipe.to_dict() for name, trial in trials.items()}
        record = self.common.to_dict(self.source.sha256, {"trials": recipes})
        save_settings(self.folder, record)
        self.console.say(f"{self.common.model.name}: {count_line(self.space)}; {images_line(self.common)}")
        for name in done:
            if tasks[name].folder.exists():  # a sweep may have been killed before this
                tasks[name].tidy()
        self.reference.images()
        costs = self._costs()
        if waiting:
            self._capture(waiting)
        self.reference.release()
        outcomes = done | self._run(waiting, trials, done)
        shared_parts(self.common, self.source, self.folder).remove()
        rows = [Row(trial, costs[name], outcomes[name]) for name, trial in trials.items()]
        self._report(rows, record)
        if failed := [row.trial.name for row in rows if row.failed]:
            shown = ", ".join(failed[:3]) + (", ..." if len(failed) > 3 else "")
            raise UserError(
                f"{len(failed)} of {len(rows)} trials failed ({shown}); "
                "the same command tries them again and keeps what is done"
            )

    def _task(self, trial: Trial) -> Task:
        out = self.folder.path.resolve()
        given = with_shared_data(trial.settings, out, self.source.key)
        paths = {name: path.resolve() for name in ("calibration_data", "real") if (path := getattr(given, name))}
        if given.memory_budget is None and self.crew.workers > 1:
            paths["memory_budget"] = default_budget() // self.crew.workers
        return Task(replace(given, **paths), self.source, out, self.keep_images)

    def _costs(self) -> dict[str, Costs]:
        """Arithmetic costs of every trial, by its name."""
        key = self.reference.requests[0].key  # stands for weights and call
        counted = self.folder.finished("costs", key)
        if counted is None:
            counts = first_call(self.reference.load(), self.common)
            counted = self.folder.finish("costs", key, multiply_accumulates=counts)
        backbone = skeleton(
            self.source.folder / self.common.family.component
        )  # names and shapes are all that is needed
        fan_in = fans_in(backbone)
        return {
            trial.name: model_costs(
                plan(backbone, trial.settings.recipe_for(backbone)), counted["multiply_accumulates"], fan_in
            )
            for trial in self.space.trials
        }

    def _capture(self, waiting: Sequence[Task]) -> None:
        """Make the calibration data that trials share before they start; where that fails, each of them says so."""
        needed = {task.settings.calibration_data: task.settings for task in waiting if task.settings.recipe.calibrated}
        for settings in needed.values():
            try:
                pipeline = self.reference.load()
                for name in to_quantize(pipeline, settings):
                    one = settings.for_backbone(name)
                    calibration_data(pipeline, one, self.folder.path, self.console, self.source.key)
            except UserError as error:
                if is_full_disk(error):
                    raise
                self.console.say(f"note: no calibration data for {settings.recipe.name} and others like it: {error}")

    def _run(
        self, waiting: Sequence[Task], trials: dict[str, Trial], done: dict[str, dict[str, Any]]
    ) -> dict[str, dict[str, Any] | Failure]:
        """Run the waiting trials; returns the outcome of each, and prints them one by one, with the time to go."""
        if not waiting:
            self.console.say("trials: all are done")
            return {}
        left = Counter(trials[task.name].technique for task in waiting)
        clock = _Clock(left, self.crew.workers)
        for name, record in done.items():
            clock.know(trials[name].technique, record["seconds"]["trial"])
        there = f"{len(done)} are done, " if done else ""
        self.console.say(
            f"trials: {there}{len(waiting)} to do, {self.crew.workers} at once with {self.crew.threads} "
            f"thread{'s' if self.crew.threads > 1 else ''} each; {clock.to_go()}"
        )
        outcomes: dict[str, dict[str, Any] | Failure] = {}
        running = ENGINES[self.engine](run_trial, waiting, self.crew)
        with self.console.bar("trials") as bar, contextlib.closing(running):
            bar(0, len(waiting))
            for task, outcome in running:
                if isinstance(outcome, UserError):
                    outcome = Failure(str(outcome))
                outcomes[task.name] = outcome
                clock.end(trials[task.name].technique, outcome)
                self._tell(task, outcome, f"{len(outcomes)} of {len(waiting)}", clock.to_go())
                bar(len(outcomes), len(waiting))
        return outcomes

    def _tell(self, task: Task, outcome: dict[str, Any] | Failure, count: str, to_go: str) -> None:
        if isinstance(outcome, Failure):
            self.console.say(f"{count}: {task.name} failed: {outcome.reason}")
            if outcome.disk_is_full:
                raise UserError(
                    f"the disk that holds {task.sweep} is full: make room and run the same command to resume; "
                    "what is done stays"
                )
            return
        name = self.common.metrics[0]
        value = outcome["metrics"][name]["value"]
        quality = f"{name} {'not computed' if value is None else METRICS[name].text(value)}"
        seconds = time_text(outcome["seconds"]["trial"])
        self.console.say(f"{count}: {task.name}: {quality}, {outcome[BITS]:.2f} bits a weight, in {seconds}; {to_go}")

    def _report(self, rows: Sequence[Row], record: dict[str, Any]) -> None:
        """Table, page, picture and data; without a single trial that was done, none of an earlier sweep either."""
        path, metric = self.folder.path, self.common.metrics[0]
        files = (runfolder.SWEEP_DATA, runfolder.SWEEP_TABLE, runfolder.SWEEP_PAGE, runfolder.SWEEP_PLOT)
        if all(row.failed for row in rows):
            for name in files:
                owned.remove(path / name)
            return
        fronts = pareto_fronts(rows, metric)
        data = {
            "version": VERSION,
            "model": self.common.model.name,
            "metrics": list(self.common.metrics),
            "trials": [row.to_json(fronts) for row in sorted_rows(rows, metric)],
            "left_out": {name: without_folders(reason) for name, reason in self.space.left_out.items()},
            "settings": published({name: value for name, value in record.items() if name != "trials"}),
        }
        write_text(path / runfolder.SWEEP_DATA, json.dumps(data, indent=1) + "\n")
        write_text(path / runfolder.SWEEP_TABLE, as_csv(data["trials"], data["metrics"]))
        write_text(path / runfolder.SWEEP_PAGE, page(data, data["settings"]["command"]))
        images = f"{len(self.common.prompts)} images, {len(rows)} trials"
        drawn = draw_pareto(f"{data['model']}: {images}", _points(rows, metric), AXES, metric, path / files[-1])
        self.console.show(terminal_table(data["model"], data["trials"], data["metrics"]))
        for line in filter(None, (memory_line(data["trials"]), left_out_line(self.space))):
            self.console.say(line)
        shown = files if drawn else files[:-1]
        self.console.say("   ".join(f"{name.partition('.')[2]}: {path / name}" for name in shown))


class _Clock:
    """Estimates the time to go: for each technique from its finished trials, or else from all."""

    def __init__(self, left: Counter[str], workers: int):
        self._left, self._workers = left, workers
        self._seconds: dict[str, list[float]] = {}

    def know(self, technique: str, seconds: float) -> None:
        self._seconds.setdefault(technique, []).append(seconds)

    def end(self, technique: str, outcome: dict[str, Any] | Failure) -> None:
        """Count a finished trial."""
        self._left[technique] -= 1
        if not isinstance(outcome, Failure):
            self.know(technique, outcome["seconds"]["trial"])

    def to_go(self) -> str:
        """For people."""
        unknown = [technique for technique, count in self._left.items() if count and technique not in self._seconds]
        if unknown:
            return f"time to go not known before a trial of {', '.join(unknown)} is done"
        means = {technique: sum(seconds) / len(seconds) for technique, seconds in self._seconds.items()}
        seconds = sum(count * means[technique] for technique, count in self._left.items() if count) / self._workers
        ends = time.strftime("%H:%M", time.localtime(time.time() + seconds))
        return f"about {time_text(seconds)} to go, until {ends}" if seconds else "none to go"


def first_call(pipeline: "DiffusionPipeline", settings: Settings) -> dict[str, int]:
    """Multiply-accumulates of every layer in the first backbone call for one image, both guidance branches included."""
    backbone = getattr(pipeline, settings.family.component)

    def stop(module: "nn.Module", args: tuple, output: Any) -> None:
        raise _Counted

    handle = None
    with counting(backbone) as counts, contextlib.suppress(_Counted):
        handle = backbone.register_forward_hook(stop)
        try:
            call = settings.call | opened_inputs(settings.inputs.of_each_prompt()[:1] if settings.inputs else [])
            final_latents(settings.prompted(pipeline), settings.prompts[:1], settings.seed, call)
        finally:
            handle.remove()
    return counts


class _Counted(Exception):  # noqa: N818, it is no error
    """The call that counts has been made."""


def count_line(space: Space) -> str:
    """A line on the number of trials of each kind."""
    trials = space.trials
    techniques = list(dict.fromkeys(trial.technique for trial in trials))
    kinds = Counter(trial.kind for trial in trials)
    of_kinds = ", ".join(f"{count} {kind.upper() if kind != 'mixed' else kind}" for kind, count in kinds.items())
    return f"{len(trials)} trials ({of_kinds}) with {', '.join(techniques)}"


def left_out_line(space: Space) -> str:
    """A line on the combinations that no recipe allows; "" where there are none."""
    if not space.left_out:
        return ""
    name, reason = next(iter(space.left_out.items()))
    more = f", and {len(space.left_out) - 1} more" if len(space.left_out) > 1 else ""
    return f"left out: {name}: {reason}{more}"


def _points(rows: Sequence[Row], metric: str) -> list[Point]:
    points = []
    for row in rows:
        if not row.failed:
            label = " / ".join(name.rpartition("_")[2] for name in row.trial.settings.formats)
            known = {name: cost for name in AXES if (cost := row.cost(name)) is not None}
            costs = {name: cost / UNITS.get(name, 1) for name, cost in known.items()}
            points.append(Point(row.trial.technique, row.trial.kind, label, costs, row.metric(metric)))
    return points
