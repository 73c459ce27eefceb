"""Scores of images: Fréchet distances, judges of labels and features, copies, Inception FID, a run's table.

Images are uint8 tensors [N, C, R, R].
"""

import json
import math
from functools import cache, cached_property

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fgm import InputError, process_rank
from images.data import random_order, save_grid, shrunk, split, to_float
from training import progress
from training.files import reason, refusals, save_tensors
from training.progress import bar, batches

# ---- Fréchet distances -------------------------------------------------------------------------------------


class Gaussian:
    """Mean [D] and covariance [D, D], in float64, of features [N, D], N at least 2.

    Raises InputError for features that are not finite."""

    def __init__(self, features):
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


def coarse_pixels(pixels, resolution=16):
    """The values of images, averaged to at most resolution x resolution, in -1..1: float32 [N, D]."""
    return to_float(shrunk(pixels, resolution)).flatten(1)  # [N, C, R, R] -> [N, D]


def make_picture(out, real, teacher, draw, samples):
    """A picture(step, generator) for FolderRun: a grid of 100 images in out, and a cheap distance.

    draw(sampler, n, in_turn): n images of a fixed seed; every process calls it. The distance is that of
    `samples` images to at most 10,000 real ones, on 8x8 pixels. More samples would give a smaller one, so
    compare it with distances of as many."""
    some = Gaussian(coarse_pixels(real[random_order(len(real))[:10_000]], 8))

    def measure(sampler):
        return some.distance(Gaussian(coarse_pixels(draw(sampler, samples, False), 8)))

    score = progress.make_scorer(teacher, measure)

    def picture(step, generator):
        grid = draw(generator, 100, True)
        if process_rank() == 0:
            save_grid(out / f"distill-{step:07d}.png", grid)
        return score(step, generator)

    return picture


# ---- Copies ------------------------------------------------------------------------------------------------


def nearest_distances(samples, images):
    """The L2 distance of each of samples [N, D] to the nearest of images [M, D]: [N]."""
    return torch.cat([torch.cdist(part, images).amin(1) for part in samples.split(500)])


