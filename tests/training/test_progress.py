"""progress.png and what the log holds for it; pictures made to be looked at."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from images import data as images
from training import progress


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_progress_shows_a_run_whose_numbers_are_no_longer_finite(tmp_path):
    lines = [{"phase": "teacher", "step": 1, "flow_loss": 3.0}]
    lines += [{"phase": "distill", "step": k, "flow_loss": 2.0, "distance": -1.0 / k} for k in (1, 2)]
    lines += [{"phase": "distill", "step": 3, "flow_loss": None, "score": 0.5, "teacher_scores": {"1": 4.0}}]
    write(tmp_path / "log.jsonl", lines)
    curves, teacher = progress.read(tmp_path / "log.jsonl")
    assert curves["flow_loss"] == ([1, 2], [2.0, 2.0]) and curves["score"] == ([3], [0.5])
    assert teacher == {"1": 4.0}
    progress.draw(tmp_path / "log.jsonl", tmp_path / "progress.png")
    assert len(np.unique(np.array(Image.open(tmp_path / "progress.png")))) > 10


@pytest.mark.parametrize("scores", [(0.3, 0.1), (0.3, -0.001), (2e-5, 1e-5)])
def test_the_whole_log_lies_inside_the_axes(scores, tmp_path):
    """Scores of the teacher far above and below, distances of both signs with a band, an empty bin."""
    teacher = {"1": 4.0, "10": 0.03, "50": 0.002}
    by_t = {"distance_by_t": [None, -2.0, 5.0], "flow_loss_by_t": [None, 1.0, 3.0]}
    lines = [{"phase": "distill", "step": 1, "l1": 900.0, "distance": -40.0, "flow_gradient": 1.0}]
    lines += [{"phase": "distill", "step": k, "l1": 3.0 / k, "distance": 0.4, "distance_error": 0.1,
               "flow_gradient": 1e-4, "score": score, "teacher_scores": teacher} | by_t
              for k, score in zip((2, 3), scores, strict=True)]
    write(tmp_path / "log.jsonl", lines)
    axes = progress.figure_of(tmp_path / "log.jsonl").axes
    for axis, values in ((axes[1], [900, -40, 0.5]), (axes[2], [*scores, *teacher.values()]),
                         (axes[4], [-2, 5]), (axes[5], [1, 1e-4])):
        low, high = axis.get_ylim()
        assert low < min(values) and high > max(values)
    assert [axis.get_yscale() for axis in axes[:2]] == ["linear", "symlog"]
    assert axes[2].get_yscale() == ("log" if min(scores) > 0 else "symlog")
    (band,) = axes[1].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == pytest.approx(0.5) and heights.min() == -40
    bars = [bar.get_height() for bar in axes[4].patches]
    assert np.isnan(bars[0]) and bars[1:] == [-2.0, 5.0]


def test_grid_is_enlarged_without_blur_with_gaps_and_titles(tmp_path):
    """Two by two images of noise: each pixel a square of one colour, white between and in the margin."""
    pixels = torch.randint(0, 200, (4, 1, 8, 8), dtype=torch.uint8)
    images.save_grid(tmp_path / "grid.png", pixels, 2, ["teacher", "one step"])
    grid = np.array(Image.open(tmp_path / "grid.png"))
    zoom, gap = 38, 19  # ceil(600 / 16), an image's width / 16
    side, margin = 8 * zoom, grid.shape[1] - 2 * 8 * zoom - 3 * gap
    assert grid.shape[0] == 2 * side + 3 * gap and margin > 50
    for i, image in enumerate(pixels):
        top, left = gap + i // 2 * (side + gap), margin + gap + i % 2 * (side + gap)
        cell = torch.from_numpy(grid[top : top + side, left : left + side, 0])
        assert torch.equal(cell, image[0].repeat_interleave(zoom, 0).repeat_interleave(zoom, 1))
        grid[top : top + side, left : left + side] = 255
    assert (grid[:, margin:] == 255).all() and (grid[:, :margin] < 128).any()


def test_same_seeds_stand_above_one_another(tmp_path):
    drawn = {"teacher, 50 steps": torch.zeros(12, 3, 64, 64, dtype=torch.uint8)}
    drawn["one step"] = drawn["teacher, 50 steps"] + 100
    images.save_samples(tmp_path, drawn)
    names = {"samples.png", "teacher-50-steps.png", "one-step.png"}
    assert {path.name for path in tmp_path.iterdir()} == names
    grid = np.array(Image.open(tmp_path / "samples.png"))
    height = (grid.shape[0] - 3 * 4) // 2
    assert (grid[4 : 4 + height, -68:-4] == 0).all() and (grid[8 + height : -4, -68:-4] == 100).all()
