"""The committed notebooks, their execution by the figures stage, and what they compute and draw."""

import io
import json
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from milan.core.errors import UserError
from milan.core.validation import validate
from milan.params import Params
from milan.report import analysis, drawing, plots
from milan.report.project import FOLDERS, FigureImages, Project, patch_cover, spread
from stages import figures as stage
from tests.conftest import change

NOTEBOOKS = sorted(Path("notebooks").glob("*.ipynb"))


def notebook(path: Path, *sources: str) -> Path:
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    return path


def test_there_are_four_notebooks():
    assert [path.stem for path in NOTEBOOKS] == ["1_results", "2_masking", "3_features", "4_segmentation"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_committed_valid_and_without_outputs(path):
    book = json.loads(path.read_text())
    nbformat.validate(book)
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    code = [cell for cell in book["cells"] if cell["cell_type"] == "code"]
    assert code and all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def test_notebooks_run_in_order_each_in_an_empty_namespace(tmp_path, capfd):
    first = notebook(tmp_path / "1.ipynb", "import os\nleft = 1")
    second = notebook(tmp_path / "2.ipynb", "assert 'left' not in globals() and 'os' not in globals()")
    failing = notebook(tmp_path / "3.ipynb", "fine = 1", "raise ValueError('on the way\\nthe reason')", "never = 1")
    with pytest.raises(UserError, match=r"3\.ipynb, cell 2: ValueError: the reason"):
        stage.execute_all([first, second, failing])
    printed = capfd.readouterr().out
    assert "1.ipynb (1 of 3)" in printed and "2.ipynb (2 of 3)" in printed and "3.ipynb (3" not in printed


def test_a_folder_that_takes_no_sockets_is_left_alone(tmp_path, monkeypatch):
    """The kernel's sockets lie in the system's temporary folder; where that takes none, the kernel is talked to by TCP."""
    assert stage.transport(tmp_path) == {"transport": "ipc", "ip": str(tmp_path / "kernel")}
    assert stage.transport(tmp_path / ("long" * 30)) == {"transport": "tcp"}
    (empty := tmp_path / "empty").mkdir()
    listing = notebook(tmp_path / "1.ipynb", "import os, tempfile\nassert os.listdir() == [], os.listdir()")
    monkeypatch.chdir(empty)
    stage.execute_all([listing])
    monkeypatch.setattr(stage, "transport", lambda _: {"transport": "tcp"})
    stage.execute_all([listing])


def test_stage_and_notebooks_use_the_same_variable():
    assert stage.FOLDERS == FOLDERS


def test_notebooks_use_the_stage_s_folders(monkeypatch, tmp_path):
    monkeypatch.setenv(FOLDERS, json.dumps({"outs": "elsewhere", "figures": str(tmp_path)}))
    project = Project.open()
    assert project.folders["outs"] == Path("elsewhere") and project.folders["metrics"] == Path("reports/metrics", project.params.data.name)
    with pytest.raises(UserError, match="elsewhere/targets"):
        project.path("targets")


def test_equal_figures_give_equal_bytes(tmp_path):
    def draw(name: str) -> bytes:
        figure, axes = drawing.picture_grid(["a", "b"], 3)
        for k, axis in enumerate(axes.flat):
            drawing.show(axis, np.arange(4).reshape(2, 2) * (k + 1))
        drawing.add_legend(figure, dict(zip("abcde", drawing.class_colours(5), strict=False)))
        return plots.save(figure, tmp_path / name).read_bytes()

    data = draw("one.png")
    assert data == draw("two.png") and b"Software" not in data and b"tIME" not in data


def test_class_colours_differ():
    colours = drawing.class_colours(150)
    assert colours.shape == (151, 3) and len(np.unique(colours.round(3), axis=0)) == 151


def test_keep_probability_is_one_for_the_only_important_patches():
    importance = torch.tensor([[0.5, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    kept = analysis.keep_probability(importance, 2)
    assert kept[0].tolist() == [1, 1, 0, 0]
    assert kept[1].sub(0.5).abs().max() < 0.08 and kept.sum(dim=1).tolist() == pytest.approx([2, 2])


def test_principal_components_have_a_fixed_sign_and_separate_groups():
    features = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)) * 0.05
    features[:, :8, 0] += 1
    features[:, 8:, 1] += 1
    picture = drawing.PrincipalColours(features)(features[0])
    assert picture.shape == (4, 4, 3) and picture.min() >= 0 and picture.max() <= 1
    assert abs(picture[:2, :, 0].mean() - picture[2:, :, 0].mean()) > 0.7
    assert np.array_equal(picture, drawing.PrincipalColours(features.clone())(features[0]))


def test_nearest_neighbours_leave_out_the_query():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 1.0], [0.1, 3.0]])
    assert analysis.nearest_neighbours(features, 1).flatten().tolist() == [1, 0, 3, 2]


