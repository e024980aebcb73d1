"""What a file of weights says about itself, in its header, read without torch."""

import json
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from milan.core.errors import UserError
from milan.core.files import damaged_source


def read_about(path: Path, fault: Callable[[Path, str], UserError]) -> dict:
    """Return what save_weights (milan/training/weights.py) wrote about the weights, {} where it wrote nothing.

    Raises fault(path, reason) for a file that is no safetensors, or says no JSON object about itself."""
    try:
        with safe_open(path, "np") as file:
            about = json.loads((file.metadata() or {}).get("milan", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise fault(path, f"it cannot be read ({str(error)[:200]})") from None
    if not isinstance(about, dict):
        raise fault(path, "what its header says is no JSON object")
    return about


def small_clip(path: Path) -> dict:
    """Return the teacher.json in a small CLIP's file (milan/teacher/clip.py, save_teacher). Raises UserError for any other file."""
    config = read_about(path, damaged_source).get("teacher")
    if not isinstance(config, dict) or config.get("kind") != "tiny":
        raise UserError(f"{path} describes no small CLIP: with library milan give a teacher.safetensors of the stage teacher.")
    return config
