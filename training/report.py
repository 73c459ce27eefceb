"""What the commands say at the end of a run: whether the teacher is one, a table of scores, the time."""

import math
import sys

import torch

import fgm

DEFECT_TIMES = (0.2, 0.5, 0.8, 0.95)  # each fault of a teacher hides at some t


@torch.no_grad()
def teacher_defect(name, teacher, x0, seed, **cond):
    """fgm.defect of a teacher on its own samples x0 [B, ...], at the one of DEFECT_TIMES where it is nan or
    furthest from 0: {"t", "value", "standard_error"}. Warns if it is clearly not 0, since FGM needs the
    velocity of a flow.

    name: the teacher's, for the warning. A collective call."""
    torch.manual_seed(seed)
    defects = []
    for t in DEFECT_TIMES:
        value, error = fgm.defect(teacher, x0, t, **cond)
        defects.append({"t": t, "value": value, "standard_error": error})
    worst = max(defects, key=lambda defect: (math.isnan(defect["value"]), abs(defect["value"])))

    clear = not abs(worst["value"]) <= max(0.3, 5 * worst["standard_error"])  # nan is clear, too
    if clear and fgm.process_rank() == 0:
        print(f"warning: {name} is not a flow's velocity: its defect is {worst['value']:.2f} at "
              f"t = {worst['t']}, not 0. Usual causes: its training paired noise with data (OT-CFM, "
              "rectified flow); its velocity has the opposite sign (it should be noise - data); its t runs "
              "the other way (t = 1 should be noise).", file=sys.stderr)
    return worst


def teacher_title(steps):
    """What the teacher as a sampler is called in tables and pictures."""
    return "teacher, 1 step" if steps == 1 else f"teacher, {steps} steps"


def metrics_of(rows, metric, samples, defect, seconds):
    """What cifar.py and sd3.py write into metrics.json alike.

    rows: {"teacher, K steps" or "one step": {score: value}}; metric: the score that counts; defect: what
    teacher_defect returned, or None."""
    metrics = {
        "samples": samples,
        "teacher": {name.split()[1]: row[metric] for name, row in rows.items() if name != "one step"},
        "one_step": rows["one step"][metric],
        "rows": rows,
        "seconds": seconds,
    }
    return metrics if defect is None else metrics | {"defect": defect}


def print_scores(rows):
    """Print {sampler: {score: value}} as a table, with the columns of the last sampler.

    A sampler may lack a score, or have None for it."""
    scores = list(list(rows.values())[-1])
    table = [["", *(score.replace("_", " ") for score in scores)]]
    for sampler, row in rows.items():
        values = [row.get(score) for score in scores]
        table.append([sampler, *("" if value is None else f"{value:.4f}" for value in values)])

    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        print("  " + "   ".join([f"{first:{widths[0]}}", *cells]))


def print_end(defect, seconds, out):
    """The lines below the table. defect: what teacher_defect returned, or None."""
    if defect is not None:
        print(f"  the teacher's defect, 0 for a flow's velocity: {defect['value']:.3f} +- "
              f"{defect['standard_error']:.3f} at t = {defect['t']}")
    print(f"  {spent(seconds)}; pictures and metrics.json in {out}")


def spent(seconds):
    """{phase: seconds} as text."""
    return ", ".join(f"{phase} {value:.1f} s" for phase, value in seconds.items())
