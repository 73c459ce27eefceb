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
from training.files import atomically
from training.processes import first_process, noise_from, to_device
from training.progress import batches

# ---- Pixels and image files --------------------------------------------------------------------------------


def to_float(pixels):
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """float -1..1 -> uint8 0..255, values outside clipped."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def read_image(path):
    """A PIL image in RGB, on white where transparent, turned as its EXIF data say.

    Raises InputError, naming the file, unless it is a still image of 8 bits a channel that can be read."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            # A photograph in MPO format holds itself and previews.
            if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:
                raise ValueError("it is animated or has pages")
            if image.mode.startswith(("I", "F")):
                raise ValueError("it has 16 or more bits a channel: convert it to 8")

            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            return image.convert("RGB")
    except Exception as error:  # the decoders raise what they like
        raise InputError(f"cannot read the image {path} ({error}); fix or remove it") from error


def save_grid(path, images, columns=10, titles=()):
    """Write uint8 images [N, C, H, W], C 1 or 3, row by row as one PNG, with gaps between them.

    They are enlarged without blur, by a whole factor, until the rows are 600 pixels wide or more. titles: one
    for each row, written at its left."""
    from PIL import ImageDraw, ImageFont, ImageOps
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    columns = min(columns, len(images))
    zoom = math.ceil(600 / (columns * images.shape[3]))
    images = images.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    h, w = images.shape[2:]
    gap = max(2, w // 16)
    canvas = to_pil_image(make_grid(images, columns, gap, pad_value=255))  # uint8 [3, H, W]

    font = ImageFont.load_default(16)
    margin = math.ceil(max((font.getlength(title) + 2 * gap for title in titles), default=0))
    canvas = ImageOps.expand(canvas, (margin, 0, 0, 0), "white")
    for i, title in enumerate(titles):
        middle = gap + i * (h + gap) + h // 2
        ImageDraw.Draw(canvas).text((gap, middle), title, "black", font, "lm")

    with atomically(path) as temporary:
        canvas.save(temporary)


def save_samples(out, samples):
    """Pictures of {title: uint8 images [N, C, H, W], from the same noise}, written into the folder out.

    samples.png has a row for each title; TITLE.png has all images, one-step.png for instance."""
    for title, images in samples.items():
        save_grid(out / f"{title.replace(', ', '-').replace(' ', '-')}.png", images)
    if samples:
        rows = [images[:10] for images in samples.values()]
        save_grid(out / "samples.png", torch.cat(rows), len(rows[0]), list(samples))


# ---- Data sets ---------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".bmp", ".webp", ".gif", ".tif", ".tiff")
LEFT_BY_SYSTEMS = ("__MACOSX", "Thumbs.db", "desktop.ini")


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

    def rows(self, positions):
        """The images at some positions."""
        return self._replace(pixels=self.pixels[positions], labels=self.labels[positions])

    def in_turn(self, n):
        """Pixels of n images, one of each class in turn, from the first of each on."""
        positions = [(self.labels == label).nonzero()[:, 0] for label in range(len(self.classes))]
        chosen = []
        for i in range(n):
            of_class = positions[i % len(positions)]
            chosen.append(of_class[i // len(positions) % len(of_class)])
        return self.pixels[torch.stack(chosen)]


def load_images(data, resolution=None, cond=False):
    """The training images of "cifar10" (downloaded on first use), "digits" (scikit-learn's, no network),
    or a folder with one sub-folder per class. Returns Images.

    resolution: CIFAR-10 is shrunk to it, images of a folder are cropped to their central square and resized.
    Raises InputError, naming the file, for images that cannot be read or, without resolution, are not all of
    one square size; and for data sets that cannot be had."""
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
    """CIFAR-10's training images; the first process downloads.

    Raises InputError, on all processes, if they cannot be downloaded or kept."""
    from torchvision.datasets import CIFAR10

    cache_folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if cache_folder.startswith("~"):
        raise InputError("there is no home folder to keep CIFAR-10 in: set XDG_CACHE_HOME to a folder")
    root = Path(cache_folder) / "cifar10"

    def download():
        try:
            CIFAR10(root, download=True)
        except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
            raise InputError(f"cannot download CIFAR-10 to {root} ({error}): try again, or set "
                             "XDG_CACHE_HOME to another folder, or give --data digits or a folder") from error

    first_process(download)
    dataset = CIFAR10(root)
    return Images(channels_first(dataset.data), torch.tensor(dataset.targets), dataset.classes)


def passed_over(path):
    """Whether a file or folder is hidden, or was left by an operating system and is no data."""
    return path.name.startswith(".") or path.name in LEFT_BY_SYSTEMS


def image_files(folder, suffixes=IMAGE_SUFFIXES):
    """The files with such suffixes at any depth in a folder, sorted; nothing that is passed over.

    Prints how many files of other kinds there are."""
    files, other_files = [], []
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if not path.is_dir() and not any(passed_over(part) for part in (inside, *inside.parents)):
            (files if path.suffix.lower() in suffixes else other_files).append(path)

    if other_files and process_rank() == 0:
        print(f"{len(other_files)} files in {folder} are of other kinds and left out, {other_files[0]} the "
              "first")
    return files


def image_folder(root, resolution):
    """load_images for a folder: every sub-folder of root is a class, its images lie at any depth inside."""
    if not root.is_dir():
        raise InputError(f"unknown data set {str(root)!r}: neither cifar10, digits nor a folder")
    folders = [path for path in root.iterdir() if path.is_dir() and not passed_over(path)]
    folders.sort(key=lambda folder: folder.name)
    if not folders:
        raise InputError(f"{root} has no sub-folders; it needs one a class, with the images inside")

    paths, labels = [], []
    for label, folder in enumerate(folders):
        files = image_files(folder)
        if not files:
            raise InputError(f"{root} has no images in its sub-folder {folder.name}")
        paths += files
        labels += [label] * len(files)
    classes = [folder.name for folder in folders]
    if process_rank() == 0:
        print(f"{len(paths):,} images of {len(classes)} classes in {root}: {', '.join(classes)}"[:500])

    pixels = []
    for i in batches(len(paths), 1, f"reading {root}"):
        image = read_image(paths[i])
        if resolution:
            image = central_square(image, resolution)
        side = pixels[0].shape[0] if pixels else image.width
        if image.size != (side, side):
            raise InputError(f"{paths[i]} is {image.width}x{image.height}, not {side}x{side}; "
                             "--resolution R makes all images one size")
        pixels.append(np.asarray(image))
    return Images(channels_first(np.stack(pixels)), torch.tensor(labels), classes)


def central_square(image, resolution):
    """The central square of a PIL image, averaged to resolution x resolution, or enlarged smoothly."""
    from PIL import Image, ImageOps

    method = Image.Resampling.BOX if min(image.size) >= resolution else Image.Resampling.BICUBIC
    return ImageOps.fit(image, (resolution, resolution), method)


def channels_first(pixels):
    """A uint8 numpy array [N, R, R, C] as a tensor [N, C, R, R]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # [N, R, R, C] -> [N, C, R, R]


def random_order(n):
    """A fixed random permutation of 0..n-1."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def split(labels, n):
    """(positions of n images, positions of the others): a fixed random choice among labels [N], in which
    each class has its share, up to one image."""
    order = random_order(len(labels))
    order = order[labels[order].argsort(stable=True)]  # by class, at random within
    chosen = torch.arange(n) * len(order) // n
    others = torch.ones(len(order), dtype=torch.bool)
    others[chosen] = False
    return order[chosen], order[others]


def condition(labels, label_dim, device):
    """What a network takes for labels [B]: {"class_labels": one-hot [B, label_dim]}, {} for label_dim 0."""
    if not label_dim:
        return {}
    return {"class_labels": F.one_hot(labels, label_dim).float().to(device)}


def data_functions(images, label_dim, flip, device):
    """(data, conditions) as train_flow and distill take them: what int64 seeds [B] choose from the images."""
    pixels, labels = images.pixels.to(device), images.labels.to(device)
    n = len(pixels)

    def conditions(seeds):
        return condition(labels[to_device(seeds, device) % n], label_dim, device)

    def data(seeds):
        cond, seeds = conditions(seeds), to_device(seeds, device)
        x = to_float(pixels[seeds % n])
        if flip:
            flipped = per_sample(seeds // n % 2 == 1, x)
            x = torch.where(flipped, x.flip(3), x)
        return x, cond

    return data, conditions


# ---- Drawing samples ---------------------------------------------------------------------------------------


def labels_of(indices, class_counts):
    """Labels of the samples with these indices, int64 [B] each: sample i has the label of image i modulo N of
    the N data, in a fixed random order. So N samples have each class exactly as often as the data. Without
    classes all labels are 0."""
    if not class_counts:
        return torch.zeros_like(indices)
    labels = torch.arange(len(class_counts)).repeat_interleave(torch.tensor(class_counts))  # [N]
    return labels[random_order(len(labels))[indices % len(labels)]]


def draw_images(sampler, n, shape, class_counts, device, seed=0, classes=None, batch=None, title=None):
    """n images of sampler(noise, **cond) -> x0, uint8 [n, *shape], and their labels [n], on every CPU.

    class_counts: how many images of each class the data has, empty if the sampler takes no labels. Image i
    has the label of labels_of, or classes[i % len(classes)] if classes are given, and noise that depends on
    (seed, i) alone. A collective call: the processes share each batch (default: 500 images, or fewer of more
    than 32x32 pixels). A last batch that is not full is filled with images that are dropped, because sharded
    networks must be called by all processes. title: that of a progress bar, None for no bar."""
    if batch is None:
        batch = max(1, 500 * 32**2 // max(32**2, math.prod(shape[1:])))
    share = math.ceil(min(batch, n) / world_size())
    size = share * world_size()
    indices = torch.arange(math.ceil(n / size) * size)

    labels = labels_of(indices, class_counts)
    if classes:
        labels = torch.tensor(classes)[indices % len(classes)]

    images = []
    for begin in batches(n, size, title):
        own = indices[begin + process_rank() * share :][:share]
        cond = condition(labels[own], len(class_counts), device)
        with torch.no_grad():
            part = to_uint8(sampler(noise_from(seed * 2**32 + own, shape, device), **cond))
        if world_size() > 1:
            parts = [torch.empty_like(part) for _ in range(world_size())]
            dist.all_gather(parts, part)
            part = torch.cat(parts)  # processes x [share, C, R, R] -> [batch, C, R, R]
        images.append(part.cpu())
    return torch.cat(images)[:n], labels[:n]
