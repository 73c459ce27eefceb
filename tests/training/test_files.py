"""Files are written whole or not at all, also where the disk fills up at any write of a run."""

import gc
import json
import math
import os
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
    refused = pytest.raises(fgm.InputError, match=r"cannot write .*metrics\.json \(.*No space left")
    with refused, files.atomically(path) as temporary:
        temporary.write_text("half of")
        raise OSError(28, "No space left on device")
    assert files.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


# ---- A full disk -------------------------------------------------------------------------------------------

resource = pytest.importorskip("resource")  # limits the size of files


class Disk:
    """A disk that has room for no more bytes (a limit on the size of files) from the n-th moment on at which
    a file is opened for writing or renamed."""

    def __init__(self):
        self.folder, self.limits = None, resource.getrlimit(resource.RLIMIT_FSIZE)
        sys.addaudithook(self.watch)  # for good: there is no way to take it back

    def watch(self, event, arguments):
        if self.folder is None or event not in ("open", "os.rename"):
            return
        path = arguments[1] if event == "os.rename" else arguments[0]
        writes = event == "os.rename" or set(arguments[1] or "w") & set("wax+")
        if not writes or isinstance(path, int) or not Path(os.fsdecode(path)).is_relative_to(self.folder):
            return

        self.moments += 1
        if self.moments >= self.full_at:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1, self.limits[1]))

    def run(self, main, folder, full_at=10**9):
        """The exit status of a command that writes to the folder."""
        self.folder, self.full_at, self.moments = folder, full_at, 0
        try:
            run.command(main)
        except SystemExit as stopped:
            return stopped.code
        finally:
            self.folder = None
            resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)
            gc.collect()  # unlocks the folder
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
    sys.argv[-1] = str(out)

    def fill(*moments):
        for full_at in moments:
            capsys.readouterr()
            assert DISK.run(toy2d.main, out, full_at) == 2
            line = capsys.readouterr().err
            assert line.startswith("toy2d.py: ") and line.count("\n") == 1, line
            assert_whole(out, whole)

    fill(3, 6, 10)  # in log and checkpoints
    assert DISK.run(toy2d.main, out) == 0
    assert DISK.run(toy2d.main, out) == 0
    assert_whole(out, whole)
    finished = DISK.moments
    fill(finished - 8, finished - 1)  # in the last writes: weights, metrics, config, picture
