"""Which files of this project a piece of its code is made of, by following imports in the source."""

import ast
import json
import sys
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import json_digest

PACKAGES = ("milan", "stages")


def code_digest() -> str:
    """16 hex digits of this project's modules in use and of all that they import, now or later: edited code does not continue
    an older run's state."""
    root = Path(__file__).resolve().parents[2]
    files = {Path(m.__file__) for m in list(sys.modules.values()) if getattr(m, "__file__", None)}
    ours = closure(*(path for path in files if any(path.is_relative_to(root / package) for package in PACKAGES)))
    return json_digest([path.read_text() for path in sorted(ours)])


def closure(*files: Path) -> set[Path]:
    """The files and all that they import of this project, directly or through others. A file lies in a folder of its
    project's root."""
    found, left = set(), set(files)
    while left:
        found.add(file := left.pop())
        left |= imported(file) - found
    return found


def imported(file: Path) -> set[Path]:
    """Files of this project that a script or notebook names in its imports, inside functions too."""
    names = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise UserError(f"{file}, line {node.lineno}: write the import out in full; a relative one is not followed.")
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    root = root_of(file)
    paths = {root.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.split(".")[0] in PACKAGES}
    return {path for path in paths if path.exists()}


def root_of(file: Path) -> Path:
    """The project's folder: the one that holds the package, or the folder of notebooks, that the file lies in."""
    return next(parent.parent for parent in file.parents if parent.name in (*PACKAGES, "notebooks"))


def parsed(file: Path) -> ast.Module:
    """Of a script, or of a notebook's code cells. Raises UserError for what is no Python."""
    try:
        text = file.read_text()
        if file.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        return ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged. git checkout -- {file} restores it.") from None
