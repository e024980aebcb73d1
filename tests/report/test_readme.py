"""README and docs: the results table is that of the committed reports, and every command, link, path and test they name exists."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from milan.core.errors import UserError
from milan.report import readme
from tests.conftest import ROOT

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w-])"
ALLOWED = (  # numbers of README's prose that no report has
    r"arXiv 2208\.06049",
    r"Python\s+3\.11 to 3\.13",
    r"about \d+ minutes on two CPU cores",
    r"about \d+ GB of disk",
)
OPTIONAL = ("reports/", "outs/")  # what only a run makes


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def code_of(text: str) -> list[str]:
    """Return the commands of a page, one an element: code spans, and the lines of fenced and indented blocks."""
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.S)
    rest = re.sub(r"```\w*\n.*?```", "", text, flags=re.S)
    lines = [line for block in fenced for line in block.splitlines()] + re.findall(r"(?m)^ {4,}(.*)$", rest)
    return [re.sub(r"\s#\s.*", "", line) for line in lines] + re.findall(r"`([^`]+)`", rest)


def named(pattern: str) -> list[tuple[str, str]]:
    """Return (page, match) of a pattern in the code of all pages."""
    return [(page.name, match) for page in PAGES for code in code_of(page.read_text()) for match in re.findall(pattern, code)]


def prose(text: str) -> str:
    """Return a page without its generated part, code and the targets of its links."""
    text = re.sub(f"{readme.BEGIN}.*?{readme.END}", "", text, flags=re.S)
    return re.sub(r"```.*?```|(?m:^ {4,}[^\n]*$)|`[^`]*`|\]\([^)]*\)", "", text, flags=re.S)


def heading_anchors(path: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    titles = re.findall(r"(?m)^#+ (.*)$", path.read_text())
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", title).lower()).replace(" ", "-") for title in titles}


def test_readme_is_up_to_date():
    text = README.read_text()
    assert text == readme.replace(text, readme.render()), "run: python -m milan.report.readme"


def test_readme_is_short():
    assert len(README.read_text().splitlines()) <= 120


def test_the_plan_is_what_the_planner_says():
    text = readme.PLAN.read_text()
    card = re.search(r"px, on (\w+)", text)[1]
    command = [sys.executable, "-m", "milan.plan", "--scale", "paper", "--card", card]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert text.splitlines()[0] == said.splitlines()[0]
    hours = [[line.split() for line in words.splitlines() if line.startswith("all ")] for words in (text, said)]
    assert hours[0] == hours[1] != []


def test_numbers_in_the_prose_of_readme_are_those_of_the_reports():
    text = prose(README.read_text())
    for phrase in ALLOWED:
        assert re.search(phrase, text), f"README no longer says {phrase}: take it out of ALLOWED"
        text = re.sub(phrase, "", text)
    assert set(re.findall(NUMBER, text)) <= set(re.findall(NUMBER, Path("reports/table.md").read_text()))


def test_decimal_numbers_in_results_md_are_those_of_the_reports():
    reports = [Path("reports/table.md"), *Path("reports/evidence").rglob("table.md")]
    known = {number for path in reports for number in re.findall(NUMBER, path.read_text())}
    spread = {"1.6", "2.0"}  # differences of numbers in the tables of views and seeds
    said = {number for number in re.findall(NUMBER, prose(Path("docs/results.md").read_text())) if "." in number}
    assert said - spread <= known and len(said) > 5


def test_stages_and_packages_named_in_readme_are_those_there_are():
    text = README.read_text()
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    diagram = re.search(r"```mermaid\n(.*?)```", text, re.S)[1]
    nodes = set(re.findall(r"\b[a-z0-9_]+\b", re.sub(r"\(\[.*?\]\)|flowchart LR", "", diagram))) - {"images", "scenes"}
    assert nodes == set(re.findall(r"`(\w+)`", text.split("| stage |")[1].split("\n## ")[0])) & set(stages)
    assert nodes <= set(stages)
    assert all(re.search(rf"\b{stage}\b", text) for stage in stages)
    packages = {path.parent.name for path in Path("milan").glob("*/__init__.py")}
    table = text.split("| package of `milan/` |")[1].split("\n## ")[0]
    assert set(re.findall(r"(?m)^\| `(\w+)` \|", table)) == packages


def test_modules_to_run_exist():
    found = named(r"python\d?(?:\.\d+)? -m ([\w.]+)")
    assert len(found) > 10
    for page, module in found:
        spec = importlib.util.find_spec(module)
        assert spec, (page, module)
        if spec.submodule_search_locations is not None:
            assert importlib.util.find_spec(f"{module}.__main__"), (page, f"{module} is a package that cannot be run")


def test_make_targets_exist():
    targets = set(re.findall(r"(?m)^([\w-]+):", Path("Makefile").read_text()))
    found = named(r"(?:^|&& )make ([a-z][\w-]*)")
    assert len(found) > 10 and {place for place in found if place[1] not in targets} == set()


def test_dvc_runs_stages_that_exist():
    stages = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    found = [
        (page, word)
        for page, words in named(r"dvc (?:repro|exp run) ([^`&|]+)")
        for word in re.sub(r"-S (?:'[^']*'|\S+)|-n \S+|#.*|--?[\w-]+|…|\.\.\.", "", words).split()
    ]
    assert found and {place for place in found if place[1] not in stages} == set()


def test_settings_are_keys_of_a_recipe():
    trees = [yaml.safe_load(Path(f"conf/scale/{scale}.yaml").read_text()) for scale in ("demo", "paper")]
    found = named(r"-S [\"']?([a-z][\w.]*)=")

    def known(tree: dict, key: str) -> bool:
        for name in key.split("."):
            if not isinstance(tree, dict) or name not in tree:
                return False
            tree = tree[name]
        return True

    assert len(found) > 20 and {place for place in found if not any(known(tree, place[1]) for tree in trees)} == set()
    scales = {name for _, name in named(r"-S scale=(\w+)")} | {name.lower() for _, name in named(r"SCALE=(\w+)")}
    assert scales <= {path.stem for path in Path("conf/scale").glob("*.yaml")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith("http"):
            name, _, anchor = target.partition("#")
            path = page.parent / name if name else page
            assert path.exists(), target
            assert not anchor or anchor in heading_anchors(path), target
    for code in re.findall(r"`([^`\n]+)`", text):
        if re.fullmatch(r"(milan|stages|tests|conf|docs|reports|benchmarks|notebooks)/[\w./-]*", code):
            assert Path(code).exists() or code.startswith(OPTIONAL), code


def test_tests_named_in_pages_exist():
    found = named(r"(tests/[\w/]+\.py)::(\w+)")
    assert len(found) > 20
    for page, (path, name) in found:
        assert re.search(rf"^def {name}\(", Path(path).read_text(), re.M), (page, path, name)


@pytest.mark.parametrize("text", ["", readme.BEGIN, readme.END + readme.BEGIN, readme.BEGIN * 2 + readme.END])
def test_without_both_markers_nothing_is_written(text, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="must hold the lines"):
        readme.replace(text, "new")
    page = tmp_path / "README.md"
    page.write_text(text)
    monkeypatch.setattr(readme, "README", page)
    with pytest.raises(SystemExit) as stopped:
        readme.main()
    assert stopped.value.code == 1 and page.read_text() == text and list(tmp_path.iterdir()) == [page]


def test_only_the_part_between_the_markers_changes():
    text = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter {readme.PLAN}\n"
    assert readme.replace(text, "new") == f"before\n{readme.BEGIN}\nnew\n{readme.END}\nafter {readme.PLAN}\n"


def test_a_missing_report_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="reports/table.csv is missing"):
        readme.render()


def test_the_paper_s_own_results_take_the_place_of_the_plan(tmp_path, monkeypatch):
    text = readme.TABLE.read_text().replace("conf/scale/demo.yaml", "conf/scale/paper.yaml")
    (tmp_path / "table.csv").write_text(text)
    monkeypatch.setattr(readme, "TABLE", tmp_path / "table.csv")
    assert "not run here" in readme.planned_row(readme.PLAN.read_text())["Status"]
    assert "not run here" not in readme.render()


def test_a_mean_needs_all_its_seeds():
    """At scale demo_gpu some segmentations are missing: no mean of the others takes their place."""
    rows = [line for line in readme.render().splitlines() if "`demo_gpu`" in line and line.startswith("|")]
    assert len(rows) == 5 and all(row.split(" | ")[7] == "–" and row.split(" | ")[2] != "–" for row in rows)
