"""Stages with a wrong input: they print one paragraph that names it, exit with a status other than 0, and write no out."""

import copy
import errno
import importlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
import torch
import yaml
from PIL import Image

from milan.core.errors import UserError
from milan.core.identity import Identity, flatten, identify
from milan.core.validation import validate
from milan.data import records
from milan.method.encoder import Encoder
from milan.params import Params
from milan.stage import Kind, Stage, filled, name_leftovers, own_settings, refuse_what_is_not_there
from milan.tracking.tracker import Tracker
from milan.training.weights import save_weights
from stages import prepare_imagenet, pretrain
from tests.conftest import ROOT, change, forked, script, write_split


@pytest.fixture(scope="module", autouse=True)
def warm() -> None:
    """Import once what the stages import, for the children that are forked from here."""
    for path in (ROOT / "milan").glob("[a-z]*.py"):
        if path.stem not in ("runs", "sender", "serving"):  # the three that need mlflow
            importlib.import_module(f"milan.{path.stem}")


@pytest.fixture
def desk(workplace, monkeypatch, tree) -> Path:
    """Return an empty folder with a recipe of one process; importing MLflow fails, as in a broken installation."""
    (workplace / "broken" / "mlflow").mkdir(parents=True)
    (workplace / "broken" / "mlflow" / "__init__.py").write_text("raise ImportError('no MLflow here')\n")
    monkeypatch.setenv("PYTHONPATH", f"{workplace / 'broken'}{os.pathsep}{ROOT}")
    tree["compute"]["precision"] = "fp32"
    tree["runtime"]["processes"] = 1
    for name in ("teacher", "pretrain", "linear_eval", "attentive_probe", "finetune", "segment", "dense_probe"):
        tree[name] |= {"batch_size": 2, "micro_batch": 2}
    tree["finetune"]["labels"] = 1.0
    write_recipe(tree)
    Path(tree["report"]["published"]).parent.mkdir()
    Path(tree["report"]["published"]).touch()
    return workplace


def write_recipe(tree: dict) -> None:
    Path("params.yaml").write_text(yaml.safe_dump(tree))


def refused(said: str, *outs: str) -> str:
    """Return a failed stage's error message as one line; assert that it is its only paragraph, and that no out exists."""
    assert "Traceback" not in said, said
    paragraphs = [part for part in said.split("\n\n") if part.strip().startswith("error:")]
    assert len(paragraphs) == 1 and said.rstrip().endswith(paragraphs[0].rstrip()), said
    for out in outs:
        assert not Path(out).exists(), out
    return " ".join(paragraphs[0].split())


PREPARE = ["--out", "outs/data", "--metrics", "metrics.json"]


