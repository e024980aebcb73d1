"""Small copies of the layouts in which ImageNet and ADE20K are distributed, made of the same few images."""

import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.io
from PIL import Image

WNIDS = ["n01440764", "n01443537", "n02099601"]
WORDS = ["tench, Tinca tinca", "goldfish, Carassius auratus", "golden retriever"]
IMAGENET_NAMES = ["tench", "goldfish", "Golden Retriever"]  # OpenAI's names of the classes
IDS = {"n01440764": 449, "n01443537": 3, "n02099601": 12}  # as in the devkit, where they do not follow the WordNet ids
IMAGES_PER_CLASS = {"train": 4, "val": 2}


def encoded(kind: str = "JPEG", mode: str = "RGB", size=(20, 16), seed: int = 0, **options) -> bytes:
    """Encode a smooth picture, on which decoders agree."""
    coarse = np.random.default_rng(seed).integers(0, 255, (3, 4, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.BICUBIC).convert(mode).save(out, kind, **options)
    return out.getvalue()


def odd_files() -> dict[str, bytes]:
    """Return files of the unusual kinds that ImageNet holds and that are valid."""
    return {
        "a_plain.JPEG": encoded(),
        "b_cmyk.JPEG": encoded(mode="CMYK"),
        "c_grey.jpg": encoded(mode="L"),
        "d_png_named.JPEG": encoded("PNG"),
        "e_exif_junk.JPEG": encoded(exif=b"Exif\0\0" + b"\xff\x00junk" * 9),
        "f_progressive.JPEG": encoded(progressive=True),
    }


def broken_files() -> dict[str, bytes]:
    return {
        "zero.JPEG": b"",
        "cut.JPEG": encoded(size=(400, 300), quality=95)[:3000],
        "text.JPEG": b"no image, a note\n",
        "head.JPEG": encoded()[:30],
    }


def images() -> dict[str, dict[str, bytes]]:
    """Return {"train" | "val": {"<wnid>/<file>": bytes}}; the numbers of val alternate between classes, as in ILSVRC2012."""
    train, val = {}, {}
    for k, wnid in enumerate(WNIDS):
        train |= {f"{wnid}/{wnid}_{i}.JPEG": encoded(seed=10 * k + i) for i in range(IMAGES_PER_CLASS["train"])}
        numbers = [1 + k + len(WNIDS) * i for i in range(IMAGES_PER_CLASS["val"])]
        val |= {f"{wnid}/ILSVRC2012_val_{n:08d}.JPEG": encoded(seed=100 + n) for n in numbers}
    return {"train": train, "val": val}


def class_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Write files {"train/n01/x.JPEG": bytes} into a folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def folders(root: Path) -> Path:
    return class_tree(root, {f"{split}/{name}": data for split, files in images().items() for name, data in files.items()})


def tar(files: dict[str, bytes], format: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def train_tars(files: dict[str, bytes]) -> dict[str, bytes]:
    """Return {"n01440764.tar": its bytes}, with members at the top, as in the release."""
    return {
        f"{wnid}.tar": tar({name.split("/")[1]: data for name, data in files.items() if name.startswith(wnid)}) for wnid in WNIDS
    }


def tars(root: Path, labels: str = "devkit", given: dict[str, dict[str, bytes]] | None = None) -> Path:
    """Write the release's tars, of images() where none are given, with classes and images not in the order of their names."""
    given = given or images()
    root.mkdir(parents=True)
    inner = train_tars(dict(reversed(given["train"].items())))
    (root / "ILSVRC2012_img_train.tar").write_bytes(tar(dict(reversed(inner.items()))))
    flat = {name.split("/")[1]: data for name, data in given["val"].items()}
    (root / "ILSVRC2012_img_val.tar").write_bytes(tar(dict(sorted(flat.items()))))
    known = {Path(name).stem: name.split("/")[0] for name in given["val"]}
    {"devkit": devkit, "kaggle": kaggle, "list": listed}[labels](root, known)
    return root


def devkit(root: Path, known: dict[str, str]) -> None:
    kinds = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    rows = [(IDS[wnid], wnid, words, 0) for wnid, words in zip(WNIDS, WORDS)] + [(1001, "n00001740", "entity", 2)]
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": np.array(sorted(rows), dtype=kinds)})
    truth = "".join(f"{IDS[known[stem]]}\n" for stem in sorted(known)).encode()
    folder = "ILSVRC2012_devkit_t12"
    files = {
        f"{folder}/readme.txt": b"...",
        f"{folder}/data/ILSVRC2012_validation_ground_truth.txt": truth,
        f"{folder}/data/meta.mat": meta.getvalue(),
    }
    with tarfile.open(root / f"{folder}.tar.gz", "w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def kaggle(root: Path, known: dict[str, str]) -> None:
    lines = [f"{stem},{known[stem]} 1 2 30 40 {known[stem]} 5 6 7 8 " for stem in sorted(known, reverse=True)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")


def listed(root: Path, known: dict[str, str]) -> None:
    (root / "val_labels.txt").write_text("".join(f"{stem}.JPEG {wnid}\n" for stem, wnid in known.items()))


def parquet(path: Path, files: dict[str, bytes], names: list[str] | None, plain: bool = False, rows_a_group: int = 5) -> None:
    """Write rows {"image": {"bytes", "path"} or, where plain, bytes, "label"}; labels are indices of `names` or of WNIDS."""
    order = names if names and set(names) == set(WNIDS) else WNIDS
    labels = [order.index(name.split("/")[0]) for name in files]
    struct = [{"bytes": data, "path": name} for name, data in files.items()]
    column = (
        pa.array(list(files.values()), pa.binary())
        if plain
        else pa.array(struct, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
    )
    table = pa.table({"image": column, "label": pa.array(labels, pa.int64())})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows_a_group)


def parquets(root: Path, names: list[str] | None = WORDS, plain: bool = False) -> Path:
    """Write two files of train and one of validation into data/, as on Hugging Face."""
    given = images()
    train = list(given["train"].items())
    parts = {
        "train-00000-of-00002": train[:7],
        "train-00001-of-00002": train[7:],
        "validation-00000-of-00001": given["val"].items(),
    }
    for name, some in parts.items():
        parquet(root / "data" / f"{name}.parquet", dict(some), names, plain)
    return root


def annotation(values, mode: str = "L") -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.asarray(values, np.uint8)).convert(mode).save(out, "PNG")
    return out.getvalue()


FITTING = np.arange(48).reshape(6, 8) % 12  # labels 0 to 11


def scene_files(annotations: dict[str, bytes | None], split: str = "training") -> dict[str, bytes]:
    """Return {"images/training/x.jpg": bytes, "annotations/training/x.png": bytes}, without the annotations that are None."""
    images = {f"images/{split}/{name}.jpg": encoded(size=(8, 6)) for name in annotations}
    return images | {f"annotations/{split}/{name}.png": data for name, data in annotations.items() if data is not None}


def zipped(path: Path, files: dict[str, bytes], top: str = "ADEChallengeData2016/") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(top + name, data)
    return path
