"""Systems that lack what Linux has: Windows and macOS, and disks that cannot lock a file."""

import errno
import os
import subprocess
import sys

import pytest
from helpers import ENV, ROOT, drive_here

import toy2d

SMALL = ["--device", "cpu", "--batch", "4", "--teacher-steps", "2", "--steps", "2", "--samples", "50"]

WITHOUT = """
import importlib, os, signal, sys

import psutil, torch  # what they need of it they have elsewhere

sys.modules["fcntl"] = sys.modules["resource"] = None  # an import of them raises ImportError
for name in ("fork", "sysconf", "fchmod"):
    delattr(os, name)
del signal.SIGKILL
for name in sys.argv[1].split():
    importlib.import_module(name)
import toy2d
from training import run

sys.argv[:2] = ["toy2d.py"]
run.command(toy2d.main)
"""


def test_every_module_and_a_run_need_nothing_of_posix(tmp_path):
    modules = [path.stem for path in ROOT.glob("*.py")]
    rooms = [path for path in ROOT.glob("*/*.py") if path.parent.name != "tests"]
    modules += [f"{path.parent.name}.{path.stem}" for path in rooms]
    line = [sys.executable, "-c", WITHOUT, " ".join(modules), *SMALL, "--out", str(tmp_path / "out")]
    done = subprocess.run(line, capture_output=True, text=True, env=ENV, cwd=ROOT, timeout=3600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/metrics.json").exists()
    said = [line for line in done.stderr.splitlines() if "cannot lock" in line]
    assert len(said) == 1 and str(tmp_path / "out") in said[0]


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_that_cannot_lock_is_said_once(number, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    done = drive_here(toy2d, *SMALL, "--out", tmp_path)
    assert done.returncode == 0 and done.stderr.count("\n") == 1
    assert "cannot lock" in done.stderr and os.strerror(number) in done.stderr
    assert (tmp_path / "metrics.json").exists()
