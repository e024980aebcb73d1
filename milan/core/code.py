"""The source files that a stage's numbers can follow from, with their digests.

A stage's code is its script and all that the script imports of this project (its import closure), read from the source
text, without NOT_DEPENDENCIES. dvc.yaml lists packages that cover it; a running stage compares it with the state that it
continues, and with itself at its end.
"""

import ast
import json
from pathlib import Path

from milan.core.errors import UserError
from milan.core.files import file_digest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("milan", "stages")
# Code that cannot change a result, or whose part in it is tracked otherwise: the recipe's values are DVC params.
NOT_DEPENDENCIES = ("milan/core", "milan/params.py", "milan/stage.py", "milan/tracking")


def stage_code(name: str, root: Path = ROOT) -> dict[str, str]:
    """Return {file: SHA-256} of the code of a stage; of the figures also of the notebooks, which are their scripts."""
    scripts = [root / "stages" / f"{name}.py"]
    if name == "figures":
        scripts += sorted((root / "notebooks").glob("*.ipynb"))
    files = {path.relative_to(root).as_posix(): path for path in closure(*scripts)}
    return {file: file_digest(files[file]) for file in sorted(files) if not is_exempt(file)}


def is_exempt(file: str) -> bool:
    """Return whether a file, as a path from the project's root, is no dependency of any stage."""
    return any(file == entry or file.startswith(f"{entry}/") for entry in NOT_DEPENDENCIES)


def changed_files(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Return the files whose digests differ, those that only one side has included."""
    return sorted(file for file in before.keys() | after.keys() if before.get(file) != after.get(file))


def closure(*files: Path) -> set[Path]:
    """Return the files and all that they import of this project, directly or through others."""
    seen, waiting = set(), set(files)
    while waiting:
        seen.add(file := waiting.pop())
        waiting |= imported(file) - seen
    return seen


def imported(file: Path) -> set[Path]:
    """Return the files of this project that a script or notebook imports, inside functions too."""
    names = set()
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise UserError(f"{file}, line {node.lineno}: write the import out in full; a relative one is not followed.")
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    root = source_root(file)
    paths = {root.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.split(".")[0] in PACKAGES}
    return {path for path in paths if path.exists()}


def source_root(file: Path) -> Path:
    """Return the folder that holds the package, or the notebooks, in which the file lies."""
    return next(parent.parent for parent in file.parents if parent.name in (*PACKAGES, "notebooks"))


def parse(file: Path) -> ast.Module:
    """Parse a script, or a notebook's code cells. Raises UserError for what is not Python."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"] if cell["cell_type"] == "code")
        return ast.parse(text)
    except SyntaxError as error:
        raise UserError(f"{file}, line {error.lineno}: {error.msg}.") from None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{file} is damaged. git checkout -- {file} restores it.") from None
