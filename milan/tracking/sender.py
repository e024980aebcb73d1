"""Turn the events of a spool into calls of MLflow's client on one run."""

import functools
import json
import logging
import os
import re
import tempfile
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow import entities, types
from mlflow.entities import LifecycleStage
from mlflow.models import Model, ModelSignature

import milan
from milan.core.errors import UserError
from milan.core.files import SCRATCH, dvc_hash, project_root
from milan.params import changed_settings, say_settings
from milan.tracking import runs
from milan.tracking.store import follow_project, store_uri

NAMED = ("data.name", "data.imagenet", "data.ade20k")  # by the experiment
SKIPPED = "skipped."  # prefix of a parent run's tags that name the runs of skipped stages
KEY = re.compile(r"[/\w.\- :]{1,250}")  # what MLflow takes as the key of a tag
NOTE, PARENT = "mlflow.note.content", "mlflow.parentRunId"
COLUMN_TYPES = {"large_binary": "binary", "string": "string", "int32": "integer"}  # Arrow's name: MLflow's name
REQUIREMENTS = ("mlflow", "torch", "torchvision", "timm", "safetensors", "pillow", "pyyaml")  # of milan/serve/serving.py
SIGNATURE = ModelSignature(
    types.Schema([types.ColSpec("binary", "image")]),
    types.Schema(
        [types.ColSpec(types.schema.Array("string"), "classes"), types.ColSpec(types.schema.Array("double"), "probabilities")]
    ),
    types.ParamSchema([types.ParamSpec("top_k", "long", 5)]),
)


