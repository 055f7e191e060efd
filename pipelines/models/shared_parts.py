"""The parts of a pipeline that quantization leaves as they are, on disk once for the models of several recipes.

Large files are hard links to one file, where the file system has them, and small ones copies: every model stays a whole
folder, which can be copied away or removed without the others. The large files are made read-only, since to write into
one would change all models.
"""

import json
import os
import shutil
import stat
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from dmquant.errors import UserError
from dmquant.host import owned
from dmquant.host.hashes import LARGE, sha256_once
from dmquant.pipelines.models import folders

LISTING = "parts.json"


@dataclass(frozen=True)
class SharedParts:
    """Parts in a folder in the room of a run, saved under the `key` of all that their bytes depend on."""

    folder: Path
    key: str

    def fill(self, model: Path) -> bool:
        """Put the parts into the folder of a model that is being made; False where they are not there as written."""
        names = self._as_written()
        for name in names:
            _link(self.folder / name, model / name)
        return bool(names)

    def keep(self, model: Path, backbones: Collection[str]) -> None:
        """Take the parts of a whole model, for those to come; of several processes that do so at once one does it."""
        others = [name for name in folders.components(model) if name not in backbones]
        paths = [model / folders.INDEX, *(path for name in others for path in sorted(model.glob(f"{name}/*")))]
        parts = [path.relative_to(model) for path in paths]
        unfinished = self.folder.parent / owned.UNFINISHED
        unfinished.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{self.folder.name}.", dir=unfinished))
        try:
            for name in parts:
                _link(model / name, partial / name)
            hashes = {name.as_posix(): sha256_once(partial / name) for name in parts}
            (partial / LISTING).write_text(json.dumps({"key": self.key, "sha256": hashes}, indent=1) + "\n", "utf-8")
            if not self._as_written():
                self.remove()
                partial.replace(self.folder)
        except OSError as error:
            if not self.folder.is_dir():
                raise UserError(f"cannot write {self.folder}: {error.strerror or error}") from error
        finally:
            owned.drop(partial)

    def remove(self) -> None:
        """Remove the folder; models that were made keep their parts."""
        owned.drop(self.folder)

    def _as_written(self) -> list[str]:
        """Names of the files in the folder; none where one is not what was written under this key."""
        try:
            listed = json.loads((self.folder / LISTING).read_text(encoding="utf-8"))
            hashes = listed["sha256"] if listed["key"] == self.key else {}
            whole = all(_is_here(name) and sha256_once(self.folder / name) == hashes[name] for name in hashes)
        except (OSError, ValueError, LookupError, TypeError):
            return []
        return list(hashes) if whole else []


def _is_here(name: str) -> bool:
    """Whether a relative path that a listing names leads nowhere else."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.stat().st_size >= LARGE:
        try:
            os.link(source, target)
        except OSError:  # no hard links here, or too many to one file
            pass
        else:
            _protect(target)
            return
    shutil.copyfile(source, target)


def _protect(path: Path) -> None:
    if os.name != "nt":  # where a file that is read-only cannot be removed either
        path.chmod(stat.S_IMODE(path.stat().st_mode) & ~0o222)