def run_light(name: str, *arguments: str) -> str:
    """Run a prepare stage as users do, in a process of its own, and return its error."""
    done = subprocess.run([sys.executable, "-m", f"stages.{name}", *arguments], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    return refused(done.stderr, "outs/data", "metrics.json")


def run_heavy(name: str, *arguments) -> tuple[int, str]:
    """Run a stage that imports torch in a forked child; return its status and output."""
    status = forked(script, name, list(arguments), Path("said.txt"))
    return status, Path("said.txt").read_text()


def test_an_unknown_params_key(desk, tree):
    change(tree, "pretrain.mask_ration", 0.5)
    write_recipe(tree)
    said = run_light("prepare_imagenet", *PREPARE)
    assert "unknown key 'mask_ration'; did you mean 'mask_ratio'?" in said


def test_a_negative_epoch_count_stops_a_stage_that_does_not_train(desk, tree):
    change(tree, "pretrain.epochs", -3)
    write_recipe(tree)
    assert "pretrain.epochs: -3 must be above 0" in run_light("prepare_ade20k", *PREPARE)


def test_a_missing_recipe(desk):
    Path("params.yaml").unlink()
    assert "params.yaml is missing" in run_light("prepare_ade20k", *PREPARE)


@pytest.mark.parametrize("name, key", [("prepare_imagenet", "imagenet"), ("prepare_ade20k", "ade20k")])
def test_a_missing_data_folder(desk, tree, name, key):
    change(tree, f"data.{key}", "/nowhere/at/all")
    write_recipe(tree)
    said = run_light(name, *PREPARE)
    assert "/nowhere/at/all" in said and "is missing" in said and f"data.{key}" in said


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((64, 64), 60).convert("RGB").save(out, "JPEG")
    return out.getvalue()


def class_folders(root: Path, bad: dict[str, bytes]) -> None:
    for split in ("train", "val"):
        for wnid in ("n01", "n02"):
            (root / split / wnid).mkdir(parents=True)
            (root / split / wnid / "good.JPEG").write_bytes(jpeg())
    for name, data in bad.items():
        (root / name).write_bytes(data)


def test_broken_images_are_all_named(desk, tree):
    class_folders(
        desk / "images", {"train/n01/cut.JPEG": jpeg()[:500], "train/n02/empty.JPEG": b"", "train/n02/text.JPEG": b"a note"}
    )
    change(tree, "data.imagenet", str(desk / "images"))
    write_recipe(tree)
    said = run_light("prepare_imagenet", *PREPARE)
    assert "3 of 7 files cannot be used" in said
    assert all(name in said for name in ("n01/cut.JPEG", "n02/empty.JPEG (empty file)", "n02/text.JPEG"))


def test_too_few_images_stop_the_first_stage_before_it_packs(desk, tree):
    class_folders(desk / "images", {})
    tree["pretrain"] |= {"batch_size": 64, "micro_batch": 32}
    change(tree, "data.imagenet", str(desk / "images"))
    write_recipe(tree)
    said = run_light("prepare_imagenet", *PREPARE)
    assert "pretrain takes 64 images a step and has 2" in said and "-S pretrain.batch_size=2 -S pretrain.micro_batch=2" in said


def test_fine_tuning_s_batch_is_compared_with_the_labels_that_are_drawn(desk, tree):
    """Half of five images is two of each class, by Python's rounding: 2 x 2 of 10 images, not 5."""
    class_folders(desk / "images", {f"train/{wnid}/{k}.JPEG": jpeg() for wnid in ("n01", "n02") for k in range(4)})
    change(tree, "finetune.labels", 0.5)
    tree["finetune"] |= {"batch_size": 5, "micro_batch": 5}
    change(tree, "data.imagenet", str(desk / "images"))
    write_recipe(tree)
    assert "finetune takes 5 images a step and has 4" in run_light("prepare_imagenet", *PREPARE)


def test_other_counts_than_expected_stop_the_stage_before_it_decodes(desk, tree):
    class_folders(desk / "images", {"train/n01/broken.JPEG": b"no image"})
    change(tree, "data.imagenet", str(desk / "images"))
    change(tree, "prepare_imagenet.expect", {"train": 4, "val": 2, "classes": 2})
    write_recipe(tree)
    said = run_light("prepare_imagenet", *PREPARE)
    assert "3 instead of 4 (train)" in said and "-S prepare_imagenet.expect=null" in said and "cannot be used" not in said


def plain_images(root: Path, captions: bool) -> None:
    """Write ten images without labels, of which one becomes validation and two have captions."""
    root.mkdir()
    for k in range(10):
        (root / f"{k}.jpg").write_bytes(jpeg())
    if captions:
        (root / "pairs").mkdir()
        for k in (1, 2):
            (root / "pairs" / f"{k}.jpg").write_bytes(jpeg())
        (root / "pairs" / "captions.csv").write_text("file,caption\n1.jpg,grey noise\n2.jpg,more of it\n")


def test_without_labels_a_teacher_that_is_trained_here_needs_captions(desk, tree):
    plain_images(desk / "images", captions=False)
    change(tree, "data.imagenet", str(desk / "images"))
    write_recipe(tree)
    said = run_light("prepare_imagenet", *PREPARE)
    assert "neither labels nor" in said and "pairs/captions.csv" in said and "-S scale=photos" in said


@pytest.mark.parametrize("name", ["linear_eval", "finetune"])
def test_without_labels_a_stage_that_needs_them_names_the_stages_that_run(desk, tree, name):
    """prepare_imagenet accepts the images, although ten are too few for a batch of a stage that needs labels."""
    plain_images(desk / "images", captions=True)
    tree["linear_eval"] |= {"batch_size": 64, "micro_batch": 64}
    change(tree, "data.imagenet", str(desk / "images"))
    write_recipe(tree)
    subprocess.run([sys.executable, "-m", "stages.prepare_imagenet", "--out", "records", "--metrics", "m.json"], check=True, timeout=100)
    splits = {split: records.Records("records", split) for split in ("train", "val", "pairs")}
    assert {split: len(some) for split, some in splits.items()} == {"train": 9, "val": 1, "pairs": 2}
    assert set(splits["train"][0]) == {"image", "name"} and splits["train"].manifest["classes"] == []
    encoder = Encoder(validate(Params, tree, "params.yaml").model).vit.state_dict()
    save_weights(desk / "weights" / "encoder.safetensors", encoder)
    given = ["--variant", "milan", "--seed", "0", "--records", "records", "--weights", "weights", *MADE]
    own = {"linear_eval": ["--teacher", "teacher"], "finetune": ["--confusion", "confusion.csv"]}
    status, said = run_heavy(name, *given, *own[name])
    assert status == 1, said
    assert "has no labels" in said and "`dvc repro pretrain segment dense_probe`" in refused(said, "outs/made", "metrics.json", "curve.csv")


def test_once_mended_the_stage_goes_through_without_mlflow(desk, tree):
    """Replace the broken file in the same folder; the stage needs no MLflow."""
    class_folders(desk / "images", {"val/n01/empty.JPEG": b""})
    change(tree, "data.imagenet", str(desk / "images"))
    write_recipe(tree)
    assert "1 of 5 files" in run_light("prepare_imagenet", *PREPARE)
    (desk / "images/val/n01/empty.JPEG").write_bytes(jpeg())
    subprocess.run([sys.executable, "-m", "stages.prepare_imagenet", *PREPARE], check=True, timeout=100)
    manifest = records.read_manifest(desk / "outs/data")
    assert {name: split["images"] for name, split in manifest["splits"].items()} == {"train": 2, "val": 3, "pairs": 2}
    assert sorted(path.name for path in (desk / "outs").iterdir()) == ["data"]
    assert "prepare_imagenet/train" in Path("metrics.json").read_text()


HEAVY = {
    "teacher": ["records"],
    "extract_targets": ["records", "teacher"],
    "pretrain": ["records", "teacher", "bank"],
    "linear_eval": ["records", "weights", "teacher"],
    "attentive_probe": ["records", "weights"],
    "finetune": ["records", "weights"],
    "segment": ["scenes", "weights"],
    "dense_probe": ["scenes", "weights"],
    "prepare_robustness": ["records"],
    "robustness": ["sets", "weights", "linear", "classifier"],
}


@pytest.mark.parametrize("name", HEAVY)
def test_an_earlier_stage_s_output_is_missing(desk, name):
    arguments = [word for given in HEAVY[name] for word in (f"--{given}", f"nowhere/{given}")]
    arguments += ["--metrics", "metrics.json"] + (["--out", "outs/made"] if name != "robustness" else [])
    arguments += ["--curve", "curve.csv"] if name not in ("extract_targets", "prepare_robustness", "robustness") else []
    arguments += ["--confusion", "confusion.csv"] if name == "finetune" else []
    arguments += ["--variant", "milan", "--seed", "0"] if name not in ("teacher", "extract_targets", "prepare_robustness") else []
    status, said = run_heavy(name, *arguments)
    assert status == 1, said
    assert "nowhere/" in refused(said, "outs/made", "metrics.json", "curve.csv") and "dvc repro" in said


def pretrained_folder(desk: Path) -> list[str]:
    """Write records of 4 images and weights that fit no model, and return the arguments that name them."""
    rows = [{"image": jpeg(), "name": str(i), "label": i % 2} for i in range(4)]
    splits = {split: write_split(desk / "records", split, rows, 10) for split in ("train", "val")}
    records.write_manifest(desk / "records", splits=splits, classes=["a", "b"])
    save_weights(desk / "weights" / "encoder.safetensors", {"not_a_weight": torch.zeros(1)})
    return ["--variant", "milan", "--seed", "0", "--records", "records", "--weights", "weights", *MADE]


MADE = ["--out", "outs/made", "--metrics", "metrics.json", "--curve", "curve.csv"]


@pytest.mark.parametrize("damage", ["empty", "cut", "header"])
def test_damaged_weights(desk, damage):
    arguments = pretrained_folder(desk)
    path = desk / "weights" / "encoder.safetensors"
    data = path.read_bytes()
    path.write_bytes({"empty": b"", "cut": data[:-2], "header": b"\xff" * 8 + data[8:]}[damage])
    status, said = run_heavy("linear_eval", *arguments, "--teacher", "teacher")
    assert status == 1, said
    assert "encoder.safetensors is damaged" in refused(said, "outs/made", "metrics.json", "curve.csv")


def test_a_teacher_without_a_description(desk):
    pretrained_folder(desk)
    (desk / "teacher").mkdir()
    for name, content in {"teacher.safetensors": "", "teacher.json": "{}"}.items():
        (desk / "teacher" / name).write_text(content)
    folders = ["--records", "records", "--teacher", "teacher", "--out", "outs/made", "--metrics", "metrics.json"]
    status, said = run_heavy("extract_targets", *folders)
    assert status == 1, said
    assert "teacher.json is damaged" in refused(said, "outs/made", "metrics.json")


@pytest.mark.parametrize("key, words", [
    ("pretrain.weights", ["pretrain.weights: /nowhere/milan.pth is missing"]),
    ("data.robustness.imagenet_r", ["data.robustness.imagenet_r: /nowhere/milan.pth is missing, or no folder"]),
    ("report.published", ["report.published: /nowhere/milan.pth is missing"]),
])  # fmt: skip
def test_a_file_that_a_later_stage_needs_is_missed_by_the_first(desk, tree, key, words):
    change(tree, key, "/nowhere/milan.pth")
    write_recipe(tree)
    said = run_light("prepare_ade20k", *PREPARE)
    assert [word for word in words if word not in said] == [], said


def test_real_data_that_is_missing_is_asked_for_by_the_stage_that_packs_it_alone(workplace, tree):
    for key in ("prepare_imagenet.size", "prepare_ade20k.size"):
        change(tree, key, None)
    change(tree, "report.published", str(ROOT / "reports/published.csv"))
    params = validate(Params, tree, "params.yaml")
    for name in ("imagenet", "ade20k"):
        with pytest.raises(UserError, match=rf"data\.{name}: the recipe demo needs real data.*-S data\.{name}=/path"):
            refuse_what_is_not_there(Stage(f"prepare_{name}", Namespace(), params))
    for name in ("teacher", "linear_eval", "report"):
        refuse_what_is_not_there(Stage(name, Namespace(), params))


@pytest.mark.parametrize("arguments, words", [
    (["--out", "."], ["--out .: give a path with a name of its own"]),
    (["--out", "note"], ["--out note is a file"]),
    (["--out", "note/x"], ["--out note/x:", "note is no folder"]),
    (["--out", "sealed/x"], ["nothing can be written in"]),
    (["--metrics", "folder"], ["--metrics folder is a folder"]),
    (["--params", "folder"], ["folder cannot be read (Is a directory)"]),
    (["--out", "n" * 300], ["File name too long"]),
])  # fmt: skip
def test_an_unusable_result_path_is_refused_before_the_work(desk, monkeypatch, arguments, words):
    Path("note").write_text("mine")
    Path("folder").mkdir()
    Path("sealed").mkdir()
    may = os.access  # which grants root everything
    monkeypatch.setattr("os.access", lambda path, mode: path != Path("sealed").absolute() and may(path, mode))
    monkeypatch.setattr("milan.stage.tracked", lambda *_: pytest.fail("it started before it checked the paths"))
    status, said = run_heavy("prepare_imagenet", *PREPARE, *arguments)
    assert status == 1, said
    message = refused(said, "outs/data", "metrics.json")
    assert [word for word in words if word not in message] == [] and Path("note").read_text() == "mine", said


def test_a_scratch_that_is_a_file(desk):
    Path(".scratch").touch()
    status, said = run_heavy("prepare_imagenet", *PREPARE)
    assert status == 1 and ".scratch: File exists" in refused(said, "outs/data", "metrics.json"), said


def test_scenes_without_a_label_are_refused(desk, tree):
    for split in ("training", "validation"):
        for kind in ("images", "annotations"):
            (desk / "scenes" / kind / split).mkdir(parents=True)
        for name in "ab":
            (desk / "scenes/images" / split / f"{name}.jpg").write_bytes(jpeg())
            Image.new("L", (64, 64), 3 if split == "training" else 0).save(desk / "scenes/annotations" / split / f"{name}.png")
    change(tree, "data.ade20k", str(desk / "scenes"))
    write_recipe(tree)
    said = run_light("prepare_ade20k", *PREPARE)
    assert "every pixel of every annotation in annotations/validation is unlabelled" in said


def test_weights_that_do_not_fit(desk):
    status, said = run_heavy("finetune", *pretrained_folder(desk), "--confusion", "confusion.csv")
    assert status == 1, said
    assert "blocks.0.attn.qkv.weight" in refused(said, "outs/made", "metrics.json", "curve.csv", "confusion.csv")


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("place, kept", [("training.optim.adamw", []), ("evaluation.scores.knn_top1", ["state-000000003.pt"])])
def test_a_preemption_outside_training(desk, tree, monkeypatch, processes, place, kept):
    """Send SIGTERM before the first step, or in the evaluation after the third: status 75, no metrics, the steps are kept."""
    arguments = pretrained_folder(desk)
    save_weights(desk / "weights" / "encoder.safetensors", Encoder(validate(Params, tree, "p").model).vit.state_dict())
    tree["runtime"]["processes"] = processes
    for name in ("pretrain", "linear_eval", "attentive_probe", "finetune", "segment", "dense_probe"):
        tree[name]["batch_size"] = 4
    tree["linear_eval"] |= {"epochs": 3, "views": 0}
    write_recipe(tree)

    def preempted(*_) -> None:
        os.kill(os.getpid() if processes == 1 else os.getppid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr(f"milan.{place}", preempted)
    status, said = run_heavy("linear_eval", *arguments, "--teacher", "teacher")
    assert status == 75, said
    assert "Stopped" in refused(said, "metrics.json", "curve.csv")
    assert Path(".scratch/preempted").read_text() == "linear_eval milan seed 0\n"
    assert [path.name for path in Path().glob(".scratch/linear_eval-milan-0-*/state-*.pt")] == kept


def test_an_unknown_variant(desk):
    """As typed by hand: DVC's own variants come from the recipe."""
    arguments = ["--variant", "milano", "--seed", "0", "--records", "records", "--teacher", "teacher", "--bank", "bank"]
    status, said = run_heavy("pretrain", *arguments, *MADE)
    assert status == 1, said
    assert "'milano' is no row of pretrain.ablation; did you mean 'milan'?" in refused(said, "outs/made", "metrics.json", "curve.csv")


def test_a_fault_of_the_program_keeps_its_traceback(desk, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("milan.ingest.world.writing.write_imagenet", fail)
    status, said = run_heavy("prepare_imagenet", *PREPARE)
    assert status == 1 and "Traceback" in said and "ZeroDivisionError: a fault" in said and not Path("outs/data").exists()


CRASHES = {  # what a step raises: what the stage says
    "of the GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "Lower linear_eval.micro_batch, which is 2."),
    "of a worker": (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's "
        "workers are out of shared memory. Please try to raise your shared memory limit."), "`--shm-size=8g`"),
    "of a sample": (RuntimeError("unable to write to file </torch_7_8_9>: No space left on device (28)"), "/dev/shm"),
    "of the machine": (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        "The memory of this machine is full"),
    "of a semaphore": (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "/dev/shm"),
    "of files": (RuntimeError("received 0 items of ancdata"), "`ulimit -n 65536`"),
    "of the program": (ZeroDivisionError("a fault"), "ZeroDivisionError: a fault"),
}  # fmt: skip


@pytest.mark.parametrize("case, processes", [*((case, 1) for case in CRASHES), ("of the GPU", 2), ("of the program", 2)])
def test_a_crash_beside_loader_workers_ends_the_stage_and_them(desk, tree, monkeypatch, case, processes):
    """Raise in the second step. Loader workers ignore SIGTERM, and the exit of Python waits for them."""
    arguments = pretrained_folder(desk)
    save_weights(desk / "weights" / "encoder.safetensors", Encoder(validate(Params, tree, "p").model).vit.state_dict())
    tree["runtime"] |= {"processes": processes, "workers": 1}
    for name in ("pretrain", "linear_eval", "attentive_probe", "finetune", "segment", "dense_probe"):
        tree[name]["batch_size"] = 4
    tree["linear_eval"] |= {"epochs": 3, "views": 0}
    write_recipe(tree)
    error, words = CRASHES[case]
    workers = []

    def step(loop, batches) -> torch.Tensor:
        workers.extend(child.pid for child in multiprocessing.active_children())
        Path(f"workers-{os.getpid()}").write_text(" ".join(map(str, workers)))
        # A semaphore's error tells no more than the file that raised it.
        exec(compile("raise error", "multiprocessing/synchronize.py" if case == "of a semaphore" else "a.py", "exec"), {"error": error})

    monkeypatch.setattr("milan.training.loop.Loop.one_step", step)
    began = time.monotonic()
    status, said = run_heavy("linear_eval", *arguments, "--teacher", "teacher")
    assert status == 1 and time.monotonic() - began < 30, said
    assert words in (said if case == "of the program" else refused(said, "metrics.json", "curve.csv"))
    started = [int(number) for path in Path().glob("workers-*") for number in path.read_text().split()]
    deadline = time.monotonic() + 20
    while running := [number for number in started if psutil.pid_exists(number)]:
        assert time.monotonic() < deadline, running
        time.sleep(0.2)
    assert len(started) == processes


@pytest.mark.parametrize(
    "error, status, word", [(KeyboardInterrupt(), 130, "Stopped"), (OSError(28, "full", "a/file"), 1, "disk is full")]
)
def test_ctrl_c_and_a_full_disk(desk, monkeypatch, error, status, word):
    def fail(*_):
        raise error

    monkeypatch.setattr("milan.ingest.world.writing.write_imagenet", fail)
    ended, said = run_heavy("prepare_imagenet", *PREPARE)
    assert ended == status
    assert word in refused(said, "outs/data", "metrics.json")


@pytest.mark.parametrize(
    "stage, experiment, deleted, sentence",
    [
        ("report", "mine", True, "git shows 1 deleted file(s) of reports/ (DVC removes the results that a run replaces) and params.yaml as"),
        ("report", "mine", False, "git shows params.yaml as this experiment sets it; docs/experiments.md"),
        ("report", None, True, "git shows 1 deleted file(s) of reports/ (DVC removes the results that a run replaces); docs/exp"),
        ("report", None, False, None),
        (None, None, True, None),  # without DVC
    ],
)
def test_a_failed_stage_says_what_git_shows(workplace, monkeypatch, stage, experiment, deleted, sentence):
    Path("reports").mkdir()
    for name in ("params.yaml", "reports/table.md", "reports/table.csv"):
        Path(name).write_text("committed")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "-qm", "all"]):
        subprocess.run(["git", *words], check=True)
    Path("params.yaml").write_text("changed")
    Path("reports/table.csv").write_text("changed")
    if deleted:
        Path("reports/table.md").unlink()
    for name, value in {"PYTHONPATH": str(ROOT), "DVC_STAGE": stage, "DVC_EXP_NAME": experiment}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    error = run_light("report", "--metrics", "m", "--curves", "c", "--published", "p", "--out", "reports/new")
    assert error.startswith("error: params.yaml")
    assert sentence in error if sentence else "git shows" not in error


