"""The disk fills up at each write of a run in turn: one line, nothing half-written, and the run goes on."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toy2d
from training import run

resource = pytest.importorskip("resource")  # limits the size of files

SMALL = ["--device", "cpu", "--batch", "4", "--teacher-steps", "2", "--steps", "2", "--save-every", "1"]
SMALL += ["--log-every", "1", "--samples", "50"]
EVERY = "FGM_EVERY_WRITE" in os.environ  # by hand: two minutes


class Disk:
    """A disk that is full from the n-th moment on at which a file or folder is opened for writing, made or
    renamed: it has room for no more bytes (a limit on the size of files), or for no more files."""

    def __init__(self):
        self.folder, self.limits = None, resource.getrlimit(resource.RLIMIT_FSIZE)
        sys.addaudithook(self.watch)  # for good: there is no way to take it back

    def watch(self, event, arguments):
        if self.folder is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        path = arguments[event == "os.rename"]
        mode, flags = arguments[1:3] if event == "open" else ("w", 0)
        reads = not set(mode) & set("wax+") if mode else not flags & (os.O_WRONLY | os.O_RDWR)
        if reads or isinstance(path, int) or not Path(os.fsdecode(path)).is_relative_to(self.folder):
            return
        self.moments += 1
        if self.moments >= self.full_at and self.no_more == "bytes":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, self.limits[1]))
        elif self.moments >= self.full_at and event != "os.rename":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def run(self, main, folder, no_more="bytes", full_at=10**9):
        """The exit status of a command that writes to the folder."""
        self.folder, self.no_more, self.full_at, self.moments = folder, no_more, full_at, 0
        try:
            run.command(main)
        except SystemExit as stopped:
            return stopped.code
        finally:
            self.folder = None
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
        return 0


DISK = Disk()


def assert_whole(out, whole):
    """What stands under its final name in out is as an undisturbed run has it."""
    for path in out.rglob("*.*"):
        other = whole / path.relative_to(out)
        temporary = [part for part in path.relative_to(out).parts if part.startswith((".", "tmp-"))]
        assert not temporary or path.name == ".lock", path
        if path.suffix == ".safetensors":
            assert all(torch.equal(value, load_file(other)[name]) for name, value in load_file(path).items())
        elif path.suffix == ".json":
            assert json.loads(path.read_text()).keys() == json.loads(other.read_text()).keys()
        elif path.suffix == ".png":
            assert path.read_bytes() == other.read_bytes()


def test_disk_that_fills_up_at_any_write(tmp_path, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    monkeypatch.setattr(toy2d, "seconds_to_draw", lambda draw, repeats: 1.0)
    monkeypatch.setattr(toy2d, "ODE_STEPS", (1, 50))
    monkeypatch.setattr(sys, "argv", ["toy2d.py", *SMALL, "--out", str(whole)])
    assert DISK.run(toy2d.main, whole) == 0
    fresh = DISK.moments
    assert DISK.run(toy2d.main, whole) == 0
    resumed = DISK.moments
    sys.argv[-1] = str(out)

    def fill(no_more, moments):
        for full_at in moments:
            if EVERY:
                shutil.rmtree(out, ignore_errors=True)
            capsys.readouterr()
            assert DISK.run(toy2d.main, out, no_more, full_at) == 2
            line = capsys.readouterr().err
            assert line.startswith("toy2d.py: ") and line.count("\n") == 1, line
            assert_whole(out, whole)
            if EVERY:
                go_on()

    def go_on():
        assert DISK.run(toy2d.main, out) == 0
        assert_whole(out, whole)

    # Weights, metrics, config and picture are the last writes; checkpoints and log come before.
    fill("bytes", range(1, fresh) if EVERY else (4, 12))
    fill("files", range(1, fresh) if EVERY else (6, 13))
    assert (out / "checkpoints/teacher-000000001").exists()  # kept when the second could not be written
    go_on()
    if not EVERY:
        fill("bytes", [resumed - i for i in (8, 1)])


def test_a_folder_where_a_file_is_to_be_written_is_noticed_at_the_start(tmp_path, monkeypatch, capsys):
    (tmp_path / ".lock").mkdir()
    monkeypatch.setattr(sys, "argv", ["toy2d.py", *SMALL, "--out", str(tmp_path)])
    assert DISK.run(toy2d.main, tmp_path) == 2
    line = capsys.readouterr().err
    assert ".lock" in line and line.count("\n") == 1 and not any(tmp_path.glob("checkpoints/*"))


def test_a_folder_that_is_deleted_in_the_middle(tmp_path, monkeypatch, capsys):
    """One line; the same command starts again."""
    out, write_log = tmp_path / "out", run.FolderRun.write_log

    def delete(around, step):
        shutil.rmtree(out)
        write_log(around, step)

    monkeypatch.setattr(sys, "argv", ["toy2d.py", *SMALL, "--out", str(out)])
    with monkeypatch.context() as patched:
        patched.setattr(run.FolderRun, "write_log", delete)
        assert DISK.run(toy2d.main, out) == 2
    line = capsys.readouterr().err
    assert "cannot read or write" in line and line.count("\n") == 1 and not out.exists()
    assert DISK.run(toy2d.main, out) == 0
