"""The page: which run made a result, pictures and captions, and escaping of everything that comes from files."""

import dataclasses
import json
import platform
import re
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from milan.core.errors import UserError
from milan.params import read_params
from milan.report import page, provenance
from milan.report.provenance import Origin, PackedData, StageRun
from milan.report.reproduction import Reproduction
from milan.report.results import TITLES, EvaluationData, Results, read_published, summarise
from milan.tracking import machine
from stages import page as stage

EVIL = "<script>alert(1)</script>\"'&"
NO_VERDICT = Reproduction("No verdict.")


def a_run(name: str, started: float, seconds: float = 1.0, **hashes: str) -> StageRun:
    kind, _, variation = name.partition("@")
    tags = {"stage": kind, "git_revision": "0123456789abcdef+changes", "hardware": "a small machine"}
    if variation:
        tags["variant"], tags["seed"] = variation.rsplit("-", 1)
    tags |= {f"dvc:{path}": digest for path, digest in hashes.items()}
    return StageRun(f"id{started:g}", started, seconds, tags)


LOCK = """
schema: '2.0'
stages:
  teacher:
    deps: [{path: outs/imagenet, md5: d1.dir}, {path: milan/training/loop.py, md5: c1}]
    outs: [{path: outs/teacher, md5: t1.dir}]
  pretrain@milan-0:
    deps: [{path: outs/teacher, md5: t1.dir}]
    outs: [{path: outs/milan-0, md5: w1.dir}, {path: milan-0.json, md5: m1}]
  pretrain@gone-0:
    outs: [{path: outs/gone-0, md5: g1.dir}]
  page:
    deps: [{path: outs/teacher, md5: t1.dir}]
    outs: [{path: outs/page.json, md5: p1}]
"""


@pytest.fixture
def lock(tmp_path) -> dict:
    (tmp_path / "dvc.lock").write_text(LOCK)
    return provenance.read_lock(tmp_path / "dvc.lock", read_params("params.yaml"))


def test_read_lock_returns_the_active_recipe_s_stages(lock):
    assert list(lock) == ["teacher", "pretrain@milan-0", "page"]
    assert lock["pretrain@milan-0"]["outs"] == {"outs/milan-0": "w1.dir", "milan-0.json": "m1"}


def test_a_result_comes_from_the_newest_run_that_made_it(lock):
    """The third run wrote other weights, the fourth read another teacher, the fifth is of another stage, the sixth has no hash."""
    runs = [
        a_run("pretrain@milan-0", 1, **{"outs/teacher": "t1.dir", "outs/milan-0": "w1.dir"}),
        a_run("pretrain@milan-0", 2, **{"outs/teacher": "t1.dir", "outs/milan-0": "w1.dir", "elsewhere": "x"}),
        a_run("pretrain@milan-0", 3, **{"outs/teacher": "t1.dir", "outs/milan-0": "w2.dir"}),
        a_run("pretrain@milan-0", 4, **{"outs/teacher": "t2.dir", "milan-0.json": "m1"}),
        a_run("linear_eval@milan-0", 5, **{"outs/milan-0": "w1.dir"}),
        a_run("pretrain@milan-0", 6),
    ]
    trail = {origin.stage: origin for origin in provenance.origins(lock, runs)}
    assert list(trail) == ["teacher", "pretrain@milan-0"]  # the page has no outs
    assert trail["teacher"].run is None and trail["pretrain@milan-0"].run.id == "id2"
    assert trail["teacher"].outs == {"outs/teacher": "t1.dir"}


@pytest.mark.parametrize("text, message", [(None, "is missing"), ("stages: [", "no lock file"), ("- 1", "no lock file")])
def test_a_missing_or_broken_lock_is_named(tmp_path, text, message):
    path = tmp_path / "dvc.lock"
    if text:
        path.write_text(text)
    with pytest.raises(UserError, match=message):
        provenance.read_lock(path, read_params("params.yaml"))


def test_the_page_waits_until_its_logger_sends(tmp_path):
    spool = tmp_path / "1-2.jsonl"
    with pytest.raises(UserError, match="has not answered for 0 s"):
        provenance.wait_for_turn(spool, timeout=0)
    spool.with_suffix(".failed").write_text("MLflow says no")
    with pytest.raises(UserError, match="MLflow says no"):
        provenance.wait_for_turn(spool, timeout=60)
    spool.with_suffix(".place").touch()
    provenance.wait_for_turn(spool, timeout=0)


def test_without_a_store_the_page_leaves_out_hours(tmp_path, monkeypatch, capsys):
    (tmp_path / "1.place").touch()

    def fail(_):
        raise ConnectionError("the store is gone")

    monkeypatch.setattr(provenance, "finished_runs", fail)
    here = SimpleNamespace(tracker=SimpleNamespace(spool=tmp_path / "1.jsonl"), params=SimpleNamespace(data=SimpleNamespace(name="demo")))
    assert stage.runs_known(here) == []
    assert capsys.readouterr().out == "page: hours and hardware are left out. the store is gone.\n"


