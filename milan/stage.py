"""What every stage script does the same way: arguments, recipe, tracking, metrics, errors."""

import argparse
import csv
import functools
import io
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import yaml

from milan.core.code import ROOT, changed_files, stage_code
from milan.core.described import small_clip
from milan.core.errors import PREEMPTED, Preempted, UserError, listed, nearest
from milan.core.files import (
    SCRATCH,
    dvc_hash,
    existing_parent,
    explain_os_errors,
    json_digest,
    project_root,
    write_json,
    write_whole,
)
from milan.core.identity import Identity, flatten, identify, present
from milan.core.program import alone, explain_shortage, fail, loaded, workers_ended
from milan.core.repository import git, refuse_lost_experiments, revision
from milan.params import Params, read_params
from milan.tracking import machine, tracker

STOPPED = "Stopped. What was saved is kept; type the same command (`dvc repro`, `dvc exp run ...`) again to continue."


def left_behind() -> str:
    """Return, as a sentence, what git shows after a stage that DVC runs has not ended well; "" for nothing."""
    if "DVC_STAGE" not in os.environ or project_root() != Path.cwd():  # in DVC's own workspace of an experiment nobody works
        return ""
    try:
        changes = git("status", "--porcelain", "-uno", "--", "params.yaml", "reports").stdout.splitlines()
    except OSError:
        return ""
    deleted = sum(line.startswith(" D") for line in changes)
    shown = [f"{deleted} deleted file(s) of reports/ (DVC removes the results that a run replaces)"] if deleted else []
    if " M params.yaml" in changes and "DVC_EXP_NAME" in os.environ:
        shown.append("params.yaml as this experiment sets it")
    way = 'docs/experiments.md, "The way back", says how to return'
    return f" Now git shows {' and '.join(shown)}; {way}." if shown else ""


class SavedState(Protocol):
    """What a stage does with the state of its training (milan/training/resume.py)."""

    def edited(self) -> list[str]: ...
    def leave_others(self) -> None: ...
    def clean(self) -> None: ...


@dataclass(frozen=True)
class Kind:
    """What a stage declares: the names of its arguments, and what is done with them. Each becomes --name on the command line.

    varies: it runs once for each variant and seed; reads: paths of inputs; folders and files: paths that it writes;
    evaluates: which input is the model that it evaluates; last: it closes the pipeline."""

    varies: bool = False
    reads: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    files: tuple[str, ...] = ()
    evaluates: str | None = None
    last: bool = False

    @property
    def arguments(self) -> dict[str, type]:
        """{argument: type}, in the order of the command line."""
        variation = {"variant": str, "seed": int} if self.varies else {}
        return {**variation, **dict.fromkeys((*self.reads, *self.folders, *self.files), Path)}


