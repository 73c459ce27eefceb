"""Files are written whole or not at all."""

import math
import stat

import pytest
import torch
from safetensors.torch import load_file

import fgm
from training import files, run


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
