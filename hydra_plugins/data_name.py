"""Define Hydra's `data_name`, by which a recipe names its data: conf/scale/*.yaml, data.name.

Hydra imports every module of this folder when it composes a recipe, in DVC and in milan/plan.py."""

import os
import re

from omegaconf import OmegaConf


def data_name(imagenet: str | None, ade20k: str | None, scale: str) -> str:
    """Return the last folder's name of the first path given, with - for what is no letter, digit, dot or _, 50 letters at
    most. Without a path, or where none of its letters is left, return the scale."""
    path = str(imagenet or ade20k or "")
    folder = os.path.basename(os.path.abspath(path)).removesuffix(".zip") if path else ""
    return re.sub(r"[^\w.-]+", "-", folder).strip(".-")[:50] or scale


OmegaConf.register_new_resolver("data_name", data_name, replace=True)