class Sender:
    """Send events to one run: its id, the id of the model that it evaluates, and whether its stage still runs (live)."""

    def __init__(self, run_id: str | None, model_id: str | None, live: bool):
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.run_id, self.model_id, self.live, self.monitor = run_id, model_id, live, None
        follow_project(project_root())
        self.client = mlflow.MlflowClient(store_uri())

    def send(self, events: list[dict]) -> None:
        """Send events in order; metrics go in large batches, after the other events."""
        metrics: dict[str, list] = defaultdict(list)
        for event in events:
            kind = event["kind"]
            if kind == "metrics":
                metrics[self.run_of(event)] += [self.metric(event, *item) for item in event["values"].items()]
                if event.get("result"):  # as the run's description, which MLflow shows above the system's metrics
                    self.client.set_tag(self.run_id, NOTE, ", ".join(f"`{key}` {value:g}" for key, value in event["values"].items()))
            else:
                getattr(self, f"send_{kind}")(event)
        for run_id, points in metrics.items():
            for first in range(0, len(points), 1000):
                self.client.log_batch(run_id, metrics=points[first : first + 1000])

    def run_of(self, event: dict) -> str:
        """Return the id of the run that an event belongs to: this one, or the whole pipeline's."""
        return self.parent if event.get("whole") else self.run_id

    @functools.cached_property
    def parent(self) -> str | None:
        """The id of the pipeline's run."""
        return self.client.get_run(self.run_id).data.tags.get(PARENT)

    def metric(self, event: dict, name: str, value: float) -> entities.Metric:
        """Make a metric. Results belong to the evaluated model as well; the curve of an evaluation's training does not."""
        model_id = self.model_id if event.get("result") else None
        return entities.Metric(name, float(value), event["time"], event["step"], model_id=model_id)

    # Start and end of the run, and its parent.

    def send_start(self, event: dict) -> None:
        experiment = self.experiment(event["experiment"])
        parent = self.find_or_create_parent(experiment, event)
        self.remove_from_skipped(parent, event["name"])
        tags = {**event["tags"], PARENT: parent, "mlflow.source.name": event["tags"]["stage"]}
        run = self.client.create_run(experiment, start_time=event["time"], tags=tags, run_name=event["name"])
        self.run_id = run.info.run_id
        if self.live:
            self.start_system_metrics()

    def experiment(self, name: str) -> str:
        known = self.client.get_experiment_by_name(name)
        if known:
            if known.lifecycle_stage == LifecycleStage.DELETED:
                raise UserError(
                    f"the experiment {name} was deleted. `mlflow experiments restore --experiment-id {known.experiment_id}` brings it "
                    "back, with MLFLOW_TRACKING_URI set to its store"
                )
            return known.experiment_id
        local = not os.environ.get("MLFLOW_TRACKING_URI")
        return self.client.create_experiment(
            name, artifact_location=(project_root() / "mlartifacts" / name).as_uri() if local else None
        )

    def find_or_create_parent(self, experiment: str, event: dict) -> str:
        """Return the run of this pipeline execution, which its first stage creates.

        Its parameters are the settings that differ from the scale's recipe, and its name begins with them, but for the data,
        which the experiment is named after. A new parent lists the runs of all stages in dvc.lock as skipped; a stage that
        DVC executes removes itself from the list (remove_from_skipped)."""
        parents = self.client.search_runs([experiment], f"tags.pipeline = '{event['pipeline']}'", max_results=1)
        if parents:
            return parents[0].info.run_id
        names = {runs.title(stage): in_lock for stage, in_lock in runs.active_hashes().items()}
        done = {name: runs.find_stage_run(self.client, experiment, name, in_lock) for name, in_lock in names.items()}
        skipped = {SKIPPED + name: run.info.run_id for name, run in done.items() if run}
        kept = {k: v for k, v in event["tags"].items() if k in ("scale", "data", "git_revision", "dvc_experiment")}
        recipe, changed = event["recipe"], changed_settings(event["recipe"])
        began = time.strftime("%H:%M", time.localtime(event["time"] / 1000))
        shown = {key: value for key, value in changed.items() if key not in NAMED}
        name = f"{say_settings(shown, recipe) or kept['scale']} · {began}"
        tags = {**kept, **skipped, "pipeline": event["pipeline"], "mlflow.source.name": "pipeline"}
        run = self.client.create_run(experiment, start_time=event["time"], tags=tags, run_name=name)
        self.log_params(run.info.run_id, {"scale": kept["scale"], **changed})
        return run.info.run_id

    def remove_from_skipped(self, parent: str, name: str) -> None:
        """Remove a stage from its parent's list of skipped stages, and write the list into the parent's description as links."""
        run = self.client.get_run(parent)
        skipped = {key[len(SKIPPED) :]: run_id for key, run_id in run.data.tags.items() if key.startswith(SKIPPED)}
        if skipped.pop(name, None):
            self.client.delete_tag(parent, SKIPPED + name)
        links = [f"- [{name}](#/experiments/{run.info.experiment_id}/runs/{skipped[name]})" for name in sorted(skipped)]
        note = "Not executed again, since nothing that they depend on had changed:\n\n" + "\n".join(links) if links else ""
        if note != run.data.tags.get(NOTE, ""):
            self.client.set_tag(parent, NOTE, note)

    def start_system_metrics(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        mlflow.set_tracking_uri(self.client.tracking_uri)
        self.monitor = SystemMetricsMonitor(self.run_id, sampling_interval=5, samples_before_logging=2)
        self.monitor.start()

    def send_end(self, event: dict) -> None:
        if self.monitor:
            self.monitor.finish()
        if self.run_id is None:
            return
        for run_id in filter(None, (self.run_id, self.parent)):
            self.client.set_terminated(run_id, event["status"], event["time"])

    # Inputs of the run.

    def send_params(self, event: dict) -> None:
        self.log_params(self.run_id, event["values"])

    def log_params(self, run_id: str, values: dict) -> None:
        params = [entities.Param(name, str(value)[:6000]) for name, value in values.items()]
        for first in range(0, len(params), 100):
            self.client.log_batch(run_id, params=params[first : first + 100])

    def send_tags(self, event: dict) -> None:
        tags = {key: value for key, value in event["values"].items() if KEY.fullmatch(key)}
        if refused := event["values"].keys() - tags.keys():  # a path with other characters: the run is the same without it
            print(f"MLflow takes no such key: {', '.join(sorted(refused))}", flush=True)
        self.client.log_batch(self.run_id, tags=[entities.RunTag(key, str(value)) for key, value in tags.items()])

    def send_dataset(self, event: dict) -> None:
        columns = [{"name": name, "type": COLUMN_TYPES[kind], "required": True} for name, kind in event["columns"].items()]
        profile = {"num_rows": event["images"], "num_classes": len(event["classes"]), "classes": event["classes"]}
        details = {"source": {"uri": event["path"]}, "schema": {"mlflow_colspec": columns}, "profile": profile}
        dataset = entities.Dataset(event["name"], event["digest"], "local", **{k: json.dumps(v) for k, v in details.items()})
        context = entities.InputTag("mlflow.data.context", event["context"])
        self.client.log_inputs(self.run_id, [entities.DatasetInput(dataset, [context])])

    def send_evaluates(self, event: dict) -> None:
        experiment = self.client.get_run(self.run_id).info.experiment_id
        newest = [{"field_name": "creation_timestamp", "ascending": False}]
        models = self.client.search_logged_models([experiment], f"tags.dvc = '{event['digest']}'", max_results=1, order_by=newest)
        if models:
            self.model_id = models[0].model_id
            self.client.log_inputs(self.run_id, models=[entities.LoggedModelInput(self.model_id)])

    # Outputs of the run.

    def send_artifact(self, event: dict) -> None:
        if os.path.exists(event["path"]):
            self.client.log_artifact(self.run_of(event), event["path"], event["folder"])

    def send_text(self, event: dict) -> None:
        self.client.log_text(self.run_of(event), event["text"], event["name"])

    def send_model(self, event: dict) -> None:
        model_id = self.create_model(event)
        self.client.set_logged_model_tags(model_id, {"weights": f"runs:/{self.run_id}/weights"})
        self.client.finalize_logged_model(model_id, "READY")
        self.client.log_outputs(self.run_id, [entities.LoggedModelOutput(model_id, 0)])

    def send_classifier(self, event: dict) -> None:
        """Register a classifier: reuse the version that has the same content, else create one; set the alias on it.

        Weights that have changed since the event are not registered."""
        same = f"name = '{event['registered']}' and tags.dvc = '{event['digest']}'"
        versions = self.client.search_model_versions(same, max_results=1) if event["digest"] else []
        if not versions and dvc_hash(Path(event["path"])) != event["digest"]:
            print(f"{event['path']} has changed since it was made: not registered.", flush=True)
            return
        registered = versions[0] if versions else self.create_version(event)
        model_id = registered.source.removeprefix("models:/")
        self.client.log_outputs(self.run_id, [entities.LoggedModelOutput(model_id, 0)])
        if project_root() == Path.cwd():  # a queued experiment is compared with others, not served
            self.client.set_registered_model_alias(event["registered"], event["alias"], registered.version)

    def create_version(self, event: dict):
        model_id = self.create_model(event)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            save_classifier(event["path"], folder)
            self.client.log_model_artifacts(model_id, folder)
        self.client.finalize_logged_model(model_id, "READY")
        tags = self.client.get_run(self.run_id).data.tags
        kept = {name: tags[name] for name in ("variant", "seed", "git_revision") if name in tags}
        if not self.client.search_registered_models(f"name = '{event['registered']}'"):
            self.client.create_registered_model(event["registered"])
        details = {"tags": {**kept, **event["tags"], "dvc": event["digest"] or ""}, "model_id": model_id}
        return self.client.create_model_version(event["registered"], f"models:/{model_id}", self.run_id, **details)

    def create_model(self, event: dict) -> str:
        experiment = self.client.get_run(self.run_id).info.experiment_id
        return self.client.create_logged_model(experiment, event["name"], self.run_id, {"dvc": event["digest"] or ""}).model_id


def save_classifier(weights: str, folder: str) -> None:
    """Write a folder that MLflow can load: the classifier's files, this package, and serving.py to run; no pickle."""
    package = Path(milan.__file__).parent
    mlflow.pyfunc.save_model(
        folder,
        python_model=package / "serve/serving.py",
        artifacts={"classifier": weights},
        code_paths=[str(package)],
        signature=SIGNATURE,
        pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
    )
    model = Model.load(folder)
    # MLflow uses the file's name only, but writes the path on this machine.
    model.flavors["python_function"]["model_code_path"] = "serving.py"
    model.save(os.path.join(folder, "MLmodel"))
