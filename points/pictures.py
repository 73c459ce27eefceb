"""Pictures of points in the plane: panels with error maps, and the frames of a movie."""

import numpy as np
import torch

from fgm import InputError
from training.files import atomically, open_folder

EDGE, BINS = 2.4, 60  # half the width of a picture; bins of a histogram, each way
FRAMES = 30  # of a movie


def histogram(x):
    """The density of x [N, 2] on the picture: [BINS, BINS], rows from the top."""
    edges = torch.linspace(-EDGE, EDGE, BINS + 1)
    counts = torch.histogramdd(x.float().cpu(), [edges, edges]).hist  # [BINS of x, BINS of y]
    return counts.T.flip(0) / len(x) * (BINS / (2 * EDGE)) ** 2


def draw_panels(path, panels):
    """Scatter plots, and below each but the data's a map of its density less the data's, on one scale.

    panels: {title: samples [N, 2]}, the data first."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(panels), 6.4), layout="constrained")
    axes = figure.subplots(2, len(panels))
    data = histogram(next(iter(panels.values())))
    scale = data.max().item() / 2
    for (above, below), (title, x) in zip(axes.T, panels.items(), strict=True):
        above.scatter(*x[:10_000].cpu().T.numpy(), s=0.5, alpha=0.4, linewidths=0)
        above.set(title=title, xlim=(-EDGE, EDGE), ylim=(-EDGE, EDGE), aspect="equal")
        below.imshow((histogram(x) - data).numpy(), "RdBu_r", vmin=-scale, vmax=scale)
        for axis in (above, below):
            axis.set(xticks=[], yticks=[])
    axes[1, 0].imshow(data.numpy(), "Greys")
    axes[1, 0].set(xlabel="density; right of it, the error\n(red: too much, blue: too little)")
    with atomically(path) as temporary:
        figure.savefig(temporary, dpi=80)


def frame_steps(steps):
    """The numbers of steps after which the movie shows the generator: multiples of the first, ever further
    apart, since most changes early, and the last."""
    every = max(1, steps // 250)
    return sorted({every * round(k) for k in np.geomspace(1, steps // every, FRAMES)} | {steps})


def draw_frame(folder, step, generator, data, seed):
    """The density of the generator's samples beside the data's, as folder/STEP.png."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(seed)).to(data.device)
    density = histogram(data)
    both = torch.cat([density, histogram(generator(z))], 1)  # 2 x [BINS, BINS] -> [BINS, 2 BINS]
    colours = matplotlib.colormaps["magma"]((both / density.max() / 1.2).numpy())[..., :3]
    frame = Image.fromarray((255 * colours).astype("uint8"))
    frame = frame.resize((8 * BINS, 4 * BINS), Image.Resampling.NEAREST)
    write, font = ImageDraw.Draw(frame), ImageFont.load_default(15)
    write.text((6, 4), "data", "white", font)
    write.text((4 * BINS + 6, 4), f"one step, after {step} updates", "white", font)
    with atomically(open_folder(folder) / f"{step:09d}.png") as temporary:
        frame.save(temporary)


def write_movie(folder, path, steps):
    """The frames in folder of the given steps as an animated GIF; other runs may have left others."""
    from PIL import Image

    files = [folder / f"{step:09d}.png" for step in steps]
    frames = [Image.open(file) for file in files if file.exists()]
    if not frames:
        raise InputError(f"{folder} holds no frames: --overwrite --movie draws them while the run trains")
    palette = frames[-1].quantize(16)  # of all frames, or the data would flicker
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    with atomically(path) as temporary:
        frames[0].save(temporary, save_all=True, append_images=frames[1:], optimize=True, loop=0,
                       duration=[160] * (len(frames) - 1) + [2000])  # milliseconds
