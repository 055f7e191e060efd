"""A start-up line in a Python environment, on request, by which apps load dmquant's folders without importing it.

Python runs the lines of .pth files when it starts. Ours puts a finder on the imports, which imports dmquant when
diffusers or transformers import the registry of their quantizers, and nothing before.
"""

import sysconfig
from pathlib import Path

from dmquant.errors import UserError

NAME = "dmquant_register.pth"
FINDER = """
class DmquantFinder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in ("diffusers.quantizers.auto", "transformers.quantizers.auto"):
            return None
        if DmquantFinder in sys.meta_path:
            sys.meta_path.remove(DmquantFinder)
        try:
            import dmquant
        except ImportError:
            return None
        return next((spec for one in sys.meta_path if (spec := one.find_spec(name, path, target))), None)

sys.meta_path.insert(0, DmquantFinder)
"""
"""Imports dmquant, whose own finder is then the first, unless that was taken out of the environment since."""
LINE = f"""# Written by `dmquant register`; `dmquant unregister` removes it.
import sys; exec({FINDER!r}, {{"sys": sys}})
"""
"""A .pth file has lines of one statement, and to import a module would cost five times as much."""


def file() -> Path:
    """Where the start-up line of this environment is, or would be."""
    return Path(sysconfig.get_paths()["purelib"]) / NAME


def is_registered() -> bool:
    """Whether the start-up line is in this environment, as this dmquant writes it."""
    return file().is_file() and file().read_text("utf-8") == LINE


def register() -> Path:
    """Write the start-up line, and return its file. UserError where that is not allowed."""
    try:
        file().write_text(LINE, "utf-8")
    except OSError as error:
        raise UserError(
            f"cannot write {file()}: {error.strerror}: use an environment of your own, or `import dmquant` in the app"
        ) from error
    return file()


def unregister() -> Path | None:
    """Take the start-up line away; its file, None where there was none. UserError where that is not allowed."""
    try:
        file().unlink()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot remove {file()}: {error.strerror}: remove it yourself") from error
    return file()
