"""Anyone's console: what it cannot show, or will not take, does not stop a run; progress bars."""

import io
import subprocess
import sys

import pytest
from helpers import ENV, ROOT

import fgm
from training import progress
from training.run import command

NAME = "汉 é \udce9"  # the last: a byte of a file name that is no UTF-8

# A command of two steps that prints more than a pipe takes.
SCRIPT = r"""
import sys, torch, fgm
from training.run import FolderRun, command

class Small(torch.nn.Linear):
    def forward(self, x, t):
        return super().forward(x)

def main():
    data, run = torch.randn(8, 2), FolderRun(sys.argv[1])
    fgm.train_flow(Small(2, 2), lambda seeds: (data[seeds % 8], {}), steps=2, batch=4, run=run)
    print(100_000 * ".")

command(main)
"""


@pytest.mark.parametrize("shell", ["| head -n 1", "2>&- >&-"])
def test_a_run_goes_on_whatever_becomes_of_its_output(shell, tmp_path):
    python = sys.executable, "-c", SCRIPT, str(tmp_path)
    line = ["bash", "-c", f'set -o pipefail; "$@" {shell}', "bash", *python]
    done = subprocess.run(line, capture_output=True, env=ENV, cwd=ROOT, timeout=3600)
    assert done.returncode == 0 and done.stderr == b"", done.stderr
    assert (tmp_path / "checkpoints/teacher-000000002").is_dir()


@pytest.mark.parametrize("encoding, name", [("cp1252", b"? \xe9 ?"), ("utf-8", b"\xe6\xb1\x89 \xc3\xa9 ?")])
def test_characters_that_the_console_cannot_show_are_replaced(encoding, name, monkeypatch):
    def main():
        print(NAME)
        raise fgm.InputError(f"cannot read {NAME}")

    stdout, stderr = io.BytesIO(), io.BytesIO()
    monkeypatch.setattr(sys, "argv", ["script.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stdout, encoding))
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(stderr, encoding))
    with pytest.raises(SystemExit) as stopped:
        command(main)
    assert stopped.value.code == 2
    assert stdout.getvalue().splitlines() == [name]
    assert stderr.getvalue().splitlines() == [b"script.py: cannot read " + name]


def test_without_a_terminal_a_bar_is_a_line_every_half_minute_and_one_at_the_end(capsys, monkeypatch):
    assert progress.REPORT == 30
    monkeypatch.setattr(progress, "REPORT", 0.01)
    text = ""
    with progress.bar("training", total=4, unit="steps") as steps:
        steps.update(1)
        while text.count("\n") < 2:
            text += capsys.readouterr().out
        steps.update(3)
    assert text.startswith("training:  25%") and "1.00/4.00" in text
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("training: 100%") and "steps/s" in last


def test_a_bar_without_a_standard_error_or_a_title(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress.batches(2, 1, "scoring")) == [0, 1]
    assert list(progress.batches(2, 1, None)) == [0, 1]
    monkeypatch.undo()
    assert capsys.readouterr().out.count("\n") == 1
