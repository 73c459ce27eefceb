"""OUT/progress.png: losses, gradient norms and the score of the one-step generator, drawn from log.jsonl."""

import json
from functools import partial
from pathlib import Path

import fgm

TEACHER_STEPS = (1, 10, 50)


def scores(teacher, measure):
    """A picture(step, generator) for parts.run.FolderRun that scores the generator, and once the teacher.

    measure(sampler) -> float: the distance of a fixed set of samples, sampler(noise, **cond) -> x0; every
    process calls it. What is returned goes into the log: {"score": float, "teacher_scores": {steps: float}}.
    """
    known = {}

    def picture(step, generator):
        if not known:
            samplers = {str(k): partial(fgm.sample_ode, teacher, steps=k) for k in TEACHER_STEPS}
            known.update({k: measure(sampler) for k, sampler in samplers.items()})
        return {"score": measure(generator), "teacher_scores": known}

    return picture


def read(log):
    """The curves of a log.jsonl's distillation: {name: (steps, values)}, and the teacher's {steps: score}."""
    curves, teacher = {}, {}
    for line in Path(log).read_text().splitlines():
        record = json.loads(line)
        if record["phase"] != "distill":
            continue
        teacher = record.get("teacher_scores", teacher)
        for name, value in record.items():
            if isinstance(value, (int, float)):
                steps, values = curves.setdefault(name, ([], []))
                steps.append(record["step"])
                values.append(value)
    return curves, teacher


def draw(log, path):
    """Draw the curves of the log as a PNG file: online flow, generator, gradient norms, score."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    curves, teacher = read(log)
    panels = {
        "loss of the online flow": ["flow_loss", "extra_flow_loss"],
        "losses of the generator (L2 wanders about 0, L1 falls)": ["l1", "l2", "extra"],
        "gradient norms": [name for name in curves if "gradient" in name],
        "score of the one-step generator (lower is better)": ["score"],
    }
    figure = Figure(figsize=(11, 7))
    FigureCanvasAgg(figure)
    for axis, (title, names) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        for name in [name for name in names if name in curves]:
            axis.plot(*curves[name], marker="." * (name == "score"), label=name.replace("_", " "))
        axis.set(title=title, xlabel="distillation steps")
        positive = any(value > 0 for line in axis.lines for value in line.get_ydata())
        if positive and ("score" in names or title == "gradient norms"):
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter())
    for k, style in zip(teacher, (":", "--", "-"), strict=False):
        axis.axhline(teacher[k], color="black", linestyle=style, label=f"teacher, {k} step{'s' * (k != '1')}")
    for axis in figure.axes:
        if axis.lines:
            axis.legend(fontsize="small")
        axis.grid(alpha=0.3)
    figure.subplots_adjust(left=0.06, right=0.98, bottom=0.08, top=0.95, wspace=0.15, hspace=0.3)
    figure.savefig(path, dpi=80)
