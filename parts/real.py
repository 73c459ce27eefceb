"""Real images with captions, for the GAN on Stable Diffusion 3: found in a folder, and encoded once."""

import csv
import posixpath
import unicodedata
from pathlib import Path

import numpy as np
import torch

import fgm
from fgm import InputError
from parts.files import open_folder
from parts.images import IMAGE_SUFFIXES, channels_first, image_files, read_image, to_float
from parts.prompts import (
    Rows,
    contents,
    digest_of,
    file_digest,
    files_of,
    fill,
    load_component,
    read_json_lines,
    read_lines,
    shared,
    text_of,
)

TEXTS, TABLES = (".txt", ".caption"), (".jsonl", ".csv")


def load_real(folder, size):
    """(paths of the images, captions) of a folder, size = (H, W).

    Captions come from metadata.jsonl or metadata.csv, in the folder or further down, with file_name (relative
    to the table's own folder) and text; else from NAME.txt or NAME.caption. What has none trains with the
    empty prompt, and is counted aloud. Raises InputError, naming the file, for what is no image, images of
    another size than the run's (of both the header is read alone), links out of the folder, bad tables; and
    if no image has a caption."""
    folder = Path(folder)
    files = image_files(folder, (*IMAGE_SUFFIXES, *TEXTS, *TABLES))
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise InputError(f"--real {folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    for path in paths:
        check_size(path, header_size(path), size)
    beside = {key_of(path.with_suffix(""), folder): path for path in files
              if path.suffix.lower() in TEXTS and path.is_file()}
    tables = {}
    for path in files:
        if path.name in ("metadata.jsonl", "metadata.csv") and path.is_file():
            tables |= {key_of(f"{path.parent}/{name}", folder): text for name, text in table(path)}
    captions = []
    for path in paths:
        own = beside.get(key_of(path.with_suffix(""), folder))
        captions.append(tables.get(key_of(path, folder)) or (own and "\n".join(read_lines(own))) or "")
    without = [path for path, caption in zip(paths, captions, strict=True) if not caption]
    if len(without) == len(paths):
        raise InputError(f"none of the {len(paths)} images in --real {folder} has a caption: give "
                         "metadata.jsonl or .csv with file_name and text, or NAME.txt beside an image")
    if without and fgm.process_rank() == 0:
        print(f"{len(without)} of {len(paths)} images in {folder} have no caption and train with the empty "
              f"prompt, {without[0]} the first")
    return paths, captions


def key_of(path, folder):
    """The name in a folder under which an image and its caption meet: "./a.png" is "a.png", "a\\b.png"
    "a/b.png", and accents are composed (files from a Mac have them decomposed)."""
    name = posixpath.relpath(str(path).replace("\\", "/"), str(folder).replace("\\", "/"))
    return unicodedata.normalize("NFC", name)


def table(path):
    """[(file name, caption)] of a metadata.jsonl or metadata.csv. Raises InputError for a bad line."""

    def pick(record):
        return text_of(record["file_name"]), text_of(record["text"])

    if path.suffix == ".jsonl":
        return read_json_lines(path, pick, '{"file_name": ..., "text": ...}')
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [pick(record) for record in csv.DictReader(file, strict=True)]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: every line must have the columns file_name and text "
                         f"({type(error).__name__}: {error})") from error


def header_size(path):
    """(width, height) of an image file by its header, turned as its EXIF data say. Raises InputError for what
    is no image."""
    from PIL import ExifTags, Image

    try:
        if not path.is_file():
            raise OSError("it is no regular file")  # a pipe would be waited for
        with Image.open(path) as image:
            turned = "exif" in image.info and image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            return image.size[::-1] if turned else image.size
    except Exception as error:  # the decoders raise what they like
        raise InputError(f"cannot read the image {path} ({error}); fix or remove it") from error


def check_size(path, found, size):
    """Raises InputError unless found (width, height) is the run's size (H, W)."""
    if found != (size[1], size[0]):
        raise InputError(f"{path} is {found[0]}x{found[1]}, the run makes {size[1]}x{size[0]}; "
                         "resize the images, or change --height and --width")


def encode_images(folder, paths, size, shape, cache, device, dtype):
    """Latents of image files of size (H, W) by the pipeline's VAE, scaled as SD3 scales them: Rows of
    {"latents": shape}.

    They are kept in files of 128 in the folder cache, named after what they are made of, by content: what
    exists is not made again, what belongs to an image that has changed is. A collective call. Raises
    InputError, naming the file, for an image that cannot be read."""
    cache, vae_key = open_folder(cache), contents(folder, "vae/*")
    digests, files = shared(file_digest, paths, "reading the images"), {}
    for i, (part, digest) in enumerate(zip(files_of(paths), files_of(digests), strict=True)):
        files[f"latents-{i:06d}-{digest_of([vae_key, str(dtype), digest])[:16]}"] = part

    def encode(vae, part):
        shift, scale, latents = vae.config.shift_factor, vae.config.scaling_factor, []
        for path in part:
            image = read_image(path)
            check_size(path, image.size, size)
            pixels = channels_first(np.array(image)[None]).to(device)  # [H, W, 3] -> [1, 3, H, W]
            with torch.no_grad():
                mean = vae.encode(to_float(pixels)).latent_dist.mean
            latents.append(((mean - shift) * scale).to(dtype).cpu())
        return {"latents": torch.cat(latents)}  # 128 x [1, 16, h, w] -> [128, 16, h, w]

    fill(cache, files, {}, lambda: load_component(folder, "vae", torch.float32).to(device), encode)
    return Rows([cache / f"{name}.safetensors" for name in files], len(paths), {"latents": shape}, device)
