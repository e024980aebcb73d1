"""Fuzz every reader of files and recipes: each input gives the right result or one clear error, never another exception.

    MILAN_FUZZ=2000 pytest tests/test_fuzz.py      a longer campaign; the last test prints the counts

The examples of a run are always the same (derandomize). A fault that a longer campaign finds becomes an @example here, or a test
of the module at fault.
"""

import contextlib
import copy
import dataclasses
import io
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from milan.convert import interop
from milan.core.errors import UserError
from milan.core.validation import arithmetic, validate
from milan.data import records, transforms
from milan.evaluation.classifier import ClassifierInfo, load_classifier, save_classifier
from milan.ingest import archives, imagenet, labels, packing
from milan.ingest.archives import File
from milan.method import target_bank
from milan.method.encoder import build_vit
from milan.params import Model, Params, TinyClip, TransformerSize, read_params
from milan.report import provenance, results, table
from milan.serve import classify
from milan.teacher import clip, frozen
from milan.tracking import runs
from tests.layouts import tar, zipped

EXAMPLES = int(os.environ.get("MILAN_FUZZ", "25"))
TRIED: dict[str, Counter] = {}

pytestmark = pytest.mark.filterwarnings("ignore")  # of PIL and torch, on unusual files


def campaign(name: str, inputs: st.SearchStrategy, attempt: Callable, share: float = 1) -> Counter:
    """Call attempt(input) for many inputs; it asserts that the result is right, or raises a UserError. Return the counts."""
    count = TRIED.setdefault(name, Counter())

    @settings(
        max_examples=max(1, int(EXAMPLES * share)),
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs)
    def run(value):
        count["tried"] += 1
        try:
            attempt(value)
        except UserError as error:
            assert len(str(error)) > 20, "an error that says nothing"
            count["refused"] += 1
        else:
            count["right"] += 1

    run()
    return count


# Inputs.

ATOMS = st.none() | st.booleans() | st.integers(-3, 70) | st.floats() | st.text(max_size=5)
ATOMS |= st.sampled_from([2**31, -(10**400), 10**400, "../x", "/etc/passwd", "a\0", "\ud800", "1e999", "9**9"])
PLAIN = st.recursive(
    ATOMS, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=4), some, max_size=3), max_leaves=6
)


def places(tree, before: tuple = ()) -> list[tuple]:
    """Return the path of every value in a tree of lists and dictionaries."""
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [place for key, value in inside for place in [(*before, key), *places(value, (*before, key))]]


def changed(tree, place: tuple, value, how: str):
    """Return a copy of the tree with one value replaced or dropped, or with another value beside it."""
    tree = copy.deepcopy(tree)
    around = tree
    for key in place[:-1]:
        around = around[key]
    if how == "drop":
        del around[place[-1]]
    elif how == "add":
        around.append(value) if isinstance(around, list) else around.update({str(value): value})
    else:
        around[place[-1]] = value
    return tree


def changes(tree, plain: st.SearchStrategy = PLAIN) -> st.SearchStrategy:
    how = st.sampled_from(["replace", "replace", "drop", "add"])
    return plain | st.builds(changed, st.just(tree), st.sampled_from(places(tree)), plain, how)


