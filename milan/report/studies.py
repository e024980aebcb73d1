"""The evidence: every study of docs/evidence.md, at demo scale or another (-S scale=), written to reports/evidence/<study>/.

    python -m milan.report.studies                 # all of them; or: python -m milan.report.studies seeds views
    python -m milan.report.studies mask_ratio --values 0.6,0.8 -S scale=smoke

The studies run in a clone of the committed state, .scratch/studies, with this repository's DVC cache: nothing that was
run here is run again, and nothing here changes but reports/evidence. Type the same command again after an interruption:
it continues. Costs are said in docs/evidence.md.
"""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import yaml

from milan.core.errors import UserError
from milan.core.files import SCRATCH, refusals_said, write_whole
from milan.core.program import alone, fail
from milan.core.redaction import discreet
from milan.params import Params, read_params
from milan.report import claims, costs, plots, sweep, table
from milan.report.page import LINKS
from milan.report.provenance import StageRun
from milan.report.results import read_results

CLONE = SCRATCH / "studies"
STAGES = ("linear_eval", "finetune", "segment")  # and what they need
OUT = Path("reports/evidence")
PARTS = ("milan", "stages", "conf", "dvc.yaml", "reports/published.csv")  # what the studies take from the commit


class Study(NamedTuple):
    """One key, the values that it takes, what they are to show."""

    key: str
    values: tuple
    question: str
    fixed: tuple[str, ...] = ("variants=[milan]",)


