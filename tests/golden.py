"""Compare this code with numbers from the original implementation.

    python -m tests.golden DIR [CASE ...]

DIR holds manifest.json and the cases that it lists, in the format of tests/golden/README.md: only outputs, because one formula
makes weights and inputs from names, shapes and a seed. The command prints one line for each case and tensor, with the largest
error and the allowed one. It reads every size from the manifest, and tells the kind of a case from the tensors that it holds.
Exit status: 0 all within tolerance, 1 a miss, 2 a folder that cannot be read.
"""

import argparse
import ast
import dataclasses
import functools
import json
import sys
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from milan.core.errors import UserError

SAMPLED = "keep_prob_mc"


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison: its largest error and the allowed one. A row without an error is a note on a fact that is proved
    elsewhere or has no counterpart here."""

    case: str
    what: str
    error: float | None
    allowed: float | None
    note: str = ""

    @property
    def word(self) -> str:
        if self.error is None:
            return "NOTE"
        return "PASS" if self.error <= self.allowed else "MISS"  # nan misses

    def __str__(self) -> str:
        numbers = "" if self.error is None else f"error {self.error:8.2e}  allowed {self.allowed:8.2e}"
        return f"{self.word}  {self.case:26} {self.what:48} {numbers:34}  {self.note}".rstrip()


class Case:
    """One case of a folder: its entry in the manifest, its stored arrays, and the formula of its weights and inputs."""

    def __init__(self, folder: Path, name: str, entry: dict, seed: int):
        self.name, self.seed = name, seed
        self.entry, self.config, self.tensors = entry, entry.get("config", {}), entry["tensors"]
        self.shapes = entry.get("param_names_shapes") or entry.get("state_dict_names_shapes") or {}
        with np.load(folder / entry["file"], allow_pickle=False) as arrays:
            self.arrays = {key: arrays[key] for key in arrays.files}
        for tensor in self.tensors:
            self.stored(tensor)

    def stored(self, tensor: str) -> np.ndarray:
        """Return the stored part of a tensor: all of it or a slice."""
        full = self.tensors[tensor]["stored"] == "full"
        return self.arrays[tensor if full else f"{tensor}__slice"]

    def shape(self, tensor: str) -> list[int]:
        return self.tensors[tensor]["shape"]

    def draw(self, name: str, shape: Iterable[int], mean: float = 0.0, std: float = 1.0) -> np.ndarray:
        """Draw an array by the formula: standard normals of a generator seeded by the name, scaled and shifted in float32."""
        return np.asarray(np.float32(mean) + np.float32(std) * standard_normal(f"{self.seed}:{name}", tuple(shape)))

    def input(self, name: str, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.draw(f"input:{name}", shape))

    def weight(self, name: str, shape: Iterable[int]) -> torch.Tensor:
        mean = 1.0 if name.endswith(".weight") and len(tuple(shape)) == 1 else 0.0
        return torch.from_numpy(self.draw(name, shape, mean, 0.02))


@functools.lru_cache(maxsize=300)  # several cases share a ViT
def standard_normal(key: str, shape: tuple[int, ...]) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode())))
    return np.asarray(generator.standard_normal(shape)).astype(np.float32)


def tolerance(entry: dict, stored: np.ndarray) -> float:
    """Return the allowed error: 20 times the original's rounding error, or 1e-5 of the largest value, whichever is larger."""
    noise = entry.get("fp32_vs_fp64", {})
    largest = max(float(np.abs(stored).max(initial=0)), noise.get("ref_absmax", 0.0))
    return max(20 * noise.get("max_abs", 0.0), 1e-5 * largest)


def cut(tensor: np.ndarray, part: str) -> np.ndarray:
    """Return a part of a tensor, given as text such as "[:, ::2, ::5]" or "full"."""
    if part == "full":
        return tensor

    def index(text: str):
        ends = [ast.literal_eval(end) if end.strip() else None for end in text.split(":")]
        return slice(*ends) if len(ends) > 1 else ends[0]

    return tensor[tuple(index(text) for text in part.strip("[] ").split(","))]


def compare(case: Case, tensor: str, ours) -> Iterator[Row]:
    """Yield the rows of one tensor: its stored values, and the statistics of the whole where only a slice is stored."""
    entry, stored = case.tensors[tensor], case.stored(tensor)
    if stored.dtype.kind == "U":
        yield names_row(case.name, tensor, list(stored), list(ours))
        return
    ours = np.asarray(ours.detach().numpy() if isinstance(ours, torch.Tensor) else ours).astype(np.float64)
    if list(ours.shape) != list(entry["shape"]):
        yield Row(case.name, tensor, np.inf, 0, f"shape {list(ours.shape)}, not {entry['shape']}")
        return
    if tensor in COMPARISONS:
        yield COMPARISONS[tensor](case, tensor, ours)
        return
    allowed, label = tolerance(entry, stored), tensor + entry["stored"].removeprefix("full")
    yield Row(case.name, label, largest(cut(ours, entry["stored"]) - stored), allowed)
    if entry["stored"] != "full":
        yield statistics_row(case.name, f"{tensor} mean, std, l2", ours, entry["stats"], allowed)


def largest(difference: np.ndarray) -> float:
    return float(np.abs(difference).max(initial=0))