def damages(data: bytes, head: int | None = None) -> st.SearchStrategy:
    """Draw copies of a file that are cut short, or have one to four bytes changed (in the first `head` bytes)."""

    def flipped(flips: list) -> bytes:
        damaged = bytearray(data)
        for place, value in flips:
            damaged[place] = value
        return bytes(damaged)

    flips = st.lists(st.tuples(st.integers(0, (head or len(data)) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    return st.one_of(flips.map(flipped), flips.map(flipped), st.integers(0, len(data) - 1).map(lambda n: data[:n]))


def saved(path: Path, value) -> Path:
    path.write_bytes(value if isinstance(value, bytes) else json.dumps(value).encode())
    return path


# The recipe.


def agrees(built, given) -> bool:
    """Return whether a built recipe has the file's values. Text that may be arithmetic is left to test_sums."""
    if isinstance(given, dict):
        return built.keys() == given.keys() and all(agrees(built[key], given[key]) for key in given)
    return built == given or isinstance(given, str)


def test_recipes(committed_tree):
    def attempt(tree) -> None:
        assert agrees(dataclasses.asdict(validate(Params, tree, "params.yaml")), tree)

    near = st.sampled_from([1, 2, 4, 8, 0.5, 0.001, True, None, "milan"])
    inputs = changes(committed_tree) | changes(committed_tree, near) | changes(committed_tree, near)
    count = campaign("a recipe's values", inputs, attempt, 4)
    assert count["refused"] and count["right"]


def test_recipe_files(tmp_path):
    texts = st.text("ab:[]{}&*!%@-\n 01'\"", max_size=40).map(str.encode)
    campaign("a recipe's file", st.binary(max_size=60) | texts, lambda data: read_params(saved(tmp_path / "p.yaml", data)), 2)


def test_sums():
    def attempt(text: str) -> None:
        try:
            value = arithmetic(text)
        except ValueError as error:
            raise UserError(str(error)) from None
        assert value == eval(text, {"__builtins__": {}}), text  # of digits and signs alone

    count = campaign("a sum", st.text("0123456789.e+-*/() ", max_size=12), attempt, 8)
    assert count["refused"] and count["right"]


# Files that stages wrote.


def test_record_shards(tmp_path):
    rows = [{"image": b"x" * 20, "name": f"n{k}", "label": k % 3} for k in range(10)]
    entry = records.write_shard(tmp_path / "train-0.arrow", rows, rows[0])
    records.write_manifest(tmp_path, splits={"train": {"images": 10, "shards": [entry]}}, classes=["a", "b", "c"], source="x")
    manifest = json.loads((tmp_path / "manifest.json").read_text())

    def attempt(*_) -> None:
        split = records.Records(tmp_path, "train")
        assert len([split[k] for k in range(len(split))]) == len(split.column("image")) == split.about()["images"]
        assert all(isinstance(row["image"], bytes) and row.get("label", 0) in (0, 1, 2) for row in (split[k] for k in range(10)))
        provenance.read_data(tmp_path, None)

    shard = (tmp_path / "train-0.arrow").read_bytes()
    count = campaign("a shard", damages(shard), lambda data: attempt(saved(tmp_path / "train-0.arrow", data)), 4)
    assert count["refused"] and count["right"]
    saved(tmp_path / "train-0.arrow", shard)
    campaign("a manifest", changes(manifest), lambda tree: attempt(saved(tmp_path / "manifest.json", tree)), 2)


def test_banks(tmp_path):
    arrays = {"features": np.ones((4, 2, 5, 3), np.float16), "importance": np.ones((4, 2, 4), np.float32)}
    arrays["boxes"] = np.ones((4, 2, 5), np.int32)
    target_bank.write_shard(tmp_path, 0, arrays)
    target_bank.finish(tmp_path, views=2, shard_images=4, feature_dim=3, images=4)
    picture = torch.zeros(3, 8, 8, dtype=torch.uint8)

    def attempt(*_) -> None:
        bank = target_bank.Bank(tmp_path)
        box, features, importance = bank[1, 3]
        assert features.shape == (5, 3) and features.dtype == torch.float16 and importance.shape == (4,)
        assert transforms.crop(picture, box, 4).shape == (3, 4, 4)

    for name in arrays:
        path = tmp_path / f"{name}-00000.npy"
        data = path.read_bytes()
        campaign(f"a bank's {name}", damages(data, 128) | damages(data), lambda data, path=path: attempt(saved(path, data)))
        saved(path, data)
    about = json.loads((tmp_path / "bank.json").read_text())
    campaign("a bank's index", changes(about), lambda tree: attempt(saved(tmp_path / "bank.json", tree)))


MODEL = Model("tiny", 16, 8, TransformerSize(16, 1, 2), TransformerSize(16, 1, 2))
SMALL = st.recursive(  # without sizes that are valid and take all memory
    st.none() | st.booleans() | st.integers(-3, 70) | st.floats(-2, 2) | st.text(max_size=4),
    lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=4), some, max_size=3),
    max_leaves=5,
)


def test_teachers(tmp_path, committed_tree):
    sizes = {"embed_dim": 8, "width": 32, "layers": 1, "head_width": 16, "conv_stem": False}
    tiny = TinyClip(**sizes, text_width=16, text_heads=1, text_layers=1, context_length=5)
    clip.save_teacher(tmp_path, clip.build_tiny(tiny, 16, 8, 3), clip.tiny_config(tiny, MODEL, [1, 2, 3], None))
    about = json.loads((tmp_path / "teacher.json").read_text())
    compute = validate(Params, committed_tree, "params.yaml").compute

    def attempt(tree) -> None:
        saved(tmp_path / "teacher.json", tree)
        assert frozen.load_tower(tmp_path, compute, torch.device("cpu")).size == 16
        assert clip.load_teacher(tmp_path)[0].visual.image_size == (16, 16)

    attempt(about)
    assert campaign("a teacher's description", changes(about, SMALL), attempt)["refused"]


def test_classifiers(tmp_path):
    vit = build_vit(MODEL, num_classes=3, global_pool="avg")
    save_classifier(tmp_path, vit, ClassifierInfo(MODEL, "mean", 16, ["a", "b", "c"]))
    about = json.loads((tmp_path / "classifier.json").read_text())

    def attempt(tree) -> None:
        vit, about = load_classifier(Path(saved(tmp_path / "classifier.json", tree)).parent)
        assert vit.head.out_features == len(about.classes) == 3

    attempt(about)
    assert campaign("a classifier's description", changes(about, SMALL), attempt)["refused"]


# Weights from anywhere.


def test_weights(tmp_path):
    state = build_vit(MODEL).state_dict()
    plain, safe = tmp_path / "e.pth", tmp_path / "e.safetensors"
    torch.save({"model": state}, plain)
    interop.convert(plain, safe, "timm")

    def attempt(path: Path) -> None:
        weights = interop.read_encoder(path, MODEL)
        assert {name: tensor.shape for name, tensor in weights.items()} == {name: tensor.shape for name, tensor in state.items()}
        assert all(tensor.isfinite().all() for tensor in weights.values())

    data = safe.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    campaign("safetensors", damages(data, header) | damages(data), lambda data: attempt(saved(safe, data)), 2)
    campaign("a checkpoint", damages(plain.read_bytes()), lambda data: attempt(saved(plain, data)), 2)
    programs = st.binary(max_size=40).map(lambda code: b"\x80\x02" + code + b".")
    campaign("a pickle", programs, lambda data: attempt(saved(plain, data)), 2)
    odd = [torch.zeros(()), torch.zeros(0), torch.ones(16).long(), torch.zeros(16, device="meta"), torch.full((16,), torch.nan)]
    odd += [torch.zeros(16).to_sparse(), torch.zeros(16, dtype=torch.complex64), None, 3, torch.ones(16)]
    swaps = st.tuples(st.sampled_from(list(state)), st.sampled_from(odd))
    campaign("tensors", swaps, lambda swap: attempt(torch.save({**state, swap[0]: swap[1]}, plain) or plain))


# Images.


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@st.composite
def pictures(draw) -> bytes:
    """Draw a small picture of any mode in any format that can hold it, including formats that are not read here."""
    mode = draw(st.sampled_from(["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"]))
    kind = draw(st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "TGA", "EPS"]))
    size = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    values = np.random.default_rng(draw(st.integers(0, 99)))
    image = Image.fromarray(values.integers(0, 65536, size).astype(np.uint16))
    if mode != "I;16":
        image = Image.fromarray(values.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
    jpeg = st.fixed_dictionaries({"progressive": st.booleans(), "subsampling": st.integers(0, 2), "quality": st.integers(5, 100)})
    options = draw({"JPEG": jpeg, "PNG": st.sampled_from([{}, {"transparency": 0}, {"bits": 2}])}.get(kind, st.just({})))
    if kind in ("GIF", "WEBP", "PNG") and draw(st.booleans()):
        options = {**options, "save_all": True, "append_images": [image]}
    try:
        return encoded(image, kind, **options)
    except (OSError, ValueError, SyntaxError, KeyError):  # no such mode in this format
        return b""


def packed(path: Path, data: bytes, short_side: int | None = None, mask: Path | None = None) -> dict:
    item = {"image": File(saved(path, data)), "name": "x"} | ({"mask": File(mask)} if mask else {})
    row, fault = packing.read_job((item, short_side, 11))
    if fault:
        raise UserError(fault)
    return row


def by_hand(data: bytes) -> np.ndarray:
    """Decode by PIL to (H, W, 3), of 16-bit grey the high byte."""
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            return np.repeat((np.asarray(image) >> 8)[..., None], 3, axis=2)
        return np.asarray(image.convert("RGB")).astype(int)


def test_pictures(tmp_path):
    def attempt(data: bytes) -> None:
        ours = transforms.decode(packed(tmp_path / "x.jpg", data)["image"]).permute(1, 2, 0).numpy().astype(int)
        assert ours.shape == by_hand(data).shape and np.abs(ours - by_hand(data)).max() <= 4

    def shrunk(data: bytes) -> None:
        small = transforms.decode(packed(tmp_path / "x.jpg", data, short_side=6)["image"])
        assert min(small.shape[1:]) == min(6, *by_hand(data).shape[:2])
        assert abs(small.float().mean().item() - by_hand(data).mean()) < 25

    assert campaign("a picture", pictures(), attempt, 4)["right"]
    assert campaign("a picture to be shrunk", pictures(), shrunk, 2)["right"]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF"])
def test_damaged_pictures(tmp_path, kind):
    """A packed picture can be decoded in training; the server returns a picture or a UserError."""
    data = encoded(Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8)), kind)
    campaign("a damaged picture", damages(data), lambda data: transforms.decode(packed(tmp_path / "x.jpg", data)["image"]), 2)

    def unpacked(data: bytes) -> None:
        assert classify.read_image(data, "image 0").ndim == 3

    campaign("a picture for the server", damages(data), unpacked)
    campaign("a record's picture", damages(data), lambda data: transforms.decode(data, "x"))