def test_a_real_ctrl_c(desk):
    """Send SIGINT to a process that draws the world."""
    process = subprocess.Popen([sys.executable, "-m", "stages.prepare_imagenet", *PREPARE], stderr=subprocess.PIPE, text=True)
    while not list(Path(".scratch").glob("world-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(2)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130, said
    assert not Path("outs/data").exists()


@pytest.mark.parametrize("edited", [False, True])
def test_a_half_packed_set_is_continued_only_by_the_code_that_began_it(workplace, tree, monkeypatch, edited):
    calls = []

    def pack(root: Path, folder: Path, *_) -> None:
        calls.append((root, [path.name for path in folder.iterdir()]))
        (folder / "train-00000.arrow").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare_imagenet, "pack", pack)
    monkeypatch.setattr(prepare_imagenet, "draw", lambda root, _: root.mkdir(parents=True, exist_ok=True))
    for code in ("1", "2" if edited else "1"):
        made = Stage("prepare_imagenet", Namespace(out=Path("outs/data")), validate(Params, tree, "params.yaml"))
        made.code = {"milan/ingest/packing.py": code}
        with pytest.raises(KeyboardInterrupt):
            prepare_imagenet.main(made)
    (first_world, nothing), (second_world, left) = calls
    assert nothing == [] and left == ([] if edited else ["train-00000.arrow"])
    assert (first_world == second_world) is not edited  # an edit draws the world again too


def test_pretraining_is_of_its_own_row_and_of_the_bank_s_content(workplace, tree, monkeypatch):
    """Other variants, figure images, shard sizes, seeds, the monitor and save intervals leave the digest as it is; another bank changes it."""
    (manifest := Path("records/manifest.json")).parent.mkdir()
    manifest.write_text("{}")
    (weights := Path("teacher/teacher.safetensors")).parent.mkdir()
    weights.write_text("")
    bank = ["content 1"]
    monkeypatch.setattr("milan.method.target_bank.content_digest", lambda _: bank[0])

    def digest() -> str:
        given = Namespace(variant="milan", seed=0, records=manifest.parent, teacher=weights.parent, bank=Path("bank"))
        return pretrain.identify(Stage("pretrain", given, validate(Params, tree, "params.yaml"))).digest

    base = digest()
    change(tree, "pretrain.ablation.mine", {"target": "clip", "decoder": "mae", "masking": "semantic"})
    change(tree, "extract_targets.figure_images", 7)
    change(tree, "extract_targets.shard_images", 7)
    change(tree, "seeds", [0, 1])
    change(tree, "runtime.save_seconds", 3)
    change(tree, "pretrain.monitor_epochs", 3)
    assert digest() == base
    bank[0] = "content 2"
    assert digest() != base
    bank[0] = "content 1"
    for key, value in {"compute.precision": "bf16", "pretrain.lr": 0.5, "pretrain.ablation.milan.masking": "random"}.items():
        before = copy.deepcopy(tree)
        change(tree, key, value)
        assert digest() != base
        tree = before


# The parts of milan/stage.py.


def stage(tree: dict, **arguments) -> Stage:
    made = Stage("pretrain", Namespace(**arguments), validate(Params, tree, "params.yaml"))
    made.tracker = Tracker(Path("spool.jsonl"))
    return made


def test_a_recipe_digest_follows_recipe_variation_and_inputs(workplace, tree):
    Path("in").write_text("1")
    plain = dict(variant="milan", seed=0)
    one = stage(tree, **plain)
    section = {"pretrain": one.params.pretrain}
    base = one.identify(section, data=Path("in")).digest
    assert stage(tree, **plain).identify(section, data=Path("in")).digest == base
    others = {
        stage(tree, **{**plain, "seed": 1}).identify(section, data=Path("in")).digest,
        stage(tree, **{**plain, "variant": "mae"}).identify(section, data=Path("in")).digest,
        one.identify({"finetune": one.params.finetune}, data=Path("in")).digest,
        one.identify(section).digest,
        one.identify(section, other=Path("in")).digest,
    }
    Path("in").write_text("2")
    others.add(one.identify(section, data=Path("in")).digest)
    assert len(others) == 6 and base not in others
    with pytest.raises(UserError, match="absent is missing"):
        one.identify({}, data=Path("absent"))


def test_differences_are_named_by_their_keys(tree):
    before = identify({"pretrain": validate(Params, tree, "p").pretrain}, {"records": "d1"})
    change(tree, "pretrain.lr", 0.5)
    change(tree, "pretrain.epochs", 3)
    after = identify({"pretrain": validate(Params, tree, "p").pretrain}, {"records": "d2"})
    assert after.differences(before.values) == (
        f"input records is d2, was d1; pretrain.epochs is 3.0, was {before.values['pretrain.epochs']}; "
        f"pretrain.lr is 0.5, was {before.values['pretrain.lr']}"
    )
    assert after.differences({}).endswith(f"and {len(after.values) - 5} more")


def test_metrics_and_curve_are_written_as_dvc_reads_them(workplace, tree):
    made = stage(tree, metrics=Path("m/m.json"), curve=Path("c/c.csv"), variant="milan", seed=3)
    made.write_metrics({"b/top1": 12.345678, "a/images": 5}, Identity({"a": "1"}))
    made.write_curve([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}])
    assert Path("m/m.json").read_text() == '{\n "a/images": 5,\n "b/top1": 12.3457,\n "recipe": "{digest}"\n}\n'.replace("{digest}", Identity({"a": "1"}).digest)
    assert Path("c/c.csv").read_text() == "step,loss\n1,0.5\n2,0.25\n"
    made.write_curve([{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "rankme": 3.5}, {"step": 3, "loss": 0.125}])
    assert Path("c/c.csv").read_text() == "step,loss,rankme\n1,0.5,\n2,0.25,3.5\n3,0.125,\n"
    made.write_curve([])
    assert Path("c/c.csv").read_text() == "step,epoch,loss,lr\n"
    assert made.title == "pretrain milan seed 3"


