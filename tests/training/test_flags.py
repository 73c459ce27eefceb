"""training/flags.py: what settings may be."""

import math

import numpy as np
import pytest

from fgm import InputError
from training.flags import check_setting


@pytest.mark.parametrize(
    "allowed, inside, outside",
    [
        ("(0, 1]", [1e-9, 0.5, 1], [0, -0.1, 1.0001, math.inf]),
        ("[0, 1)", [0, 0.999], [-1e-9, 1, math.inf]),
        ("[-10, 10]", [-10, 0, 10], [-10.1, 10.1, -math.inf]),
        ("(0, inf)", [1e-30, 1e30], [0, -1, math.inf]),
        ("(-inf, inf)", [-1e30, 0], [math.inf, -math.inf]),
        (["none", "sid"], ["none", "sid"], ["", "SiD"]),
        (("[-20, 20]", "[0, 20]"), [(-20, 0), (20, 20)], [(0, -1), (-21, 1), (math.nan, 1), (0, math.inf)]),
        (("[-20, 20]", "[0, 20]"), [[-20, 0]],
         [(0, 1, 2), (0,), (None, 1), ([1], [1, 2]), 0.5, "ab", np.zeros(3)]),
    ],
)
def test_ranges_with_open_and_closed_ends(allowed, inside, outside):
    for value in [None, *inside]:
        check_setting("name", value, allowed)
    for value in outside if isinstance(allowed, list | tuple) else [*outside, math.nan]:
        with pytest.raises(InputError, match="^name must be "):
            check_setting("name", value, allowed)


def test_whole_numbers():
    check_setting("batch", np.int64(3), "[1, 1e9]", whole=True)
    for value in (2.5, 3.0, "3"):
        with pytest.raises(InputError, match=r"batch must be a whole number in \[1, 1e9\], got"):
            check_setting("batch", value, "[1, 1e9]", whole=True)
