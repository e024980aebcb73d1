"""Events of a spool -> calls of MLflow on one run."""

import json
import logging
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import mlflow
from mlflow import entities, types
from mlflow.models import Model, ModelSignature

import milan
from milan.core.files import SCRATCH, dvc_hash, project_root
from milan.tracking import runs
from milan.tracking.store import store_uri

SKIPPED = "skipped."  # before the name of a stage's run, in the tags of a parent
NOTE = "mlflow.note.content"
COLUMNS = {"large_binary": "binary", "string": "string", "int32": "integer"}  # Arrow's names -> MLflow's
NEEDED = ("mlflow", "torch", "torchvision", "timm", "safetensors", "pillow", "pyyaml")  # by milan/serve/serving.py
SIGNATURE = ModelSignature(
    types.Schema([types.ColSpec("binary", "image")]),
    types.Schema(
        [types.ColSpec(types.schema.Array("string"), "classes"), types.ColSpec(types.schema.Array("double"), "probabilities")]
    ),
    types.ParamSchema([types.ParamSpec("top_k", "long", 5)]),
)


class Sender:
    """What is known of one run: its id, the model that it evaluates; live while its stage is at work."""

    def __init__(self, run_id: str | None, model_id: str | None, live: bool):
        os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        logging.getLogger("mlflow").setLevel(logging.WARNING)
        self.run_id, self.model_id, self.live, self.monitor = run_id, model_id, live, None
        self.client = mlflow.MlflowClient(store_uri())

    def send(self, events: list[dict]) -> None:
        metrics = []
        for event in events:
            kind = event["kind"]
            if kind == "metrics":
                metrics += [self.metric(event, *item) for item in event["values"].items()]
            else:
                getattr(self, f"send_{kind}")(event)
        for first in range(0, len(metrics), 1000):
            self.client.log_batch(self.run_id, metrics=metrics[first : first + 1000])

    def metric(self, event: dict, name: str, value: float) -> entities.Metric:
        """Results are the evaluated model's as well; an evaluation's own training curve is not."""
        model_id = self.model_id if event.get("result") else None
        return entities.Metric(name, float(value), event["time"], event["step"], model_id=model_id)

    # The run and its parent

    def send_start(self, event: dict) -> None:
        experiment = self.experiment(event["experiment"])
        parent = self.parent(experiment, event["pipeline"], event["tags"])
        self.no_longer_skipped(parent, event["name"])
        tags = {**event["tags"], "mlflow.parentRunId": parent, "mlflow.source.name": event["tags"]["stage"]}
        run = self.client.create_run(experiment, start_time=event["time"], tags=tags, run_name=event["name"])
        self.run_id = run.info.run_id
        if self.live:
            self.watch_system()

    def experiment(self, name: str) -> str:
        found = self.client.get_experiment_by_name(name)
        if found:
            return found.experiment_id
        local = not os.environ.get("MLFLOW_TRACKING_URI")
        return self.client.create_experiment(
            name, artifact_location=(project_root() / "mlartifacts" / name).as_uri() if local else None
        )

    def parent(self, experiment: str, pipeline: str, tags: dict) -> str:
        """The run of this pipeline execution, made by its first stage. It names the runs of all that dvc.lock says
        is done: DVC skips those stages, and each that it does not skip takes itself off."""
        found = self.client.search_runs([experiment], f"tags.pipeline = '{pipeline}'", max_results=1)
        if found:
            return found[0].info.run_id
        names = {runs.title(stage): in_lock for stage, in_lock in runs.locked_now().items()}
        done = {name: runs.run_of(self.client, experiment, name, in_lock) for name, in_lock in names.items()}
        skipped = {SKIPPED + name: run.info.run_id for name, run in done.items() if run}
        kept = {k: v for k, v in tags.items() if k in ("scale", "git_revision")}
        name = time.strftime(f"pipeline {tags['scale']} %Y-%m-%d %H:%M")
        return self.client.create_run(experiment, tags={**kept, **skipped, "pipeline": pipeline}, run_name=name).info.run_id

    def no_longer_skipped(self, parent: str, name: str) -> None:
        """Take a stage off its parent's list of skipped ones; the list stands in the parent's description, to click."""
        run = self.client.get_run(parent)
        skipped = {key[len(SKIPPED) :]: run_id for key, run_id in run.data.tags.items() if key.startswith(SKIPPED)}
        if skipped.pop(name, None):
            self.client.delete_tag(parent, SKIPPED + name)
        links = [f"- [{name}](#/experiments/{run.info.experiment_id}/runs/{skipped[name]})" for name in sorted(skipped)]
        note = "Not executed again, since nothing that they depend on had changed:\n\n" + "\n".join(links) if links else ""
        if note != run.data.tags.get(NOTE, ""):
            self.client.set_tag(parent, NOTE, note)

    def watch_system(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        mlflow.set_tracking_uri(self.client.tracking_uri)
        self.monitor = SystemMetricsMonitor(self.run_id, sampling_interval=5, samples_before_logging=2)
        self.monitor.start()

    def send_end(self, event: dict) -> None:
        if self.monitor:
            self.monitor.finish()
        if self.run_id is None:
            return
        self.client.set_terminated(self.run_id, event["status"], event["time"])
        parent = self.client.get_run(self.run_id).data.tags.get("mlflow.parentRunId")
        if parent:
            self.client.set_terminated(parent, event["status"], event["time"])

    # What it was given

    def send_params(self, event: dict) -> None:
        params = [entities.Param(k, str(v)[:6000]) for k, v in event["values"].items()]
        for first in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[first : first + 100])

    def send_tags(self, event: dict) -> None:
        self.client.log_batch(self.run_id, tags=[entities.RunTag(k, str(v)) for k, v in event["values"].items()])

    def send_dataset(self, event: dict) -> None:
        columns = [{"name": name, "type": COLUMNS[kind], "required": True} for name, kind in event["columns"].items()]
        profile = {"num_rows": event["images"], "num_classes": len(event["classes"]), "classes": event["classes"]}
        told = {"source": {"uri": event["path"]}, "schema": {"mlflow_colspec": columns}, "profile": profile}
        dataset = entities.Dataset(event["name"], event["digest"], "local", **{k: json.dumps(v) for k, v in told.items()})
        context = entities.InputTag("mlflow.data.context", event["context"])
        self.client.log_inputs(self.run_id, [entities.DatasetInput(dataset, [context])])

    def send_evaluates(self, event: dict) -> None:
        experiment = self.client.get_run(self.run_id).info.experiment_id
        newest = [{"field_name": "creation_timestamp", "ascending": False}]
        found = self.client.search_logged_models([experiment], f"tags.dvc = '{event['digest']}'", max_results=1, order_by=newest)
        if found:
            self.model_id = found[0].model_id
            self.client.log_inputs(self.run_id, models=[entities.LoggedModelInput(self.model_id)])

    # What it made

    def send_artifact(self, event: dict) -> None:
        if os.path.exists(event["path"]):
            self.client.log_artifact(self.run_id, event["path"], event["folder"])

    def send_model(self, event: dict) -> None:
        model_id = self.new_model(event)
        self.client.set_logged_model_tags(model_id, {"weights": f"runs:/{self.run_id}/weights"})
        self.client.finalize_logged_model(model_id, "READY")
        self.client.log_outputs(self.run_id, [entities.LoggedModelOutput(model_id, 0)])

    def send_classifier(self, event: dict) -> None:
        """A version of the registered model for each result: what was made before is the version that is there."""
        same = f"name = '{event['registered']}' and tags.dvc = '{event['digest']}'"
        found = self.client.search_model_versions(same, max_results=1) if event["digest"] else []
        if not found and dvc_hash(Path(event["path"])) != event["digest"]:
            print(f"{event['path']} has changed since it was made: not registered.", flush=True)
            return
        made = found[0] if found else self.new_version(event)
        model_id = made.source.removeprefix("models:/")
        self.client.log_outputs(self.run_id, [entities.LoggedModelOutput(model_id, 0)])
        if project_root() == Path.cwd():  # a queued experiment is compared with others, not served
            self.client.set_registered_model_alias(event["registered"], event["alias"], made.version)

    def new_version(self, event: dict):
        model_id = self.new_model(event)
        with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
            save_classifier(event["path"], folder)
            self.client.log_model_artifacts(model_id, folder)
        self.client.finalize_logged_model(model_id, "READY")
        tags = self.client.get_run(self.run_id).data.tags
        kept = {name: tags[name] for name in ("variant", "seed", "git_revision") if name in tags}
        if not self.client.search_registered_models(f"name = '{event['registered']}'"):
            self.client.create_registered_model(event["registered"])
        about = {"tags": {**kept, "dvc": event["digest"] or ""}, "model_id": model_id}
        return self.client.create_model_version(event["registered"], f"models:/{model_id}", self.run_id, **about)

    def new_model(self, event: dict) -> str:
        experiment = self.client.get_run(self.run_id).info.experiment_id
        return self.client.create_logged_model(experiment, event["name"], self.run_id, {"dvc": event["digest"] or ""}).model_id


def save_classifier(weights: str, folder: str) -> None:
    """A folder that MLflow loads by itself: the classifier's files, this package, and serving.py to run; no pickle."""
    package = Path(milan.__file__).parent
    mlflow.pyfunc.save_model(
        folder,
        python_model=package / "serve/serving.py",
        artifacts={"classifier": weights},
        code_paths=[str(package)],
        signature=SIGNATURE,
        pip_requirements=[f"{name}=={version(name)}" for name in NEEDED],
    )
    about = Model.load(folder)
    about.flavors["python_function"]["model_code_path"] = "serving.py"  # only the name is used; MLflow writes our folder too
    about.save(os.path.join(folder, "MLmodel"))