def test_annotations(tmp_path):
    values = np.random.default_rng(0).integers(0, 12, (12, 9), dtype=np.uint8)
    picture, whole, mask = (
        encoded(Image.fromarray(some), "PNG") for some in (np.repeat(values[..., None], 3, 2), values, values * 2)
    )

    def attempt(data: bytes) -> None:
        row = packed(tmp_path / "x.jpg", picture, mask=saved(tmp_path / "m.png", data))
        assert set(transforms.decode_annotation(row["mask"]).unique().tolist()) <= {*range(12), 255}  # 255 is void

    attempt(whole)
    shades = st.integers(0, 255).map(lambda value: encoded(Image.fromarray(np.full((12, 9), value, np.uint8)), "PNG"))
    some = damages(whole) | pictures() | shades | st.just(mask)
    assert campaign("an annotation", some, attempt, 4)["refused"]


# Archives and tables.


def test_archives(tmp_path):
    content = {"a.JPEG": b"a" * 700, "b.JPEG": b"b"}

    def read(listed: list) -> None:
        for place in listed:
            try:
                assert isinstance(place.read(), bytes)
            except (OSError, ValueError) as error:  # which packing lists with the file's name
                raise UserError(f"{place}: {error}, of the file alone") from None

    campaign("a tar", damages(tar(content)), lambda data: read(archives.tar_members(saved(tmp_path / "a.tar", data))), 2)
    whole = zipped(tmp_path / "a.zip", content).read_bytes()
    campaign("a zip", damages(whole), lambda data: read(archives.zip_members(saved(tmp_path / "a.zip", data))), 2)
    images = [{"bytes": b"x%d" % k, "path": f"n{k}"} for k in range(6)]
    pq.write_table(pa.table({"image": images, "label": pa.array([0, 1, 2] * 2, pa.int64())}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    path = tmp_path / "a.parquet"
    assert campaign("a parquet file", damages(whole), lambda data: read(archives.parquet_rows(saved(path, data))[0]), 4)[
        "refused"
    ]


PARTS = ["train", "val", "test", "a", "b", "images", ".hidden", "Thumbs.db", "__MACOSX", "x.jpg", "._x.jpg", "y.PNG", "n.txt"]
TARGETS = ["..", ".", "../b", "../../train", "/nowhere", "../../../disk"]


def test_image_folders(tmp_path):
    """Trees of real files and links: no file of a class is dropped or gets another label, and no leftover is read."""
    numbers = iter(range(10**9))
    paths = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).map("/".join)
    classes = st.sampled_from([[], [f"{split}/{name}/x.jpg" for split in ("train", "val") for name in ("a", "b")]])

    def attempt(tree) -> None:
        always, names, links = tree
        root = tmp_path / str(next(numbers)) / "set"
        (root.parent / "disk").mkdir(parents=True)
        (root.parent / "disk" / "d.jpg").write_bytes(b"disk")
        real = []
        for name, target in [*((name, None) for name in [*always, *names]), *links]:
            with contextlib.suppress(OSError):  # a file where this tree has a folder already
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).symlink_to(target) if target else (root / name).write_bytes(name.encode())
                real += [] if target or (root / name).parent.resolve() != (root / name).parent else [name]
        dataset = imagenet.read_images(root)
        splits = {"train": dataset.train, "val": dataset.val}
        for item in [*dataset.train, *dataset.val]:
            assert item["image"].read() and not archives.passed_over(item["name"])
            assert "label" not in item or item["name"].split("/")[0] == dataset.wnids[item["label"]]
        wanted = [name for name in real if imagenet.is_image(name) and not archives.passed_over(name)]
        if dataset.wnids:
            for split, items in splits.items():
                inside = {root / name for name in wanted if name.startswith(f"{split}/") and name.count("/") > 1}
                assert inside <= {item["image"].path for item in items}
        else:
            read = {item["image"].path.resolve() for items in splits.values() for item in items}
            assert {(root / name).resolve() for name in wanted} <= read

    links = st.lists(st.tuples(paths, st.sampled_from(TARGETS)), max_size=2)
    campaign("image folders", st.tuples(classes, st.lists(paths, max_size=8), links), attempt, share=4)


