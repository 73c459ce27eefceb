"""Images: files, data sets, drawing samples in batches, and the scores of samples.

Images are uint8 tensors [N, C, R, R] wherever they are kept, float32 in -1..1 wherever a network sees them.
"""

import math
import os
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

from fgm import InputError, per_sample, process_rank, world_size
from parts.bars import bar, batches
from parts.progress import scores
from parts.run import atomically, first_process, moved, noise_from
from parts.sizes import check_memory

# ------------------------------------------------------------------------------------------------------------
# Pixels and image files
# ------------------------------------------------------------------------------------------------------------


def to_float(pixels):
    """uint8 0..255 -> float32 -1..1."""
    return pixels.float() / 127.5 - 1


def to_uint8(x):
    """float -1..1 -> uint8 0..255, values outside clipped."""
    return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def read_image(path):
    """A PIL image in RGB, whatever the mode of the file, turned as its EXIF data say.

    Raises InputError, naming it, if it cannot be read, is no regular file (a pipe would be waited for) or
    holds several pictures."""
    from PIL import Image, ImageOps

    if not Path(path).is_file():
        raise InputError(f"cannot read the image {path} (it is no regular file); fix or remove it")
    try:
        with Image.open(path) as image:
            # A photograph in MPO format holds itself and previews.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            image = ImageOps.exif_transpose(image)
            image = eight_bits(image) if image.mode[0] in "IF" else image.convert("RGB")
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


# ------------------------------------------------------------------------------------------------------------
# Data sets
# ------------------------------------------------------------------------------------------------------------

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff")


class Images(NamedTuple):
    """pixels: uint8 [N, C, R, R]; labels: int64 [N], indices into classes."""

    pixels: torch.Tensor
    labels: torch.Tensor
    classes: list


def load_images(data, resolution=None, cond=False):
    """The training images of "cifar10" (downloaded on first use), "digits" (scikit-learn's, no network),
    or a folder with one sub-folder per class. Returns Images.

    Folders: greyscale, palette and alpha become RGB; resolution: centre-crop to a square and resize to it.
    Raises InputError, naming the file, for images that cannot be read or, without resolution, are not all of
    one square size; and for data sets that cannot be had."""
    if data == "digits":
        values, labels = digits()
        pixels = (values * 255 / 16).round().to(torch.uint8)[:, None]  # [N, 8, 8] -> [N, 1, 8, 8]
        images = Images(pixels, labels, [str(digit) for digit in range(10)])
    elif data == "cifar10":
        images = cifar10()
    else:
        with bar(f"reading {data}"):
            images = image_folder(Path(data), resolution)
    if cond and len(images.classes) < 2:
        raise InputError(f"--cond needs at least two classes, {data} has {len(images.classes)}")
    if resolution and images.pixels.shape[-1] != resolution:
        raise InputError(f"{data} has resolution {images.pixels.shape[-1]}; --resolution is for folders")
    return images


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

    Raises InputError for a link out of the folder."""
    paths = [path.relative_to(folder) for path in folder.rglob("*")]
    paths = [folder / path for path in sorted(paths) if not any(part[0] == "." for part in path.parts)]
    for path in paths:
        refuse_link_out(path, folder)
    return [path for path in paths if path.suffix.lower() in suffixes]


def image_folder(root, resolution):
    """load_images for a folder: every sub-folder of root is a class, its images lie at any depth inside.

    What is hidden, such as .ipynb_checkpoints, is left out."""
    if not root.is_dir():
        raise InputError(f"unknown data set {str(root)!r}: neither cifar10, digits nor a folder")
    folders = [path for path in root.iterdir() if path.is_dir() and not path.name.startswith(".")]
    for folder in folders:
        refuse_link_out(folder, root)
    classes = sorted(folder.name for folder in folders)
    files = {name: image_files(root / name) for name in classes}
    check_memory(f"--resolution {resolution}", 3 * (resolution or 1) ** 2 * sum(map(len, files.values())))
    pixels, labels = [], []
    for label, name in enumerate(classes):
        for path in files[name]:
            image = read_image(path)
            if resolution:
                image = fit(image, resolution)
            elif image.width != image.height or (pixels and image.width != pixels[0].shape[0]):
                first = f"{pixels[0].shape[1]}x{pixels[0].shape[0]}" if pixels else "square"
                raise InputError(f"{path} is {image.width}x{image.height}, not {first}; "
                                 "--resolution R makes all images one size")
            pixels.append(np.asarray(image))
            labels.append(label)

    empty = [name for label, name in enumerate(classes) if label not in set(labels)]
    if empty:
        raise InputError(f"{root} has no images in its sub-folder {empty[0]}")
    if not pixels:
        raise InputError(f"{root} has no sub-folders; it needs one a class, with the images inside")
    return Images(channels_first(np.stack(pixels)), torch.tensor(labels), classes)


def channels_first(pixels):
    """A uint8 numpy array [N, R, R, C] as a tensor [N, C, R, R]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()  # [N, R, R, C] -> [N, C, R, R]