def test_results_of_removed_variants_are_named_where_a_stage_depends_on_their_folder(workplace, tree, capsys):
    change(tree, "variants", ["milan", "clip_target"])
    change(tree, "seeds", [0, 1])
    for name in ("pretrain/milan-0", "pretrain/clip_target-1", "pretrain/milan-2", "pretrain/mae-0", "segment/milan-0"):
        (path := Path("metrics", f"{name}.json")).parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    for name in ("segment/clip_target-0", "segment/mae-0", "imagenet/train-00000", "robustness"):
        Path("outs", name).mkdir(parents=True)
    Path("outs/robustness/imagenet_c-contrast-1-00000.arrow").touch()  # of prepare_robustness, beside metrics/robustness
    Path("metrics/robustness").mkdir()
    params, given = validate(Params, tree, "p"), Namespace(metrics=Path("metrics"), outs=Path("outs"))
    for kind in (Kind(), Kind(reads=("other",)), Kind(reads=("outs", "metrics"))):
        assert capsys.readouterr().err == ""
        name_leftovers(Stage("figures", given, params, kind))
    said = capsys.readouterr().err
    assert said.startswith("figures: metrics/pretrain/mae-0.json, metrics/pretrain/milan-2.json, outs/segment/mae-0: of variants")
    assert "`rm -r metrics/*/mae-0.json metrics/*/milan-2.json outs/*/mae-0 && dvc repro`" in said


