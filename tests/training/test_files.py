"""Files are written whole or not at all, also where the disk fills up at any write of a run."""

import errno
import json
import math
import os
import shutil
import stat
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fgm
import toy2d
from training import files, run

SMALL = ["--device", "cpu", "--batch", "4", "--teacher-steps", "2", "--steps", "2", "--save-every", "1"]
SMALL += ["--log-every", "1", "--samples", "50"]
EVERY = "FGM_EVERY_WRITE" in os.environ  # by hand: two minutes


def test_json_is_finite_and_holds_names_as_they_are(tmp_path):
    path = tmp_path / "a.json"
    name = "汉 é \udce9"  # the last: a byte of a file name that is no UTF-8
    files.write_json(path, {"a": math.nan, "b": [1.0, math.inf], name: {"d": name}})
    assert files.read_json(path) == {"a": None, "b": [1.0, None], name: {"d": name}}
    for content in (b"[]", b"\xff", b'{"a":'):
        path.write_bytes(content)
        with pytest.raises(fgm.InputError, match=r"a\.json"):
            files.read_json(path)


def test_weights_are_finite_tied_ones_too_and_readable_as_any_file(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[1].weight = net[0].weight
    path, plain = tmp_path / "net.safetensors", tmp_path / "plain"
    run.save_weights(net, path)
    written = load_file(path)
    assert torch.equal(written["0.weight"], net[0].weight) and torch.equal(written["1.weight"], net[0].weight)
    plain.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    net[0].bias.data[0] = math.nan
    with pytest.raises(fgm.Diverged, match="0.bias"):
        run.save_weights(net, tmp_path / "other.safetensors")
    assert sorted(tmp_path.iterdir()) == [path, plain]


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"a": 1})
    refused = pytest.raises(fgm.InputError, match=r"cannot write .*metrics\.json \(No space left on device\)")
    with refused, files.atomically(path) as temporary:
        temporary.write_text("half of")
        raise OSError(28, "No space left on device")
    assert files.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# ---- A full disk -------------------------------------------------------------------------------------------

resource = pytest.importorskip("resource")  # limits the size of files


class Disk:
    """A disk that is full from the n-th moment on at which a file or folder is opened for writing, made or
    renamed: it has room for no more bytes (a limit on the size of files), or for no more files."""

    def __init__(self):
        self.folder, self.limits = None, resource.getrlimit(resource.RLIMIT_FSIZE)
        sys.addaudithook(self.watch)  # for good: there is no way to take it back

    def watch(self, event, arguments):
        if self.folder is None or event not in ("open", "os.mkdir", "os.rename"):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
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
        assert not path.name.startswith(".tmp-"), path
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
