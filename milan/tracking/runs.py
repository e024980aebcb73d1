"""From dvc.lock to the runs that made and read what it names.

    python -m milan.tracking.runs outs/demo/pretrain/milan-0

prints their names, ids and artifact folders, newest first. Runs carry DVC's hashes as tags, `dvc:PATH`.
"""

import sys
from pathlib import Path
from urllib.parse import urlsplit

import yaml
from mlflow import MlflowClient

from milan.core.errors import UserError
from milan.core.files import refusals_said
from milan.tracking.store import knock, store_uri

LOCK, RECIPE = Path("dvc.lock"), Path("params.yaml")


def locked() -> dict[str, dict[str, str]]:
    """{stage: {path: DVC's hash}} of what the stages in dvc.lock read and wrote; empty without dvc.lock."""
    stages = read_yaml(LOCK).get("stages", {})
    try:
        return {name: hashes([*entry.get("deps", []), *entry.get("outs", [])]) for name, entry in stages.items()}
    except (AttributeError, TypeError, KeyError):
        raise damaged(LOCK) from None


def locked_now() -> dict[str, dict[str, str]]:
    """The same, without the variants and seeds that only earlier recipes had: DVC leaves theirs in dvc.lock."""
    recipe, found = read_yaml(RECIPE), locked()
    try:
        return of_recipe(found, recipe.get("variants", []), recipe.get("seeds", []))
    except TypeError:
        raise damaged(RECIPE) from None


def of_recipe(stages: dict, variants: list[str], seeds: list[int]) -> dict:
    """The entries of a lock that belong to a recipe: DVC leaves in it what only earlier variants and seeds had."""
    variations = {"", *(f"{variant}-{seed}" for variant in variants for seed in seeds)}
    return {name: entry for name, entry in stages.items() if name.partition("@")[2] in variations}


def read_yaml(path: Path) -> dict:
    """Empty without the file. Raises UserError for anything but keys and values."""
    try:
        found = parsed(path.read_text()) if path.exists() else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        raise damaged(path) from None
    if not isinstance(found, dict):
        raise damaged(path)
    return found


def parsed(text: str):
    """What YAML says; empty for none."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the Python one takes seconds over a dvc.lock
    return yaml.load(text, loader) or {}


def damaged(path: Path) -> UserError:
    return UserError(f"{path} is damaged, or holds the marks of an unfinished merge. git checkout -- {path} restores it.")


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
    """OSError, within seconds, when its server or its file is not there: mlflow would make an empty one."""
    uri = store_uri()
    parts = urlsplit(uri)
    place = {"sqlite": parts.path[1:], "file": parts.path, "": uri}.get(parts.scheme)
    if place is not None and not Path(place).exists():
        raise FileNotFoundError(f"there is no {place}")
    knock(uri)
    return MlflowClient(uri)


def find(path: str) -> list:
    """The runs that dvc.lock's content of a path was made or read by, newest first. Raises UserError when there is none."""
    digests = {in_lock[path] for in_lock in locked().values() if path in in_lock}
    if not digests:
        raise UserError(f"{LOCK} names no {path}. It must be written as there, such as outs/demo/pretrain/milan-0.")
    try:
        client = store()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        found = [run for digest in digests for run in client.search_runs(experiments, f"tags.`dvc:{path}` = '{digest}'")]
    except Exception as error:  # whatever ails the store: its server, its address, its file
        raise UserError(
            f"MLflow's store cannot be read ({why(error)}). It is mlflow.db in the repository's root, or where the variable "
            "MLFLOW_TRACKING_URI says: mend that, or start its server."
        ) from None
    if not found:
        raise UserError(f"MLflow has no run that made or read {path} as {LOCK} has it: it was made elsewhere, or not yet sent.")
    return found


def why(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def main(words: list[str]) -> None:
    if len(words) != 1:
        sys.exit(__doc__)
    try:
        with refusals_said():
            found = find(words[0].rstrip("/"))
    except UserError as error:
        sys.exit(f"error: {error}")
    for run in found:
        print(run.info.run_name, run.info.run_id, run.info.artifact_uri, sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
