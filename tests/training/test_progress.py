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
    progress.draw(tmp_path / "log.jsonl", tmp_path / "progress.png")
    assert len(np.unique(np.array(Image.open(tmp_path / "progress.png")))) > 10


@pytest.mark.parametrize("scores", [(0.3, 0.1), (0.3, -0.001)])
def test_the_whole_log_lies_inside_the_axes(scores, tmp_path):
    """Scores of the teacher far above and below, bounds of both signs with a band, an empty bin."""
    teacher = {"1": 4.0, "10": 0.03, "50": 0.002}
    by_t = {"bound_by_t": [None, -2.0, 5.0], "flow_loss_by_t": [None, 1.0, 3.0]}
    lines = [{"phase": "distill", "step": 1, "l1": 900.0, "bound": -40.0, "flow_gradient": 1.0}]
    lines += [{"phase": "distill", "step": k, "l1": 3.0 / k, "bound": 0.4, "bound_error": 0.1,
               "flow_loss": 3.0, "flow_gradient": 1e-4, "score": score, "teacher_scores": teacher} | by_t
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
