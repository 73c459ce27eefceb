"""The 2-D suite's data sets and its energy distance."""

import pytest
import torch

from points.data import DATA, toy_data
from toy2d import energy_distance


def test_energy_distance_against_the_definition():
    x, y = toy_data("moons", 900, 1).double(), 1.2 * toy_data("rings", 800, 2).double()
    xy, xx, yy = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
    direct = 2 * xy.mean() - xx.sum() / (900 * 899) - yy.sum() / (800 * 799)
    assert energy_distance(x, y) == pytest.approx(direct.item(), rel=5e-3)
    assert abs(energy_distance(toy_data("moons", 20_000, 1), toy_data("moons", 20_000, 2))) < 5e-4


@pytest.mark.parametrize("name", DATA)
def test_data_sets_are_about_unit(name):
    x = toy_data(name, 50_000)
    assert x.mean(0).abs().max() < 0.4 and 0.5 < x.std() < 1.5


def test_unknown_data_set_is_named():
    with pytest.raises(ValueError, match="unknown data set"):
        toy_data("circles", 10)
