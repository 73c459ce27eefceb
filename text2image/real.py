"""Real images with captions, for the GAN on Stable Diffusion 3: found in a folder, and encoded once."""

import csv
import posixpath
import unicodedata
from pathlib import Path

import torch

import fgm
from fgm import InputError
from images.data import IMAGE_SUFFIXES, image_files, read_image, to_float
from text2image import prompts
from training.files import file_digest

TEXTS, TABLES = (".txt", ".caption"), (".jsonl", ".csv")


def load_real(folder):
    """(paths of the images, captions) of a folder.

    Captions come from metadata.jsonl or metadata.csv, in the folder or further down, with file_name (relative
    to the table's own folder) and text; else from NAME.txt or NAME.caption. What has none trains with the
    empty prompt, and is counted aloud. Raises InputError, naming the file, for links out of the folder and
    bad tables; and if no image has a caption."""
    folder = Path(folder)
    files = image_files(folder, (*IMAGE_SUFFIXES, *TEXTS, *TABLES))
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise InputError(f"--real {folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    beside = {key_of(path.with_suffix(""), folder): path for path in files
              if path.suffix.lower() in TEXTS and path.is_file()}
    tables = {}
    for path in files:
        if path.name in ("metadata.jsonl", "metadata.csv") and path.is_file():
            tables |= {key_of(f"{path.parent}/{name}", folder): text for name, text in table(path)}
    captions = []
    for path in paths:
        own = beside.get(key_of(path.with_suffix(""), folder))
        lines = prompts.read_lines(own) if own else []
        captions.append(tables.get(key_of(path, folder)) or "\n".join(lines))
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
        return prompts.text_of(record["file_name"]), prompts.text_of(record["text"])

    if path.suffix == ".jsonl":
        return prompts.read_json_lines(path, pick, '{"file_name": ..., "text": ...}')
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            return [pick(record) for record in csv.DictReader(file, strict=True)]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputError(f"{path}: every line must have the columns file_name and text "
                         f"({type(error).__name__}: {error})") from error


def encode_images(folder, paths, size, shape, cache, device, dtype):
    """Latents of image files of size (H, W) by the pipeline's VAE, scaled as SD3 scales them: Rows of
    {"latents": shape}.

    They are kept in files of 128 in the folder cache, and made again for images, a VAE or a size that have
    changed (see prompts.fill). A collective call. Raises InputError, naming the file, for an image that is
    not readable or of another size."""
    from torchvision.transforms.functional import pil_to_tensor

    def encode(vae, part):
        shift, scale, latents = vae.config.shift_factor, vae.config.scaling_factor, []
        for path in part:
            image = read_image(path)
            if image.size[::-1] != tuple(size):
                raise InputError(f"{path} is {image.width}x{image.height}, the run makes {size[1]}x{size[0]}"
                                 ": resize it, or change --height and --width")
            pixels = pil_to_tensor(image)[None].to(device)  # [1, 3, H, W]
            with torch.no_grad():
                mean = vae.encode(to_float(pixels)).latent_dist.mean
            latents.append(((mean - shift) * scale).to(dtype).cpu())
        return {"latents": torch.cat(latents)}  # 128 x [1, 16, h, w] -> [128, 16, h, w]

    digests = prompts.shared(file_digest, paths, "reading the images")
    keys, parts = prompts.files_of(digests), prompts.files_of(paths)
    made_of = [prompts.contents(folder, "vae/*"), str(dtype), list(size)]
    files = prompts.fill(cache, "latents", made_of, keys, parts,
                         lambda: prompts.load_component(folder, "vae", torch.float32).to(device), encode)
    return prompts.Rows(files, len(paths), {"latents": shape}, device)
