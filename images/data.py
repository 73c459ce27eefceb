"""Images: files, data sets, and drawing samples in batches.

Images are uint8 tensors [N, C, R, R] wherever they are kept, float32 in -1..1 wherever a network sees them.
"""

import math
import os
import zlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from fgm import InputError, per_sample, process_rank, world_size
from training.bars import bar, batches
from training.run import atomically, first_process, moved, noise_from
from training.sizes import check_memory

# ---- Pixels and image files --------------------------------------------------------------------------------


def to_float(pixels):
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """float -1..1 -> uint8 0..255, values outside clipped."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def read_image(path):
    """A PIL image in RGB, on white where transparent, whatever the file's mode, turned as its EXIF data say.

    Raises InputError, naming it, if it cannot be read, is no regular file (a pipe would be waited for) or
    holds several pictures."""
    from PIL import Image, ImageOps

    try:
        if not Path(path).is_file():
            raise OSError("it is no regular file")
        with Image.open(path) as image:
            # A photograph in MPO format holds itself and previews.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":
                image = eight_bits(image)
            elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            image = image.convert("RGB")
    except Exception as error:  # the decoders raise what they like
        raise InputError(f"cannot read the image {path} ({error}); fix or remove it") from error
    if frames > 1:
        raise InputError(f"the image {path} is animated or has pages: it holds {frames} pictures, not one")
    return image


def eight_bits(image):
    """A PIL image of 16-bit values 0..65535 (modes I;16 and I) or floats 0..1 (mode F), in RGB.

    Raises ValueError for other values."""
    from PIL import Image

    values, top = np.asarray(image), 1 if image.mode == "F" else 65535
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):  # nor if one is NaN
        raise ValueError(f"its values {low:g}..{high:g} are not in 0..{top}")
    if top > 1 and 0 < high < 256:
        raise ValueError(f"its values {low:g}..{high:g} are of 8 bits, in a file of 16 that is all but black")
    return Image.fromarray(np.rint(values / (top / 255)).astype(np.uint8)).convert("RGB")


def save_grid(path, images, columns=10, titles=(), least=600):
    """Write uint8 images [N, C, H, W], C 1 or 3, row by row as one PNG, with gaps between them.

    They are enlarged without blur, by a whole factor, until the rows are `least` pixels wide or more. titles:
    one for each row, written at its left."""
    from PIL import Image, ImageDraw, ImageFont

    n, _, h, w = images.shape
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    zoom = math.ceil(least / (columns * w))
    h, w, gap = h * zoom, w * zoom, max(2, w * zoom // 16)
    font = ImageFont.load_default(16)
    margin = math.ceil(max((font.getlength(title) + 2 * gap for title in titles), default=0))
    canvas = Image.new("RGB", (margin + columns * (w + gap) + gap, rows * (h + gap) + gap), "white")
    pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1)  # [N, C, H, W] -> [N, H, W, 3]
    for i, image in enumerate(pixels.numpy()):
        corner = margin + gap + i % columns * (w + gap), gap + i // columns * (h + gap)
        canvas.paste(Image.fromarray(image).resize((w, h), Image.Resampling.NEAREST), corner)
    for i, title in enumerate(titles):
        middle = gap + i * (h + gap) + h // 2
        ImageDraw.Draw(canvas).text((gap, middle), title, "black", font, "lm")
    with atomically(path) as temporary:
        canvas.save(temporary)


def save_samples(out, drawn):
    """Pictures of {title: uint8 images [N, C, H, W], the same seeds in each}, written into the folder out.

    samples.png has a row for each title; TITLE.png has all images, one-step.png for instance."""
    for title, images in drawn.items():
        save_grid(out / f"{title.replace(', ', '-').replace(' ', '-')}.png", images)
    if drawn:
        rows = [images[:10] for images in drawn.values()]
        save_grid(out / "samples.png", torch.cat(rows), len(rows[0]), list(drawn))


# ---- Data sets ---------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff")


class Images(NamedTuple):
    """pixels: uint8 [N, C, R, R]; labels: int64 [N], indices into classes."""

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: list

    def class_counts(self):
        """How many images each class has, a list of int."""
        return torch.bincount(self.labels, minlength=len(self.classes)).tolist()

    def fingerprint(self):
        """A checksum of pixels and labels."""
        return f"{zlib.crc32(self.labels.numpy(), zlib.crc32(self.pixels.numpy())):08x}"


def load_images(data, resolution=None, cond=False):
    """The training images of "cifar10" (downloaded on first use), "digits" (scikit-learn's, no network),
    or a folder with one sub-folder per class. Returns Images.

    Folders: greyscale and palette become RGB, what is transparent white. resolution: CIFAR-10 is shrunk to
    it, images of a folder are cropped to their central square and resized. Raises InputError, naming the
    file, for images that cannot be read or, without resolution, are not all of one square size; and for data
    sets that cannot be had."""
    if data == "digits":
        values, labels = digits()
        pixels = (values * 255 / 16).round().to(torch.uint8)[:, None]  # [N, 8, 8] -> [N, 1, 8, 8]
        images = Images(pixels, labels, [str(digit) for digit in range(10)])
    elif data == "cifar10":
        images = cifar10()
        if resolution and resolution < images.pixels.shape[-1]:
            images = images._replace(pixels=shrunk(images.pixels, resolution).round().to(torch.uint8))
    else:
        images = image_folder(Path(data), resolution)
    if cond and len(images.classes) < 2:
        raise InputError(f"--cond needs at least two classes, {data} has {len(images.classes)}")
    if resolution and images.pixels.shape[-1] != resolution:
        raise InputError(f"{data} has resolution {images.pixels.shape[-1]}; --resolution is for folders, and "
                         "to shrink cifar10")
    return images


def shrunk(pixels, resolution):
    """uint8 images [N, C, R, R] averaged to at most resolution x resolution: float32 0..255, as many."""
    if pixels.shape[-1] <= resolution:
        return pixels.float()
    return torch.cat([F.adaptive_avg_pool2d(part.float(), resolution) for part in pixels.split(1000)])


@cache
def digits():
    """scikit-learn's handwritten digits: float64 values 0..16 [1797, 8, 8], int64 labels [1797]."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.from_numpy(data.images), torch.from_numpy(data.target).long()


def cifar10():
    """CIFAR-10's training images; the first process downloads. Raises InputError on all if that fails."""
    from torchvision.datasets import CIFAR10

    root = Path.home() / ".cache" / "cifar10"

    def download():
        try:
            CIFAR10(root, download=True)
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
            raise InputError(f"cannot download CIFAR-10 to {root} ({error}); try --data digits "
                             "(no download), or --data DIR for a folder of images") from error

    first_process(download)
    dataset = CIFAR10(root)
    return Images(channels_first(dataset.data), torch.tensor(dataset.targets), dataset.classes)


def refuse_link_out(path, folder):
    """Raise InputError if a path in a folder is a link, or lies behind one, that leads out of it."""
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise InputError(f"{path} is a link out of {folder}, which is not followed; copy it there")


def image_files(folder, suffixes=IMAGE_SUFFIXES):
    """The image files at any depth in a folder, sorted; none that is hidden or in a hidden folder.

    Files of other kinds are counted aloud. Raises InputError for a link out of the folder."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    paths = [folder / path for path in sorted(paths) if not any(part[0] == "." for part in path.parts)]
    for path in paths:
        refuse_link_out(path, folder)
    others = [path for path in paths if path.suffix.lower() not in suffixes and path.is_file()]
    if others and process_rank() == 0:
        print(f"{len(others)} files in {folder} are of other kinds and left out, {others[0]} the first")
    return [path for path in paths if path.suffix.lower() in suffixes]


def image_folder(root, resolution):
    """load_images for a folder: every sub-folder of root is a class, its images lie at any depth inside.

    What is hidden, such as .ipynb_checkpoints, is left out."""
    from PIL import Image, ImageOps

    if not root.is_dir():
        raise InputError(f"unknown data set {str(root)!r}: neither cifar10, digits nor a folder")
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    folders.sort(key=lambda folder: folder.name)
    if not folders:
        raise InputError(f"{root} has no sub-folders; it needs one a class, with the images inside")
    labelled = []
    with bar(f"listing {root}"):
        for label, folder in enumerate(folders):
            refuse_link_out(folder, root)
            paths = image_files(folder)
            if not paths:
                raise InputError(f"{root} has no images in its sub-folder {folder.name}")
            labelled += [(label, path) for path in paths]
    check_memory(f"--resolution {resolution}", 3 * (resolution or 1) ** 2 * len(labelled))
    classes = [folder.name for folder in folders]
    if process_rank() == 0:
        print(f"{len(labelled):,} images of {len(classes)} classes in {root}: {', '.join(classes)}"[:500])
    pixels = []
    with bar(f"reading {root}", len(labelled)) as shown:
        for _, path in labelled:
            image = read_image(path)
            if resolution:
                method = Image.Resampling.BOX if min(image.size) >= resolution else Image.Resampling.BICUBIC
                image = ImageOps.fit(image, (resolution, resolution), method)  # its central square, resized
            elif image.width != image.height or (pixels and image.width != pixels[0].shape[0]):
                first = f"{pixels[0].shape[1]}x{pixels[0].shape[0]}" if pixels else "square"
                raise InputError(f"{path} is {image.width}x{image.height}, not {first}; "
                                 "--resolution R makes all images one size")
            pixels.append(np.asarray(image))
            shown.update()
    labels = torch.tensor([label for label, _ in labelled])
    return Images(channels_first(np.stack(pixels)), labels, classes)


def channels_first(pixels):
    """A uint8 numpy array [N, R, R, C] as a tensor [N, C, R, R]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # [N, R, R, C] -> [N, C, R, R]


def data_functions(images, label_dim, flip, device):
    """(data, conditions) as train_flow and distill take them: what int64 seeds [B] choose from the images."""
    pixels, labels = images.pixels.to(device), images.labels.to(device)
    n = len(pixels)

    def conditions(seeds):
        if not label_dim:
            return {}
        return {"class_labels": F.one_hot(labels[moved(seeds, device) % n], label_dim).float()}

    def data(seeds):
        cond, seeds = conditions(seeds), moved(seeds, device)
        x = to_float(pixels[seeds % n])
        if flip:
            flipped = per_sample(seeds // n % 2 == 1, x)
            x = torch.where(flipped, x.flip(3), x)
        return x, cond

    return data, conditions


# ---- Drawing samples ---------------------------------------------------------------------------------------


def labels_of(indices, class_counts, seed=0):
    """Labels of the samples with these indices, int64 [B] each, as often as the data has each class.

    Sample i gets the label of image (i + seed) step modulo N of the N data, ordered by class. The step has no
    factor in common with N, so that N samples have each class exactly as often as the data; and it is near
    the golden section of N, so that fewer are spread as evenly as a lattice of one dimension can."""
    n = sum(class_counts)
    step = round(n * (math.sqrt(5) - 1) / 2)
    while math.gcd(step, n) > 1:
        step += 1
    positions = (indices + seed) % n * step % n
    return torch.searchsorted(torch.tensor(class_counts).cumsum(0), positions, right=True)


def draw_images(sampler, n, shape, class_counts, device, seed=0, classes=None, batch=None, what=None):
    """n images of sampler(noise, **cond) -> x0, uint8 [n, *shape], and their labels [n], on every CPU.

    class_counts: how many images of each class the data has, empty if the sampler takes no labels. Image i
    has the label of labels_of, or classes[i % len(classes)] if classes are given, and noise that depends on
    (seed, i) alone. A collective call: the processes share each batch (default: 500 images, or fewer of more
    than 32x32 pixels). A last batch that is not full is filled with images that are dropped, because sharded
    networks must be called by all processes. what: the title of a progress bar."""
    check_memory(f"{n} images", 2 * n * math.prod(shape))
    batch = batch or max(1, 500 * 32**2 // max(32**2, math.prod(shape[1:])))
    share = math.ceil(min(batch, n) / world_size())
    size = share * world_size()
    indices = torch.arange(math.ceil(n / size) * size)
    if not class_counts:
        labels = torch.zeros_like(indices)
    elif classes is None:
        labels = labels_of(indices, class_counts, seed)
    else:
        labels = torch.tensor(classes)[indices % len(classes)]
    images = []
    for begin in batches(n, size, what):
        mine = indices[begin + process_rank() * share :][:share]
        cond = {}
        if class_counts:
            cond["class_labels"] = F.one_hot(labels[mine], len(class_counts)).float().to(device)
        with torch.no_grad():
            part = to_uint8(sampler(noise_from(seed * 2**32 + mine, shape, device), **cond))
        if world_size() > 1:
            parts = [torch.empty_like(part) for _ in range(world_size())]
            dist.all_gather(parts, part)
            part = torch.cat(parts)  # processes x [share, C, R, R] -> [batch, C, R, R]
        images.append(part.cpu())
    return torch.cat(images)[:n], labels[:n]
