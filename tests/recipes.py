"""The recipes of conf/scale as DVC composes them, for the tests and the golden check."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

CONF = Path(__file__).resolve().parents[1] / "conf"


def composed(scale: str, *overrides: str) -> dict:
    """Return the recipe that DVC writes into params.yaml for this scale and these words of -S."""
    with initialize_config_dir(str(CONF), version_base=None):
        return OmegaConf.to_container(compose("config", overrides=[f"scale={scale}", *overrides]), resolve=True)
