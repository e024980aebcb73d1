"""Heat maps of text, worked out by hand: mean scores of the masks, and how often the object is the hotter part."""

import math

import pytest
import torch

from milan.report import drawing, heat, plots


def test_a_patch_has_the_mean_score_of_the_masks_that_keep_it():
    """The class token points east where patch 2 is visible, else north. The texts point east and north, their mean is
    (1/2, 1/2): an image of class east scores 1/2 with patch 2 and -1/2 without; an image of class north the other way."""
    seen = []

    def class_tokens(images, visible):
        assert images.shape == (2, 3, 4, 4) and visible.shape == (2, 2)
        seen.append(visible)
        sees = (visible == 2).any(dim=1, keepdim=True)
        return torch.where(sees, torch.tensor([7.0, 0]), torch.tensor([0, 3.0]))

    texts, images = torch.eye(2), torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    east, north = heat.text_maps(class_tokens, images, texts, torch.tensor([0, 1]), n_patches=4, n_visible=2, masks=50)
    for image, heat_map, sign in ((0, east, 1), (1, north, -1)):
        masks = [set(visible[image].tolist()) for visible in seen]
        expected = [[0.5 if 2 in mask else -0.5 for mask in masks if patch in mask] for patch in range(4)]
        assert heat_map.tolist() == pytest.approx([sign * sum(scores) / len(scores) for scores in expected])
        assert heat_map[2] == pytest.approx(sign * 0.5) and sign * heat_map[2] > (sign * heat_map[[0, 1, 3]]).max()
    assert len({tuple(visible[0].tolist()) for visible in seen}) > 6 and not torch.equal(seen[0][0], seen[0][1])


def test_hidden_patches_have_the_image_s_mean_colour():
    """An image of 4 x 4 pixels and 2 x 2 patches, in which only the last patch stays: the others have 60, the mean."""
    image = torch.tensor([[0, 0, 80, 80], [0, 0, 80, 80], [40, 40, 120, 120], [40, 40, 120, 120]], dtype=torch.uint8)
    shown = heat.hide(image.expand(1, 3, 4, 4), torch.tensor([[3]]), grid=2)
    assert shown[0, 1].tolist() == [[60] * 4, [60] * 4, [60, 60, 120, 120], [60, 60, 120, 120]]


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
