"""Scores of images: Fréchet distances, judges of labels and features, Inception FID, a run's table.

Images are uint8 tensors [N, C, R, R].
"""

import json
import math
from functools import cache, cached_property, lru_cache

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Subset

from fgm import InputError, process_rank
from images.data import save_grid, shrunk, to_float
from images.unet import refusals
from training import flags, progress
from training.bars import bar, batches
from training.files import reason, save_tensors

# ---- Fréchet distances -------------------------------------------------------------------------------------


class Gaussian:
    """Mean [D] and covariance [D, D], in float64, of features [N, D].

    Raises InputError for fewer than two samples and for features that are not finite."""

    def __init__(self, features):
        if len(features) < 2:
            raise InputError(f"a Fréchet distance needs two images on either side, got {len(features)}")
        if not features.isfinite().all():
            raise InputError("no Fréchet distance: some features are not finite")
        features = features.double()
        self.mean, self.cov = features.mean(0), torch.cov(features.T)

    @cached_property
    def root(self):
        """The symmetric root of the covariance."""
        values, axes = torch.linalg.eigh(self.cov)
        return axes * values.clamp(min=0).sqrt() @ axes.T

    def distance(self, other):
        """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), the Fréchet distance."""
        cross = torch.linalg.eigvalsh(self.root @ other.cov @ self.root).clamp(min=0).sqrt().sum()
        shift = (self.mean - other.mean).square().sum()
        return (shift + self.cov.trace() + other.cov.trace() - 2 * cross).item()


def frechet_distance(a, b):
    """The Fréchet distance between Gaussians fitted to features a [N, D] and b [M, D]."""
    return Gaussian(a).distance(Gaussian(b))


def fresh_distance(features, samples, labels=None, splits=10):
    """What so many fresh samples of the same distribution would score, on average, against features [N, D];
    given labels [N], samples that have each label as often.

    The features vary, too: to leading order, for N well above D, the distance of n samples to m others goes
    as 1 / n + 1 / m, and random halves of the features say how steeply. Less is possible: these N may be
    easy, or the sampler has learned their own mean and covariance."""
    n, random, total = len(features), torch.Generator().manual_seed(0), 0.0
    for _ in range(splits):
        order = torch.randperm(n, generator=random)
        if labels is not None:
            order = order[labels[order].argsort(stable=True)]
        total += frechet_distance(features[order[::2]], features[order[1::2]])
    return total / splits * (1 / n + 1 / samples) / (4 / n)


def noise_of_draw(real, features, groups=10):
    """Standard deviation that drawing these samples, and not others, gives to real's distance to them.

    The jackknife of groups: the spread of the distances without each tenth of the features [N, D]. None for
    fewer than 20 samples."""
    if len(features) < 2 * groups:
        return None
    group = torch.arange(len(features)) % groups
    left = torch.tensor([real.distance(Gaussian(features[group != i])) for i in range(groups)])
    return ((groups - 1) ** 0.5 * left.std(correction=0)).item()


def raw_pixels(pixels):
    """The values of images, in -1..1, as features: float32 [N, D]."""
    return to_float(pixels).flatten(1)  # [N, C, R, R] -> [N, D]


def coarse_pixels(pixels, resolution=16):
    """raw_pixels of images averaged to at most resolution x resolution."""
    return raw_pixels(shrunk(pixels, resolution))


