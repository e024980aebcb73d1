"""Heat maps of text by hand: cosines of the patches, and how often the object is the hotter."""

import math

import pytest
import torch

from milan import figures, heat, plots


def test_a_map_is_the_cosine_of_each_patch_and_not_of_the_class_token():
    features = torch.tensor([[[9.0, 9], [3, 0], [0, 5], [-2, 0], [1, 1]], [[0, 1], [0, 2], [1, 0], [0, 0.5], [-1, -1]]])
    found = heat.text_maps(features, torch.tensor([[2.0, 0], [0, 0.1]]))
    assert found[0].tolist() == pytest.approx([1, 0, -1, math.sqrt(0.5)])
    assert found[1].tolist() == pytest.approx([1, 0, 1, -math.sqrt(0.5)])


def test_how_often_the_object_is_hotter():
    """Object: patches 0 and 1; background: 3 and 4; patch 2, a tenth object, is neither. Pairs won: 0 by 3, 0 by 4, 1 by 4."""
    cover = torch.tensor([[1.0, 0.5, 0.1, 0, 0]])
    maps = torch.tensor([[0.9, 0.2, 7.0, 0.5, 0.1]])
    assert heat.found(maps, cover) == pytest.approx(75)
    assert heat.found(-maps, cover) == pytest.approx(25)
    assert heat.found(torch.zeros_like(maps), cover) == pytest.approx(50)
    two = heat.found(torch.cat([maps, -maps, maps]), torch.cat([cover, cover, torch.ones_like(cover)]))
    assert two == pytest.approx(50)  # the third image has no background and does not count
    assert math.isnan(heat.found(maps, torch.zeros_like(cover)))


def test_whole_images_show_every_patch():
    assert heat.whole(2, 3).tolist() == [[0, 1, 2], [0, 1, 2]]


def test_a_row_has_one_scale_that_of_all_its_maps():
    figure, axes = figures.grid_of(["heat"], 2)
    shades = torch.linspace(0, 1, 101).reshape(1, -1)
    heat.show(list(axes[0]), torch.tensor([[0.0, 0.1, 0.2, 0.3], [0.6, 0.7, 0.8, 0.9]]), shades)
    limits = [axis.images[0].get_clim() for axis in axes[0]]
    assert limits[0] == limits[1] == pytest.approx((0.02, 0.98))
    assert axes[0, 0].images[0].get_array().tolist() == [pytest.approx([0.0, 0.1]), pytest.approx([0.2, 0.3])]
    plots.plt.close(figure)


def test_a_long_name_is_wrapped():
    figure, axis = plots.plt.subplots()
    heat.title(axis, "American Staffordshire Terrier")
    assert axis.get_title() == "American\nStaffordshire\nTerrier"
    plots.plt.close(figure)
