"""A start-up line in a Python environment, on request, by which apps load dmquant's folders without importing it.

Python runs the lines of .pth files when it starts. Ours puts a finder on the imports, which imports dmquant when
diffusers or transformers import the registry of their quantizers, and nothing before.
"""

import sysconfig
from pathlib import Path

from dmquant.errors import UserError

MODULE = "_dmquant_startup"
CODE = '''"""Written by `dmquant register`, removed by `dmquant unregister`: dmquant is imported when it is needed."""

import sys


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name in ("diffusers.quantizers.auto", "transformers.quantizers.auto") and _Finder in sys.meta_path:
            sys.meta_path.remove(_Finder)
            try:
                import dmquant  # whose own finder is now the first
            except ImportError:
                return None  # it was taken out of the environment
            return next((spec for each in sys.meta_path if (spec := each.find_spec(name, path, target))), None)
        return None


sys.meta_path.insert(0, _Finder)
'''


def files() -> dict[Path, str]:
    """The files of the start-up line in this environment, with what they hold."""
    place = Path(sysconfig.get_paths()["purelib"])
    return {place / f"{MODULE}.py": CODE, place / f"{MODULE}.pth": f"import {MODULE}\n"}


def is_registered() -> bool:
    """Whether the start-up line is in this environment, as this dmquant writes it."""
    return all(path.is_file() and path.read_text("utf-8") == text for path, text in files().items())


def register() -> list[Path]:
    """Write the start-up line; gives its files, of which the .pth comes last. UserError where that is not allowed."""
    for path, text in files().items():
        try:
            path.write_text(text, "utf-8")
        except OSError as error:
            raise UserError(
                f"cannot write {path}: {error.strerror}: use an environment of your own, or `import dmquant` in the app"
            ) from error
    return list(files())


def unregister() -> list[Path]:
    """Take the start-up line away; the files that were there, of which the .pth is the first to go."""
    gone = [path for path in reversed(files()) if path.is_file()]
    for path in gone:
        try:
            path.unlink()
        except OSError as error:
            raise UserError(f"cannot remove {path}: {error.strerror}: remove it yourself") from error
    return gone