def random_order(n):
    """A fixed random permutation of 0..n-1."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def pictures(out, real, teacher, draw, samples):
    """A picture(step, generator) for FolderRun: a grid of 100 images in out, and a cheap distance.

    draw(sampler, n, in_turn): n images of a fixed seed; every process calls it. The distance is that of
    `samples` images to at most 10,000 real ones, on 8x8 pixels. Beside one of many samples it is too large,
    since few samples vary; compare it with its like."""
    near = Gaussian(coarse_pixels(real[random_order(len(real))[:10_000]], 8))
    scored = progress.scores(
        teacher, lambda sampler: near.distance(Gaussian(coarse_pixels(draw(sampler, samples, False), 8))))

    def picture(step, generator):
        grid = draw(generator, 100, True)
        if process_rank() == 0:
            save_grid(out / f"distill-{step:07d}.png", grid)
        return scored(step, generator)

    return picture


# ---- Judges: do samples look like their label? -------------------------------------------------------------


def accuracy(judge, features, labels):
    """(share of samples that a judge takes for their label, the smallest such share of any class)."""
    right = judge.agrees(features, labels).float()
    return right.mean().item(), min(right[labels == label].mean().item() for label in labels.unique())


class Judge:
    """A support vector classifier of features [N, D], trained on real ones: for images as small as digits.

    own_accuracy: its accuracy on real ones, cross-validated by as many fits as there are folds, no more than
    the smallest class has samples; None for one fold. Raises InputError for one class."""

    def __init__(self, features, labels, folds=1):
        from sklearn.model_selection import cross_val_score
        from sklearn.svm import SVC

        x, y = features.numpy(), labels.numpy()
        _, sizes = np.unique(y, return_counts=True)
        if len(sizes) < 2:
            raise InputError(f"a judge of labels needs images of at least two classes, got {len(sizes)}")
        folds = min(folds, sizes.min())
        self.own_accuracy = None
        if folds > 1:
            self.own_accuracy = float(cross_val_score(SVC(C=10), x, y, cv=folds).mean())
        self.classifier = SVC(C=10).fit(x, y)

    def agrees(self, features, labels):
        """Whether each sample is classified as its label: bool [N]."""
        return torch.from_numpy(self.classifier.predict(features.numpy())) == labels


def first_of_each(labels):
    """Positions of the first sample of each class among labels [N]."""
    return torch.from_numpy(np.unique(labels, return_index=True)[1])


def train_judge(images, limit=5000):
    """A cross-validated Judge of `limit` images, chosen at random, and their labels.

    A class that is not among them is there with one image more."""
    order = random_order(len(images.pixels))
    chosen = order[np.union1d(np.arange(min(limit, len(order))), first_of_each(images.labels[order]))]
    return Judge(raw_pixels(images.pixels[chosen]), images.labels[chosen], folds=5)


def hold_out(labels):
    """(positions to hold out of a judge's training, a random tenth; the others, with every class)."""
    order = random_order(len(labels))
    kept = torch.isin(torch.arange(len(order)), first_of_each(labels[order]))
    order = torch.cat([order[~kept], order[kept]])
    held = min(max(2, len(order) // 10), int((~kept).sum()))
    return order[:held], order[held:]


def judge_network(channels, side, outputs):
    """Features and class scores of images in -1..1: Sequential([B, C, side, side] -> [B, 128], -> outputs).

    The four convolutions work at 16x16, 16x16, 8x8 and 4x4 pixels for a side of 16 or 32. The last batch norm
    has no weights: each feature of real images has mean 0 and variance 1."""
    kernel, stride = (4, 2) if side > 16 else (3, 1)
    features = nn.Sequential(
        nn.Conv2d(channels, 32, kernel, stride, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 64, 3, 1, 1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 96, 3, 1, 1, bias=False), nn.MaxPool2d(2), nn.BatchNorm2d(96), nn.ReLU(),
        nn.Conv2d(96, 128, 3, 1, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(128, affine=False))
    return nn.Sequential(features, nn.Linear(128, outputs)).to(memory_format=torch.channels_last)


def turned(x):
    """(x with its first quarter as it is, the second turned by 90 degrees, ...; the number of turns [B])."""
    turns = torch.arange(len(x), device=x.device) * 4 // len(x)
    return torch.cat([x[turns == k].rot90(k, (2, 3)) for k in range(4)]), turns


class NetworkJudge:
    """A judge_network trained on real images (of at most 32x32 pixels; larger ones are averaged to that).

    With labels it tells the classes apart. Without, it tells by how many quarter turns an image was turned
    (RotNet, arXiv 1803.07728), which takes no labels, and shapes to tell, not colours alone as clusters of
    pixels do. about: what it was trained on, as its file says; own_accuracy: measured on a tenth of the
    images, that it was not trained on (None if there are none)."""

    def __init__(self, images, cond, device):
        channels, resolution = images.pixels.shape[1:3]
        self.device, self.side, classes = device, min(resolution, 32), images.classes if cond else []
        self.about, self.own_accuracy = {"classes": classes, "images": images.fingerprint()}, None
        self.net = judge_network(channels, self.side, len(classes) or 4).to(device).eval()

    @classmethod
    def load(cls, path, images, cond, device):
        """The judge in a file. Raises InputError if it is damaged, or of other images or classes."""
        from safetensors import safe_open

        judge = cls(images, cond, device)
        with refusals(path, "judge of cifar.py"), safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["judge"])
            for name, value in judge.about.items():
                if about[name] != value:
                    raise InputError(f"it was trained for other {name}; remove it, or name another --out")
            judge.own_accuracy = about["own_accuracy"]
            flags.check_setting("its accuracy", judge.own_accuracy, "[0, 1]")
            judge.net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
            if not all(value.isfinite().all() for value in judge.net.state_dict().values()):
                raise InputError("some of its weights are not finite")
        return judge

    @classmethod
    def train(cls, images, cond, flip, device, seen=None, batch=250):
        """A judge of these images, and of their labels if cond, after `seen` images, each at most 60 times
        (default: 270,000, on a GPU six times as many). AdamW with one cycle of the learning rate; images are
        moved by up to a sixteenth of their side and, if flip, mirrored."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            judge = cls(images, cond, device)
        net, side, moves = judge.net.train(), judge.side, judge.side // 16
        held, trained = hold_out(images.labels)
        seen = min(seen or (1_620_000 if device.type == "cuda" else 270_000), 60 * len(trained))
        batch = min(batch, len(trained))
        steps, epochs = seen // batch, math.ceil(seen / len(trained))
        adam = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 0.008, total_steps=steps + 1, pct_start=0.25)
        pixels, labels = shrunk(images.pixels, side).to(device, torch.uint8), images.labels.to(device)
        draws = torch.Generator().manual_seed(0)
        order = torch.cat([trained[torch.randperm(len(trained), generator=draws)] for _ in range(epochs)])
        for begin in batches(steps * batch, batch, "training the judge"):
            chosen = order[begin : begin + batch].to(device)
            down, right = torch.randint(2 * moves + 1, (2,), generator=draws).tolist()
            x = F.pad(to_float(pixels[chosen]), (moves,) * 4, "reflect")
            x = x[:, :, down : down + side, right : right + side]
            if flip and begin // batch % 2:
                x = x.flip(3)
            x, target = (x, labels[chosen]) if cond else turned(x)
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                scores = net(x.contiguous(memory_format=torch.channels_last))
            adam.zero_grad()
            F.cross_entropy(scores.float(), target, label_smoothing=0.1).backward()
            adam.step()
            cycle.step()
        judge.net.eval()
        if len(held):
            x, target = images.pixels[held], images.labels[held]
            x, target = (x, target) if cond else turned(x)
            judge.own_accuracy = judge.agrees(judge.features(x), target).float().mean().item()
        return judge

    def save(self, path):
        state = {name: value.cpu().contiguous() for name, value in self.net.state_dict().items()}
        about = self.about | {"own_accuracy": self.own_accuracy}
        save_tensors(state, path, {"judge": json.dumps(about)})

    @torch.no_grad()
    def features(self, pixels):
        """float32 [N, 128] of uint8 images [N, C, R, R]."""
        found = []
        for begin in batches(len(pixels), 500, f"features of {len(pixels):,} images"):
            part = shrunk(pixels[begin : begin + 500], self.side).to(self.device)
            found.append(self.net[0](to_float(part)).cpu())
        return torch.cat(found)

    @torch.no_grad()
    def agrees(self, features, labels):
        """Whether each sample is classified as its label: bool [N]."""
        return self.net[1](features.to(self.device)).argmax(1).cpu() == labels


# ---- All scores of a run -----------------------------------------------------------------------------------


SMALL = 8  # pixels: up to this size images are scored by their values


class Scores:
    """What the rows of a run's table are measured with, on the first process, against the real images.

    of_data: what data score, as many fresh images, estimated, or those held out when the judge was trained.

    Images of up to SMALL pixels a side: their values, and a support vector machine for labels. Larger ones:
    features of a NetworkJudge, from the file judge, or trained and kept there; and pixels averaged to 16x16.
    """

    def __init__(self, real, cond, flip, device, judge, samples):
        self.judge, held_out = None, ()
        if real.pixels.shape[-1] <= SMALL:
            if cond:
                with bar("training the judge"):
                    self.judge = train_judge(real)
            self.features, self.split = {"pixel_frechet": raw_pixels}, "fresh data, estimated"
            self.detector = "raw pixels; a support vector machine for labels"
        else:
            if judge.exists():
                self.judge = NetworkJudge.load(judge, real, cond, device)
            else:
                self.judge = NetworkJudge.train(real, cond, flip, device)
                self.judge.save(judge)
            self.features = {"judge_frechet": self.judge.features, "pixel_frechet": coarse_pixels}
            self.split, held_out = "data held out", hold_out(real.labels)
            self.detector = "judge.safetensors, which tells " + ("classes" if cond else "quarter turns")
        self.cond, self.main = cond, next(iter(self.features))
        self.real, self.of_data = {}, {"accuracy": self.judge.own_accuracy} if cond else {}
        for name, features in self.features.items():
            found = features(real.pixels)
            with bar("scoring the data itself"):
                self.real[name] = Gaussian(found)
                if not held_out and len(found) > 2 * found.shape[1]:
                    self.of_data[name] = fresh_distance(found, samples, real.labels if cond else None)
                elif held_out and min(map(len, held_out)) > 1:
                    self.of_data[name] = frechet_distance(*(found[rows] for rows in held_out))

    def of(self, pixels, labels):
        """{score: value} of samples and their labels; "noise" is the main distance's, of this draw."""
        found = {name: features(pixels) for name, features in self.features.items()}
        with bar(f"scoring {len(pixels):,} images"):
            row = {name: self.real[name].distance(Gaussian(values)) for name, values in found.items()}
            row["noise"] = noise_of_draw(self.real[self.main], found[self.main])
            if self.cond:
                row["accuracy"], row["worst_class"] = accuracy(self.judge, found[self.main], labels)
        return row


# ---- FID ---------------------------------------------------------------------------------------------------


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
        what = "the Inception weights cannot be downloaded; give --inception-weights FILE"
        if weights:
            what = f"the Inception weights {weights} cannot be used"
        raise InputError(f"no FID: {what} ({reason(error)})") from error


def inception_statistics(pixels, weights, device):
    """{"mu": mean [2048], "sigma": covariance} of the Inception features of uint8 images [N, C, R, R].

    Raises InputError for fewer than two images, and for features that are not finite."""
    from torch_fidelity.metric_fid import fid_input_id_to_statistics

    if len(pixels) < 2:
        raise InputError(f"no FID: it needs at least two images on either side, got {len(pixels)}")
    network, on_gpu = inception(weights, device), device.type == "cuda"
    images = Subset(pixels.expand(-1, 3, -1, -1), range(len(pixels)))  # a data set of uint8 [3, R, R]
    with bar(f"Inception features of {len(pixels):,} images"):
        statistics = fid_input_id_to_statistics(1, network, "2048", input1=images, cuda=on_gpu,
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
