"""Find the MLflow runs that made or read a path, by its hash in dvc.lock.

    python -m milan.tracking.runs outs/demo/pretrain/milan-0

prints their names, ids and artifact folders, newest first. Runs have DVC's hashes as tags `dvc:PATH`.
"""

import sys
from pathlib import Path

import yaml
from mlflow import MlflowClient

from milan.core.errors import UserError
from milan.core.files import explain_os_errors
from milan.tracking.store import check_reachable, file_of, store_uri

LOCK, RECIPE = Path("dvc.lock"), Path("params.yaml")


def lock_hashes() -> dict[str, dict[str, str]]:
    """Return {stage: {path: DVC hash}} of the inputs and outputs in dvc.lock; empty without dvc.lock."""
    stages = read_yaml(LOCK).get("stages", {})
    try:
        return {name: hashes([*entry.get("deps", []), *entry.get("outs", [])]) for name, entry in stages.items()}
    except (AttributeError, TypeError, KeyError):
        raise damaged_error(LOCK) from None


def active_hashes() -> dict[str, dict[str, str]]:
    """Return lock_hashes() of the stages of the active recipe."""
    recipe, stages = read_yaml(RECIPE), lock_hashes()
    try:
        return recipe_stages(stages, recipe.get("variants", []), recipe.get("seeds", []))
    except TypeError:
        raise damaged_error(RECIPE) from None


def recipe_stages(stages: dict, variants: list[str], seeds: list[int]) -> dict:
    """Select a recipe's stages from dvc.lock, where DVC leaves those of variants and seeds of earlier recipes."""
    variations = {"", *(f"{variant}-{seed}" for variant in variants for seed in seeds)}
    return {name: entry for name, entry in stages.items() if name.partition("@")[2] in variations}


def read_yaml(path: Path) -> dict:
    """Read a YAML file; empty without the file. Raises UserError when it does not hold keys and values."""
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (yaml.YAMLError, ValueError, RecursionError):
        raise damaged_error(path) from None
    if not isinstance(tree, dict):
        raise damaged_error(path)
    return tree


def parse_yaml(text: str):
    """Parse YAML; an empty dict for an empty text."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the Python loader takes seconds for dvc.lock
    return yaml.load(text, loader) or {}


def damaged_error(path: Path) -> UserError:
    return UserError(f"{path} is damaged, or holds the marks of an unfinished merge. git checkout -- {path} restores it.")


def hashes(items: list[dict]) -> dict[str, str]:
    """Return {path: DVC hash} of the entries of one stage in dvc.lock."""
    return {item["path"]: item["md5"] for item in items if "md5" in item}


def title(stage: str) -> str:
    """Return the name of a stage's runs from DVC's name of the stage: `pretrain milan seed 0` from `pretrain@milan-0`."""
    name, _, item = stage.partition("@")
    variant, _, seed = item.rpartition("-")
    return f"{name} {variant} seed {seed}" if item else name


def find_stage_run(client, experiment: str, name: str, in_lock: dict[str, str]):
    """Return the newest finished run of a stage whose hashes agree with dvc.lock, or None."""
    named = f"attributes.run_name = '{name}' and attributes.status = 'FINISHED'"
    newest = client.search_runs([experiment], named, max_results=20)
    return next((run for run in newest if hashes_agree(run.data.tags, in_lock)), None)


def hashes_agree(tags: dict[str, str], in_lock: dict[str, str]) -> bool:
    """Return whether a run and dvc.lock have paths in common, with the same hash for each."""
    pairs = [(tag, in_lock[key[4:]]) for key, tag in tags.items() if key[:4] == "dvc:" and key[4:] in in_lock]
    return bool(pairs) and all(logged == locked for logged, locked in pairs)


def open_store() -> MlflowClient:
    """Return a client of the store. Raises OSError when its server or file is not there; mlflow would create an empty file."""
    uri = store_uri()
    if (path := file_of(uri)) and not path.exists():
        raise FileNotFoundError(f"there is no {path}")
    check_reachable(uri)
    return MlflowClient(uri)


def find_runs(path: str) -> list:
    """Return the runs that made or read a path with the content in dvc.lock, newest first. Raises UserError without any."""
    digests = {in_lock[path] for in_lock in lock_hashes().values() if path in in_lock}
    if not digests:
        raise UserError(f"{LOCK} names no {path}. It must be written as there, such as outs/demo/pretrain/milan-0.")
    try:
        client = open_store()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        matches = [run for digest in digests for run in client.search_runs(experiments, f"tags.`dvc:{path}` = '{digest}'")]
    except Exception as error:  # the store's server, address or file may be at fault
        raise UserError(
            f"MLflow's store cannot be read ({first_line(error)}). It is mlflow.db in the repository's root, or where the "
            "variable MLFLOW_TRACKING_URI says: mend that, or start its server."
        ) from None
    if not matches:
        raise UserError(f"MLflow has no run that made or read {path} as {LOCK} has it: it was made elsewhere, or not yet sent.")
    return matches


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type when it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def main(words: list[str]) -> None:
    if len(words) != 1:
        sys.exit(__doc__)
    try:
        with explain_os_errors():
            matches = find_runs(words[0].rstrip("/"))
    except UserError as error:
        sys.exit(f"error: {error}")
    for run in matches:
        print(run.info.run_name, run.info.run_id, run.info.artifact_uri, sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
