"""The costs of results: seconds of the runs that made them, from MLflow, and the size of the target bank, from dvc.lock."""

import pandas as pd

from milan.report import provenance
from milan.report.provenance import StageRun
from milan.report.text import decimal

COSTS = {"bank_mb": "Bank, MB", "targets_seconds": "Targets, s", "pretrain_seconds": "Pretraining, s"}
CAVEAT = (
    "Seconds are wall times of the runs that made these results, on the machine named below: compare them within this table "
    "only. A run that was stopped and went on counts from its last start; a dash is a run that MLflow does not know."
)


class Prices:
    """The costs of an experiment's results.

    lock: the stages of its dvc.lock; known: MLflow's runs."""

    def __init__(self, lock: dict, known: list[StageRun]):
        self.lock = lock
        self.runs = {origin.stage: origin.run for origin in provenance.origins(provenance.stage_hashes(lock), known)}

    def of(self, variant: str, seed: int) -> dict[str, float | None]:
        """Return {column: number}; None where it is not known."""
        outs = self.lock.get("extract_targets", {}).get("outs", [])
        bank = next((item["size"] / 1e6 for item in outs if item["path"].endswith("/targets") and "size" in item), None)
        seconds = map(self.seconds, ("extract_targets", f"pretrain@{variant}-{seed}"))
        return dict(zip(COSTS, (bank, *seconds), strict=True))

    def seconds(self, stage: str) -> float | None:
        run = self.runs.get(stage)
        return run.seconds if run else None


def known_runs(names: set[str]) -> list[StageRun]:
    """Return MLflow's finished runs on the data of these names. Where MLflow cannot be read, print that and return none."""
    try:
        return [run for name in sorted(names) for run in provenance.finished_runs(f"milan-{name}")]
    except Exception as error:  # a fault of the store of any kind must not prevent the table
        print(f"An MLflow store cannot be read, so what it knows is left out: {str(error)[:300]}.", flush=True)
        return []


def cell(values: pd.Series) -> str:
    return decimal(pd.to_numeric(values).mean(), 0)


def said(locks: list[dict], known: list[StageRun]) -> str:
    """Return a sentence with the revisions and the machines that made the results in the locks."""
    made = [origin for lock in locks for origin in provenance.origins(provenance.stage_hashes(lock), known)]
    runs = [origin.run for origin in made if origin.run]
    if not runs:
        return "MLflow knows no run of these results: revision, machine and seconds are not known here."
    revisions = sorted({provenance.revision(run) for run in runs})
    machines = sorted({run.tags.get("hardware", "a machine not recorded") for run in runs})
    part = "" if len(runs) == len(made) else f" ({len(runs)} of {len(made)} stages are known to MLflow)"
    return f"Made at git revision {', '.join(revisions)} on {'; '.join(machines)}{part}."
