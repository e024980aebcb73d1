"""Hostile files run no code and take no memory, our code makes no unsafe calls, servers bind to this machine, and logs hold no
secrets. (Names and links in archives: ingest/test_archives.py; the digest of TorchScript: teacher/test_released.py.)"""

import argparse
import ast
import gzip
import hashlib
import io
import json
import os
import pickle
import re
import shlex
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image

from milan import stage
from milan.convert import interop
from milan.core.errors import UserError
from milan.core.redaction import redact
from milan.core.validation import validate
from milan.data import records
from milan.data.records import Records
from milan.evaluation.classifier import load_classifier
from milan.ingest import archives, imagenet, packing
from milan.ingest.archives import File
from milan.method import target_bank
from milan.params import Params, Pretrained, read_params
from milan.report import provenance, results
from milan.teacher.clip import load_teacher
from milan.teacher.released import fetch_teacher
from milan.tracking import logger, runs, tracker
from milan.training.foreign import read_foreign
from milan.training.weights import load_weights
from stages import prepare_imagenet
from tests.conftest import ROOT, saved_state
from tests.layouts import class_tree

# Programs in place of data.


class Malice:
    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def zip_pickle(marker: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"model": Malice(marker)}, out)
    return out.getvalue()


def legacy_pickle(marker: Path) -> bytes:
    out = io.BytesIO()
    torch.save({"model": Malice(marker)}, out, _use_new_zipfile_serialization=False)
    return out.getvalue()


def bare_pickle(marker: Path) -> bytes:
    return pickle.dumps(Malice(marker), protocol=2)


def array_of_objects(marker: Path) -> bytes:
    out = io.BytesIO()
    np.save(out, np.array([Malice(marker)], dtype=object), allow_pickle=True)
    return out.getvalue()


def archive_of_arrays(marker: Path) -> bytes:
    out = io.BytesIO()
    np.savez(out, a=np.array([Malice(marker)], dtype=object))
    return out.getvalue()


def yaml_program(marker: Path) -> bytes:
    return f"stages: !!python/object/apply:os.mkdir ['{marker}']\n".encode()


def extension_table(marker: Path) -> pa.Table:
    """Return a table whose column type is a pickle, which pyarrow before 14.0.1 ran (CVE-2023-47248)."""
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": bare_pickle(marker)}
    fields = [pa.field("image", pa.large_binary(), metadata=metadata), pa.field("label", pa.int32())]
    return pa.table([pa.array([b"x"], pa.large_binary()), pa.array([0], pa.int32())], pa.schema(fields))


def arrow_program(marker: Path) -> bytes:
    out, table = io.BytesIO(), extension_table(marker)
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def parquet_program(marker: Path) -> bytes:
    out = io.BytesIO()
    pq.write_table(extension_table(marker), out)
    return out.getvalue()


PROGRAMS = {
    made.__name__: made
    for made in (
        zip_pickle,
        legacy_pickle,
        bare_pickle,
        array_of_objects,
        archive_of_arrays,
        yaml_program,
        arrow_program,
        parquet_program,
    )
}


def as_scratch(path: Path) -> None:
    """Load a file as a saved state with a correct digest, which anyone who writes the file can compute."""
    data, saved = path.read_bytes(), saved_state()
    saved.folder.mkdir(parents=True, exist_ok=True)
    (saved.folder / "state-000000001.pt").write_bytes(hashlib.sha256(data).digest() + data)
    saved.load()


def as_bank(path: Path) -> None:
    folder = path.parent / "bank"
    folder.mkdir(exist_ok=True)
    np.save(folder / "crc-00000.npy", np.zeros((1, 1, 3), np.uint32))
    target_bank.finish(folder, views=1, shard_images=1, feature_dim=1, images=1)
    for name in target_bank.ARRAYS:
        (folder / f"{name}-00000.npy").write_bytes(path.read_bytes())
    target_bank.Bank(folder)[0, 0]


def as_records(path: Path) -> None:
    folder = path.parent / "records"
    shard = {"file": "train.arrow", "images": 1}
    records.write_manifest(folder, splits={"train": {"images": 1, "shards": [shard]}}, classes=["a"])
    (folder / "train.arrow").write_bytes(path.read_bytes())
    Records(folder, "train")[0]


