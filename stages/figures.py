"""The figures: executes the notebooks, headless, from the repository's root.

    python -m stages.figures --notebooks notebooks --outs outs/demo --metrics reports/metrics/demo \
        --curves reports/curves/demo --published reports/published.csv --out reports/figures

All notebooks run in one kernel, so that libraries load once; each starts with an empty namespace and must run on
its own. Costs half a minute at demo scale. Expect importance on the object, and a student whose colours follow the teacher's.
"""

import json
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError

from milan.core.errors import UserError
from milan.core.files import SCRATCH, whole_folder, write_whole
from milan.stage import Kind, Stage, run

FOLDERS = "MILAN_FIGURES"  # where milan.report.project looks for its folders
OF_THE_TEACHER = ("2_masking.ipynb", "3_features.ipynb")
KIND = Kind(reads=("notebooks", "outs", "metrics", "curves", "published"), folders=("out",))


class OwnPython(KernelSpecManager):
    """Kernels of the running Python, whatever other kernels this machine calls python3."""

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        return KernelSpec(argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"], language="python")


def main(stage: Stage) -> None:
    args = stage.args
    notebooks = sorted(args.notebooks.glob("*.ipynb"))
    if not notebooks:
        raise UserError(f"{args.notebooks} holds no notebook (git checkout -- {args.notebooks} restores them).")
    if stage.params.no_teacher:
        print(
            f"figures: without {', '.join(OF_THE_TEACHER)}: a released student is evaluated, and no teacher is here.", flush=True
        )
        notebooks = [path for path in notebooks if path.name not in OF_THE_TEACHER]
    SCRATCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        folders = {name: str(getattr(args, name)) for name in ("params", "outs", "metrics", "curves", "published")}
        os.environ[FOLDERS] = json.dumps({**folders, "figures": f"{folder}/figures"})
        execute_all(notebooks)
        with whole_folder(args.out, str(os.getpid())) as out:
            shutil.copytree(f"{folder}/figures", out, dirs_exist_ok=True, copy_function=copy_whole)
    for picture in sorted(args.out.glob("*.png")):
        stage.tracker.artifact(picture, "figures")


def copy_whole(source: str, target: str) -> None:
    write_whole(Path(target), Path(source).read_bytes())


def execute_all(notebooks: list[Path]) -> None:
    """One after the other, in one kernel; a line each."""
    with tempfile.TemporaryDirectory() as sockets:
        kernel = AsyncKernelManager(kernel_spec_manager=OwnPython(), **transport(Path(sockets)))
        try:
            for number, path in enumerate(notebooks, 1):
                began = time.monotonic()
                execute(path, kernel)
                print(f"figures: {path.name} ({number} of {len(notebooks)}), {time.monotonic() - began:.0f} s", flush=True)
        finally:
            if kernel.has_kernel:
                run_sync(kernel.shutdown_kernel)(now=True)


def transport(folder: Path) -> dict[str, str]:
    """Return how the kernel is talked to: by Unix sockets in this folder, else by TCP on this machine, guarded by a key.

    The project's folder may take no sockets: shared folders of Docker Desktop, CIFS and exFAT do not."""
    try:
        with socket.socket(socket.AF_UNIX) as trial:
            trial.bind(str(folder / "trial"))
    except OSError:
        return {"transport": "tcp"}
    return {"transport": "ipc", "ip": str(folder / "kernel")}


def execute(path: Path, kernel: AsyncKernelManager) -> None:
    """Run a notebook in an empty namespace. Raises UserError naming the cell that failed."""
    notebook = nbformat.read(path, as_version=4)
    notebook.cells.insert(0, nbformat.v4.new_code_cell("%reset -f"))
    client = NotebookClient(notebook, km=kernel, timeout=None, resources={"metadata": {"path": str(Path.cwd())}})
    try:
        client.execute()
    except CellExecutionError as error:
        said = f"{path}, cell {failed_cell(notebook)}: {error.ename}: {last_line(error.evalue)}"
        raise UserError(f"{said} (Open the notebook in Jupyter for the whole of it.)") from None
    except DeadKernelError:
        raise UserError(
            f"{path}: its Python process died, most likely for lack of memory. Free some and run `dvc repro` again."
        ) from None
    finally:
        if client.kc:
            client.kc.stop_channels()


def failed_cell(notebook: nbformat.NotebookNode) -> int:
    """Number of the cell that holds an error, counted from 1 in the notebook as committed."""
    return next(i for i, cell in enumerate(notebook.cells) if any(o.output_type == "error" for o in cell.get("outputs", [])))


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


if __name__ == "__main__":
    run("figures", main, __doc__, KIND)