@pytest.mark.parametrize("seconds, text", [(0.4, "0 s"), (99, "99 s"), (150, "2.5 min"), (5940, "99.0 min"), (9000, "2.5 h")])
def test_durations(seconds, text):
    assert page.duration(seconds) == text


def test_a_revision_is_short_and_still_says_that_code_was_changed():
    assert provenance.revision(a_run("teacher", 1)) == "0123456789+changes"


def test_the_hardware_does_not_name_the_machine():
    said = machine.hardware("cpu")
    assert machine.cpu_name() in said and f"{machine.cores()} cores" in said
    assert platform.node() not in said


# The pictures.


def save_picture(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)


def notebook(path: Path, *cells: tuple[str, str]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"cells": [{"cell_type": kind, "source": [text]} for kind, text in cells]}))


def test_pictures_have_the_notebooks_order_and_captions(tmp_path):
    for name in ("a", "b", "c"):
        save_picture(tmp_path / f"figures/{name}.png", np.full((4, 6, 3), 200, np.uint8))
    text = ("markdown", "## Title of b\n\nSees *much* of `x < y`.")
    notebook(tmp_path / "notebooks/1.ipynb", text, ("code", "figure = 1"), ("code", 'project.save(draw(1, "z"), "b")'))
    notebook(
        tmp_path / "notebooks/2.ipynb", ("markdown", "# A"), ("code", "project.save(f, 'a')\nproject.save(f, 'never drawn')")
    )
    pictures = page.read_pictures(tmp_path / "figures", tmp_path / "notebooks")
    assert [picture.title for picture in pictures] == ["Title of b", "A", "c"]
    assert pictures[0].caption == "Sees <em>much</em> of <code>x &lt; y</code>." and (pictures[0].width, pictures[0].height) == (6, 4)


def test_a_picture_is_lossless_when_that_is_smaller(tmp_path):
    flat, noise = np.zeros((64, 64, 3), np.uint8), np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    flat[:, 32:] = (213, 94, 0)
    for name, pixels, exact in (("flat", flat, True), ("noise", noise, False)):
        save_picture(tmp_path / f"{name}.png", pixels)
        source = page.picture(tmp_path / f"{name}.png", "t", "").source
        assert source.startswith("data:image/webp;base64,")
        with Image.open(urllib.request.urlopen(source)) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), pixels) == exact


# The page.


