"""How much each input channel of a saved model's layers matters, by the calibration data that is kept with its run."""

from pathlib import Path

import torch
from torch import nn

from dmquant.calib.data.index import INDEX
from dmquant.calib.data.store import CalibrationStore
from dmquant.calib.layers.importance import mean_squares
from dmquant.errors import UserError
from dmquant.exchange.source import Importance, Source
from dmquant.host.console import Console
from dmquant.pipelines.models import folders
from dmquant.pipelines.models.loading import resolve_device
from dmquant.pipelines.models.whole import model_class


def data_of(folder: Path) -> Path | None:
    """The newest calibration data of a run, or of the comparison that it is part of; None where there is none."""
    places = [folder, *folder.resolve().parents[:2]]
    # That of further backbones is in folders of longer names.
    found = [path for place in places for path in place.glob(f"calibration/data/????????/{INDEX}")]
    return max(found, key=lambda path: path.stat().st_mtime_ns).parent if found else None


def importance_of(source: Source, data: Path | None, console: Console) -> Importance | None:
    """The mean squares of the inputs of a saved model's Linear layers on the calibration data in `data`, if any.

    Raises UserError for data that is damaged, or whose calls the model does not take.
    """
    layers = [name for name, layer in source.layers.items() if isinstance(layer, nn.Linear)]
    if data is None or not layers:
        return None
    store, device = CalibrationStore.open(data), resolve_device("auto")
    kind = model_class(*folders.classes(source.folder)[source.component])
    backbone = kind.from_pretrained(source.folder / source.component, dtype=torch.float32).eval().to(device)
    with console.bar("what errors cost") as bar:
        try:
            return Importance(*mean_squares(backbone, layers, store, device, bar))
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"the calibration data in {data} is not for this model ({reason}): name other") from error