def fit(image, resolution):
    """A PIL image, cropped to its central square and resized to resolution x resolution."""
    from PIL import Image, ImageOps

    shrinks = min(image.size) >= resolution
    method = Image.Resampling.BOX if shrinks else Image.Resampling.BICUBIC
    return ImageOps.fit(image, (resolution, resolution), method)


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


# ------------------------------------------------------------------------------------------------------------
# Drawing samples
# ------------------------------------------------------------------------------------------------------------


def images_at_once(shape):
    """How many images [C, R, R] all processes together draw: 500, or fewer of more than 32x32."""
    return max(1, 500 * 32**2 // max(32**2, shape[1] * shape[2]))


def draw_images(sampler, n, shape, label_dim, device, seed=0, classes=None, batch=None, what=None):
    """n images of sampler(noise, **cond) -> x0, uint8 [n, *shape], and their labels [n], on every CPU.

    Image i has class classes[i % len(classes)] (by default all classes in turn) and noise that depends on
    (seed, i) alone. A collective call: the processes share each batch. A last batch that is not full is
    filled with images that are dropped, because sharded networks must be called by all processes. what: the
    title of a progress bar."""
    check_memory(f"{n} images", 2 * n * math.prod(shape))
    classes = torch.tensor(range(label_dim or 1) if classes is None else classes)
    share = math.ceil(min(batch or images_at_once(shape), n) / world_size())
    images = []
    for begin in batches(n, share * world_size(), what):
        indices = begin + process_rank() * share + torch.arange(share)
        cond = {}
        if label_dim:
            labels = classes[indices % len(classes)]
            cond["class_labels"] = F.one_hot(labels, label_dim).float().to(device)
        with torch.no_grad():
            part = to_uint8(sampler(noise_from(seed * 2**32 + indices, shape, device), **cond))
        if world_size() > 1:
            parts = [torch.empty_like(part) for _ in range(world_size())]
            dist.all_gather(parts, part)
            part = torch.cat(parts)  # processes x [share, C, R, R] -> [batch, C, R, R]
        images.append(part.cpu())
    return torch.cat(images)[:n], classes[torch.arange(n) % len(classes)]


# ------------------------------------------------------------------------------------------------------------
# Scores
# ------------------------------------------------------------------------------------------------------------


def frechet_distance(a, b):
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) between Gaussians fitted to features a [N, D] and b [M, D].

    Raises InputError for fewer than two samples and for features that are not finite."""
    if min(len(a), len(b)) < 2:
        raise InputError(f"a Fréchet distance needs two images on either side, got {len(a)} and {len(b)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise InputError("no Fréchet distance: the features of some images are not finite")
    check_memory(f"a Fréchet distance of {a.shape[1]} values a sample", 3 * 8 * a.shape[1] ** 2)
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, axes = torch.linalg.eigh(cov_a)
    root = axes * values.clamp(min=0).sqrt() @ axes.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross).item()


def raw_pixels(pixels):
    """uint8 images [N, C, R, R] as features, their values in -1..1: float32 [N, D]."""
    return to_float(pixels).flatten(1)  # [N, C, R, R] -> [N, D]


def pixel_frechet(real, fake):
    """Fréchet distance on the raw pixels (-1..1) of uint8 images [N, C, R, R]."""
    return frechet_distance(raw_pixels(real), raw_pixels(fake))


def coarse_frechet(real, fake, size=8):
    """pixel_frechet of at most 10,000 real images and few fake ones, averaged to size x size pixels: cheap.

    Beside pixel_frechet of many samples it is too large, since few samples vary; compare it with its like."""
    real = real[random_order(len(real))[:10_000]]
    features = [F.adaptive_avg_pool2d(to_float(pixels), size).flatten(1) for pixels in (real, fake)]
    return frechet_distance(*features)  # each [N, C, R, R] -> [N, C, 8, 8] -> [N, D]


def pictures(out, real, teacher, draw, samples):
    """A picture(step, generator) for FolderRun: a grid of 100 images in out, and coarse_frechet for the log.

    real: uint8 [N, C, R, R]. draw(sampler, n): n images of a fixed seed; every process calls it. samples: how
    many the score is measured on."""
    scored = scores(teacher, lambda sampler: coarse_frechet(real, draw(sampler, samples)))

    def picture(step, generator):
        grid = draw(generator, 100)
        if process_rank() == 0:
            save_grid(out / f"distill-{step:07d}.png", grid)
        return scored(step, generator)

    return picture


def random_order(n):
    """A fixed random permutation of 0..n-1."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def train_judge(images, limit=5000):
    """A cross-validated Judge of `limit` images, chosen at random, and their labels.

    A class that is not among them is there with one image more."""
    order = random_order(len(images.pixels))
    _, first = np.unique(images.labels[order], return_index=True)
    chosen = order[np.union1d(np.arange(min(limit, len(order))), first)]
    return Judge(raw_pixels(images.pixels[chosen]), images.labels[chosen], folds=5)