@pytest.mark.parametrize("reader", [labels.kaggle_labels, labels.listed_labels, labels.read_class_names, labels.devkit_labels])
def test_labels(tmp_path, reader):
    texts = st.text('ab,"\n ImageIdPredictonSrg{}:', max_size=60).map(str.encode)

    def attempt(data: bytes) -> None:
        assert all(isinstance(word, str) for pair in reader(saved(tmp_path / "f", data)).items() for word in pair)

    campaign("labels", st.binary(max_size=60) | texts, attempt)


def test_results(tmp_path):
    def attempt(tree) -> None:
        assert isinstance(results.read_value(saved(tmp_path / "m.json", tree), "x"), (int, float, str))

    campaign("metrics", PLAIN | st.fixed_dictionaries({"x": ATOMS}), attempt)


def test_published_tables(tmp_path):
    rows = "method,backbone,epochs,batch_size,teacher,linear,finetune,miou,kind,source\nMAE,ViT,1600,,none,68.0,83.6,48.1,published,x\n"
    cells = [line.split(",") for line in rows.splitlines()]
    words = st.text(max_size=4).filter(lambda text: "\ud800" not in text) | st.sampled_from(["", "1.5", "nan", "1e999", ",", '"'])

    def attempt(tree: list) -> None:
        text = "\n".join(",".join(line) for line in tree)
        published = results.read_published(saved(tmp_path / "p.csv", text.encode(errors="replace")))
        assert len(table.published_rows(published, "published", str)) <= len(published)

    inputs = st.builds(
        changed, st.just(cells), st.sampled_from([p for p in places(cells) if len(p) == 2]), words, st.just("replace")
    )
    assert campaign("published numbers", inputs, attempt, 2)["right"]


