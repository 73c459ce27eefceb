"""Prompts for Stable Diffusion 3: read from files or made by a grammar, and encoded once, into files."""

import hashlib
import json
import random
import re
from pathlib import Path

import torch
import torch.distributed as dist

import fgm
from fgm import InputError
from text2image.pipeline import ENCODERS, free_memory, load_pipeline, text_embeddings
from training.files import open_folder, refusals, save_tensors
from training.processes import first_process, to_device
from training.progress import bar

# ---- Prompts -----------------------------------------------------------------------------------------------


def read_lines(path):
    """The lines of a UTF-8 text that are not empty, stripped; a byte-order mark is dropped.

    Raises InputError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as text in UTF-8 ({error})") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def read_json_lines(path):
    """The objects in a JSON-lines file, one per line. Raises InputError if it cannot be read as such."""
    records = []
    for line in read_lines(path):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        if not isinstance(record, dict):
            raise InputError(f"{path}: every line must be a JSON object, got {line[:80]}")
        records.append(record)
    return records


def text_of(record, name, path):
    """The text under a name in a record of the file path. Raises InputError if there is none."""
    text = record.get(name)
    if not isinstance(text, str):
        raise InputError(f'{path}: every record must have a text as "{name}", got {str(record)[:80]!a}')
    return text


def read_prompts(path):
    """The prompts of a text file, one per line, or of a JSON-lines file with a "prompt" or "text" in each.

    Raises InputError if there are none."""
    if Path(path).suffix.lower() in (".jsonl", ".json", ".ndjson"):
        prompts = [text_of(record, "text" if "text" in record else "prompt", path)
                   for record in read_json_lines(path)]
    else:
        prompts = read_lines(path)
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


THINGS = """
    apple bear bench bicycle bird boat book bottle bowl bus cake car cat chair clock cow cup dog donut
    elephant fox giraffe guitar horse house kite lamp laptop motorcycle mushroom orange owl pizza rabbit robot
    sheep skateboard sofa suitcase teapot toaster train tree truck umbrella vase zebra
""".split()
COLOURS = "red orange yellow green blue purple pink brown black white golden silver".split()
COUNTS = ("two", "three", "four")
POSITIONS = ("left of", "right of", "above", "below", "next to", "behind")
SUBJECTS = (
    "a {a}", "a {colour} {a}", "{count} {a}s", "a {a} and a {b}", "a {colour} {a} and a {other} {b}",
    "a {a} {position} a {b}", "{count} {colour} {a}s {position} a {other} {b}")
SCENES = (
    " in the snow", " on a beach", " in a forest", " on a street at night", " in a kitchen",
    " under a starry sky", " on a wooden table", " in the rain", "")
STYLES = (
    "a photo of {}", "an oil painting of {}", "a watercolour of {}", "a pencil drawing of {}",
    "a photo of {}, highly detailed", "{}, studio light", "{}")
ENGLISH = {r"\ba (?=[aeiou])": "an ", r"(x|ch|us)s\b": r"\1es", "sheeps": "sheep"}  # of articles and plurals


def grammar(n=8192, seed=0):
    """n different prompts from templates: objects, counts, colours, positions, scenes, styles."""
    random_source, prompts = random.Random(seed), {}
    choose = random_source.choice
    while len(prompts) < n:
        a, b = random_source.sample(THINGS, 2)
        colour, other = random_source.sample(COLOURS, 2)
        count, position = choose(COUNTS), choose(POSITIONS)
        subject = choose(SUBJECTS).format(
            a=a, b=b, colour=colour, other=other, count=count, position=position)
        prompt = choose(STYLES).format(subject + choose(SCENES))
        for pattern, correct in ENGLISH.items():
            prompt = re.sub(pattern, correct, prompt)
        prompts[prompt] = None  # a dict, as a set that keeps its order
    return list(prompts)


def find_prompts(path, folder):
    """The prompts of a file, else of the model's own prompts.txt in its folder, else of the grammar."""
    if path or (folder / "prompts.txt").exists():
        return read_prompts(path or folder / "prompts.txt")
    prompts = grammar()
    if fgm.process_rank() == 0:
        print(f"no --prompts given: {len(prompts)} prompts from the built-in grammar, such as {prompts[0]!r}")
    return prompts


# ---- Rows of tensors, encoded once into files: embeddings of prompts, latents of images --------------------

ROWS_PER_FILE = 128


def digest_of(content):
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_versions(paths):
    """[[path, size, time of change], ...] of a list of Path: what differs once a file has changed."""
    return [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


class Rows:
    """Rows of tensors in files of ROWS_PER_FILE, memory-mapped: called with indices [B], gives
    {name: [B, ...]} on the device. Raises InputError, naming the file, for one that is damaged."""

    def __init__(self, paths, device):
        from safetensors import safe_open

        self.files, self.device = [], device
        for path in paths:
            with refusals(path, "cache of sd3.py; remove it, and it is made again"):
                self.files.append(safe_open(path, "pt"))

    def __call__(self, indices):
        columns = {}
        for name in self.files[0].keys():
            rows = []
            for i in indices.tolist():
                row = i % ROWS_PER_FILE
                rows.append(self.files[i // ROWS_PER_FILE].get_slice(name)[row : row + 1])
            columns[name] = to_device(torch.cat(rows), self.device)  # B x [1, ...] -> [B, ...]
        return columns


def cached_rows(cache, title, items, made_of, load, encode, device):
    """The Rows of a list of items, in safetensors files in the folder cache.

    A file holds encode(load(), part), {name: [B, ...]}, of a part of the items. made_of(part) is all that
    decides its content, and a digest of that is in its name. So a file that exists is kept, and what has
    changed is made anew. The processes share the work. A collective call."""
    cache = open_folder(cache)
    parts = [items[i : i + ROWS_PER_FILE] for i in range(0, len(items), ROWS_PER_FILE)]
    paths = [cache / f"{title}-{i:06d}-{digest_of(made_of(part))[:16]}.safetensors"
             for i, part in enumerate(parts)]

    missing = first_process(lambda: [i for i, path in enumerate(paths) if not path.exists()])
    if missing:
        encoder, processes = load(), fgm.world_size()
        with bar(f"encoding, for {cache}", len(missing), unit="files") as progress:
            for i in missing[fgm.process_rank() :: processes]:
                save_tensors(encode(encoder, parts[i]), paths[i])
                progress.update(processes)
        del encoder
        free_memory()
        if processes > 1:
            dist.barrier()
    return Rows(paths, device)


def cached_embeddings(folder, prompts, cache, device, dtype):
    """Prompts as the network takes them, encoded into files in the folder cache, as Rows of
    {"encoder_hidden_states": [B, tokens, D], "pooled_projections": [B, P]}. Their attribute null is the row
    of the empty prompt, {name: [1, ...]}, for guidance.

    Files that exist are kept if they are of the same prompts, precision, encoders and tokenizers; the last
    two are told by path, size and time of change. A collective call."""
    encoder_files = sorted([*folder.glob("text_encoder*/*"), *folder.glob("tokenizer*/*")])
    made_of = [file_versions(encoder_files), str(dtype)]
    rows = cached_rows(
        cache, "prompts", [*prompts, ""], lambda texts: [made_of, texts],
        lambda: load_pipeline(folder, ENCODERS, device, dtype),
        lambda pipe, texts: text_embeddings(pipe, texts, device, dtype), device)
    rows.null = rows(torch.tensor([len(prompts)]))
    return rows