def as_picture(path: Path) -> None:
    _, fault = packing.read_job(({"image": File(path), "name": "x"}, None, 255))
    if fault:
        raise UserError(fault)


def named(path: Path, name: str) -> Path:
    path.with_name(name).write_bytes(path.read_bytes())
    return path.with_name(name)


def as_teacher(path: Path) -> None:
    fetch_teacher(Pretrained("open_clip", "ViT-B-32", None, str(path), None), path.parent / "teacher")


MODEL = validate(Params, yaml.safe_load((ROOT / "params.yaml").read_text()), "params.yaml").model
READERS = {
    "a released checkpoint .pth": lambda path: interop.read_encoder(named(path, "a.pth"), MODEL),
    "a released checkpoint .pt": lambda path: interop.read_encoder(named(path, "a.pt"), MODEL),
    "a released checkpoint .safetensors": lambda path: interop.read_encoder(named(path, "a.safetensors"), MODEL),
    "a checkpoint to convert": lambda path: interop.convert(named(path, "a.pth"), path.with_name("b.safetensors"), "timm"),
    "a decoder": lambda path: interop.read_decoder(named(path, "a.pth")),
    "a teacher .pt": lambda path: as_teacher(named(path, "a.pt")),
    "a teacher .safetensors": lambda path: as_teacher(named(path, "a.safetensors")),
    "weights of a stage": load_weights,
    "a teacher of a stage": lambda path: load_teacher(named(path, "teacher.json").parent),
    "a classifier": lambda path: load_classifier(named(path, "classifier.json").parent),
    "a run's state": as_scratch,
    "a target bank": as_bank,
    "records": as_records,
    "a manifest": lambda path: records.read_manifest(named(path, "manifest.json").parent),
    "a recipe": read_params,
    "a lock": lambda path: provenance.read_lock(path, None),
    "a lock for the runs": lambda path: runs.read_yaml(path),
    "metrics": results.read_metrics,
    "published numbers": results.read_published,
    "a parquet file": archives.parquet_rows,
    "a tar": archives.tar_members,
    "a zip": archives.zip_members,
    "a devkit": lambda path: archives.tar_texts(path, "a"),
    "captions": lambda path: imagenet.read_table(path, "file", "caption"),
    "a picture": as_picture,
}
HARMLESS = {("archive_of_arrays", "a zip"), ("zip_pickle", "a zip")}  # zips, whose members are listed and not opened
HARMLESS |= {("parquet_program", "a parquet file")}  # a column of bytes, whose extension type is ignored


@pytest.mark.parametrize("reader", READERS)
def test_no_file_runs_a_program(reader, workplace):
    """Give programs of every kind to every reader of files that a user may have downloaded."""
    for name, made in PROGRAMS.items():
        marker, path = workplace / "ran", workplace / "given"
        path.write_bytes(made(marker))
        if (name, reader) in HARMLESS:
            READERS[reader](path)
        else:
            with pytest.raises(UserError):
                READERS[reader](path)
        assert not marker.exists(), name


