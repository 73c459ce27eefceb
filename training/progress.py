"""OUT/progress.png: how far a distillation is, drawn from log.jsonl."""

import json
from functools import cache, partial
from pathlib import Path

import numpy as np

import fgm

TEACHER_STEPS = (1, 10, 50)


def scores(teacher, measure):
    """A picture(step, generator) for training.run.FolderRun that scores the generator, and once the teacher.

    measure(sampler) -> float: the distance of a fixed set of samples, sampler(noise, **cond) -> x0; every
    process calls it. The log gets {"score": float, "teacher_scores": {steps: float}}."""
    @cache
    def of_teacher():
        return {str(k): measure(partial(fgm.sample_ode, teacher, steps=k)) for k in TEACHER_STEPS}

    def picture(step, generator):
        return {"score": measure(generator), "teacher_scores": of_teacher()}

    return picture


def read(log):
    """The curves of a log.jsonl's distillation: {name: (steps, values)}, and the teacher's {steps: score}."""
    curves, teacher = {}, {}
    for line in Path(log).read_text().splitlines():
        record = json.loads(line)
        if record["phase"] == "distill":
            teacher = record.get("teacher_scores", teacher)
            for name, value in record.items():
                if isinstance(value, (int, float, list)):  # a list: by bins of t
                    steps, values = curves.setdefault(name, ([], []))
                    steps.append(record["step"])
                    values.append(value)
    return curves, teacher


def spread(axis):
    """A logarithmic axis where its values span more than a decade, with a linear part where signs differ."""
    values = np.array([value for line in axis.lines for value in line.get_ydata()])
    sizes = np.abs(values[values != 0])
    if sizes.size and sizes.max() > 10 * sizes.min():
        if values.min() > 0:
            axis.set_yscale("log")
        else:
            axis.set_yscale("symlog", linthresh=np.quantile(sizes, 0.1))


def figure_of(log):
    """Losses of the flow; the distance, believed and at least; score; both losses by t; gradient norms."""
    from matplotlib.figure import Figure

    curves, teacher = read(log)
    figure = Figure(figsize=(14, 7.5), layout="constrained")
    (flow, distance, score), (flow_by_t, distance_by_t, norms) = figure.subplots(2, 3)
    panels = [
        (flow, "$R_v$, the loss of the online flow", ["flow_loss", "extra_flow_loss", "extra"]),
        (distance, "L1 and $R_u - R_v$ (equal: v is best, or still u)", ["l1", "distance"]),
        (score, "score of the one-step generator (lower is better)", ["score"]),
        (norms, "gradient norms", [name for name in curves if "gradient" in name]),
    ]
    for axis, title, names in panels:
        for name in [name for name in names if name in curves]:
            axis.plot(*curves[name], marker="." * (name == "score"), label=name.replace("_", " "))
        axis.set(title=title, xlabel="distillation steps")
    errors = dict(zip(*curves.get("distance_error", ([], [])), strict=True))
    steps, middle = (np.array(values) for values in curves.get("distance", ([], [])))
    error = np.array([errors.get(step, 0) for step in steps])
    distance.fill_between(steps, middle - error, middle + error, color="C1", alpha=0.3, label="its error")
    distance.axhline(0, color="black", linewidth=0.8)
    for (k, value), style in zip(teacher.items(), (":", "--", "-"), strict=False):
        score.axhline(value, color="black", linestyle=style, label=f"teacher, {k} step{'s' * (k != '1')}")
    for axis in (distance, score, norms):
        spread(axis)
    for axis, name, title in ((flow_by_t, "flow_loss", "$R_v$"), (distance_by_t, "distance", "$R_u - R_v$")):
        means = np.array(curves.get(f"{name}_by_t", ([], [[]]))[1][-1], dtype=float)
        axis.bar((np.arange(len(means)) + 0.5) / len(means), means, 0.8 / max(len(means), 1))
        axis.set(title=f"{title} by t, last line", xlim=(0, 1), xlabel="t (0: data, 1: noise)")
    for axis in figure.axes:
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    return figure


def draw(log, path):
    """Draw the log as a PNG file."""
    figure_of(log).savefig(path, dpi=100)