def test_the_recipe_is_flattened_for_mlflow(tree):
    flat = flatten(validate(Params, tree, "params.yaml"))
    assert flat["pretrain.ablation.milan.masking"] == "semantic"
    assert flat["model.encoder.depth"] == tree["model"]["encoder"]["depth"]
    assert flat["variants"] == tree["variants"] and flat["teacher.pretrained"] is None


# Commands.


def test_a_command_is_filled_with_the_recipe_s_own_words(tree, monkeypatch):
    """Once: what a word brings in is filled no further. Other braces stay."""
    tree["report"]["published"] = "my {name} $(x).csv"
    params = validate(Params, tree, "the recipe")
    text = "outs/{name}/{variant}-{seed} {published} {other}"
    assert filled(text, params, "pretrain@my-own.row-12") == f"outs/{params.data.name}/my-own.row-12 my {{name}} $(x).csv {{other}}"
    monkeypatch.setenv("DVC_STAGE", "sub/dvc.yaml:pretrain@mae-3")
    assert filled("{variant} {seed}", params) == "mae 3"
    monkeypatch.delenv("DVC_STAGE")
    assert filled("outs/{name}", params) == f"outs/{params.data.name}"
    with pytest.raises(UserError, match="only `dvc repro` fills {variant} and {seed}"):
        filled("outs/{variant}", params)