class Stage:
    """One execution of one stage: its arguments, recipe, tracker and results."""

    def __init__(self, name: str, args: argparse.Namespace, params: Params, kind: Kind = Kind()):
        self.name, self.args, self.params, self.kind = name, args, params, kind
        self.tracker: tracker.Tracker = None
        self.metrics: dict[str, float] = {}
        self.doubts: list[str] = []
        self.state: SavedState | None = None
        variant, rows = getattr(args, "variant", None), params.pretrain.ablation
        if variant is not None and variant not in rows:
            raise UserError(
                f"--variant {variant!r} is no row of pretrain.ablation{nearest(variant, rows)}; there are {', '.join(rows)}."
            )

    @property
    def title(self) -> str:
        words = [self.name, getattr(self.args, "variant", None)]
        seed = getattr(self.args, "seed", None)
        return " ".join(w for w in words if w) + (f" seed {seed}" if seed is not None else "")

    @functools.cached_property
    def code(self) -> dict[str, str]:
        """{file: SHA-256} of the code whose numbers this execution computes, as it stood when first asked for."""
        return stage_code(self.name)

    @property
    def variation(self) -> dict[str, str]:
        """Variant and seed, of a stage that has them."""
        return {name: str(getattr(self.args, name)) for name in ("variant", "seed") if hasattr(self.args, name)}

    @property
    def slug(self) -> str:
        """<stage>-<variant>-<seed>, for names of files."""
        return "-".join([self.name, *self.variation.values()])

    @property
    def images_at_a_time(self) -> str:
        """The setting that says how many images a process computes at a time, with its value; "" for a stage without one."""
        key = "batch_size" if self.name in ("teacher", "extract_targets") else "micro_batch"
        value = getattr(getattr(self.params, self.name, None), key, None)
        return f"{self.name}.{key}, which is {value}" if value else ""

    def identify(self, sections: dict[str, object], **inputs: Path | str) -> Identity:
        """Return what the result follows from besides code: sections of the recipe, and inputs (files, or digests)."""
        return identify({"stage": self.name, **self.variation, **sections}, inputs)

    def folder_digest(self, identity: Identity) -> str:
        """Digest for a folder of shards that an interrupted run left: only the same code continues it."""
        return json_digest(identity.digest, self.code)

    def keep(self, state: SavedState) -> SavedState:
        """Take charge of a training's saved state: it is removed when the stage has ended well."""
        self.state = state
        state.leave_others()
        return state

    def close(self) -> None:
        """Check that the code is still the code that ran, and remove the training's state.

        Raises UserError naming the files that were edited meanwhile: DVC would record the result as theirs."""
        if files := changed_files(self.code, stage_code(self.name)):
            raise UserError(
                f"{', '.join(files)} changed while {self.title} ran, so the result may be of either code and is not recorded. "
                "Run `dvc repro` again" + (": its training is kept, and is not repeated." if self.state else ".")
            )
        if self.state:
            self.state.clean()

    def write_curve(self, curve: list[dict]) -> None:
        """CSV with a column a name: what `dvc plots` draws. A cell is empty where a point has no such value."""
        names = dict.fromkeys(name for point in curve for name in point) or ["step", "epoch", "loss", "lr"]
        lines = [",".join(names)] + [",".join(repr(point[name]) if name in point else "" for name in names) for point in curve]
        self.write_csv(self.args.curve, "\n".join(lines) + "\n", "curve")

    def write_confusion(self, pairs: list[tuple[str, str]]) -> None:
        """CSV of (actual, predicted), a row an image: what DVC's confusion template draws.

        DVC's page holds the rows inside a script, unescaped: an invisible space in a name like `</script>` keeps it text."""
        text = io.StringIO()
        rows = [[re.sub(r"<(?=[A-Za-z/!])", "<\u200b", name) for name in pair] for pair in pairs]
        csv.writer(text, lineterminator="\n").writerows([("actual", "predicted"), *rows])
        self.write_csv(self.args.confusion, text.getvalue(), "confusion")

    def write_csv(self, path: Path, text: str, what: str) -> None:
        """Write a file, and log it as <what>-<stage>-<variant>-<seed>.csv: files of several stages have the same name."""
        write_whole(path, text.encode())
        self.tracker.text(text, f"{what}-{self.slug}.csv")

    def doubt(self, sentence: str) -> None:
        """Say that a number of this stage means nothing, and why: now, and under the table."""
        print(f"warning: {sentence}", file=sys.stderr, flush=True)
        self.doubts.append(sentence)

    def write_metrics(self, metrics: dict, identity: Identity) -> None:
        """Write deterministic values only, with the digest of recipe and inputs. Edits of code that a training went on over
        are named under `edited_while_training`, doubts under `doubts`."""
        self.metrics = {k: round(v, 4) if isinstance(v, float) else v for k, v in metrics.items()}
        edited = {"edited_while_training": ", ".join(files)} if self.state and (files := self.state.edited()) else {}
        doubts = {"doubts": " ".join(self.doubts)} if self.doubts else {}
        write_json(self.args.metrics, {**self.metrics, "recipe": identity.digest, **edited, **doubts})
        self.tracker.results({k: v for k, v in self.metrics.items() if isinstance(v, (int, float))})
        if edited:
            self.tracker.event("tags", values=edited)
        print("  ".join(f"{k} {v}" for k, v in self.metrics.items()), flush=True)


def run(name: str, main: Callable[[Stage], None], doc: str, kind: Kind) -> None:
    """Parse the arguments, read the recipe, call main(stage) under a tracking run.

    Exit status 0, or 1 with one paragraph on what is wrong; a traceback only for a fault of this program. After a SIGTERM
    75, which DVC does not pass on, so .scratch/preempted says it too (docs/slurm.sh looks for that). Whatever is raised, the
    program ends at once, and its workers with it."""
    loaded()
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="the recipe (default: %(default)s)")
    for argument, of in kind.arguments.items():
        parser.add_argument(f"--{argument}", required=True, metavar=of.__name__.upper())
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, preempt)
    try:
        with workers_ended(), explain_os_errors():
            params = read_params(args.params)
            for argument, of in kind.arguments.items():
                setattr(args, argument, typed(argument, filled(getattr(args, argument), params), of))
            stage = Stage(name, args, params, kind)
            refuse_what_is_not_there(stage)
            refuse_what_cannot_be_written(stage)
            if project_root() != Path.cwd():  # DVC's workspace of an experiment
                refuse_lost_experiments()
            name_leftovers(stage)
            with alone(stage.title), explain_shortage(stage.images_at_a_time):
                tracked(stage, main)
    except UserError as error:
        fail(f"{error}{left_behind()}")
    except KeyboardInterrupt:
        fail(f"{STOPPED}{left_behind()}", 130)
    except Preempted:
        write_whole(SCRATCH / "preempted", f"{stage.title}\n".encode())
        fail(f"{STOPPED}{left_behind()}", PREEMPTED)


