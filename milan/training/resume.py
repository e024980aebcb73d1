"""The resumable state of a training run."""

import hashlib
import io
import shutil
import socket
import sys
from pathlib import Path

import torch

from milan.core.code import code_digest
from milan.core.errors import UserError
from milan.core.files import SCRATCH, json_digest, write_whole


class Scratch:
    """The resumable state of one run: the last two saves, each with its digest."""

    def __init__(self, name: str, recipe: str):
        """name: the stage's; recipe: its fingerprint. Edited code does not continue an older run's state."""
        self.folder = SCRATCH / f"{name}-{json_digest(recipe, code_digest())}"

    def saves(self) -> list[Path]:
        return sorted(self.folder.glob("state-*.pt"), reverse=True)

    def save(self, step: int, state: dict) -> None:
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        try:
            write_whole(self.folder / f"state-{step:09d}.pt", hashlib.sha256(data).digest() + data)
        except UserError as error:
            raise UserError(f"{error} This was the state of step {step}; {self.kept()}.") from None
        for old in self.saves()[2:]:
            old.unlink(missing_ok=True)

    def kept(self) -> str:
        """What there is to continue from, in words."""
        saves = self.saves()
        return f"the last good state is {saves[0]}" if saves else "no state had been saved yet"

    def newest(self) -> Path | None:
        """The newest state that is whole, or None; damaged ones are named and passed over."""
        for path in self.saves():
            data = path.read_bytes()
            if hashlib.sha256(data[32:]).digest() == data[:32]:
                return path
            print(f"{path} is damaged (its digest does not match); falling back to the save before it.", file=sys.stderr)
        return None

    def read(self, path: Path, map_location: str | torch.device = "cpu") -> dict:
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
        """The newest state that is whole, on the CPU."""
        path = self.newest()
        return self.read(path) if path else None

    def clean(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
