"""The flags of all commands: ranges, and what lies outside."""

import math

import pytest
from helpers import parse

import bench
import cifar
import sd3
import tiny_sd3
import toy2d
from fgm import InputError
from training.flags import Setting, flag


@pytest.mark.parametrize("allowed, inside, outside", [
    ("(0, 1]", [1e-9, 0.5, 1], [0, -0.1, 1.0001, math.inf, math.nan]),
    ("[0, 1)", [0, 0.999], [-1e-9, 1]),
    (("[-20, 20]", "[0, 20]"), [(-20, 0), (20, 20)], [(0, -1), (-21, 1), (math.nan, 1)]),
])
def test_ranges_with_open_and_closed_ends(allowed, inside, outside):
    setting = Setting(float, allowed, "", 2 if isinstance(allowed, tuple) else None)
    for value in [None, *inside]:
        setting.check("name", value)
    for value in outside:
        with pytest.raises(InputError, match="^name must be in "):
            setting.check("name", value)


def settings_of(command):
    """{name: Setting} of a command's flags, which may lie in groups."""
    settings = {}
    for name, value in command.FLAGS.items():
        settings |= {name: value} if isinstance(value, Setting) else value
    return settings


@pytest.mark.parametrize("command", [bench, cifar, sd3, tiny_sd3, toy2d], ids=lambda module: module.__name__)
def test_no_flag_takes_nonsense(command, monkeypatch, capsys):
    """Every flag with a number, given odd ones: one line and status 2, or a value within its range."""
    settings = settings_of(command)
    numeric = [name for name in settings if settings[name].kind in (int, float)]
    assert numeric
    for name in numeric:
        count = settings[name].count
        count = count if isinstance(count, int) else 1  # "+": one or more
        for text in ("nan", "inf", "-inf", "-1", str(2**70), "", "word"):
            parsed = parse(command, [flag(name), *[text] * count], monkeypatch)
            error = capsys.readouterr().err
            if parsed is None:
                assert error.startswith(f"{command.__name__}.py: ") and error.count("\n") == 1, (name, text)
            else:
                value = getattr(parsed, name)
                numbers = value if isinstance(value, list) else [value]
                assert all(abs(number) < 2**70 for number in numbers), (name, text)
