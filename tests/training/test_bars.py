"""Progress bars, on a terminal and without one."""

import os
import re
import sys

import pytest

from training.bars import bar, batches


def test_without_a_terminal_every_report_is_a_line(capsys):
    assert list(batches(250, 100, "scoring")) == [0, 100, 200]
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("scoring:   0%") and last.startswith("scoring: 100%")
    assert "250/250" in last and "images/s" in last


def test_a_bar_without_a_name_says_nothing(capsys):
    assert list(batches(2, 1, None)) == [0, 1]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_hears_of_long_work_every_second(monkeypatch):
    """Nothing is counted; the time goes on all the same, also where the work ends in an error."""
    termios = pytest.importorskip("termios")
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 80))
    shown = b""
    with open(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with pytest.raises(OSError, match="full"), bar("writing"):
            while len(set(re.findall(rb"writing: \d\d:\d\d", shown))) < 2:
                shown += os.read(ours, 4096)
            raise OSError("full")
        monkeypatch.undo()
    os.close(ours)
