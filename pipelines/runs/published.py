"""The settings of run.yaml as reports show them: of files and folders of this machine, their names alone."""

import os
from typing import Any

from dmquant.evaluation.result import Metric
from dmquant.host.text import command_without_folders, file_name, without_folders


def published(settings: dict[str, Any]) -> dict[str, Any]:
    """A copy of the content of run.yaml; the id of a model on the Hub stays, in the command as well."""
    model, calibration = settings["model"], settings.get("calibration", {})
    data = {name: name_of(path) for name, path in calibration.items() if name == "data" and path}
    source = name_of(model["source"])
    return settings | {
        "model": model | {"source": source},
        "calibration": calibration | data,
        "real": settings["real"] and name_of(settings["real"]),
        "clip": without_folders(settings.get("clip") or ""),
        "command": command_without_folders(settings.get("command", ""), keep=source),
    }


def name_of(source: str) -> str:
    """The last part of an absolute path; anything else as it is."""
    return file_name(source) if os.path.isabs(os.path.expanduser(source)) else source


def published_metric(metric: Metric) -> Metric:
    """A metric whose remarks name files without the folders above them."""
    texts = {name: without_folders(text) for name in ("reason", "note") if (text := getattr(metric, name))}
    return Metric(**vars(metric) | texts)
