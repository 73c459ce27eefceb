"""progress.png, the curves of a log."""

import json

import numpy as np
import pytest
from PIL import Image

from training import progress


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_progress_shows_a_run_whose_numbers_are_no_longer_finite(tmp_path):
    lines = [{"phase": "teacher", "step": 1, "flow_loss": 3.0}]
    lines += [{"phase": "distill", "step": k, "flow_loss": 2.0, "bound": -1.0 / k} for k in (1, 2)]
    lines += [{"phase": "distill", "step": 3, "flow_loss": None, "score": 0.5, "teacher_scores": {"1": 4.0}}]
    write(tmp_path / "log.jsonl", lines)
    curves, teacher = progress.read(tmp_path / "log.jsonl")
    assert curves["flow_loss"] == ([1, 2], [2.0, 2.0]) and curves["score"] == ([3], [0.5])
    assert teacher == {"1": 4.0}
    progress.figure_of(tmp_path / "log.jsonl").savefig(tmp_path / "progress.png")
    assert len(np.unique(np.array(Image.open(tmp_path / "progress.png")))) > 10


@pytest.mark.parametrize("last_score, scale", [(0.1, "log"), (-0.001, "symlog")])
def test_the_whole_log_lies_inside_the_axes(last_score, scale, tmp_path):
    """Scores of the teacher far above and below, bounds of both signs, an empty bin of t."""
    teacher = {"1": 4.0, "10": 0.03, "50": 0.002}
    write(tmp_path / "log.jsonl", [
        {"phase": "distill", "step": 1, "l1": 900.0, "bound": -40.0, "score": 0.3},
        {"phase": "distill", "step": 2, "l1": 3.0, "bound": 0.4, "bound_error": 0.1, "score": last_score,
         "teacher_scores": teacher, "bound_by_t": [None, -2.0, 5.0]},
    ])
    axes = progress.figure_of(tmp_path / "log.jsonl").axes
    values = {1: [900, -40, 0.5], 2: [0.3, last_score, *teacher.values()], 4: [-2, 5]}
    for position, expected in values.items():
        low, high = axes[position].get_ylim()
        assert low < min(expected) and high > max(expected)
    assert axes[2].get_yscale() == scale
