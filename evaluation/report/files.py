"""The files that say what a run found: report.json, report.md and report.html."""

import json
from pathlib import Path

from dmquant.errors import UserError
from dmquant.evaluation.progress import Progress, silent
from dmquant.evaluation.report.markdown import render_markdown
from dmquant.evaluation.report.page import render_html
from dmquant.evaluation.result import VERSION, Report
from dmquant.host.files import write_text
from dmquant.host.text import json_text

JSON_NAME = "report.json"


def write_report(folder: Path, report: Report, progress: Progress = silent) -> None:
    """Write report.json, report.md and report.html to the run folder `folder`, each whole or not at all.

    The images are where `Measured.images` says; report.md shows grid.png and compare.png if they are there. Raises
    UserError, before anything is written, when an image folder does not hold one readable image per prompt.
    """
    folder = Path(folder)
    contents = {
        JSON_NAME: json_text(report.to_json(), indent=2) + "\n",
        "report.md": render_markdown(folder, report),
        "report.html": render_html(folder, report, progress),
    }
    for name, text in contents.items():
        write_text(folder / name, text)


def read_report(folder: Path) -> Report:
    """The report in the run folder `folder`; raises UserError when there is none or it cannot be read."""
    path = Path(folder) / JSON_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        version = data["version"]
        if version != VERSION:
            raise UserError(f"{path} is version {version}; this dmquant reads version {VERSION}")
        return Report.from_json(data)
    except FileNotFoundError:
        raise UserError(f"no {JSON_NAME} in {folder}: is it the folder of a finished run?") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}): run the command that made it again"
        ) from error
