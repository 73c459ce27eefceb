"""Progress: bars while a run works, and OUT/progress.png, the curves of its log.jsonl."""

import io
import json
import math
import sys
import threading
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

import fgm

# ---- Bars --------------------------------------------------------------------------------------------------

REDRAW, REPORT = 1, 30  # seconds between two redrawings on a terminal, and between two lines elsewhere


@contextmanager
def bar(title, total=None, done=0, unit="images"):
    """A tqdm bar of the first process, to update(n) as units are done; without a total it shows the time.

    On a terminal it is redrawn every second, however long a step within takes. Elsewhere it prints a line
    every half minute and one at the end. title None: no bar."""
    stderr = sys.stderr
    on_terminal = stderr is not None and not stderr.closed and stderr.isatty()
    progress = tqdm(
        desc=title, total=total, initial=done, unit=f" {unit}", unit_scale=True, mininterval=math.inf,
        bar_format=None if total else "{desc}: {elapsed}", disable=title is None or fgm.process_rank() > 0,
        file=stderr if on_terminal else io.StringIO(), delay=0 if on_terminal else math.inf)
    finished = threading.Event()

    def report():
        if on_terminal:
            progress.refresh()
        elif not progress.disable:
            print(progress, flush=True)

    def redraw():
        while not finished.wait(REDRAW if on_terminal else REPORT):
            report()

    thread = threading.Thread(target=redraw, daemon=True)
    thread.start()
    try:
        yield progress
    finally:
        finished.set()
        thread.join()
        report()
        progress.close()


def batches(total, size, title):
    """range(0, total, size) with a progress bar."""
    with bar(title, total) as progress:
        for begin in range(0, total, size):
            yield begin
            progress.update(min(size, total - begin))


# ---- Scores for the log ------------------------------------------------------------------------------------

TEACHER_STEPS = (1, 10, 50)


def make_scorer(teacher, measure):
    """A picture(step, generator) for training.run.FolderRun that scores the generator, and once the teacher.

    measure(sampler) -> float: the distance of a fixed set of samples, sampler(noise, **cond) -> x0; every
    process calls it. The log gets {"score": float, "teacher_scores": {steps: float}}."""

    @cache
    def teacher_scores():
        return {str(steps): measure(partial(fgm.sample_ode, teacher, steps=steps)) for steps in TEACHER_STEPS}

    def picture(step, generator):
        return {"score": measure(generator), "teacher_scores": teacher_scores()}

    return picture


# ---- Curves ------------------------------------------------------------------------------------------------

BOUND, L1, FLOW_LOSS = "C0", "C1", "C2"  # their colours in every picture
COLOURS = {"bound": BOUND, "l1": L1, "flow_loss": FLOW_LOSS}
TITLES = {"bound": "bound: mean of $R_u - R_v$", "l1": "L1: mean of $|u - v|^2$",
          "flow_loss": "flow loss: mean of $R_v$"}


def read(log):
    """The curves of a log.jsonl's distillation: {name: (steps, values)}, and the teacher's {steps: score}."""
    curves, teacher = {}, {}
    for line in Path(log).read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        if record["phase"] != "distill":
            continue

        teacher = record.get("teacher_scores", teacher)
        for name, value in record.items():
            if isinstance(value, (int, float, list)):  # a list: by bins of t
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves, teacher


def use_log_scale(axis):
    """Make an axis logarithmic if its values span more than a decade; linear near 0 if signs differ."""
    values = np.array([value for line in axis.lines for value in line.get_ydata()])
    sizes = np.abs(values[values != 0])
    if sizes.size == 0 or sizes.max() <= 10 * sizes.min():
        return

    if values.min() > 0:
        axis.set_yscale("log")
    else:
        axis.set_yscale("symlog", linthresh=np.quantile(sizes, 0.1))


def figure_of(log):
    """The figure of a log.jsonl: flow loss, bound and L1, score; flow loss and bound by t; gradient norms."""
    from matplotlib.figure import Figure

    curves, teacher = read(log)
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    (flow, bound, score), (flow_by_t, bound_by_t, norms) = figure.subplots(2, 3)

    gradients = [name for name in curves if "gradient" in name]
    panels = [
        (flow, "loss of the online flow", ["flow_loss", "extra_flow_loss", "extra"]),
        (bound, "distance to the teacher", ["bound", "l1"]),
        (score, "score of the one-step generator (lower is better)", ["score"]),
        (norms, "gradient norms", gradients),
    ]
    for axis, title, names in panels:
        for name in names:
            if name in curves:
                label, marker = TITLES.get(name, name.replace("_", " ")), "." if name == "score" else ""
                axis.plot(*curves[name], color=COLOURS.get(name), marker=marker, label=label)
        axis.set(title=title, xlabel="distillation steps")

    if "bound" in curves:
        steps, means = curves["bound"]
        error_at = dict(zip(*curves.get("bound_error", ([], [])), strict=True))
        means, errors = np.array(means), np.array([error_at.get(step, 0) for step in steps])
        bound.fill_between(steps, means - errors, means + errors, color=BOUND, alpha=0.3,
                           label="standard error of bound")
    bound.axhline(0, color="black", linewidth=0.8)

    for (steps, value), style in zip(teacher.items(), (":", "--", "-"), strict=False):
        label = "teacher, 1 step" if steps == "1" else f"teacher, {steps} steps"
        score.axhline(value, color="black", linestyle=style, label=label)
    for axis in (bound, score, norms):
        use_log_scale(axis)

    for axis, name in ((flow_by_t, "flow_loss"), (bound_by_t, "bound")):
        axis.set(title=f"{name.replace('_', ' ')} by t, last line of the log", xlim=(0, 1),
                 xlabel="t (0: data, 1: noise)")
        if f"{name}_by_t" in curves:
            means = np.array(curves[f"{name}_by_t"][1][-1], dtype=float)  # nan where a bin is empty
            middles = (np.arange(len(means)) + 0.5) / len(means)
            axis.bar(middles, means, 0.8 / len(means), color=COLOURS[name])

    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    return figure
