"""The state from which a training continues after an interruption.

It lies outside DVC's outs, which DVC deletes before a run, in .scratch/<stage>-<variant>-<seed>-<digest>/, where the digest
is of recipe and inputs, not of code: state-<step>.pt (the last two saves, each behind its SHA-256), identity.json (the
recipe's values and the inputs' digests) and code.json (the source files that wrote it). A killed training of unchanged code
ends in the same bytes as an undisturbed one. Where code has changed since, the training goes on and its result is marked.
"""

import hashlib
import io
import re
import shutil
import socket
import sys
from pathlib import Path

import torch

from milan.core.code import changed_files
from milan.core.errors import UserError
from milan.core.files import SCRATCH, read_json, write_json, write_whole
from milan.core.identity import Identity


class SavedState:
    """The saves of one training, named <stage>-<variant>-<seed>."""

    def __init__(self, name: str, identity: Identity, code: dict[str, str]):
        """code: {file: SHA-256} of the running stage (milan/core/code.py)."""
        self.name, self.identity, self.code = name, identity, code
        self.folder = SCRATCH / f"{name}-{identity.digest}"

    def saves(self) -> list[Path]:
        """The saves, the newest first."""
        return sorted(self.folder.glob("state-*.pt"), reverse=True)

    def save(self, step: int, state: dict) -> None:
        """Write the state of a step, and drop all but the last two. Raises UserError on a full disk."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        try:
            if not (self.folder / "code.json").exists():
                write_json(self.folder / "identity.json", self.identity.values)
                write_json(self.folder / "code.json", {"files": self.code, "edited": []})
            write_whole(self.folder / f"state-{step:09d}.pt", hashlib.sha256(data).digest() + data)
        except UserError as error:
            raise UserError(f"{error} This was the state of step {step}; {self.kept()}.") from None
        for old in self.saves()[2:]:
            old.unlink(missing_ok=True)

    def kept(self) -> str:
        """Say what there is to continue from."""
        saves = self.saves()
        return f"the last good state is {saves[0]}" if saves else "no state had been saved yet"

    def newest(self) -> Path | None:
        """Return the newest save that is whole, or None; damaged ones are named and passed over."""
        for path in self.saves():
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                return path
            print(f"{path} is damaged (its digest does not match); falling back to the save before it.", file=sys.stderr)
        return None

    def read(self, path: Path, map_location: str | torch.device = "cpu") -> dict:
        """Load a save. Raises UserError where it is missing or holds anything but tensors and plain values."""
        try:
            return torch.load(io.BytesIO(path.read_bytes()[32:]), map_location=map_location, weights_only=True)
        except FileNotFoundError:
            raise UserError(
                f"{path} is missing on {socket.gethostname()}: all nodes need this folder as one shared folder, {Path.cwd()}."
            ) from None
        except (OSError, torch.OutOfMemoryError):
            raise
        except Exception:  # torch raises many kinds for what it did not write itself
            raise UserError(
                f"{path} is refused: it holds other things than tensors and plain values. Nothing in it was run. Delete "
                f"{self.folder} and run again, which starts afresh."
            ) from None

    def load(self) -> dict | None:
        """Load the newest save that is whole, on the CPU."""
        path = self.newest()
        return self.read(path) if path else None

    # What wrote the state

    def edited(self) -> list[str]:
        """Return the source files that changed between the saves of this training; none for one piece of code."""
        path = self.folder / "code.json"
        return read_json(path, edited=list)["edited"] if path.exists() else []

    def note_edits(self) -> None:
        """Before a training continues: say and record which source files have changed since the state was saved."""
        path = self.folder / "code.json"
        before = read_json(path, files=dict)["files"] if path.exists() else {}
        if files := changed_files(before, self.code):
            write_json(path, {"files": self.code, "edited": sorted({*self.edited(), *files})})
            print(
                f"{self.name}: the code has changed since this state was saved ({', '.join(files)}). The training goes on, and "
                f"its result is marked. To start afresh instead, stop it and delete {self.folder}.",
                flush=True,
            )

    def leave_others(self) -> None:
        """Name the state of another recipe or other inputs before it is left, and keep only the newest of such states."""
        folders = [path for path in SCRATCH.glob(f"{self.name}-*") if re.fullmatch(r"-[0-9a-f]{16}", path.name[len(self.name) :])]
        others = [path for path in folders if path != self.folder and any(path.glob("state-*.pt"))]
        others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in others[1:]:
            shutil.rmtree(path, ignore_errors=True)
        if others and not self.saves():
            step = int(max(others[0].glob("state-*.pt")).stem.removeprefix("state-"))
            earlier = read_json(others[0] / "identity.json") if (others[0] / "identity.json").exists() else {}
            print(
                f"{self.name}: starts at step 0 and leaves the state of another recipe or other inputs, saved at step {step} in "
                f"{others[0]}: {self.identity.differences(earlier)}. That state continues when these are set back; the next one "
                "that is left takes its place.",
                flush=True,
            )

    def clean(self) -> None:
        """Remove the state of a training whose result is written."""
        shutil.rmtree(self.folder, ignore_errors=True)
