"""The table and the charts of all variants and seeds, beside the published numbers.

    python -m stages.report --metrics reports/metrics/demo --curves reports/curves/demo \
        --published reports/published.csv --out reports

Writes table.md, table.csv, table.tex and claims.csv, plots/bars.png and plots/curves.png. Costs a few seconds. Expect MILAN
well above MAE and no pretraining in linear evaluation; the table states what order there is. Evaluations that were not run are
dashes: `dvc repro -s report` after a `dvc exp run` of some stages.
"""

from milan.core.files import write_whole
from milan.report import claims, plots, table
from milan.report.results import read_results
from milan.stage import Kind, Stage, run

KIND = Kind(reads=("metrics", "curves", "published"), folders=("out",))


def main(stage: Stage) -> None:
    args = stage.args
    results = read_results(args.metrics, args.published, stage.params, partial=True)
    texts = {"table.md": table.markdown, "table.csv": table.csv, "table.tex": table.latex, "claims.csv": claims.csv}
    for name, write in texts.items():
        write_whole(args.out / name, write(results).encode())
        stage.tracker.artifact(args.out / name, "report")
    curves = plots.curves(args.curves, stage.params, results.missing)
    for name, figure in {"bars.png": plots.bars(results), "curves.png": curves}.items():
        stage.tracker.artifact(plots.save(figure, args.out / "plots" / name), "report/plots")
    print(f"{args.out / 'table.md'}: {len(results.ours)} variants, {len(stage.params.seeds)} seed(s)", flush=True)


if __name__ == "__main__":
    run("report", main, __doc__, KIND)
