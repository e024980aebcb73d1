"""The code that every stage runs: for each a list of its script and all that this imports of milan/, with their digests.

    python -m stages.code --out outs/code

A stage depends on its own list, so that an edit reruns what it concerns and nothing else, and nobody has to keep such
lists by hand. Costs a second.
"""

from pathlib import Path

from milan.core.code import closure
from milan.core.files import file_digest, json_digest, whole_folder, write_whole
from milan.stage import Stage, run


def main(stage: Stage) -> None:
    notebooks = sorted(Path("notebooks").glob("*.ipynb"))
    scripts = [path for path in sorted(Path("stages").glob("*.py")) if path.stem not in ("__init__", stage.name)]
    lists = {}
    for script in scripts:
        # A notebook is a dependency of figures by itself; what it imports is code.
        read = [script, *(notebooks if script.stem == "figures" else [])]
        files = sorted(closure(*read) - {*notebooks})
        lists[f"{script.stem}.txt"] = "".join(f"{file_digest(file)}  {file.as_posix()}\n" for file in files)
    with whole_folder(stage.args.out, json_digest(lists)) as folder:
        for name, text in lists.items():
            write_whole(folder / name, text.encode())
    print(f"{stage.args.out}: the code of {len(lists)} stages", flush=True)


if __name__ == "__main__":
    run("code", main, __doc__, out=Path)
