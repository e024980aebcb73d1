"""From dvc.lock to the runs that made and read what it names.

    python -m milan.runs outs/demo/pretrain/milan-0

prints their names, ids and artifact folders, newest first. Runs carry DVC's hashes as tags, `dvc:PATH`.
"""

import sys
from pathlib import Path

import yaml
from mlflow import MlflowClient

from milan.store import knock, store_uri

LOCK, RECIPE = Path("dvc.lock"), Path("params.yaml")


def locked() -> dict[str, dict[str, str]]:
    """{stage: {path: DVC's hash}} of what the stages in dvc.lock read and wrote; empty without dvc.lock."""
    stages = read_yaml(LOCK).get("stages", {})
    return {name: hashes([*entry.get("deps", []), *entry.get("outs", [])]) for name, entry in stages.items()}


def locked_now() -> dict[str, dict[str, str]]:
    """The same, without the variants and seeds that only earlier recipes had: DVC leaves theirs in dvc.lock."""
    recipe = read_yaml(RECIPE)
    items = {f"{variant}-{seed}" for variant in recipe.get("variants", []) for seed in recipe.get("seeds", [])}
    return {name: found for name, found in locked().items() if "@" not in name or name.partition("@")[2] in items}


def read_yaml(path: Path) -> dict:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the Python one takes seconds
    return (yaml.load(path.read_text(), loader) or {}) if path.exists() else {}


def hashes(items: list[dict]) -> dict[str, str]:
    return {item["path"]: item["md5"] for item in items if "md5" in item}


def title(stage: str) -> str:
    """DVC's name of a stage -> its runs' name: pretrain@milan-0 -> pretrain milan seed 0."""
    name, _, item = stage.partition("@")
    variant, _, seed = item.rpartition("-")
    return f"{name} {variant} seed {seed}" if item else name


def run_of(client, experiment: str, name: str, in_lock: dict[str, str]):
    """The newest finished run of a stage, or None, whose hashes are those of dvc.lock, as far as both have them."""
    named = f"attributes.run_name = '{name}' and attributes.status = 'FINISHED'"
    return next((run for run in client.search_runs([experiment], named, max_results=20) if agrees(run.data.tags, in_lock)), None)


def agrees(tags: dict[str, str], in_lock: dict[str, str]) -> bool:
    """Whether a run's hashes are those of dvc.lock as far as both have them, and both have some."""
    both = [(tag, in_lock[key[4:]]) for key, tag in tags.items() if key[:4] == "dvc:" and key[4:] in in_lock]
    return bool(both) and all(ours == theirs for ours, theirs in both)


def store() -> MlflowClient:
    """OSError within seconds when its server is not there."""
    knock(store_uri())
    return MlflowClient(store_uri())


def find(path: str) -> list:
    """The runs that dvc.lock's content of a path was made or read by, newest first."""
    digests = {in_lock[path] for in_lock in locked().values() if path in in_lock}
    if not digests:
        sys.exit(f"error: {LOCK} names no {path}. It must be written as there, such as outs/demo/pretrain/milan-0.")
    client = store()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return [run for digest in digests for run in client.search_runs(experiments, f"tags.`dvc:{path}` = '{digest}'")]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for found in find(sys.argv[1].rstrip("/")):
        print(found.info.run_name, found.info.run_id, found.info.artifact_uri, sep="\t")
