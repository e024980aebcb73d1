"""Where results come from: their DVC hashes, as dvc.lock has them, and for each the MLflow run that made it."""

import re
import time
from pathlib import Path
from typing import NamedTuple

import yaml

from milan.core.errors import UserError
from milan.core.files import file_digest
from milan.core.redaction import redact
from milan.data.records import read_manifest
from milan.params import Params
from milan.tracking import runs

PATIENCE = 60.0  # seconds for the loggers of earlier stages


class Run(NamedTuple):
    """A stage's run in MLflow."""

    id: str
    started: float  # seconds since 1970
    seconds: float
    tags: dict[str, str]

    @property
    def stage(self) -> str:
        """The name that DVC gives to the stage: `pretrain@milan-0`."""
        variation = [self.tags[tag] for tag in ("variant", "seed") if tag in self.tags]
        return "@".join([self.tags["stage"], *(["-".join(variation)] if variation else [])])


class Origin(NamedTuple):
    """A stage's results."""

    stage: str
    outs: dict[str, str]  # path: DVC hash
    run: Run | None  # that made them; None where MLflow has none


class Data(NamedTuple):
    """A packed data set: images by split, and the digest of the manifest, which lists the digest of every shard."""

    folder: Path
    splits: dict[str, int]
    source: str
    sha256: str


def read_lock(path: Path, p: Params) -> dict[str, dict]:
    """Stage: {"deps", "outs": {path: DVC hash}}, of the active recipe's stages, in the order of the pipeline."""
    try:
        return digests(runs.recipe_stages(runs.parse_yaml(path.read_text()).get("stages", {}), p.variants, p.seeds))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc repro` writes it, and git checkout -- {path} restores it.") from None
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        raise UserError(f"{path} is no lock file of DVC's. git checkout -- {path} restores it.") from None


def digests(stages: dict) -> dict[str, dict]:
    """Stage: {"deps", "outs": {path: DVC hash}}."""
    return {
        name: {kind: {item["path"]: item.get("md5", "") for item in entry.get(kind, [])} for kind in ("deps", "outs")}
        for name, entry in stages.items()
    }


def origins(lock: dict[str, dict], found: list[Run]) -> list[Origin]:
    """For each stage with outs, the newest run that read and wrote what dvc.lock says: for one that DVC skips, the earlier."""
    return [Origin(name, entry["outs"], newest(name, entry, found)) for name, entry in lock.items() if entry["outs"]]


def newest(name: str, entry: dict, found: list[Run]) -> Run | None:
    in_lock = {**entry["deps"], **entry["outs"]}
    agreeing = (run for run in found if run.stage == name and runs.hashes_agree(run.tags, in_lock))
    return max(agreeing, key=lambda run: run.started, default=None)


def read_data(folder: Path, source: str | None) -> Data:
    """Return a packed data set's counts and digest; source: the folder that it was packed from, None for the built-in world."""
    manifest = read_manifest(folder)
    splits = {name: split["images"] for name, split in manifest["splits"].items()}
    return Data(folder, splits, redact(source or "the built-in world"), file_digest(folder / "manifest.json"))


def finished_runs(experiment: str) -> list[Run]:
    """All stage runs of an MLflow experiment that ended well."""
    client, found, page = runs.open_store(), [], None
    known = client.get_experiment_by_name(experiment)
    while known:
        page = client.search_runs(
            [known.experiment_id], "attributes.status = 'FINISHED'", max_results=1000, page_token=page and page.token
        )
        found += [
            Run(run.info.run_id, run.info.start_time / 1000, run.data.metrics["wall_seconds"], run.data.tags)
            for run in page
            if "stage" in run.data.tags and "wall_seconds" in run.data.metrics
        ]
        if not page.token:
            break
    return found


def turn_came(spool: Path, patience: float = PATIENCE) -> bool:
    """Wait for the logger of this stage to have its turn: the earlier ones have then said all. False: out of reach."""
    end = time.monotonic() + patience
    while not spool.with_suffix(".place").exists():
        if spool.with_suffix(".failed").exists() or time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def revision(run: Run) -> str:
    """The git revision of a run, short."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", run.tags.get("git_revision", ""))
