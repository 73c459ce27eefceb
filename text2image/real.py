"""Real images with captions, for the GAN on Stable Diffusion 3: found in a folder, and encoded once."""

import csv
from pathlib import Path

import torch

import fgm
from fgm import InputError
from images.data import IMAGE_SUFFIXES, image_files, read_image, to_float
from text2image.pipeline import load_network
from text2image.prompts import cached_rows, file_versions, read_json_lines, read_lines, text_of


def load_real(folder):
    """(paths of the images, captions) of a folder, at any depth.

    Captions come from metadata.jsonl or metadata.csv in the folder, with file_name (relative to it) and text,
    else from NAME.txt beside the image. An image without one trains with the empty prompt; how many do so is
    printed. Raises InputError, naming the file, for bad tables, and if no image has a caption."""
    folder = Path(folder)
    files = image_files(folder, (*IMAGE_SUFFIXES, ".txt", ".jsonl", ".csv"))
    paths = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    if not paths:
        raise InputError(f"--real {folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")

    in_table, captions = captions_in_table(folder), []
    for path in paths:
        text_file = path.with_suffix(".txt")
        if path in in_table:
            captions.append(in_table[path])
        elif text_file.exists():
            captions.append("\n".join(read_lines(text_file)))
        else:
            captions.append("")

    without = [path for path, caption in zip(paths, captions, strict=True) if not caption]
    if len(without) == len(paths):
        raise InputError(f"none of the {len(paths)} images in --real {folder} has a caption: give "
                         "metadata.jsonl or .csv with file_name and text, or NAME.txt beside an image")
    if without and fgm.process_rank() == 0:
        print(f"{len(without)} of {len(paths)} images in {folder} have no caption and train with the empty "
              f"prompt, {without[0]} the first")
    return paths, captions


def captions_in_table(folder):
    """{path of an image: caption} by a folder's metadata.jsonl or metadata.csv. Raises InputError for a bad
    line."""
    lines, table = folder / "metadata.jsonl", folder / "metadata.csv"
    if lines.exists():
        path, records = lines, read_json_lines(lines)
    elif table.exists():
        path = table
        try:
            with open(table, newline="", encoding="utf-8-sig") as file:
                records = list(csv.DictReader(file, strict=True))
        except (ValueError, csv.Error) as error:
            raise InputError(f"cannot read {table} as a table in UTF-8 ({error})") from error
    else:
        return {}
    return {folder / text_of(record, "file_name", path): text_of(record, "text", path) for record in records}


def cached_latents(folder, paths, size, cache, device, dtype):
    """Latents of image files of size (H, W) by the pipeline's VAE, scaled as SD3 scales them: Rows of
    {"latents": [B, 16, h, w]}, in files in the folder cache.

    A file is made anew where an image, the VAE (both told by path, size and time of change) or the size has
    changed. A collective call. Raises InputError, naming the file, for an image that is not readable or of
    another size."""
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

    made_of = [file_versions(sorted(folder.glob("vae/*"))), str(dtype), list(size)]
    return cached_rows(
        cache, "latents", paths, lambda part: [made_of, file_versions(part)],
        lambda: load_network(folder, "vae", torch.float32).to(device), encode, device)
