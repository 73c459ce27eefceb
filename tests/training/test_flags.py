"""training/flags.py: what settings may be, and which flags need another one."""

import math
import sys

import pytest

from fgm import InputError
from training import flags
from training.flags import Setting


@pytest.mark.parametrize(
    "allowed, inside, outside",
    [
        ("(0, 1]", [1e-9, 0.5, 1], [0, -0.1, 1.0001, math.inf]),
        ("[0, 1)", [0, 0.999], [-1e-9, 1, math.inf]),
        ("[-10, 10]", [-10, 0, 10], [-10.1, 10.1, -math.inf]),
        (("[-20, 20]", "[0, 20]"), [(-20, 0), (20, 20)], [(0, -1), (-21, 1), (math.nan, 1), (0, math.inf)]),
    ],
)
def test_ranges_with_open_and_closed_ends(allowed, inside, outside):
    setting = Setting(float, allowed, "", 2 if isinstance(allowed, tuple) else None)
    for value in [None, *inside]:
        setting.check("name", value)
    for value in outside if isinstance(allowed, tuple) else [*outside, math.nan]:
        with pytest.raises(InputError, match="^name must be in "):
            setting.check("name", value)


def test_a_list_of_numbers_is_checked_one_by_one():
    widths = Setting(int, "[1, 8]", "", "+")
    widths.check("widths", [1, 8])
    with pytest.raises(InputError, match=r"widths must be in \[1, 8\], got 9"):
        widths.check("widths", [1, 9])


def test_a_path_may_begin_with_the_users_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    assert flags.path("~/runs/a b") == "/home/someone/runs/a b" and flags.path("runs/~") == "runs/~"


def test_a_flag_that_needs_another_one(monkeypatch, capsys):
    def parse(*words):
        settings = {
            "sample": Setting(int, "[1, 9]", ""),
            "npz": Setting(bool, None, ""),
            "out": Setting(str, None, ""),
        }
        monkeypatch.setattr(sys, "argv", ["draw.py", *words])
        parser = flags.Parser({"": settings}, prog="draw.py")
        return parser.parse_with(lambda given: {"out": "runs"}, {"npz": ["sample"]})

    assert vars(parse("--npz", "--sample=2")) == {
        "sample": 2, "npz": True, "out": "runs", "seed": 0, "precision": "auto"}
    with pytest.raises(SystemExit) as stopped:
        parse("--npz")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "draw.py: --npz means nothing without --sample\n"