def copy_ratio(samples, training, held_out, mirrored=None):
    """Whether samples are copies: the mean distance of a sample to its nearest training image over that to
    its nearest held-out image, all of them float [., D].

    mirrored: the samples' mirror images, where a network also sees mirrored images when it trains. A sample
    is then as near as the nearer of the two, to either kind of images.

    The training images are taken in random parts of as many as are held out, and the distances averaged over
    the parts. So the ratio is 1 where nothing is copied. Of K parts, copies have a distance of 0 to one: if
    all samples are copies of training images the ratio is 1 - 1 / K (a fifth held out: 0.75)."""

    def mean_distance(images):
        distances = nearest_distances(samples, images)
        if mirrored is not None:
            distances = distances.minimum(nearest_distances(mirrored, images))
        return distances.mean().item()

    n = min(len(training), len(held_out))
    order = random_order(len(training))
    parts = order[: len(order) // n * n].split(n)
    to_training = np.mean([mean_distance(training[part]) for part in parts])
    return to_training / mean_distance(held_out[:n])


# ---- Judges: do samples look like their label? -------------------------------------------------------------


def accuracy(judge, features, labels):
    """(share of samples that a judge takes for their label, the smallest such share of any class)."""
    correct = judge.agrees(features, labels).float()
    return correct.mean().item(), min(correct[labels == label].mean().item() for label in labels.unique())


class Judge:
    """A support vector classifier of features [N, D], trained on real ones of two classes or more: for images
    as small as digits. own_accuracy: see train_judge."""

    def __init__(self, features, labels):
        from sklearn.svm import SVC

        self.classifier, self.own_accuracy = SVC(C=10).fit(features.numpy(), labels.numpy()), None

    def agrees(self, features, labels):
        """Whether each sample is classified as its label: bool [N]."""
        return torch.from_numpy(self.classifier.predict(features.numpy())) == labels


def train_judge(images, limit=5000):
    """A Judge of at most `limit` images. Its own_accuracy is cross-validated, if all classes have two images
    or more."""
    from sklearn.model_selection import cross_val_score

    chosen, _ = split(images.labels, min(limit, len(images.labels)))
    features, labels = coarse_pixels(images.pixels[chosen]), images.labels[chosen]
    judge = Judge(features, labels)
    folds = min(5, labels.bincount().min().item())
    if folds > 1:
        scores = cross_val_score(judge.classifier, features.numpy(), labels.numpy(), cv=folds)
        judge.own_accuracy = float(scores.mean())
    return judge


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


class NetworkJudge:
    """A judge_network that tells the classes of real images apart (of at most 32x32 pixels; larger ones are
    averaged to that).

    own_accuracy: measured on the tenth of the images that it was not trained on. trained_on: which images,
    as its file says."""

    def __init__(self, images, device):
        channels, resolution = images.pixels.shape[1:3]
        self.device, self.side, self.own_accuracy = device, min(resolution, 32), None
        self.net = judge_network(channels, self.side, len(images.classes)).to(device).eval()
        self.trained_on = {"images": images.fingerprint(), "classes": images.classes}

    @staticmethod
    def hold_out(labels):
        """(positions that a judge is not trained on, a tenth; the others)."""
        return split(labels, max(2, len(labels) // 10))

    @classmethod
    def load(cls, path, images, device):
        """The judge in a file, None if it was trained on other images. Raises InputError if it is damaged."""
        from safetensors import safe_open

        judge = cls(images, device)
        with refusals(path, "judge of cifar.py"), safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["judge"])
            if {name: about.get(name) for name in judge.trained_on} != judge.trained_on:
                return None
            judge.own_accuracy = about["own_accuracy"] and float(about["own_accuracy"])
            judge.net.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        return judge

    @classmethod
    def train(cls, images, flip, device, seen=None, batch=250):
        """A judge of these images after `seen` images, each at most 60 times (default: 270,000, on a GPU six
        times as many). AdamW with one cycle of the learning rate; images are moved by up to a sixteenth of
        their side and, if flip, mirrored."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            judge = cls(images, device)
        net, side, moves = judge.net.train(), judge.side, judge.side // 16

        held, trained = cls.hold_out(images.labels)
        seen = min(seen or (1_620_000 if device.type == "cuda" else 270_000), 60 * len(trained))
        batch = min(batch, len(trained))
        steps, epochs = seen // batch, math.ceil(seen / len(trained))
        adam = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
        cycle = torch.optim.lr_scheduler.OneCycleLR(adam, 0.008, total_steps=steps + 1, pct_start=0.25)

        pixels, labels = shrunk(images.pixels, side).to(device, torch.uint8), images.labels.to(device)
        random = torch.Generator().manual_seed(0)
        order = torch.cat([trained[torch.randperm(len(trained), generator=random)] for _ in range(epochs)])
        for begin in batches(steps * batch, batch, "training the judge"):
            chosen = order[begin : begin + batch].to(device)
            top, left = torch.randint(2 * moves + 1, (2,), generator=random).tolist()
            x = F.pad(to_float(pixels[chosen]), (moves,) * 4, "reflect")
            x = x[:, :, top : top + side, left : left + side]
            if flip and begin // batch % 2:
                x = x.flip(3)
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                scores = net(x.contiguous(memory_format=torch.channels_last))

            adam.zero_grad()
            F.cross_entropy(scores.float(), labels[chosen], label_smoothing=0.1).backward()
            adam.step()
            cycle.step()

        net.eval()
        correct = judge.agrees(judge.features(images.pixels[held]), images.labels[held])
        judge.own_accuracy = correct.float().mean().item()
        return judge

    def save(self, path):
        state = {name: value.cpu().contiguous() for name, value in self.net.state_dict().items()}
        about = self.trained_on | {"own_accuracy": self.own_accuracy}
        save_tensors(state, path, {"judge": json.dumps(about)})

    @torch.no_grad()
    def features(self, pixels):
        """float32 [N, 128] of uint8 images [N, C, R, R]."""
        parts = []
        for begin in batches(len(pixels), 500, f"features of {len(pixels):,} images"):
            part = shrunk(pixels[begin : begin + 500], self.side).to(self.device)
            parts.append(self.net[0](to_float(part)).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def agrees(self, features, labels):
        """Whether each sample is classified as its label: bool [N]."""
        return self.net[1](features.to(self.device)).argmax(1).cpu() == labels


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
        raise InputError(f"no FID: cannot load the Inception weights from {weights or 'the network'} "
                         f"({reason(error)}); --inception-weights names a file") from error


@torch.no_grad()
def inception_features(pixels, weights, device):
    """float32 [N, 2048] of uint8 images, whose Fréchet distance is the FID. weights: see inception."""
    network, parts = inception(weights, device), []
    for begin in batches(len(pixels), 50, f"Inception features of {len(pixels):,} images"):
        part = pixels[begin : begin + 50].expand(-1, 3, -1, -1)  # [50, C, R, R] -> [50, 3, R, R]
        parts.append(network(part.to(device))[0].cpu())
    return torch.cat(parts)


# ---- All scores of a run -----------------------------------------------------------------------------------


def judged_by_network(images):
    """Whether a NetworkJudge scores such images: larger ones than digits, of two classes or more."""
    return images.pixels.shape[-1] > 8 and len(images.classes) > 1


def judge_of(real, cond, flip, device, file):
    """The judge of a run on real images. A NetworkJudge, from its file or, where that is missing or of other
    images, trained and kept there; a Judge if the images are small and cond asks whether labels are followed;
    or None."""
    if judged_by_network(real):
        judge = NetworkJudge.load(file, real, device) if file.exists() else None
        if judge is None:
            judge = NetworkJudge.train(real, flip, device)
            judge.save(file)
        return judge
    if cond:
        with bar("training the judge"):
            return train_judge(real)
    return None


class Scores:
    """What the rows of a run's table are measured with, against the real images.

    Fréchet distances: of a NetworkJudge's features, if there is one; of coarse pixels; and the FID, if
    fid_features are given. If cond, the judge also says how many samples look like their label.

    main: the first of the distances. of_data: what data themselves score: those that the judge was not
    trained on, or else as many fresh images as samples, estimated; data_title says which. held_out: Images
    that nothing was trained on, for `copies`; flip: whether networks were trained on mirrored images, too."""

    def __init__(self, real, cond, judge, samples, fid_features=None, held_out=None, flip=False):
        self.real, self.cond, self.judge, self.held_out, self.flip = real, cond, judge, held_out, flip
        self.features, self.detector = {"pixel_frechet": coarse_pixels}, "pixels, at most 16x16"
        by_network = isinstance(judge, NetworkJudge)
        if by_network:
            self.features = {"judge_frechet": judge.features} | self.features
            self.detector = "judge.safetensors"
        self.main = next(iter(self.features))
        if fid_features:
            self.features["fid"] = fid_features

        self.data_title = "data held out" if by_network else "fresh data, estimated"
        self.of_data = {"accuracy": judge.own_accuracy} if cond else {}
        self.gaussians = {}
        for name, features_of in self.features.items():
            features = features_of(real.pixels)
            with bar("scoring the data itself"):
                self.gaussians[name] = Gaussian(features)
                if by_network:
                    held, trained = NetworkJudge.hold_out(real.labels)
                    self.of_data[name] = frechet_distance(features[held], features[trained])
                elif len(features) > 2 * features.shape[1]:
                    self.of_data[name] = fresh_distance(features, samples, real.labels if cond else None)

    def of(self, pixels, labels):
        """{score: value} of samples and their labels; "noise" is the main distance's, of this draw."""
        features = {name: features_of(pixels) for name, features_of in self.features.items()}
        with bar(f"scoring {len(pixels):,} images"):
            row = {name: self.gaussians[name].distance(Gaussian(features[name])) for name in features}
            row["noise"] = noise_of_draw(self.gaussians[self.main], features[self.main])
            if self.cond:
                row["accuracy"], row["worst_class"] = accuracy(self.judge, features[self.main], labels)
        return row

    def copies(self, pixels, limit=2000):
        """{score: value}: the distance of samples, on coarse pixels, to the images held out and to as many of
        those trained on, and the copy_ratio of at most `limit` samples.

        A judge's features would not do: it has learned from the images trained on, and from no others."""
        chosen, _ = split(self.real.labels, len(self.held_out.pixels))
        samples = coarse_pixels(pixels)
        to_trained = frechet_distance(samples, coarse_pixels(self.real.pixels[chosen]))
        to_held_out = frechet_distance(samples, coarse_pixels(self.held_out.pixels))

        some = pixels[:limit]
        some, mirrored, training, held_out = (
            to_float(part).flatten(1)  # [N, C, R, R] -> [N, D]
            for part in (some, some.flip(3), self.real.pixels, self.held_out.pixels))
        with bar("looking for copies"):
            ratio = copy_ratio(some, training, held_out, mirrored if self.flip else None)
        return {"to_trained": to_trained, "to_held_out": to_held_out, "copy_ratio": ratio}
