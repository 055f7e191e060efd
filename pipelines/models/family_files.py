"""Model families in Python files of one's own."""

import runpy
from pathlib import Path

from dmquant.diffusers.families import Family, families, register
from dmquant.errors import UserError


def family_in(file: Path) -> str:
    """The name of the family that a Python file defines as FAMILY, which is known from now on; UserError otherwise."""
    if not file.is_file():
        raise UserError(f"there is no file {file} with a family: `dmquant draft-family MODEL --out {file}` writes one")
    try:
        found = runpy.run_path(str(file)).get("FAMILY")
    except Exception as error:
        raise UserError(f"{file} cannot be run: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(found, Family):
        raise UserError(f"{file} defines no FAMILY, a dmquant.diffusers.families.Family")
    if families().get(found.name) is None:
        register(found)
    return found.name