def statistics_row(case: str, what: str, ours: np.ndarray, stats: dict, allowed: float) -> Row:
    """Compare statistics: if no value differs by more than `allowed`, neither do mean, std and l2 / sqrt(n)."""
    mine = {"mean": ours.mean(), "std": ours.std(), "l2": np.linalg.norm(ours)}
    scale = {"mean": 1, "std": 1, "l2": np.sqrt(ours.size)}
    return Row(case, what, max(abs(mine[key] - stats[key]) / scale[key] for key in mine), allowed)


def names_row(case: str, what: str, theirs: Iterable, ours: Iterable) -> Row:
    """Compare two lists as sets; the error is the number of names in only one of them."""
    differing = sorted(set(map(str, theirs)) ^ set(map(str, ours)))
    return Row(case, what, len(differing), 0, f"differ: {', '.join(differing[:8])}" if differing else "names")


def relative_row(case: Case, tensor: str, ours: np.ndarray) -> Row:
    """Compare norms, each relative to itself, because 1e-5 of the largest would hide the small ones; a norm of zero is compared
    relative to the largest."""
    stored = case.stored(tensor).astype(np.float64)
    errors = np.abs(ours - stored) / np.maximum(stored, 1e-8 * stored.max())
    allowed = max(1e-4, 20 * case.entry.get(f"{tensor}_fp32_vs_fp64_max_rel", 0))
    names = case.stored("grad_names" if tensor == "grad_norms" else "param_names")
    return Row(case.name, f"{tensor} (relative)", float(errors.max()), allowed, f"worst: {names[errors.argmax()]}")


def sampled_row(case: Case, tensor: str, ours: np.ndarray) -> Row:
    """Compare two Monte-Carlo estimates of the same probabilities: five standard errors, plus the resolution of the draws."""
    stored = case.stored(tensor).astype(np.float64)
    theirs, draws = case.entry[SAMPLED]["draws"], SAMPLES
    allowed = 5 * np.sqrt(stored * (1 - stored) * (1 / draws + 1 / theirs)) + 5 / min(draws, theirs)
    worst = (np.abs(ours - stored) / allowed).argmax()
    return Row(case.name, tensor, abs(ours[worst] - stored[worst]), allowed[worst], f"closest to its bound: patch {worst}")


SAMPLES = 200_000
COMPARISONS = {"grad_norms": relative_row, "final_param_norms": relative_row, SAMPLED: sampled_row}


def run_case(case: Case) -> Iterator[Row]:
    from tests import golden_cases

    compute = golden_cases.kind(case)
    if compute is None:
        yield Row(case.name, "(all)", np.inf, 0, "no check knows a case that holds these tensors")
        return
    ours = compute(case)
    for tensor in case.tensors:
        if tensor in ours:
            yield from compare(case, tensor, ours[tensor])
        else:
            yield Row(case.name, tensor, np.inf, 0, "nothing here computes it")
    yield from (Row(case.name, *row) for row in ours.get("rows", ()))


def run_json(name: str, content: dict) -> Iterator[Row]:
    from tests import golden_lists

    for key, check in golden_lists.KINDS.items():
        if key in content:
            yield from (Row(name, *row) for row in check(content))
            return
    yield Row(name, "(all)", np.inf, 0, "no check knows a file that holds these keys")


def run(folder: Path, only: Iterable[str] = ()) -> Iterator[Row]:
    """Yield all rows of a folder, or of the cases and files in `only`. A check that raises an error is a miss."""
    for name, check in read(folder):
        if only and name not in only:
            continue
        try:
            yield from check()
        except Exception as error:
            yield Row(name, "(could not be run)", np.inf, 0, f"{type(error).__name__}: {error}")


def read(folder: Path) -> list:
    """Return (name, check) for every case and JSON file. Raises UserError where one cannot be read."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        checks = []
        for name, entry in manifest["cases"].items():
            path = folder / entry["file"]
            case = Case(folder, name, entry, manifest["seed"])
            checks.append((name, lambda case=case: run_case(case)))
        for name in manifest.get("json_files", ()):
            path = folder / name
            content = json.loads(path.read_text())
            checks.append((name, lambda name=name, content=content: run_json(name, content)))
        return checks
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]!r} is missing. The folder's format is described in tests/golden/README.md.") from None
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be read ({error}). Give a folder as described in tests/golden/README.md.") from None


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.golden", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("only", nargs="*", metavar="CASE", help="names of cases or JSON files; all when left out")
    options = parser.parse_args(arguments)
    start, rows, threads = time.monotonic(), [], torch.get_num_threads()
    torch.set_num_threads(1)  # as for the original's numbers
    try:
        for row in run(options.folder, options.only):
            print(row, flush=True)
            rows.append(row)
        if not rows:
            raise UserError(f"{options.folder} holds no case {' or '.join(options.only) or 'at all'}.")
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    finally:
        torch.set_num_threads(threads)
    missed = [f"{row.case} {row.what}" for row in rows if row.word == "MISS"]
    compared, cases = sum(row.word != "NOTE" for row in rows), len({row.case for row in rows})
    print(f"{compared - len(missed)} of {compared} comparisons in {cases} cases within tolerance, {time.monotonic() - start:.0f} s")
    if missed:
        print("missed: " + "; ".join(missed))
    return int(bool(missed))


if __name__ == "__main__":
    import tests.golden  # not __main__: the cases import this module too, and it must not be loaded twice

    raise SystemExit(tests.golden.main())
