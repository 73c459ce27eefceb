"""The pictures of toy2d.ipynb, in the colours of progress.png."""

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import PowerNorm

from points.pictures import EDGE, histogram
from training.progress import COLOURS, TITLES


def draw_densities(panels):
    """The densities of samples [N, 2], by title, on one scale that ends at the highest of them."""
    densities = [histogram(x.detach()) for x in panels.values()]
    norm = PowerNorm(0.4, 0, torch.stack(densities).max().item())  # between linear and logarithmic

    figure, axes = plt.subplots(1, len(panels), figsize=(2.4 * len(panels), 2.7), layout="constrained")
    for axis, title, density in zip(axes, panels, densities, strict=True):
        extent = (-EDGE, EDGE, -EDGE, EDGE)
        axis.imshow(density.numpy(), "magma_r", norm, extent=extent, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=9)
    plt.show()


def draw_curve(axis, rows, names, window=10, **style):
    """Means over windows of steps of what a run logged: rows, a list with a dict of these names per step."""
    windows = len(rows) // window
    steps = window * (np.arange(windows) + 0.5)
    for name in names:
        values = np.array([row[name] for row in rows[: windows * window]])
        means = values.reshape(windows, window).mean(1)  # [steps] -> [windows, window] -> [windows]
        axis.plot(steps, means, color=COLOURS[name], **{"label": TITLES[name]} | style)

    if "bound" in names:
        axis.axhline(0, color="black", linewidth=0.6)
    axis.set(xlabel="step")


def draw_dots(rows, xlabel):
    """One line per title with a dot for each value, {title: values}, on a logarithmic axis."""
    figure, axis = plt.subplots(figsize=(7, 0.6 + 0.36 * len(rows)), layout="constrained")
    for height, values in enumerate(rows.values()):
        axis.plot(values, [height] * len(values), "o", color="0.25", alpha=0.6)

    axis.set(xscale="log", xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    axis.set_yticks(range(len(rows)), rows)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_formatter("{x:g}")
    axis.grid(axis="x", which="both", alpha=0.25)
    plt.show()
