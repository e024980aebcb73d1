"""In a real browser: reports/index.html as somebody opens it, and MLflow's pages on a store that tracking wrote.

Skipped where no Chromium is installed; `.ci/run` installs one."""

import csv
import io
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from milan.report.text import decimal
from milan.tracking import logger
from tests.conftest import ROOT
from tests.report.test_page import page_text, results
from tests.tracking.test_tracker import write_spool

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no browser is installed (Debian: apt-get install chromium)")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PAGE = ROOT / "reports/index.html"
LOSSES = {"mae": 4.0, "milan": 2.0}  # the first of each curve


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # as root there is no sandbox
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(browser):
    """reports/index.html, opened from the disk, with what it said and asked for."""
    page = browser.new_page(viewport={"width": 1300, "height": 900})
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url.split(":")[0]))
    page.goto(PAGE.as_uri())
    return page


def rows(page, section: str) -> dict[str, list[str]]:
    """First cell: the others, of a section's table."""
    found = [row.locator("th, td").all_inner_texts() for row in page.locator(f"{section} table").first.locator("tbody tr").all()]
    return {name: cells for name, *cells in found}


def test_the_page_asks_for_nothing_and_says_nothing(page):
    assert page.said == []
    assert page.asked.count("file") == 1 and set(page.asked) <= {"file", "data"}


def test_every_picture_of_the_reports_is_there_and_has_a_text(page):
    pictures = page.locator("img").evaluate_all("all => all.map(i => [i.complete && i.naturalWidth, i.alt.length])")
    assert len(pictures) == len(list((ROOT / "reports/figures").glob("*.png"))) + 1
    assert all(width > 500 and words > 5 for width, words in pictures), pictures


def test_the_cells_are_the_numbers_of_the_table(page):
    table = list(csv.DictReader(PAGE.with_name("table.csv").open()))
    ours = rows(page, "#ours")
    for row in filter(lambda row: row["kind"] == "ours", table):
        shown = [cell.split(" ")[0] for cell in ours.pop(row["method"])[3:12]]
        columns = ("linear", "knn", "zero_shot", "zero_shot_masked", "attentive", "finetune", "corrupted", "miou", "dense")
        assert shown == [decimal(float(row[column])) if row[column] else "–" for column in columns]
    assert ours == {}
    assert rows(page, "#others")["MILAN"][4:7] == ["79.9", "85.4", "52.7"]


def test_tables_have_heads_for_rows_and_columns(page):
    for table in page.locator("table").all():
        assert table.locator("thead th[scope=col]").count() == table.locator("tbody tr").first.locator("th, td").count()
        assert table.locator("tbody th[scope=row]").count() == table.locator("tbody tr").count()


def test_a_phone_scrolls_tables_and_not_the_page(page):
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.evaluate("Array.from(document.querySelectorAll('.wide')).some(box => box.scrollWidth > box.clientWidth)")


def test_on_a_phone_a_shadow_says_that_a_table_scrolls_and_figures_are_legible(browser, tmp_path):
    (tmp_path / "page.html").write_text(page_text(results()))
    page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="light")
    page.goto((tmp_path / "page.html").as_uri())
    table, figure = page.locator("#ours .wide").first, page.locator("figure .wide").first

    def edges() -> list[int]:
        """Return the grey of the box's top corners: 255 for paper."""
        corners = Image.open(io.BytesIO(table.screenshot())).convert("L")
        return [corners.getpixel((x, 1)) for x in (1, corners.width - 2)]

    assert edges()[0] == 255 and edges()[1] < 200
    table.evaluate("box => box.scrollLeft = 50")
    assert max(edges()) < 200
    table.evaluate("box => box.scrollLeft = box.scrollWidth")
    assert edges()[0] < 200 and edges()[1] == 255
    assert figure.evaluate("box => [box.scrollWidth, box.clientWidth]") == [720, 358]  # half of a figure's 1350 pixels, or more
    page.set_viewport_size({"width": 1300, "height": 900})
    assert edges() == [255, 255] and figure.evaluate("box => box.scrollWidth == box.clientWidth")


def runs_of(variant: str, loss: float, place: int) -> Path:
    """The spool of a pretraining with a curve of ten points and a picture."""
    start = {"name": f"pretrain {variant} seed 0", "experiment": "milan-test", "pipeline": "1-1", "recipe": {"scale": "test"}}
    tags = {"stage": "pretrain", "scale": "test", "git_revision": "abc", "variant": variant, "seed": "0"}
    points = [{"kind": "metrics", "step": step, "values": {"train/loss": loss / (1 + step)}} for step in range(10)]
    picture = {"kind": "artifact", "path": "masks.png", "folder": "figures"}
    return write_spool(
        [{"kind": "start", "tags": tags, **start}, *points, picture, {"kind": "end", "status": "FINISHED"}], place=place
    )


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Address of `mlflow ui` on a store with a pipeline of two pretrainings."""
    folder = tmp_path_factory.mktemp("store")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        Image.new("RGB", (64, 48), "orange").save("masks.png")
        spools = [runs_of(variant, loss, place) for place, (variant, loss) in enumerate(LOSSES.items(), 1)]
        logger.serve(spools[-1])
        assert not any(spool.exists() for spool in spools)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "ui", "--backend-store-uri", "sqlite:///mlflow.db", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--workers", "1"],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield answering(f"http://127.0.0.1:{port}", process, folder / "log")
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def answering(address: str, process: subprocess.Popen, log: Path) -> str:
    end = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=10).close()
            return address
        except OSError:
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.2)


@pytest.fixture(scope="module")
def compared(browser, server):
    """MLflow's comparison of two runs, reached as a reader does: the experiment, the pipeline opened, both ticked."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(90_000)
    page.goto(f"{server}/#/experiments/1/runs")
    page.get_by_role("row").filter(has_text="test · ").get_by_role("button").first.click()
    for variant in LOSSES:
        row = page.get_by_role("row").filter(has_text=f"pretrain {variant} seed 0")
        row.get_by_role("checkbox").first.check(force=True)
    page.get_by_role("button", name="Compare").click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").first.wait_for()
    return page


def test_mlflow_shows_the_runs_and_compares_two(compared):
    for words in ("pretrain mae seed 0", "pretrain milan seed 0", "train/loss"):
        compared.get_by_text(words, exact=True).first.wait_for()


def test_mlflow_shows_a_curve_and_a_picture(compared):
    found = compared.evaluate("decodeURIComponent(location.href).match(/[0-9a-f]{32}/g)")
    run = f"{compared.url.split('#')[0]}#/experiments/1/runs/{found[0]}"
    compared.goto(f"{run}/model-metrics")
    compared.locator(".js-plotly-plot .points path").nth(9).wait_for()
    assert compared.locator(".js-plotly-plot .points path").count() == 10
    compared.goto(f"{run}/artifacts/figures/masks.png")
    picture = compared.get_by_role("img", name="figures/masks.png")
    picture.wait_for()
    assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)") == 64
