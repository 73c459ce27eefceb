"""The 2-D command: its data sets, its energy distance, its table, bad command lines."""

import json

import pytest
import torch
from helpers import ROOT, refusal, succeed

import toy2d

SMALL = ["--device", "cpu", "--batch", "4", "--teacher-steps", "2", "--steps", "2", "--save-every", "1",
         "--log-every", "1", "--samples", "50"]


def test_energy_distance_against_the_definition():
    x, y = toy2d.toy_data("moons", 900, 1).double(), 1.2 * toy2d.toy_data("rings", 800, 2).double()
    xy, xx, yy = torch.cdist(x, y), torch.cdist(x, x), torch.cdist(y, y)
    direct = 2 * xy.mean() - xx.sum() / (900 * 899) - yy.sum() / (800 * 799)
    assert toy2d.energy_distance(x, y) == pytest.approx(direct.item(), rel=5e-3)
    a, b = toy2d.toy_data("moons", 20_000, 1), toy2d.toy_data("moons", 20_000, 2)
    assert abs(toy2d.energy_distance(a, b)) < 5e-4


@pytest.mark.parametrize("name", toy2d.DATA)
def test_data_sets_are_about_unit(name):
    x = toy2d.toy_data(name, 50_000)
    assert x.mean(0).abs().max() < 0.4 and 0.5 < x.std() < 1.5


def test_all_data_sets_with_a_movie_in_the_users_folder(tmp_path, monkeypatch):
    """A table each; ~ is expanded."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(toy2d, "DATA", ("moons", "rings"))
    printed = succeed(toy2d, *SMALL, "--data", "all", "--out=~/all", "--movie")
    for name in ("moons", "rings"):
        assert f"\n{name}: energy distance to the data x 1000, 50 samples\n" in printed
        one_step = json.loads((tmp_path / "all" / name / "metrics.json").read_text())["one_step"]
        assert f"one-step generator {1000 * one_step:27.3f}" in printed
        assert (tmp_path / "all" / name / "movie.gif").exists()
    assert "training the teacher" in printed and "distilling" in printed
    assert "steps/s" in printed and "images" not in printed


@pytest.mark.parametrize("arguments, message", [
    (["--colour", "red"], "unrecognized arguments"),
    (["--steps", "0"], "argument --steps: must be in [1, 1e9], got 0"),
    (["--micro-batch", "3"], "global batch 4"),
    (["--resume", "--overwrite"], "give one of them"),
    (["--device", "cuda:99"], "--device cuda:99: this machine has 0 CUDA devices"),
    (["--out", ""], "argument --out: is empty"),
    (["--out", ROOT / "README.md"], "cannot write to the output folder"),
])
def test_bad_command_lines(arguments, message, tmp_path):
    assert message in refusal(toy2d, *SMALL, "--out", tmp_path / "x", *arguments)
    assert not list(tmp_path.glob("x/*"))
