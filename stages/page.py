"""One page that opens without a server: table, figures, recipe, and the trail of every number.

    python -m stages.page --metrics reports/metrics/demo --published reports/published.csv --plots reports/plots \
        --figures reports/figures --notebooks notebooks --imagenet outs/demo/imagenet --ade20k outs/demo/ade20k \
        --lock dvc.lock --evidence reports/evidence --contents outs/demo/page.json --out reports/index.html

Hours, hardware and git revision come from MLflow, from the runs that made what dvc.lock names, so they change from run
to run: the page is in git and no out of DVC's, and dvc.lock stays as it is. The out is the list of what the page shows, with
digests. A fresh clone lacks it, so that DVC makes the page there too, of that machine's runs, even where all numbers come out as
committed. Costs a few seconds. Expect a page of about 1 MB.
"""

import argparse

from milan.core.files import file_digest, write_json, write_whole
from milan.core.redaction import redact
from milan.core.repository import revision
from milan.report import page, provenance, reproduction, table
from milan.report.results import TITLES, Results, read_results
from milan.stage import Kind, Stage, present, run
from milan.tracking import machine
from milan.tracking.tracker import Tracker

KIND = Kind(
    reads=("metrics", "published", "plots", "figures", "notebooks", "imagenet", "ade20k", "lock", "evidence"),
    files=("out", "contents"),
    last=True,
)


def main(stage: Stage) -> None:
    args, params = stage.args, stage.params
    results = read_results(args.metrics, args.published, params)
    lock = provenance.read_lock(args.lock, params)
    data = [provenance.read_data(args.imagenet, params.data.imagenet), provenance.read_data(args.ade20k, params.data.ade20k)]
    trail = provenance.origins(lock, runs_known(stage))
    bars = page.picture(present(args.plots / "bars.png"), "Our variants", page.BARS)
    here = {"revision": revision(), "hardware": machine.hardware(params.compute.device)}
    verdict = reproduction.judge(results, args.params, args.lock, args.evidence)
    pictures = page.read_pictures(args.figures, args.notebooks)
    text = page.render(results, verdict, pictures, bars, trail, data, here, redact(args.params.read_text(encoding="utf-8")))
    write_whole(args.out, text.encode())
    shown = (path for folder in (args.metrics, args.figures, args.plots) for path in folder.rglob("*") if path.is_file())
    write_json(args.contents, {path.as_posix(): file_digest(path) for path in shown})
    stage.tracker.artifact(args.out, "report")
    summarise(results, args, stage.tracker.pipeline)
    known = sum(origin.run is not None for origin in trail)
    print(f"{args.out}: {len(text) / 1e6:.1f} MB, the runs of {known} of {len(trail)} stages", flush=True)


def summarise(results: Results, args: argparse.Namespace, pipeline: Tracker) -> None:
    """Log what a person looks for to the pipeline's run: the table, its numbers as <column>/<variant>, page and figures."""
    means = results.ours[list(TITLES)].stack().dropna()
    pipeline.event("metrics", step=0, values={f"{column}/{variant}": value for (variant, column), value in means.items()})
    for name, text in {"table.md": table.markdown(results), "table.csv": table.csv(results)}.items():
        pipeline.text(text, name)
    for path in (args.out, args.figures, args.plots):
        pipeline.artifact(path)


def runs_known(stage: Stage) -> list[provenance.StageRun]:
    """From MLflow; none, and the reason is printed, where it does not answer: the page then says so."""
    try:
        provenance.wait_for_turn(stage.tracker.spool)
        return provenance.finished_runs(f"milan-{stage.params.data.name}")
    except Exception as error:  # whatever ails the store must not keep the page
        print(f"page: hours and hardware are left out. {redact(str(error)[:500]) or type(error).__name__}.", flush=True)
        return []


if __name__ == "__main__":
    run("page", main, __doc__, KIND)