def test_the_programs_would_run(tmp_path):
    """Read the programs with the functions that our code may not call."""
    pickle.loads(bare_pickle(tmp_path / "pickle"))
    torch.load(io.BytesIO(zip_pickle(tmp_path / "zip")), weights_only=False)
    torch.load(io.BytesIO(legacy_pickle(tmp_path / "legacy")), weights_only=False)
    np.load(io.BytesIO(array_of_objects(tmp_path / "npy")), allow_pickle=True)
    np.load(io.BytesIO(archive_of_arrays(tmp_path / "npz")), allow_pickle=True)["a"]
    yaml.unsafe_load(yaml_program(tmp_path / "yaml"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["legacy", "npy", "npz", "pickle", "yaml", "zip"]


# Files that would take all memory.


def png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(kind: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, kind)
    return out.getvalue()


def huge_jpeg() -> bytes:
    data = encoded("JPEG")
    place = data.index(b"\xff\xc0") + 5
    return data[:place] + struct.pack(">HH", 65000, 65000) + data[place + 4 :]


def huge_bmp() -> bytes:
    return (data := encoded("BMP"))[:18] + struct.pack("<ii", 60000, 60000) + data[26:]


def huge_gif() -> bytes:
    return (data := encoded("GIF"))[:6] + struct.pack("<HH", 65000, 65000) + data[10:]


@pytest.mark.parametrize(
    "data", [png(60000, 60000), png(2**31 - 1, 1), huge_jpeg(), huge_bmp(), huge_gif()], ids=["png", "line", "jpeg", "bmp", "gif"]
)
def test_a_huge_picture_is_refused_by_its_header(data, tmp_path):
    (tmp_path / "huge.jpg").write_bytes(data)
    with pytest.raises(UserError, match=r"huge\.jpg .*exceeds limit of \d+ pixels"):
        as_picture(tmp_path / "huge.jpg")


def test_a_compressed_checkpoint_is_not_unpacked(tmp_path):
    """torch.load would unpack it: 1 MB to 1 GB."""
    torch.save({"model": {"a": torch.zeros(1 << 18)}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as bomb,
    ):
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert read_foreign(tmp_path / "plain.pth")["model"]["a"].numel() == 1 << 18
    assert torch.load(tmp_path / "bomb.pth", weights_only=True)["model"]["a"].numel() == 1 << 18
    with pytest.raises(UserError, match=r"bomb\.pth is compressed, to be unpacked to 1,0\d\d,\d\d\d bytes"):
        read_foreign(tmp_path / "bomb.pth")


def test_a_header_of_a_devkit_is_not_unpacked_beyond_the_limit(tmp_path, monkeypatch):
    """tarfile reads a whole header before it returns the member."""
    monkeypatch.setattr(archives, "LIMIT", 10_000)
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 1 << 22
    (tmp_path / "kit.tar.gz").write_bytes(gzip.compress(header.tobuf() + bytes(1 << 22)))
    with pytest.raises(UserError, match=r"kit\.tar\.gz cannot be read \(it is larger than any devkit\)"):
        archives.tar_texts(tmp_path / "kit.tar.gz", "a")


def test_more_rows_than_bytes_are_refused(tmp_path):
    """A million labels of one value take a few bytes."""
    table = pa.table({"image": pa.array([None] * 1_000_000, pa.binary()), "label": pa.array(np.zeros(1_000_000, np.int64))})
    pq.write_table(table, tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 10_000
    with pytest.raises(UserError, match=r"a\.parquet is not a complete parquet file \(it claims more rows than it has bytes\)"):
        archives.parquet_rows(tmp_path / "a.parquet")


def test_arrays_larger_than_their_file_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((1, 1, 2, 1), np.float16))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "given").write_bytes(data.replace(b"(1, 1, 2, 1), }", b"(1,1,9999999999,1)}"[:15].ljust(15)))
    with pytest.raises(UserError, match=r"\.npy is damaged: it cannot be read"):
        as_bank(tmp_path / "given")


# Calls that the code may not make.

SAFE = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False), "numpy.load": ("allow_pickle", False)}
SAFE_LOADER = 'loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)'
UNSAFE = r"""(pickle|cPickle|dill|cloudpickle|joblib|marshal)\.(loads?|Unpickler)|(pd|pandas)\.read_pickle|shelve\.open|eval|exec
|yaml\.(unsafe_load|full_load|load_all|unsafe_load_all)|.*\.(extractall|extract)|shutil\.unpack_archive|os\.(system|popen)|torch\.hub\.load
|torch\.jit\.load"""


def dangers(code: str) -> list[str]:
    """Return the calls in a program that could run code from a file, or write to a path from a file."""
    calls = []
    for node in ast.walk(ast.parse(code)):
        if not isinstance(node, ast.Call):
            continue
        name, options = ast.unparse(node.func), {word.arg: word.value for word in node.keywords}
        said = {key: getattr(value, "value", None) for key, value in options.items()}
        unsafe = re.fullmatch(UNSAFE.replace("\n", ""), name) or said.get("shell") or said.get("allow_pickle")
        unstated = name in SAFE and said.get(SAFE[name][0]) is not SAFE[name][1]
        if unsafe or unstated or (name == "yaml.load" and SAFE_LOADER not in code):
            calls.append(ast.unparse(node))
    return calls


