"""Run the studies of docs/evidence.md and write each to reports/evidence/<study>/.

    python -m milan.report.studies                 # all of them; or: python -m milan.report.studies seeds views
    python -m milan.report.studies mask_ratio --values 0.6,0.8 -S scale=smoke

Every point of a study is a DVC experiment on the present commit (`dvc exp run --temp`): it runs in a temporary workspace
of DVC's, shares the cache with this one, and is listed by `dvc exp show`. Type the same command again after an
interruption: it continues. docs/evidence.md gives the costs.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from milan.core.errors import UserError
from milan.core.files import explain_os_errors, json_digest, write_json, write_whole
from milan.core.program import alone, fail
from milan.core.redaction import redact
from milan.params import read_params
from milan.report import claims, costs, plots, sweep, table
from milan.report.page import LINKS
from milan.report.provenance import StageRun
from milan.report.results import ALL_MEASURES, read_results
from milan.report.text import in_markdown, markdown_table

EVALUATIONS = tuple(dict.fromkeys(stage for stage, _ in ALL_MEASURES.values()))  # and the stages that they need
OUT = Path("reports/evidence")
COMMITTED = ("milan", "stages", "conf", "dvc.yaml", "reports/published.csv")  # an experiment would take their changes along
EXECUTIONS = Path(".dvc/tmp/exps/run")  # DVC's records of the experiments that it ran: a JSON file each


class Study(NamedTuple):
    """A key of the recipe, its values, and the question that they answer."""

    key: str
    values: tuple
    question: str
    fixed: tuple[str, ...] = ("variants=[milan]",)


STUDIES = {
    "seeds": Study("seeds", ("[0,1,2]",), "Do the paper's claims hold over seeds?", ()),
    "views": Study(
        "extract_targets.views",
        (1, 2, 4, 0),
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
        with explain_os_errors(), alone("studies") as lock:
            refuse_changes()
            for name, study in chosen(args.studies, args.values).items():
                run(name, study, args.settings, args.out, lock)
    except UserError as error:
        fail(str(error))
    except KeyboardInterrupt:
        fail("Stopped. What is finished is kept; type the same command again to continue.", 130)


def chosen(names: list[str], values: str | None) -> dict[str, Study]:
    """Return the named studies, or all. Raises UserError for an unknown study, and for values without exactly one study."""
    for name in names:
        if name not in STUDIES:
            raise UserError(f"{name}: there is no such study; there are {', '.join(STUDIES)}.")
    if values is None:
        return {name: STUDIES[name] for name in names or STUDIES}
    if len(names) != 1 or names == ["seeds"]:
        raise UserError("--values goes with one study that varies a number. Other seeds are -S 'seeds=[3,4,5]'.")
    return {names[0]: STUDIES[names[0]]._replace(values=tuple(values.split(",")))}


def refuse_changes() -> None:
    """Raise UserError where files that decide the results are not as committed."""
    changed = sweep.git("status", "--porcelain", "-uno", *COMMITTED).strip()
    if changed:
        raise UserError(f"The studies run what is committed, and this is not: {' '.join(changed.split())}. Commit it first.")


def run(name: str, study: Study, settings: list[str], out: Path, lock: int) -> None:
    """Run the points of a study that have no result yet, and write the study to out/name."""
    points = {point_name(name, value, settings): value for value in study.values}
    remove_killed(list(points))
    finished = [experiment.name for experiment in sweep.read_experiments()]
    for number, (point, value) in enumerate(points.items(), 1):
        print(f"\nstudy {name}, run {number} of {len(points)}: {study.key}={value}", flush=True)
        if point in finished:
            print(f"DVC has its result: experiment {point}", flush=True)
        else:
            given = [word for setting in (*study.fixed, f"{study.key}={value}", *settings) for word in ("-S", setting)]
            sweep.dvc("exp", "run", "--temp", "--name", point, *given, *EVALUATIONS, pass_fds=[lock])
    subprocess.run([sys.executable, "-m", "milan.tracking.logger"], check=True)  # events that MLflow could not take before
    about = f"{study.question}\n\nThe command: `{command(name, study, settings, out)}`."
    experiments = [experiment for experiment in sweep.read_experiments() if experiment.name in points]
    runs = costs.known_runs({experiment.recipe["data"]["name"] for experiment in experiments})
    if name == "seeds":
        write_seeds(experiments[0], runs, out / name, about)
    else:
        sweep.write(study.key, experiments, runs, out / name, about)


def point_name(name: str, value, settings: list[str]) -> str:
    """Return the name of a point's experiment, such as mask_ratio-0.5; other settings have other names."""
    words = [name, str(value), *([json_digest(settings)[:8]] if settings else [])]
    return re.sub(r"[^\w.]+", "-", "-".join(words)).strip("-")


def remove_killed(points: list[str]) -> None:
    """Remove the temporary workspaces of killed runs of these points, which DVC keeps and lists as running."""
    for path in EXECUTIONS.glob("*/*.run"):
        execution = json.loads(path.read_text(encoding="utf-8"))
        if execution["name"] in points:
            shutil.rmtree(execution["root_dir"], ignore_errors=True)


def command(name: str, study: Study, settings: list[str], out: Path = OUT) -> str:
    values = "" if study == STUDIES[name] else f" --values {','.join(study.values)}"
    words = [f" -S '{setting}'" for setting in settings] + ([] if out == OUT else [f" --out {redact(out)}"])
    return f"python -m milan.report.studies {name}{values}{''.join(words)}"


def write_seeds(experiment: sweep.Experiment, runs: list[StageRun], out: Path, about: str) -> None:
    """Write variants over seeds: means, ranges and the judged claims to table.md, every seed's numbers to table.csv."""
    sweep.keep(out, experiment)
    params = read_params(out / "params.yaml")
    with tempfile.TemporaryDirectory() as folder:
        for path, values in experiment.metrics.items():
            write_json(Path(folder, path), values)
        results = read_results(Path(folder), Path(params.report.published), params)
    rows = [{k: v for k, v in row.items() if k not in LINKS} for row in table.our_rows(results, lambda text, path: text)]
    head = [f"# {in_markdown(f'Variants over seeds at scale {params.scale}')}", about, in_markdown(table.measured_on(results))]
    parts = [*head, markdown_table(rows), table.markdown_sentences(results)]
    origin = in_markdown(costs.said([experiment.lock], runs))
    parts += [*table.claims_section(results), origin, "![Bars of our variants](figure.png)"]
    write_whole(out / "table.md", ("\n\n".join(parts) + "\n").encode())
    write_whole(out / "table.csv", results.runs.to_csv(index=False, lineterminator="\n").encode())
    write_whole(out / "claims.csv", claims.csv(results).encode())
    plots.save(plots.bars(results), out / "figure.png")
    print(f"{out / 'table.md'}: {len(results.ours)} variants, {len(params.seeds)} seed(s)", flush=True)


if __name__ == "__main__":
    main()
