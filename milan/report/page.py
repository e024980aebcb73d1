"""reports/index.html: one page with table, figures, recipe and provenance, which opens without a server.

The text is page.html, a template that escapes whatever it is given; pictures stand in it as data.
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
from milan.report.provenance import Data, Origin, revision
from milan.report.results import KINDS, Results

TEMPLATE = Path(__file__).with_name("page.html")
LINKS = ("Recipe", "Weights of seed", "Curve of seed")  # which lead nowhere from a page that was sent to somebody
SAVED = re.compile(r"""\.save\(.*["'](\w+)["']\)""")
BARS = "A bar is the mean over seeds, a whisker their range, a dot a seed. Dashed: chance."


class Picture(NamedTuple):
    title: str
    caption: Markup
    source: str  # data: URI
    width: int
    height: int


def render(
    r: Results, pictures: list[Picture], bars: Picture, trail: list[Origin], data: list[Data], here: dict, recipe: str
) -> str:
    """The page. here: {"revision", "hardware"} of whoever writes it, for what no run is known for; recipe: text of params.yaml."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(duration=duration, date=date, revision=revision, emphasised=emphasised)
    ours = [{k: v for k, v in row.items() if k not in LINKS} for row in table.our_rows(r, lambda text, path: text)]
    runs = [origin.run for origin in trail if origin.run]
    return environment.from_string(TEMPLATE.read_text()).render(
        scale=r.params.scale,
        heading=table.heading(r),
        measured=table.measured(r),
        ours=ours,
        sentences=[*table.order_said(r), *table.notes(r)],
        bars=bars,
        claims={"heading": claims.heading(r), "notes": claims.notes(r), "rows": claims.rows(r)},
        others={title: table.published_rows(r.published, kind, linked) for kind, title in KINDS.items()},
        elsewhere=table.ELSEWHERE,
        pictures=pictures,
        recipe=recipe,
        trail=trail,
        runs=runs,
        revisions=Counter(revision(run) for run in runs),
        machines=Counter(run.tags["hardware"] for run in runs if "hardware" in run.tags),
        seconds=sum(run.seconds for run in runs),
        data=data,
        here=here,
    )


def linked(text: str) -> Markup:
    """Text with its URLs as links."""
    return Markup(table.URL.sub(lambda url: f'<a href="{url[0]}">{url[0].split("/")[2]}</a>', str(escape(text))))


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.gmtime(seconds))


def read_pictures(folder: Path, notebooks: Path) -> list[Picture]:
    """The figures in the order of the notebooks, under what these say above them."""
    said = captions(notebooks)
    paths = {path.stem: path for path in sorted(folder.glob("*.png"))}
    order = [name for name in said if name in paths] + [name for name in paths if name not in said]
    return [picture(paths[name], *said.get(name, (name.replace("_", " "), ""))) for name in order]


def captions(notebooks: Path) -> dict[str, tuple[str, str]]:
    """Figure's name: (title, text), from the markdown cell before the cell that saves it."""
    found, words = {}, ("", "")
    for path in sorted(notebooks.glob("*.ipynb")):
        for cell in read_json(path, cells=list)["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                title, _, rest = text.partition("\n")
                words = (title.lstrip("# "), rest.strip())
            else:
                found.update(dict.fromkeys(SAVED.findall(text), words))
    return found


def picture(path: Path, title: str, text: str) -> Picture:
    """As WebP, without loss or with a little, whichever is smaller: PNG would make the page twice as large."""
    with Image.open(path) as image:
        size, rgb = image.size, image.convert("RGB")
    options = ({"lossless": True}, {"quality": 75, "method": 6})
    data = min((encoded(rgb, **option) for option in options), key=len)
    return Picture(title, emphasised(text), f"data:image/webp;base64,{base64.b64encode(data).decode()}", *size)


def encoded(image: Image.Image, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, "WEBP", **options)
    return data.getvalue()


def emphasised(text: str) -> Markup:
    """The two marks of Markdown that captions have."""
    marked = re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text)))
    return Markup(re.sub(r"\*([^*]+)\*", r"<em>\1</em>", marked))
