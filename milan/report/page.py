"""Write reports/index.html: one page with table, figures, recipe and provenance, which opens without a server.

Its template page.html escapes all values; pictures are embedded as data.
"""

import base64
import io
import re
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jinja2
from markupsafe import Markup, escape
from PIL import Image

from milan.core.files import read_json
from milan.report import claims, table
from milan.report.provenance import Origin, PackedData, revision
from milan.report.reproduction import Reproduction
from milan.report.results import KINDS, Results
from milan.report.text import decimal, links_in_html

TEMPLATE = Path(__file__).with_name("page.html")
LINKS = ("Recipe", "Weights of seed", "Curve of seed")  # their links would be dead on a page that is passed on
SAVE_CALL = re.compile(r"""\.save\(.*["'](\w+)["']\)""")
BARS = "A bar is the mean over seeds, a whisker their range, a dot a seed. Dashed: chance, or the most frequent class everywhere."


class Picture(NamedTuple):
    """An embedded picture with its title and caption; width and height in pixels."""

    title: str
    caption: Markup
    source: str  # data: URI
    width: int
    height: int


def render(
    results: Results,
    reproduction: Reproduction,
    pictures: list[Picture],
    bars: Picture,
    trail: list[Origin],
    data: list[PackedData],
    here: dict,
    recipe: str,
) -> str:
    """Return the page as HTML.

    here: {"revision", "hardware"} of this execution, shown when MLflow knows no run; recipe: text of params.yaml."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(duration=duration, date=date, revision=revision, emphasised=emphasised, decimal=decimal)
    rows = table.our_rows(results, lambda text, path: text)
    ours = [{title: cell for title, cell in row.items() if title not in LINKS} for row in rows]
    runs = [origin.run for origin in trail if origin.run]
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        scale=results.params.scale,
        where=table.measured_where(results),
        heading=table.heading(results),
        measured=table.measured_on(results),
        ours=ours,
        sentences=[*table.order_sentences(results), *table.notes(results)],
        reproduction=reproduction,
        bars=bars,
        claims={"heading": claims.heading(results), "notes": claims.notes(results), "rows": claims.rows(results)},
        others={title: table.published_rows(results.published, kind, links_in_html) for kind, title in KINDS.items()},
        elsewhere=table.ELSEWHERE,
        pictures=pictures,
        recipe=recipe,
        trail=trail,
        runs=runs,
        revisions=Counter(revision(run) for run in runs),
        machines=Counter(run.tags["hardware"] for run in runs if "hardware" in run.tags),
        precisions=Counter(f"{run.tags['precision']} on {run.tags['device']}" for run in runs if "precision" in run.tags),
        precision=results.params.compute.precision,
        seconds=sum(run.seconds for run in runs),
        data=data,
        here=here,
    )


def duration(seconds: float) -> str:
    """Return a duration in seconds, minutes or hours: `58.5 min`."""
    if seconds < 100:
        return f"{decimal(seconds, 0)} s"
    return f"{decimal(seconds / 60)} min" if seconds < 6000 else f"{decimal(seconds / 3600)} h"


def date(seconds: float) -> str:
    """Return the date and time in UTC of seconds since 1970."""
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def read_pictures(folder: Path, notebooks: Path) -> list[Picture]:
    """Return the figures in the order of the notebooks, with the captions from there; other figures follow."""
    texts = captions(notebooks)
    paths = {path.stem: path for path in sorted(folder.glob("*.png"))}
    order = [name for name in texts if name in paths] + [name for name in paths if name not in texts]
    return [picture(paths[name], *texts.get(name, (name.replace("_", " "), ""))) for name in order]


def captions(notebooks: Path) -> dict[str, tuple[str, str]]:
    """Return {figure's name: (title, text)}, from the last markdown cell before the cell that saves the figure."""
    texts, caption = {}, ("", "")
    for path in sorted(notebooks.glob("*.ipynb")):
        for cell in read_json(path, cells=list)["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                title, _, rest = text.partition("\n")
                caption = (title.lstrip("# "), rest.strip())
            else:
                texts.update(dict.fromkeys(SAVE_CALL.findall(text), caption))
    return texts


def picture(path: Path, title: str, text: str) -> Picture:
    """Embed a picture as lossless or lossy WebP, whichever is smaller; PNG would make the page twice as large."""
    with Image.open(path) as image:
        size, rgb = image.size, image.convert("RGB")
    options = ({"lossless": True}, {"quality": 75, "method": 6})
    data = min((encoded(rgb, **option) for option in options), key=len)
    return Picture(title, emphasised(text), f"data:image/webp;base64,{base64.b64encode(data).decode()}", *size)


def encoded(image: Image.Image, **options) -> bytes:
    """Return an image as WebP."""
    data = io.BytesIO()
    image.save(data, "WEBP", **options)
    return data.getvalue()


def emphasised(text: str) -> Markup:
    """Return a text as HTML, with Markdown's `code` and *emphasis*."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*([^*]+)\*", r"<em>\1</em>", marked))