def programs() -> dict[str, str]:
    """Return {file: code} of the library, the stages, the benchmarks and the notebooks."""
    texts = {path: path.read_text() for folder in ("milan", "stages", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
        texts[path] = "\n".join("".join(cell["source"]) for cell in cells)
    return {path.relative_to(ROOT).as_posix(): text for path, text in texts.items()}


def test_no_call_runs_code_from_a_file():
    """The one exception is a TorchScript archive whose digest the recipe states (milan/teacher/released.py)."""
    assert len(programs()) > 60
    dangerous = {name: calls for name, text in programs().items() if (calls := dangers(text))}
    assert dangerous == {"milan/teacher/released.py": ["torch.jit.load(path, map_location='cpu')"]}


@pytest.mark.parametrize(
    "call",
    [
        *("torch.load(f)", "torch.load(f, weights_only=False)", "pickle.load(f)", "pickle.loads(b)", "np.load(f)", "eval(x)"),
        *(
            "np.load(f, allow_pickle=True)",
            "yaml.load(t, yaml.Loader)",
            "yaml.unsafe_load(t)",
            "tar.extractall()",
            "os.system(x)",
        ),
        *("zipfile.ZipFile(f).extract('a')", "subprocess.run(x, shell=True)", "pd.read_pickle(f)", "torch.jit.load(f)"),
    ],
)
def test_the_search_finds_unsafe_calls(call):
    assert dangers(f"def f():\n    return {call}")


def test_every_package_is_pinned():
    """To one version for each version of Python; `make audit` checks them for known vulnerabilities."""
    lines = [line.split(";")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 100
    assert [line for line in packages if not re.fullmatch(r"[\w.\[\],-]+==[\w.+!]+", line)] == []


# Servers.


def commands() -> list[tuple[str, list[str]]]:
    """Return (file, words) of every command in documents, Makefile and scripts that opens a port."""
    places = [
        ROOT / "README.md",
        ROOT / "Makefile",
        *(ROOT / "docs").iterdir(),
        *(ROOT / "milan").rglob("*.py"),
        *ROOT.glob("stages/*.py"),
    ]
    servers = []
    for path in places:
        text = re.sub(r"\\\n\s*", "", path.read_text())
        for line in re.findall(r"mlflow (?:ui|server|models serve|gateway)\b [^`\n]*--[^`\n]*", text):
            servers.append((path.name, shlex.split(line.split("#")[0].replace('"', " "))))
    return servers


def test_every_server_binds_to_this_machine():
    servers = commands()
    assert {name for name, _ in servers} >= {"README.md", "Makefile", "stores.md", "serving.md"} and len(servers) >= 6
    for name, words in servers:
        assert "--host" in words and words[words.index("--host") + 1] == "127.0.0.1", (name, words)
        assert "0.0.0.0" not in words


@pytest.mark.parametrize("document", ["stores.md", "serving.md"])
def test_the_documents_demand_a_login_for_a_shared_server(document):
    text = (ROOT / "docs" / document).read_text()
    about = text[text.index("**Who may come in.**") :]
    assert re.search(r"proxy .*asks for a login", about, re.S) and "--host 127.0.0.1" in about


# Redaction of logs and reports.

REDACTED = {
    "/home/alice/data/imagenet": "~/data/imagenet",
    "/home/alicent/data": "/home/alicent/data",
    "data.imagenet: /home/alice/data\nseeds": "data.imagenet: ~/data\nseeds",
    "/mnt/home/alice/data": "/mnt/home/$USER/data",
    "/scratch/alice/data": "/scratch/$USER/data",
    "/scratch/malice/alices": "/scratch/malice/alices",
    "sqlite:////home/alice/mlflow.db": "sqlite:///~/mlflow.db",
    "https://alice:sesame@example.org/x": "https://***@example.org/x",
    "no answer from postgresql://u:p%40ss@host:5432/mlflow (refused)": "no answer from postgresql://***@host:5432/mlflow (refused)",
    "GET https://b.s3.example.org/k?X-Amz-Signature=abc&X-Amz-Credential=AKIA: 403": "GET https://b.s3.example.org/k?*** 403",
    "alice@example.org asks what? nothing": "alice@example.org asks what? nothing",
}


@pytest.mark.parametrize("text", REDACTED)
def test_logged_text_is_redacted(text, monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    monkeypatch.setenv("USER", "alice")
    assert redact(text) == REDACTED[text]
    assert redact([text, 1]) == [REDACTED[text], 1]


def test_without_a_home_no_path_is_redacted(monkeypatch):
    monkeypatch.setenv("HOME", "/")
    monkeypatch.delenv("USER", raising=False)
    assert [redact(value) for value in ("/data/imagenet", 0.5, None)] == ["/data/imagenet", 0.5, None]


SECRETS = {
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMI",
    "AWS_SESSION_TOKEN": "FwoGZXIvYXdz",
    "HF_TOKEN": "hf_sesame",
    "MLFLOW_TRACKING_PASSWORD": "opensesame",
    "MLFLOW_TRACKING_URI": "https://alice:sesame@mlflow.example.org/x?token=ticket",
    "HOME": "/home/alice",
    "USER": "alice",
}
PRIVATE = [*SECRETS.values(), "alice", "sesame", "ticket"]


@pytest.fixture
def private_environment(workplace, monkeypatch) -> Path:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return workplace


def test_a_run_logs_nothing_private(private_environment, tree, monkeypatch):
    """Search everything that a stage sends to MLflow: tags, params, data, metrics."""
    tree["data"]["imagenet"] = "/home/alice/images"
    tree["pretrain"]["weights"] = "/scratch/alice/milan.pth"
    records.write_manifest(private_environment / "alice", splits={"train": {"images": 0, "shards": []}}, classes=[], source="x")
    monkeypatch.setattr(tracker, "subprocess", SimpleNamespace(Popen=lambda *_, **__: None, DEVNULL=None))
    out = private_environment / "alice" / "out.json"
    here = stage.Stage("teacher", argparse.Namespace(out=out, metrics=out, seed=0), validate(Params, tree, "params.yaml"))

    def main(here: stage.Stage) -> None:
        here.tracker.reads(Records(private_environment / "alice", "train"))
        here.write_metrics({"teacher/loss": 0.5}, here.identify({}))

    stage.tracked(here, main)
    (spool,) = tracker.SPOOLS.glob("*.jsonl")
    said = [json.loads(line) for line in spool.read_text().splitlines()]
    assert [event["kind"] for event in said] == ["start", "params", "dataset", "metrics", "metrics", "tags", "end"]
    recipe = said[0]["recipe"]
    assert recipe["data.imagenet"] == "~/images" and recipe["pretrain.weights"] == "/scratch/$USER/milan.pth"
    # The data set's name is that of its folder, alice, which is no path.
    said[2]["name"] = ""
    assert [word for word in PRIVATE if word in json.dumps(said)] == []


def test_a_logger_s_error_holds_nothing_private(private_environment, monkeypatch, capsys):
    def refuse(*_):
        raise ConnectionError(f"no answer from {SECRETS['MLFLOW_TRACKING_URI']} for /home/alice/x")

    monkeypatch.setattr(logger, "check_reachable", refuse)
    (private_environment / "1.jsonl").touch()
    logger.deliver(private_environment / "1.jsonl")
    said = capsys.readouterr().out
    assert "no answer from https://***@mlflow.example.org/x?***" in said and [word for word in PRIVATE if word in said] == []


def test_a_manifest_and_the_page_hold_nothing_private(private_environment, tree, monkeypatch):
    root = private_environment / "alice" / "images"
    for split in ("train", "val"):
        class_tree(root, {f"{split}/{name}/1.jpg": encoded("JPEG") for name in ("cat", "dog")})
    monkeypatch.setattr(imagenet, "refuse_too_few", lambda *_: None)
    tree["prepare_imagenet"]["pairs"] = 0
    folder = private_environment / "records"
    folder.mkdir()
    prepare_imagenet.pack(root, folder, validate(Params, tree, "params.yaml"), "/home/alice/images")
    assert "alice" not in "".join(path.read_bytes().decode(errors="replace") for path in folder.iterdir())
    assert provenance.read_data(folder, "/home/alice/images").source == "~/images"
