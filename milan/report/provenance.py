"""Trace results: their DVC hashes from dvc.lock, and the MLflow run that made each of them."""

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

LOGGER_TIMEOUT = 60.0  # seconds to wait for the loggers of earlier stages


class StageRun(NamedTuple):
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
    """A stage's results and the run that made them."""

    stage: str
    outs: dict[str, str]  # {path: DVC hash}
    run: StageRun | None  # None when MLflow has no such run


class PackedData(NamedTuple):
    """A packed data set: images by split, source, and the digest of its manifest, which lists the digest of every shard."""

    folder: Path
    splits: dict[str, int]
    source: str
    sha256: str


def read_lock(path: Path, params: Params) -> dict[str, dict]:
    """Return {stage: {"deps" and "outs": {path: DVC hash}}} of the active recipe's stages, in the order of the pipeline.

    Raises UserError when dvc.lock is missing or damaged."""
    try:
        stages = runs.parse_yaml(path.read_text(encoding="utf-8")).get("stages", {})
        return stage_hashes(runs.recipe_stages(stages, params.variants, params.seeds))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: `dvc repro` writes it, and git checkout -- {path} restores it.") from None
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError, KeyError):
        raise UserError(f"{path} is no lock file of DVC's. git checkout -- {path} restores it.") from None


def stage_hashes(stages: dict) -> dict[str, dict]:
    """Return {stage: {"deps" and "outs": {path: DVC hash}}} of the stages as they are in dvc.lock."""
    return {
        name: {kind: {item["path"]: item.get("md5", "") for item in entry.get(kind, [])} for kind in ("deps", "outs")}
        for name, entry in stages.items()
    }


def origins(lock: dict[str, dict], stage_runs: list[StageRun]) -> list[Origin]:
    """Return the origin of each stage with outs but the page itself, which is not done yet. A stage that DVC skipped has an
    earlier run."""
    made = {name: entry for name, entry in lock.items() if entry["outs"] and name != "page"}
    return [Origin(name, entry["outs"], newest_run(name, entry, stage_runs)) for name, entry in made.items()]


def newest_run(name: str, entry: dict, stage_runs: list[StageRun]) -> StageRun | None:
    """Return the newest run of a stage whose hashes agree with dvc.lock."""
    in_lock = {**entry["deps"], **entry["outs"]}
    agreeing = (run for run in stage_runs if run.stage == name and runs.hashes_agree(run.tags, in_lock))
    return max(agreeing, key=lambda run: run.started, default=None)


def read_data(folder: Path, source: str | None) -> PackedData:
    """Return a packed data set's counts and digest; source: the folder that it was packed from, None for the built-in world."""
    manifest = read_manifest(folder)
    splits = {name: split["images"] for name, split in manifest["splits"].items()}
    return PackedData(folder, splits, redact(source or "the built-in world"), file_digest(folder / "manifest.json"))


def finished_runs(experiment: str) -> list[StageRun]:
    """Return all finished stage runs of an MLflow experiment. Raises OSError or MLflow's errors when the store fails."""
    client, stage_runs, page = runs.open_store(), [], None
    known = client.get_experiment_by_name(experiment)
    while known:
        page = client.search_runs(
            [known.experiment_id], "attributes.status = 'FINISHED'", max_results=1000, page_token=page and page.token
        )
        stage_runs += [
            StageRun(run.info.run_id, run.info.start_time / 1000, run.data.metrics["wall_seconds"], run.data.tags)
            for run in page
            if "stage" in run.data.tags and "wall_seconds" in run.data.metrics
        ]
        if not page.token:
            break
    return stage_runs


def wait_for_turn(spool: Path, timeout: float = LOGGER_TIMEOUT) -> None:
    """Wait until this stage's logger begins to send, which it does after the loggers of all earlier stages.

    Raises UserError with the reason when MLflow took no events, or the timeout (seconds) has passed."""
    end, failed = time.monotonic() + timeout, spool.with_suffix(".failed")
    while not spool.with_suffix(".place").exists():
        if failed.exists():
            raise UserError(failed.read_text(encoding="utf-8"))
        if time.monotonic() > end:
            raise UserError(f"MLflow has not answered for {timeout:.0f} s")
        time.sleep(0.1)


def revision(run: StageRun) -> str:
    """Return the git revision of a run, with ten hex digits."""
    return re.sub(r"^([0-9a-f]{10})[0-9a-f]+", r"\1", run.tags.get("git_revision", ""))
