"""Heat maps of text, worked out by hand: cosines of the patches, and how often the object is the hotter part."""

import math

import pytest
import torch

from milan.report import drawing, heat, plots


def test_a_map_is_the_cosine_with_the_class_s_text_less_the_mean_over_all_texts():
    """The texts point east, north and west; their mean is (0, 1/3). The class token, which points east, is left out."""
    texts = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    patches = torch.tensor([[3.0, 0], [0, 5], [-2, 0], [1, 1]])
    features = torch.cat([torch.tensor([[9.0, 0]]), patches])
    east, north = heat.text_maps(features.expand(2, -1, -1), texts, torch.tensor([0, 1]))
    half = math.sqrt(0.5)
    assert east.tolist() == pytest.approx([1, 0 - 1 / 3, -1, half - half / 3])
    assert north.tolist() == pytest.approx([0, 1 - 1 / 3, 0, half - half / 3], abs=1e-6)


def test_how_often_the_object_is_hotter():
    """Object: patches 0 and 1; background: 3 and 4; patch 2, a tenth object, is neither. Hotter pairs: (0, 3), (0, 4), (1, 4)."""
    cover = torch.tensor([[1.0, 0.5, 0.1, 0, 0]])
    maps = torch.tensor([[0.9, 0.2, 7.0, 0.5, 0.1]])
    assert heat.object_auc(maps, cover) == pytest.approx(75)
    assert heat.object_auc(-maps, cover) == pytest.approx(25)
    assert heat.object_auc(torch.zeros_like(maps), cover) == pytest.approx(50)
    two = heat.object_auc(torch.cat([maps, -maps, maps]), torch.cat([cover, cover, torch.ones_like(cover)]))
    assert two == pytest.approx(50)  # the third image has no background and does not count
    assert math.isnan(heat.object_auc(maps, torch.zeros_like(cover)))


def test_every_map_has_its_own_scale():
    figure, axes = drawing.picture_grid(["heat"], 2)
    heat.show_maps(list(axes[0]), torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.9, 0.6, 0.7, 0.8]]))
    assert [axis.images[0].get_clim() for axis in axes[0]] == [pytest.approx((0, 0.3)), pytest.approx((0.6, 0.9))]
    assert axes[0, 0].images[0].get_array().tolist() == [pytest.approx([0.0, 0.1]), pytest.approx([0.2, 0.3])]
    plots.plt.close(figure)


def test_a_long_name_is_wrapped():
    figure, axis = plots.plt.subplots()
    heat.set_title(axis, "American Staffordshire Terrier")
    assert axis.get_title() == "American\nStaffordshire\nTerrier"
    plots.plt.close(figure)