STUDIES = {
    "seeds": Study("seeds", ("[0,1,2]",), "Do the paper's claims hold over seeds?", ()),
    "views": Study(
        "extract_targets.views",
        (1, 2, 4, 8, 0),
        "How many fixed views of an image does the target bank need? With 0 there is no bank: every epoch has a crop of its "
        "own, and the teacher runs inside pretraining.",
    ),
    "mask_ratio": Study("pretrain.mask_ratio", (0.5, 0.65, 0.75, 0.9), "How much of an image is to be masked?"),
    "decoder_depth": Study("model.decoder.depth", (1, 2, 4), "How deep is the decoder to be?"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", metavar="STUDY", help=f"of {', '.join(STUDIES)} (default: all)")
    parser.add_argument("--values", help="other values for the one study named, with commas between")
    parser.add_argument("-S", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="for every run, as DVC's")
    parser.add_argument("--out", type=Path, default=OUT, help="default: %(default)s")
    args = parser.parse_args()
    try:
        with refusals_said(), alone("studies") as lock:
            run(chosen(args.studies, args.values), args.settings, args.out, lock)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Stopped. What is finished is kept; type the same command again to continue.", 130)


def chosen(names: list[str], values: str | None) -> dict[str, Study]:
    """Raises UserError for a study that there is not, and for values that go with no one study."""
    for name in names:
        if name not in STUDIES:
            raise UserError(f"{name}: there is no such study; there are {', '.join(STUDIES)}.")
    if values is None:
        return {name: STUDIES[name] for name in names or STUDIES}
    if len(names) != 1 or names == ["seeds"]:
        raise UserError("--values goes with one study that varies a number. Other seeds are -S 'seeds=[3,4,5]'.")
    return {names[0]: STUDIES[names[0]]._replace(values=tuple(values.split(",")))}


def run(studies: dict[str, Study], settings: list[str], out: Path, lock: int) -> None:
    home, folder = Path.cwd(), out.absolute()
    make_clone()
    os.chdir(CLONE)
    for name, study in studies.items():
        for number, value in enumerate(study.values, 1):
            print(f"\nstudy {name}, run {number} of {len(study.values)}: {study.key}={value}", flush=True)
            experiment(re.sub(r"[^\w.]+", "-", f"{name}-{value}").strip("-"), study, value, settings, lock)
        subprocess.run([sys.executable, "-m", "milan.tracking.logger"], check=True)  # what MLflow has not heard yet
        about = f"{study.question}\n\nThe command: `{command(name, study, settings, out)}`."
        known = runs_known(home)
        if name == "seeds":
            write_seeds(read_params(Path("params.yaml")), known, folder / name, about)
        else:
            points = [e for e in sweep.read_experiments() if e.name.startswith(f"{name}-")]
            sweep.write(study.key, points, known, folder / name, about)


def command(name: str, study: Study, settings: list[str], out: Path = OUT) -> str:
    values = "" if study == STUDIES[name] else f" --values {','.join(study.values)}"
    words = [f" -S '{setting}'" for setting in settings] + ([] if out == OUT else [f" --out {discreet(out)}"])
    return f"python -m milan.report.studies {name}{values}{''.join(words)}"


# -------------------------------------------------------------------------------------------------------------- the clone


def make_clone() -> None:
    """.scratch/studies at this commit, on this repository's DVC cache. What an earlier run left in it is continued."""
    changed = sweep.git("status", "--porcelain", "-uno", *PARTS).strip()
    if changed:
        raise UserError(f"The studies run what is committed, and this is not: {' '.join(changed.split())}. Commit it first.")
    if not CLONE.exists():
        sweep.git("clone", "--quiet", "--no-checkout", ".", str(CLONE))
    sweep.git("-C", str(CLONE), "fetch", "--quiet", str(Path.cwd()), "HEAD")
    sweep.git("-C", str(CLONE), "reset", "--quiet", "--hard", "FETCH_HEAD")
    cache = dvc("cache", "dir", capture_output=True, text=True).stdout.strip()
    dvc("config", "--local", "cache.dir", cache, cwd=CLONE)


def experiment(name: str, study: Study, value, settings: list[str], lock: int) -> None:
    """One point, as an experiment of DVC's in the clone. A finished stage comes from the cache."""
    sweep.git("reset", "--quiet", "--hard")
    sweep.git("clean", "-fdq", "reports")
    dvc("checkout", "--quiet", "--force", stderr=subprocess.DEVNULL, check=False)  # what the cache has, of what was pulled
    dvc("exp", "remove", name, capture_output=True, check=False)  # of an earlier run, if there was one
    given = [word for setting in (*study.fixed, f"{study.key}={value}", *settings) for word in ("-S", setting)]
    dvc("exp", "run", "--name", name, *given, *STAGES, pass_fds=[lock])


def dvc(*words: str, check: bool = True, **options) -> subprocess.CompletedProcess:
    """DVC, with this interpreter for its stages. Raises UserError when it fails."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run([sys.executable, "-m", "dvc", *words], env={**os.environ, "PATH": path}, **options)
    if check and done.returncode:
        raise UserError(
            f"dvc {' '.join(words)} ended with status {done.returncode}; what it said stands above. What is finished is kept: "
            "mend the cause and type the same command again."
        )
    return done


def runs_known(home: Path) -> list[StageRun]:
    """Of the clone's store, and of this repository's, which knows what came from the cache."""
    scale, here, found = yaml.safe_load(Path("params.yaml").read_text())["scale"], Path.cwd(), []
    for folder in (home, here):
        os.chdir(folder)
        found += costs.known_runs(scale)
    return found


# -------------------------------------------------------------------------------------------------------------- the seeds


def write_seeds(p: Params, known: list[StageRun], out: Path, about: str) -> None:
    """Variants over seeds: means and ranges, and the claims judged; every seed's numbers in table.csv."""
    r = read_results(Path("reports/metrics") / p.scale, Path(p.report.published), p)
    recipe = yaml.safe_load(Path("params.yaml").read_text())
    lock = sweep.read_lock(Path("dvc.lock").read_text(), recipe)
    rows = [{k: v for k, v in row.items() if k not in LINKS} for row in table.our_rows(r, lambda text, path: text)]
    sentences = "\n".join(f"- {sentence}" for sentence in [*table.order_sentences(r), *table.notes(r)])
    parts = [f"# Variants over seeds at scale {p.scale}", about, table.measured_on(r), table.markdown_table(rows), sentences]
    parts += [*table.claims_section(r), costs.said([lock], known), "![Bars of our variants](figure.png)"]
    write_whole(out / "table.md", ("\n\n".join(parts) + "\n").encode())
    write_whole(out / "table.csv", r.runs.to_csv(index=False, lineterminator="\n").encode())
    write_whole(out / "claims.csv", claims.csv(r).encode())
    plots.save(plots.bars(r), out / "figure.png")
    sweep.keep(out, recipe, lock)
    print(f"{out / 'table.md'}: {len(r.ours)} variants, {len(p.seeds)} seed(s)", flush=True)


if __name__ == "__main__":
    main()