def noise_floor(pixels):
    """Pixel Fréchet distance between two random halves of real images: uint8 [N, C, R, R], N >= 4."""
    if len(pixels) < 4:
        raise InputError(f"the data has {len(pixels)} images; its scores need at least 4")
    order = random_order(len(pixels))
    half = len(order) // 2
    return pixel_frechet(pixels[order[:half]], pixels[order[half:]])


class Judge:
    """Do samples look like their label? A support vector classifier of features [N, D], trained on real ones.

    own_accuracy: its cross-validated accuracy on real ones if folds are given (as many fits, no more than the
    smallest class has samples), else None; None too if a class has one sample. Raises InputError for one
    class."""

    def __init__(self, features, labels, folds=None):
        from sklearn.model_selection import cross_val_score
        from sklearn.svm import SVC

        x, y = features.numpy(), labels.numpy()
        _, sizes = np.unique(y, return_counts=True)
        if len(sizes) < 2:
            raise InputError(f"a judge of labels needs images of at least two classes, got {len(sizes)}")
        folds = min(folds or 1, sizes.min())
        self.own_accuracy = None
        if folds > 1:
            self.own_accuracy = float(cross_val_score(SVC(C=10), x, y, cv=folds).mean())
        self.classifier = SVC(C=10).fit(x, y)

    def agrees(self, features, labels):
        """Whether each sample is classified as its label: bool [N]."""
        return torch.from_numpy(self.classifier.predict(features.numpy())) == labels

    def accuracy(self, features, labels):
        """(share of samples classified as their label, the smallest such share of any class)."""
        right = self.agrees(features, labels).float()
        return right.mean().item(), min(right[labels == label].mean().item() for label in labels.unique())


class RGB(torch.utils.data.Dataset):
    """uint8 images [N, C, R, R], C 1 or 3, as torch-fidelity takes them: a data set of uint8 [3, R, R]."""

    def __init__(self, pixels):
        self.pixels = pixels.expand(-1, 3, -1, -1)

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, i):
        return self.pixels[i]


@cache
def inception(weights, device):
    """torch-fidelity's Inception network. weights: their file, None to download them.

    Raises InputError if they cannot be had."""
    from torch_fidelity.utils import create_feature_extractor

    try:
        if weights:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run its content
        return create_feature_extractor("inception-v3-compat", ["2048"], cuda=device.type == "cuda",
                                        verbose=False, feature_extractor_weights_path=weights)
    except Exception as error:  # a foreign file can fail in any way at all
        if weights:
            reason = f"the Inception weights {weights} cannot be used"
        else:
            reason = "the Inception weights cannot be downloaded; give --inception-weights FILE"
        raise InputError(f"no FID: {reason} ({' '.join(str(error).split())[:200]})") from error


def inception_statistics(pixels, weights, device):
    """{"mu": mean [2048], "sigma": covariance} of the Inception features of uint8 images [N, C, R, R].

    Raises InputError for fewer than two images, and for features that are not finite."""
    from torch_fidelity.metric_fid import fid_input_id_to_statistics

    if len(pixels) < 2:
        raise InputError(f"no FID: it needs at least two images on either side, got {len(pixels)}")
    network, on_gpu = inception(weights, device), device.type == "cuda"
    with bar(f"Inception features of {len(pixels):,} images"):
        statistics = fid_input_id_to_statistics(1, network, "2048", input1=RGB(pixels), cuda=on_gpu,
                                                verbose=False)
    if not np.isfinite(statistics["sigma"]).all():
        raise InputError("no FID: some Inception features are not finite; are the Inception weights whole?")
    return statistics


# One tensor of real images is scored against again and again. In memory, because torch-fidelity's own cache
# is a file of all features under a name, which may outlive the images that it was made from.
real_statistics = lru_cache(maxsize=1)(inception_statistics)


def fid(real, fake, weights, device):
    """Fréchet Inception distance of uint8 images, by torch-fidelity.

    weights: a file of its Inception network, None to download it. Raises InputError if that cannot be had.
    The features of real are computed once, as long as it is the same tensor."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    statistics = inception_statistics(fake, weights, device), real_statistics(real, weights, device)
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