def test_masked_patches_are_grey():
    image = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    picture = drawing.masked_image(image, torch.tensor([3]), 4)
    assert picture[2:, 2:].min() == 1 and np.allclose(picture[:2], drawing.HIDDEN_GREY)


def encoded(mask: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(mask).save(data, "PNG")
    return data.getvalue()


def test_an_outline_is_cut_out_as_its_image_is(tree):
    """The image's short side of 12 px becomes 96, the figure shows the central 48: the 6 middle rows and columns of the mask,
    in 3 x 3 patches. The object, the mask's left half, is the left half of those: one patch and a half of each row."""
    change(tree, "model.patch_size", 16)
    change(tree, "segment.crop_size", 48)
    change(tree, "linear_eval.resize", 96)
    params = validate(Params, tree, "params.yaml")
    mask = np.zeros((12, 18), np.uint8)
    mask[:, :9] = 255
    assert patch_cover(encoded(mask), params).reshape(3, 3).tolist() == [[1, 0.5, 0]] * 3
    mask[:, :7], mask[:5] = 0, 0  # of the 6 columns the second and third, of the 6 rows the last four
    assert patch_cover(encoded(mask), params).tolist() == pytest.approx([0, 0, 0, 0.5, 0.5, 0, 0.5, 0.5, 0], abs=0.02)
    assert patch_cover(None, params).isnan().all()


def test_class_iou_by_hand():
    truth = torch.tensor([[0, 0], [1, 255]], dtype=torch.uint8)
    predicted = torch.tensor([[0, 1], [1, 0]])
    scene = (torch.zeros(3, 2, 2), truth)
    iou = analysis.class_iou([predicted], [scene], 3)
    assert iou[:2] == [50, 50] and np.isnan(iou[2])


def test_spread_is_even_and_has_no_repeats():
    assert spread(256, 4).tolist() == [0, 85, 170, 255] and spread(3, 10).tolist() == [0, 1, 2]


def test_without_a_teacher_its_notebooks_are_left_out(tmp_path, monkeypatch, capsys):
    """The stage prints a line; a notebook run by hand raises an error that says why."""
    for name in ("1_results", "2_masking", "3_features"):
        notebook(tmp_path / f"{name}.ipynb")
    executed = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "execute_all", lambda notebooks: executed.extend(path.name for path in notebooks))
    monkeypatch.setattr(stage.shutil, "copytree", lambda source, target, **_: None)
    folders = dict.fromkeys(("params", "outs", "metrics", "curves", "published"), Path("x"))
    params = SimpleNamespace(no_teacher=True)
    stage.main(SimpleNamespace(params=params, args=SimpleNamespace(**folders, notebooks=tmp_path, out=tmp_path / "out")))
    assert executed == ["1_results.ipynb"]
    assert "without 2_masking.ipynb, 3_features.ipynb" in capsys.readouterr().out
    with pytest.raises(UserError, match="needs the teacher"):
        FigureImages.read(SimpleNamespace(params=params))