def test_locks(tmp_path, committed_tree, monkeypatch):
    monkeypatch.chdir(tmp_path)
    item = {"path": "a", "md5": "b"}
    lock = {"stages": {"pretrain@milan-0": {"cmd": "x", "deps": [item], "outs": [item]}}}
    params = validate(Params, committed_tree, "params.yaml")
    plain = st.recursive(
        st.none() | st.integers(0, 9) | st.text("ab", max_size=3),
        lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text("ab", max_size=3), some, max_size=3),
        max_leaves=5,
    )

    def attempt(tree) -> None:
        saved(tmp_path / "dvc.lock", yaml.safe_dump(tree).encode())
        assert set(provenance.read_lock(tmp_path / "dvc.lock", params)) <= set(runs.lock_hashes())

    assert campaign("a lock", changes(lock, plain), attempt, 2)["right"]
    recipe = {"variants": ["milan"], "seeds": [0]}
    saved(tmp_path / "dvc.lock", yaml.safe_dump(lock).encode())
    campaign(
        "a recipe beside a lock",
        changes(recipe, plain),
        lambda tree: saved(tmp_path / "params.yaml", yaml.safe_dump(tree).encode()) and runs.active_hashes(),
    )


def test_the_count(capsys):
    """Print, as the last test, how many inputs of each kind were tried, refused, and read correctly."""
    total = sum(TRIED.values(), Counter())
    with capsys.disabled():
        for name, count in {**TRIED, "all": total}.items():
            print(f"\n{name:28} {count['tried']:7} tried {count['refused']:7} refused {count['right']:7} right", end="")
    assert total["tried"] == total["refused"] + total["right"]
