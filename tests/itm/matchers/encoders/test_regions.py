"""Region features as image parts: the layer by hand, torch's own weight norm, and masked padding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from itm.matchers.encoders.regions import GainLinear, RegionProjection
from itm.types import Images
from tests.support.late_worlds import images_of


@pytest.mark.parametrize("normalize", [True, False])
def test_parts_are_the_projected_regions_and_the_vector_their_mean(normalize: bool):
    tower = RegionProjection(in_width=7, width=5, normalize=normalize)
    images = images_of(3, 4, [4, 1, 2])
    encoded = tower(images)
    for row, real in enumerate([4, 1, 2]):
        wanted = images.regions[row, :real] @ tower.fc.weight.T + tower.fc.bias
        wanted = wanted / wanted.norm(dim=1, keepdim=True) if normalize else wanted
        torch.testing.assert_close(encoded.parts[row, :real], wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(encoded.vector[row], wanted.mean(0), atol=1e-6, rtol=1e-5)
        assert not encoded.parts[row, real:].any()


def test_without_a_mask_every_region_is_real():
    encoded = RegionProjection(in_width=7, width=5)(images_of(2, 3))
    assert encoded.mask.all()
    torch.testing.assert_close(encoded.vector, encoded.parts.mean(1))


def test_one_gain_for_the_whole_matrix_is_torchs_weight_norm_without_a_dimension():
    layer, x = GainLinear(7, 5), torch.randn(3, 7)
    peer = nn.utils.parametrizations.weight_norm(nn.Linear(7, 5), dim=None)
    with torch.no_grad():
        layer.weight_g.fill_(2.5)
        peer.bias.copy_(layer.bias)
        peer.parametrizations.weight.original0.fill_(2.5)
        peer.parametrizations.weight.original1.copy_(layer.weight_v)
    torch.testing.assert_close(layer(x), peer(x))


def test_images_without_regions_and_features_of_another_width_are_named_with_the_option():
    tower = RegionProjection(in_width=8)
    with pytest.raises(ValueError, match=r"regions are 7 wide, the model takes 8: set model\.options\.image\.in_width"):
        tower(images_of(1, 2))
    with pytest.raises(ValueError, match=r"set data\.image=regions"):
        tower(Images(torch.arange(1), pixels=torch.zeros(1, 3, 8, 8, dtype=torch.uint8)))