def filled(text: str, params: Params, dvc_stage: str | None = None) -> str:
    """Put the words of the recipe into a command of dvc.yaml, {name} and {published}, and {variant} and {seed} of the stage
    that DVC runs (pretrain@milan-0; None: as DVC's environment names it).

    DVC itself puts no value of params.yaml into a command: its shell would run what the value says. Raises UserError for
    {variant} or {seed} where DVC runs no such stage."""
    item = (os.environ.get("DVC_STAGE", "") if dvc_stage is None else dvc_stage).rpartition("@")[2]
    variant, _, seed = item.rpartition("-")
    words = {"{name}": params.data.name, "{published}": params.report.published, "{variant}": variant, "{seed}": seed}
    if not variant and ("{variant}" in text or "{seed}" in text):
        raise UserError(f"{text}: only `dvc repro` fills {{variant}} and {{seed}}. Give the variant and the seed themselves.")
    return re.sub("|".join(words), lambda word: words[word[0]], text)


def typed(argument: str, text: str, of: type):
    """Return the value of an argument. Raises UserError where it is none of its type."""
    try:
        return of(text)
    except ValueError:
        raise UserError(f"--{argument}: {text!r} is no {of.__name__}.") from None


def preempt(*_) -> None:
    """Training has a handler of its own, which saves first; anywhere else, what is finished is on disk."""
    raise Preempted


def refuse_what_is_not_there(stage: Stage) -> None:
    """Name at the first stage each path of the recipe that is not there, and at a stage that packs a data set the lack of it."""
    params = stage.params
    given = {
        "pretrain.weights": params.pretrain.weights,
        "teacher.pretrained.file": params.teacher.pretrained and params.teacher.pretrained.file,
    }
    for key, path in given.items():
        if path and not Path(path).is_file():
            raise UserError(f"{key}: {path} is missing, or no file. Mend the path, or set it to null.")
    if params.teacher.pretrained and params.teacher.pretrained.library == "milan" and not params.no_teacher:
        refuse_teacher_of_another_world(params)
    for name, path in vars(params.data.robustness).items():
        if path and not Path(path).is_dir():
            raise UserError(f"data.robustness.{name}: {path} is missing, or no folder. Mend the path, or set it to null.")
    if not Path(params.report.published).is_file():
        raise UserError(
            f"report.published: {params.report.published} is missing, or no file. Mend the path; reports/published.csv is in git."
        )
    sections = {"prepare_imagenet": "imagenet", "prepare_ade20k": "ade20k"}
    name = sections.get(stage.name)
    if name and getattr(params, stage.name).size is None and not getattr(params.data, name):
        raise UserError(
            f"data.{name}: the recipe {params.scale} needs real data. Give its folder (-S data.{name}=/path), or set "
            f"prepare_{name}.size and the built-in world is drawn in that size."
        )


def refuse_teacher_of_another_world(params: Params) -> None:
    """Refuse a small CLIP that was trained on a built-in world as the teacher of other images."""
    file = params.teacher.pretrained.file
    taught = small_clip(Path(file)).get("world")
    if taught and taught != params.world:
        shown = f"the {params.world} built-in world" if params.world else f"the images of {params.data.imagenet}"
        raise UserError(
            f"teacher.pretrained: {file} is a teacher of the {taught} built-in world and knows nothing of {shown}. Train one on "
            "captions or class names (-S scale=demo_teacher), or take a released CLIP (docs/teachers.md)."
        )