def test_an_argument_of_another_type_is_named(desk):
    arguments = ["--variant", "milan", "--seed", "one", "--records", "records", "--weights", "weights", *MADE, "--teacher", "teacher"]
    status, said = run_heavy("linear_eval", *arguments)
    assert status == 1 and "--seed: 'one' is no int." in refused(said, "outs/made")


def test_a_stage_s_run_shows_its_own_settings(tree):
    """Those that dvc.yaml names for it, of the ablation its own row, and not what `auto` stands for."""
    params = validate(Params, tree, "params.yaml")
    shown = own_settings(Stage("linear_eval", Namespace(variant="milan", seed=3), params), flatten(params))
    assert {key: shown[key] for key in ("scale", "variant", "seed")} == {"scale": "demo", "variant": "milan", "seed": "3"}
    assert {key for key in shown if key.startswith("pretrain.")} == {
        "pretrain.mask_ratio",
        *(f"pretrain.ablation.milan.{column}" for column in ("target", "decoder", "masking")),
    }
    sections = {key.partition(".")[0] for key in shown}
    assert sections == {"scale", "variant", "seed", "compute", "model", "linear_eval", "pretrain"}
    assert "compute.threads" in shown and not {"compute.device", "compute.precision"} & shown.keys()
    assert own_settings(Stage("page", Namespace(), params), flatten(params)) == {"scale": "demo"}


def test_curve_and_confusion_of_a_stage_have_names_of_their_own(workplace, tree):
    """On disk both are called milan-0.csv, in folders that MLflow does not have."""
    args = Namespace(variant="milan", seed=0, curve=workplace / "curves/milan-0.csv", confusion=workplace / "confusion/milan-0.csv")
    stage = Stage("finetune", args, validate(Params, tree, "params.yaml"))
    stage.tracker = Tracker(workplace / "1-1.jsonl")
    stage.write_curve([{"step": 1, "loss": 0.5}])
    stage.write_confusion([("cat", "dog")])
    events = [json.loads(line) for line in stage.tracker.spool.read_text().splitlines()]
    assert {event["name"]: event["text"] for event in events} == {
        "curve-finetune-milan-0.csv": "step,loss\n1,0.5\n",
        "confusion-finetune-milan-0.csv": "actual,predicted\ncat,dog\n",
    }
    assert args.confusion.read_text() == "actual,predicted\ncat,dog\n"