class Cells(HTMLParser):
    """Collect texts by tag; assert that the page has no scripts, no event handlers and no links to other sources."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.cells = None, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        assert tag not in ("script", "iframe", "object", "form"), tag
        given = dict(attributes)
        assert not any(name.startswith("on") for name in given), given
        assert (given.get("src") or "data:").startswith("data:"), given
        if tag in ("td", "th", "li", "dd", "pre", "h1", "h2", "figcaption"):
            self.open = tag
            self.cells.append((tag, ""))

    def handle_endtag(self, tag):
        if tag == self.open:
            self.open = None

    def handle_data(self, data):
        if self.open:
            tag, text = self.cells[-1]
            self.cells[-1] = (tag, text + data)

    def texts(self, *tags: str) -> list[str]:
        return [" ".join(text.split()) for tag, text in self.cells if tag in tags]


def results(**changes) -> Results:
    p = dataclasses.replace(read_params("params.yaml"), variants=["mae", "milan"])
    runs = pd.DataFrame(
        [{"variant": v, "seed": 0, **dict.fromkeys(TITLES, value)} for v, value in (("mae", 10.0), ("milan", 31.44))]
    )
    measured = EvaluationData("the built-in world", 20, 2000, 11, 400, "Segmentation", 2.1, 17.3, 8000)
    given = {
        "params": p,
        "data": measured,
        "runs": runs,
        "ours": summarise(runs),
        "published": read_published(Path("reports/published.csv")),
    }
    return Results(**{**given, "teacher": {}, "importance": {}, **changes})


def rendered(
    r: Results,
    trail: list[Origin],
    data: list[PackedData] = (),
    recipe: str = "scale: demo\n",
    reproduction: Reproduction = NO_VERDICT,
) -> Cells:
    dot = page.Picture("Bars", page.emphasised("of *all*"), "data:image/webp;base64,", 2, 1)
    return Cells(page.render(r, reproduction, [dot], dot, trail, list(data), {"revision": "r0", "hardware": "h0"}, recipe))


def page_text(r: Results, reproduction: Reproduction = NO_VERDICT) -> str:
    """Render the page without pictures and runs."""
    dot = page.Picture("", page.emphasised(""), "data:,", 1, 1)
    return page.render(r, reproduction, [], dot, [], [], {"revision": "", "hardware": ""}, "")


def test_the_page_shows_table_sentences_recipe_and_runs():
    trained = a_run("teacher", 0, 90)
    trained.tags.update(precision="bf16", device="cpu")
    trail = [
        Origin("teacher", {"outs/teacher": "t1.dir"}, trained),
        Origin("pretrain@milan-0", {"outs/m": "w1.dir"}, a_run("pretrain@milan-0", 3600, 3510)),
        Origin("report", {"reports/table.md": "r1"}, None),
    ]
    rendered_cells = rendered(results(), trail, [PackedData(Path("outs/demo/imagenet"), {"train": 6000, "val": 20}, "drawn", "ab12")])
    cells = rendered_cells.texts("td", "th")
    at = cells.index("MILAN")
    assert cells[at + 4 : at + 10] == ["31.4"] * 6
    assert "MILAN: linear eval 31.4, 21.4 above MAE." in rendered_cells.texts("li")
    assert "85.4" in cells and "scale: demo" in rendered_cells.texts("pre")
    at = cells.index("pretrain@milan-0")
    assert cells[at + 1 : at + 6] == ["1970-01-01 01:00", "58.5 min", "0123456789+changes", "id3600", "w1.dir outs/m"]
    assert cells[cells.index("report") + 1 :][:5] == ["–", "–", "–", "not found", "r1 reports/table.md"]
    at = cells.index("outs/demo/imagenet")
    assert cells[at + 1 : at + 4] == ["train 6,000, val 20", "drawn", "ab12"]
    assert rendered_cells.texts("dd") == [
        "git revision 0123456789+changes (2 stages)",
        "a small machine (2 stages)",
        "bf16 on cpu (1 stage)",
        "60.0 min (1.00 hours) for 2 of 3 stages, 1970-01-01 00:00 to 1970-01-01 01:00 UTC",
    ]


def test_our_numbers_and_others_are_in_separate_tables():
    ours, published, again = (part.split("</section>")[0] for part in page_text(results()).split("<section ")[1:4])
    assert "ViT-tiny/8" in ours and "ViT-B/16" not in ours
    assert "<h2>Published</h2>" in published and "<h2>Re-run by others</h2>" in again
    assert "ViT-tiny/8" not in published + again


def test_the_page_shows_the_verdict_and_every_number():
    plain = page_text(results())
    assert "<strong>No verdict.</strong>" in plain and "Every number" not in plain
    made = Reproduction("Reproduced: 1 of 1.", ("The <rule>.",), ({"Algorithm": "MILAN", "Yours": "31.44", "Within": "yes"},))
    cells = rendered(results(), [], reproduction=made).texts("td", "th")
    at = cells.index("31.44")
    assert cells[at - 1 : at + 2] == ["MILAN", "31.44", "yes"] and "The &lt;rule&gt;." in page_text(results(), made)


def test_without_a_record_the_precision_is_the_recipe_s():
    precision = results().params.compute.precision
    assert f"{precision}, as in the recipe" in rendered(results(), [Origin("teacher", {}, a_run("teacher", 0))]).texts("dd")


def test_claims_are_judged_from_three_seeds_on():
    """MILAN - MAE is 1, 2 and 3, so the interval is 2 ± 4.303 / √3."""
    (said,) = [text for text in re.findall("<p>(.*?)</p>", page_text(results())) if "spread" in text]
    assert "<code>dvc exp run -S &#39;seeds=[0,1,2]&#39;</code>" in said
    p = dataclasses.replace(results().params, seeds=[0, 1, 2])
    runs = [("mae", seed, 10.0) for seed in range(3)] + [("milan", seed, 11.0 + seed) for seed in range(3)]
    runs = pd.DataFrame([{"variant": v, "seed": seed, **dict.fromkeys(TITLES, value)} for v, seed, value in runs])
    cells = rendered(results(params=p, runs=runs, ours=summarise(runs)), []).texts("td", "th")
    at = cells.index("MILAN is above MAE")
    assert cells[at + 1 : at + 7] == ["MILAN – MAE", "Linear eval", "+2.00", "-0.48 to +4.48", "3", "inconclusive"]


def test_without_mlflow_the_page_names_its_own_revision_and_hardware():
    (said,) = rendered(results(), [Origin("report", {"reports/table.md": "r1"}, None)]).texts("dd")
    assert said.startswith("No MLflow run") and "r0" in said and "h0" in said


def test_everything_from_files_is_escaped():
    """Cells asserts that there is no script; the texts themselves must still be readable."""
    published = read_published(Path("reports/published.csv"))
    published.loc[0, ["method", "source", "teacher"]] = [EVIL, f"{EVIL} https://example.org/{EVIL}", EVIL]
    wicked = a_run(f"{EVIL}@milan-0", 1)
    wicked.tags.update(hardware=EVIL, git_revision=EVIL)
    r = results(published=published, data=EvaluationData(EVIL, 20, 2000, 11, 400, EVIL, 2.1, 17.3, 8000))
    trail = [Origin(EVIL, {EVIL: EVIL}, wicked), Origin(EVIL, {EVIL: EVIL}, None)]
    rendered_cells = rendered(r, trail, [PackedData(Path(EVIL), {EVIL: 1}, EVIL, EVIL)], recipe=EVIL)
    texts = " ".join(rendered_cells.texts("td", "th", "dd", "pre", "h2"))
    assert texts.count(EVIL) >= 15