def refuse_what_cannot_be_written(stage: Stage) -> None:
    """Refuse, before the work, an output path where nothing can be written, or a file where a folder belongs."""
    for name in (*stage.kind.folders, *stage.kind.files):
        path, is_folder = getattr(stage.args, name), name in stage.kind.folders
        if path.name in ("", ".."):
            raise UserError(f"--{name} {path}: give a path with a name of its own.")
        folder = existing_parent(path.absolute().parent)
        if not folder.is_dir():
            raise UserError(f"--{name} {path}: {folder} is no folder. Remove it or give another path.")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError(f"--{name} {path}: nothing can be written in {folder}. Change its rights or give another path.")
        if path.exists() and path.is_dir() != is_folder:
            raise UserError(f"--{name} {path} is a {'file' if is_folder else 'folder'}. Remove it or give another path.")


def name_leftovers(stage: Stage) -> None:
    """Name the results of variants and seeds that the recipe no longer has, in folders that this stage depends on as a whole:
    another clone does not get them, so that `dvc status` would not be clean there.

    They are left where they are, as DVC leaves them: the last copy of an expensive result may be among them."""
    variations = {f"{variant}-{seed}" for variant in stage.params.variants for seed in stage.params.seeds}
    folders = [getattr(stage.args, name) for name in ("metrics", "curves", "outs") if name in stage.kind.reads]
    kinds = [path.name for folder in folders[:1] for path in folder.glob("*") if path.is_dir()]  # stages that vary
    paths = [path for folder in folders for kind in sorted(kinds) for path in sorted((folder / kind).glob("*-*"))]
    results = [path for path in paths if path.is_dir() or path.suffix in (".json", ".csv")]  # not the records of robustness sets
    left = [path for path in results if (path.name if path.is_dir() else path.stem) not in variations]
    if left:
        alike = {f"{shlex.quote(str(path.parents[1]))}/*/{shlex.quote(path.name)}": None for path in left}
        print(
            f"{stage.title}: {listed([str(path) for path in left])}: of variants or seeds that the recipe does not have. Another "
            f"clone does not get them, and `dvc status` is not clean there, until you type `rm -r {' '.join(alike)} && dvc repro` "
            "here and commit. (The cache and earlier commits still have those that were committed.)",
            file=sys.stderr,
        )


def tracked(stage: Stage, main: Callable[[Stage], None]) -> None:
    tags = {"stage": stage.name, "scale": stage.params.scale, "data": stage.params.data.title, "git_revision": revision(), **stage.variation}
    tags["code"] = json_digest(stage.code)  # taken here, before the work: close() compares
    tags["hardware"] = machine.hardware(stage.params.compute.device)
    if experiment := os.environ.get("DVC_EXP_NAME"):
        tags["dvc_experiment"] = experiment
    recipe = flatten(stage.params)
    logger = tracker.LoggerProcess(stage.title, f"milan-{stage.params.data.name}", tags, recipe, own_settings(stage, recipe))
    stage.tracker, status, began = logger.tracker, "FAILED", time.monotonic()
    try:
        if stage.kind.evaluates:
            stage.tracker.evaluates(present(getattr(stage.args, stage.kind.evaluates)))
        main(stage)
        stage.close()
        status = "FINISHED"
    except (Preempted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        stage.tracker.event("metrics", step=0, values={"wall_seconds": time.monotonic() - began})
        stage.tracker.event("tags", values=hashes(stage.args))
        logger.finish(status, wait=stage.kind.last)


def own_settings(stage: Stage, recipe: dict) -> dict:
    """Return {key: value} of what the stage's run shows of a recipe: scale, variant and seed, and what dvc.yaml gives the stage;
    of the ablation the variant's own row, and device and precision not as asked for: training logs what they became."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    pipeline = yaml.load((ROOT / "dvc.yaml").read_text(encoding="utf-8"), loader)
    given = pipeline["stages"][stage.name].get("params", [])
    variant = stage.variation.get("variant")
    row, rows = f"pretrain.ablation.{variant}.", "pretrain.ablation."

    def own(key: str) -> bool:
        asked = any(key == name or key.startswith(f"{name}.") for name in given)
        other_row = variant and key.startswith(rows) and not key.startswith(row)
        return asked and not other_row and key not in ("compute.device", "compute.precision")

    return {"scale": stage.params.scale, **stage.variation, **{key: value for key, value in recipe.items() if own(key)}}


def hashes(args: argparse.Namespace) -> dict[str, str]:
    """DVC's hashes of the files and folders that the stage was given, as they stand in dvc.lock, where no path is absolute."""
    given = [path for name, path in vars(args).items() if isinstance(path, Path) and name != "params"]
    paths = {str(path) for path in given if path.exists() and not path.is_absolute()}
    return {f"dvc:{path}": digest for path in sorted(paths) if (digest := dvc_hash(Path(path)))}
