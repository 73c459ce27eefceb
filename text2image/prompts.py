"""Prompts for Stable Diffusion 3: read from files or made by a grammar, and encoded once, into files."""

import functools
import gc
import hashlib
import json
import random
import re
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

import fgm
from fgm import InputError
from training.bars import bar
from training.files import file_digest, open_folder, reason, save_tensors
from training.run import first_process, moved, read_json

# ---- Prompts -----------------------------------------------------------------------------------------------


def read_lines(path):
    """The lines of a UTF-8 text that are not empty, stripped; a byte-order mark is dropped.

    Raises InputError if it cannot be read."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path} as text in UTF-8 ({error})") from error
    return [line.strip() for line in text.split("\n") if line.strip()]


def text_of(value):
    """A value from a JSON file that must be a text. Raises TypeError or ValueError if it is none."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    value.encode()  # half of a surrogate pair cannot be
    return value


def read_json_lines(path, pick, wanted):
    """pick(object) of every line of a JSON-lines file.

    Raises InputError if it cannot be read, or for a line that pick cannot use: it must be `wanted`."""
    lines = read_lines(path)
    try:
        return [pick(json.loads(line)) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: every line must be {wanted} ({type(error).__name__}: {error})") from error


def read_prompts(path):
    """The prompts of a text file, one per line, or of a JSON-lines file with a "prompt" or "text" in each.

    Raises InputError if there are none, and for tables: their lines would be prompts, commas and all."""
    suffix = Path(path).suffix.lower()
    if suffix in (".csv", ".tsv"):
        raise InputError(f"{path} is a table: give a text with one prompt a line, or JSON lines (.jsonl)")
    if suffix in (".jsonl", ".json", ".ndjson"):
        wanted = '{"prompt": ...}'
        prompts = read_json_lines(path, lambda line: text_of(line.get("prompt") or line["text"]), wanted)
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
    choose, found = random.Random(seed), {}
    while len(found) < n:
        a, b = choose.sample(THINGS, 2)
        colour, other = choose.sample(COLOURS, 2)
        count, position = choose.choice(COUNTS), choose.choice(POSITIONS)
        subject = choose.choice(SUBJECTS).format(
            a=a, b=b, colour=colour, other=other, count=count, position=position)
        prompt = choose.choice(STYLES).format(subject + choose.choice(SCENES))
        for pattern, right in ENGLISH.items():
            prompt = re.sub(pattern, right, prompt)
        found[prompt] = None
    return list(found)


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


def shared(work, items, what):
    """[work(item) for item in items], the items shared by the processes, with a progress bar `what`.

    An InputError or OSError of one process is raised as InputError on all. A collective call."""
    mine, error, processes = [], None, fgm.world_size()
    with bar(what, len(items), unit="files") as shown:
        try:
            for i in range(fgm.process_rank(), len(items), processes):
                mine.append(work(items[i]))
                shown.update(min(processes, len(items) - i))
        except (InputError, OSError) as failure:
            error = str(failure)
    found = [(mine, error)] * processes
    if processes > 1:
        dist.all_gather_object(found, (mine, error))
    for _, error in found:
        if error:
            raise InputError(error)
    return [found[i % processes][0][i // processes] for i in range(len(items))]


def digest_of(content):
    """SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def files_of(items):
    """The items of each file."""
    return [items[i : i + ROWS_PER_FILE] for i in range(0, len(items), ROWS_PER_FILE)]


def fill(cache, what, made_of, keys, parts, load, encode):
    """The paths of files in the folder cache, one for each part: encode(load(), part), a dict of tensors with
    one row per item.

    A file is named after `what`, its number and what decides its content: its part's key and made_of.
    So what exists is not made again, and what has changed is. The processes share the work; what load() gives
    is made once on each. A collective call."""
    cache, digests = open_folder(cache), [digest_of([made_of, key])[:16] for key in keys]
    paths = [cache / f"{what}-{i:06d}-{digest}.safetensors" for i, digest in enumerate(digests)]
    missing = first_process(lambda: [i for i, path in enumerate(paths) if not path.exists()])
    load = functools.cache(load)

    def make(i):
        save_tensors(encode(load(), parts[i]), paths[i], {"name": paths[i].name})

    shared(make, missing, f"encoding, for {cache}" if missing else None)
    load.cache_clear()
    free_memory()
    return paths


@contextmanager
def opened(path):
    """A safetensors file, memory-mapped. Raises InputError if it, or what is read within, is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        yield safe_open(path, "pt")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it, it is made again") from error


class Rows:
    """The rows in files of 128, memory-mapped. Called with indices [B], gives {name: [B, *shapes[name]]} on
    the device. null: a row beside them, {name: [1, *shapes[name]]}, of the empty prompt.

    Raises InputError for damaged files."""

    def __init__(self, files, number, shapes, device, null=None):
        self.slices, self.device, self.null = [], device, null
        for i, path in enumerate(files):
            rows = min(ROWS_PER_FILE, number - i * ROWS_PER_FILE)
            expected = {name: [rows, *shape] for name, shape in shapes.items()}
            with opened(path) as file:
                self.slices.append({name: file.get_slice(name) for name in shapes})
                found = {name: part.get_shape() for name, part in self.slices[-1].items()}
                name = (file.metadata() or {}).get("name", path.name)
                if found != expected or name != path.name:
                    raise ValueError(f"{name}: {found} instead of {path.name}: {expected}")
        self.number, self.names, self.folder = number, [path.name for path in files], files[0].parent

    def __len__(self):
        return self.number

    def __call__(self, indices):
        rows = [(self.slices[i // ROWS_PER_FILE], i % ROWS_PER_FILE) for i in indices.tolist()]
        names = self.slices[0]
        columns = {name: torch.cat([file[name][i : i + 1] for file, i in rows]) for name in names}
        if not all(column.isfinite().all() for column in columns.values()):
            raise InputError(f"rows in {self.folder} are not finite: remove it, it is made again")
        return {name: moved(value, self.device) for name, value in columns.items()}


# ---- Embeddings --------------------------------------------------------------------------------------------

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
SUFFIXES = (".json", ".txt", ".model", ".safetensors")  # of the files that a component is loaded from
CONDITIONS = ("encoder_hidden_states", "pooled_projections")  # what SD3's transformer calls them


def kind_of(name):
    """The class of a network of a pipeline."""
    import diffusers
    import transformers

    return {
        "transformer": diffusers.SD3Transformer2DModel, "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModelWithProjection,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "text_encoder_3": transformers.T5EncoderModel}[name]


def described(folder, name):
    """The transformer or VAE that a pipeline's configuration describes, on the meta device: without weights.

    Raises InputError if there is none such."""
    kind, path = kind_of(name), folder / name / "config.json"
    try:
        with torch.device("meta"):
            return kind.from_config(read_json(path))
    except Exception as error:  # whatever the values of a damaged configuration lead to
        raise InputError(f"{path} describes no {kind.__name__} ({reason(error)})") from error


def load_component(folder, name, dtype):
    """A network of a pipeline, from safetensors alone. Raises InputError if it, or a tensor in it, is
    missing."""
    diffuses = name in ("transformer", "vae")
    precision = {"torch_dtype" if diffuses else "dtype": dtype}  # diffusers 0.36 passes over "dtype"
    try:
        network, loading = kind_of(name).from_pretrained(
            folder / name, use_safetensors=True, output_loading_info=True, **precision)
    except Exception as error:  # the libraries raise what they like
        raise InputError(f"cannot load {folder / name} ({reason(error)})") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(f"{folder / name} lacks {len(missing)} of its weights, {missing[0]} the first")
    return network


def free_memory():
    """Give back what is not used any more: pipelines, whose objects refer to each other in circles, too."""
    gc.collect()
    torch.cuda.empty_cache()


def load_pipeline(folder, networks, device, dtype):
    """A StableDiffusion3Pipeline with these of its networks. Raises InputError if they cannot be loaded."""
    from diffusers import StableDiffusion3Pipeline

    there = {path.name for path in folder.iterdir()}  # T5 and its tokenizer may be absent
    loaded = dict.fromkeys(["transformer", "vae", *ENCODERS, *({"tokenizer_3"} - there)])
    loaded |= {name: load_component(folder, name, dtype) for name in networks if name in there}
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, **loaded, use_safetensors=True).to(device)
        if pipe.transformer is None:  # without T5 it is asked for the width of a text
            pipe.transformer = described(folder, "transformer")
        return pipe
    except Exception as error:  # the libraries raise what they like
        raise InputError(f"cannot load the pipeline {folder} ({reason(error)})") from error


@torch.no_grad()
def encode(pipe, texts, device, dtype):
    """{condition: tensor} of texts, on the CPU: [N, tokens, D] and [N, P]."""
    embeds, pooled = [], []
    for i in range(0, len(texts), 16):
        found = pipe.encode_prompt(texts[i : i + 16], None, None, device=device,
                                   do_classifier_free_guidance=False, max_sequence_length=256)
        embeds.append(found[0].to(dtype).cpu())
        pooled.append(found[2].to(dtype).cpu())
    return dict(zip(CONDITIONS, (torch.cat(embeds), torch.cat(pooled)), strict=True))


def contents(folder, *patterns):
    """A digest of the files of a pipeline that match and that its components are loaded from.

    They are read whole: SD3's text encoders, 11 GB, in 10 to 30 seconds. A collective call."""
    paths = sorted(path for pattern in patterns for path in folder.glob(pattern)
                   if path.suffix in SUFFIXES and "fp16" not in path.name)
    return digest_of([[path.relative_to(folder).as_posix() for path in paths],
                      shared(file_digest, paths, "reading the model's files")])


def encode_prompts(folder, prompts, cache, device, dtype):
    """Prompts encoded into files of 128 in the folder cache, as Rows of what the network takes:
    {"encoder_hidden_states": [B, tokens, D], "pooled_projections": [B, P]}; null is the empty prompt's, for
    guidance, from the first file. The encoders are freed then.

    Files that exist are kept, if made of the same prompts by the same encoders and tokenizers (by content),
    in the same precision; the processes share the work. Raises InputError for damaged files."""
    truncated = []  # CLIP's longest text, once for each prompt that is longer

    def encode_file(pipe, texts):
        longest = pipe.tokenizer.model_max_length
        truncated.extend(longest for text in texts if len(pipe.tokenizer(text).input_ids) > longest)
        return encode(pipe, texts, device, dtype)

    made_of = [contents(folder, "text_encoder*/*", "tokenizer*/*"), str(dtype)]
    parts = [[""], *files_of(prompts)]
    first, *files = fill(cache, "prompts", made_of, parts, parts,
                         lambda: load_pipeline(folder, ENCODERS, device, dtype), encode_file)
    if truncated:
        message = f"{len(truncated)} prompts are longer than CLIP's {truncated[0]} tokens and were cut there"
        print(message, file=sys.stderr)
    with opened(first) as file:
        null = {name: file.get_tensor(name).to(device) for name in CONDITIONS}
    shapes = {name: value.shape[1:] for name, value in null.items()}
    return Rows(files, len(prompts), shapes, device, null)


def encoded(folder, prompts, device, dtype):
    """(conditions, null) of prompts, in memory; conditions(indices [B]) and null are as in encode_prompts."""
    texts = list(dict.fromkeys(["", *prompts]))
    places = {text: i for i, text in enumerate(texts)}
    rows = torch.tensor([places[prompt] for prompt in prompts])
    with bar("encoding prompts"):
        columns = encode(load_pipeline(folder, ENCODERS, device, dtype), texts, device, dtype)
    free_memory()

    def conditions(indices):
        return {name: moved(value[rows[indices]], device) for name, value in columns.items()}

    return conditions, {name: value[:1].to(device) for name, value in columns.items()}
