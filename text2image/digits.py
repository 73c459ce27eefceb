"""Captioned digits, on which the miniature Stable Diffusion 3 is trained, and the judge of its samples."""

import re
from functools import cache
from pathlib import Path

import torch
from torch.nn import functional as F

from fgm import InputError
from images.data import digits, random_order, to_float
from images.scores import Judge, copy_ratio, frechet_distance
from training.files import read_json

SIZE = 32  # pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{}", "the digit {}", "number {}", "a handwritten {}")
STYLES = ("{}, thin", "{}", "{}, bold")

# ---- Digits and their captions -----------------------------------------------------------------------------


def captions(style, digit):
    """The eight captions of a digit drawn thin (style 0), normally (1) or boldly (2)."""
    forms = [template.format(name) for template in TEMPLATES for name in (NAMES[digit], str(digit))]
    return [STYLES[style].format(form) for form in forms]


PROMPTS = [caption for style in range(3) for digit in range(10) for caption in captions(style, digit)]


@cache
def captioned_digits():
    """The real digits as the miniature takes them, bilinearly enlarged.

    Returns images in -1..1 [1797, 3, 32, 32], labels [1797], styles [1797] (thirds of the amount of ink)."""
    values, labels = digits()
    small = values.float()[:, None] / 8 - 1  # values 0..16, [N, 8, 8] -> [N, 1, 8, 8]
    images = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    ink = small.mean((1, 2, 3))
    styles = torch.bucketize(ink, ink.quantile(torch.tensor([1 / 3, 2 / 3])))
    return images.contiguous(), labels, styles


def digits_to_train_on(hold_out):
    """captioned_digits, or with hold_out without the fifth of them that split_rows holds out."""
    if not hold_out:
        return captioned_digits()
    training_rows, _ = split_rows()
    return tuple(values[training_rows] for values in captioned_digits())


def split_rows():
    """(rows of the digits to train on [1438], rows of the fifth that is held out [359]), a fixed choice."""
    order = random_order(len(captioned_digits()[0]))
    number = len(order) // 5
    return order[number:].sort().values, order[:number].sort().values


# ---- What a miniature's folder says about it ---------------------------------------------------------------


def is_miniature(folder):
    return (Path(folder) / "tiny_sd3.json").exists()


def has_held_out(folder):
    """Whether this miniature was made with --hold-out."""
    return bool(read_json(Path(folder) / "tiny_sd3.json")["settings"].get("hold_out"))


# ---- The judge ---------------------------------------------------------------------------------------------


def grey_values(images):
    """Images [N, 3, 32, 32] in -1..1 as the 64 grey values that a digit has: [N, 64]."""
    return F.avg_pool2d(images.mean(1, keepdim=True), SIZE // 8).flatten(1)  # [N, 1, 8, 8] -> [N, 64]


@cache
def digit_judge():
    """The grey values of the real digits, [1797, 64], and a classifier of such, trained on them.

    So the scores of judge() see all digits, also those that a miniature made with --hold-out never saw."""
    images, labels, _ = captioned_digits()
    return grey_values(images), Judge(grey_values(images), labels)


def digit_of(prompt):
    """The one digit that a prompt names, by word or figure. Raises InputError unless there is exactly one."""
    named = [digit for digit, name in enumerate(NAMES) if re.search(rf"\b({name}|{digit})\b", prompt)]
    if len(named) != 1:
        raise InputError(f"the prompt {prompt!r} does not name one digit")
    return named[0]


def judge(images, prompts):
    """How well images follow their prompts. images: uint8 [N, 3, 32, 32].

    Returns (share of images whose digit, as a classifier trained on the real ones reads it, is the prompt's;
    Fréchet distance to the real ones on 64 grey values). Raises InputError for prompts that name no digit."""
    labels, drawn = torch.tensor([digit_of(prompt) for prompt in prompts]), grey_values(to_float(images))
    real, classifier = digit_judge()
    following = classifier.agrees(drawn, labels).double().mean().item()
    return following, frechet_distance(real, drawn)


def copy_scores(images):
    """Whether samples, uint8 [N, 3, 32, 32], are copies of the digits that a miniature was trained on.

    Returns the Fréchet distances to 359 digits that were trained on and to the 359 held out, as many so that
    they can be compared, and images.scores.copy_ratio, which is 1 where nothing is copied."""
    real, _ = digit_judge()
    drawn = grey_values(to_float(images))
    training_rows, held_out_rows = split_rows()
    as_many = training_rows[random_order(len(training_rows))[: len(held_out_rows)]]
    return {
        "to_training": frechet_distance(real[as_many], drawn),
        "to_held_out": frechet_distance(real[held_out_rows], drawn),
        "copy_ratio": copy_ratio(drawn, real[training_rows], real[held_out_rows])}
