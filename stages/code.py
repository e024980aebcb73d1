"""The code that every stage runs: for each a list of its script and all that this imports of milan/, with their digests.

    python -m stages.code --out outs/code

A stage depends on its own list, so that an edit reruns what it concerns and nothing else, and nobody has to keep such
lists by hand. Costs a second.
"""

import ast
import json
from pathlib import Path

from milan.errors import UserError
from milan.files import file_digest, whole_folder, write_whole
from milan.stage import Stage, run

PACKAGES = ("milan", "stages")


def main(stage: Stage) -> None:
    notebooks = sorted(Path("notebooks").glob("*.ipynb"))
    scripts = [path for path in sorted(Path("stages").glob("*.py")) if path.stem not in ("__init__", stage.name)]
    with whole_folder(stage.args.out, stage.name) as folder:
        for script in scripts:
            # A notebook is a dependency of figures by itself; what it imports is code.
            read = [script, *(notebooks if script.stem == "figures" else [])]
            files = sorted(closure(*read) - {*notebooks})
            listed = "".join(f"{file_digest(file)}  {file.as_posix()}\n" for file in files)
            write_whole(folder / f"{script.stem}.txt", listed.encode())
    print(f"{stage.args.out}: the code of {len(scripts)} stages", flush=True)


def closure(*files: Path) -> set[Path]:
    """The files and all that they import of this project, directly or through others."""
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
    paths = {Path(*name.split(".")).with_suffix(".py") for name in names if name.split(".")[0] in PACKAGES}
    return {path for path in paths if path.exists()}


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


if __name__ == "__main__":
    run("code", main, __doc__, out=Path)
