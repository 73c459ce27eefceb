"""Stable Diffusion 3 pipelines: the source, the exported one-step pipeline, images from and for them."""

import hashlib
import json
import math
import os
import shutil
import zlib
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F

import fgm
from fgm import InputError
from parts.bars import bar, batches
from parts.images import (
    channels_first,
    image_files,
    read_image,
    refuse_link_out,
    save_grid,
    to_float,
    to_uint8,
)
from parts.progress import scores
from parts.prompts import (
    ENCODERS,
    Rows,
    contents,
    files_of,
    fill,
    load_component,
    load_pipeline,
    read_json_lines,
    read_lines,
    text_of,
)
from parts.run import atomically, noise_from, open_folder, read_json, save_tensors
from parts.scores import frechet_distance
from parts.sizes import check_memory

# ------------------------------------------------------------------------------------------------------------
# The source pipeline
# ------------------------------------------------------------------------------------------------------------

# What a component's folder must hold: its configuration, and the name of its weights.
NETWORK, ENCODER = ("config.json", "diffusion_pytorch_model"), ("config.json", "model")
COMPONENTS = {
    "transformer": NETWORK, "vae": NETWORK, "scheduler": ("scheduler_config.json", None),
    "text_encoder": ENCODER, "text_encoder_2": ENCODER, "text_encoder_3": ENCODER,
    "tokenizer": ("tokenizer_config.json", None), "tokenizer_2": ("tokenizer_config.json", None),
    "tokenizer_3": ("tokenizer_config.json", None)}
OPTIONAL = ("text_encoder_3", "tokenizer_3")  # T5
# What our code reads from a configuration.
KEYS = {
    "transformer": {"in_channels": int, "num_layers": int, "num_attention_heads": int,
                    "attention_head_dim": int, "patch_size": int, "pos_embed_max_size": int},
    "tokenizer": {"model_max_length": int},
    "vae": {"block_out_channels": list, "shift_factor": float, "scaling_factor": float}}


def quiet():
    """Keep the libraries' progress bars and notices out of ours."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def download(model):
    """The local folder of a hub id's pipeline. A collective call. Raises InputError if it cannot be had."""
    from huggingface_hub import snapshot_download

    # One process of each machine downloads; the others then find it there.
    downloads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    wanted, unwanted = ["model_index.json", "*/*"], ["*.bin", "*fp16*", "*.msgpack"]
    try:
        for turn in (True, False):
            if downloads == turn:
                folder = Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=unwanted))
            if fgm.world_size() > 1:
                dist.barrier()
    except Exception as error:  # the hub's errors have no common base
        raise InputError(
            f"{model} is neither a folder nor a model that can be downloaded ({type(error).__name__}). "
            "For Stable Diffusion 3, accept its licence on huggingface.co and log in with `hf auth login`; "
            "without network, `python tiny_sd3.py --out runs/tiny-sd3` makes a small model to go on with"
        ) from error
    return folder


def model_folder(model):
    """The local folder of a pipeline, downloaded if model is a hub id.

    Raises InputError if it cannot be had or is not an SD3 flow-matching pipeline."""
    folder = Path(model) if Path(model).is_dir() else download(model)
    check_pipeline(folder, model)
    return folder


def read_object(path):
    """The object in a JSON file. Raises InputError if it cannot be read or holds something else."""
    try:
        content = read_json(path)
    except RecursionError:
        content = None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it must hold a JSON object")
    return content


def check_pipeline(folder, model):
    """Raise InputError unless the folder holds a whole SD3 flow-matching pipeline; model: what to call it.

    That is: an index, and for each component a folder (no link out of this one) with its configuration, all
    JSON files objects, and weights in safetensors files whose headers are sound and fit their lengths."""
    try:
        components = read_object(folder / "model_index.json")
        kind = components["_class_name"]
    except (InputError, KeyError) as error:
        raise InputError(f"{model} is not a diffusers pipeline: "
                         "it has no readable model_index.json") from error
    if kind != "StableDiffusion3Pipeline":
        raise InputError(f"{model} is a {kind}; sd3.py distils StableDiffusion3Pipeline")
    for name in COMPONENTS:
        entry = components.get(name, [None, None])
        if entry == [None, None] and name in OPTIONAL:
            continue
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")):
            raise InputError(f"model_index.json of {model} is damaged: its {name} is {json.dumps(entry)}, "
                             "not a class of diffusers or transformers")
        if not (folder / name).is_dir():
            raise InputError(f"{model} lacks its component {name}")
        check_component(folder, name)
    scheduler = read_object(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"{model} samples with {scheduler}: "
                         "it is no flow-matching model (v = noise - data), which FGM needs")


def check_component(folder, name):
    """check_pipeline for one component."""
    part, (config, weights) = folder / name, COMPONENTS[name]
    refuse_link_out(part, folder)
    objects = {path.name: read_object(path) for path in part.glob("*.json")}
    if config not in objects:
        raise InputError(f"{part} lacks its {config}")
    for key, kind in KEYS.get(name, {}).items():
        value = objects[config].get(key)
        sound = type(value) in (float, int) if kind is float else type(value) is kind and value
        if not sound:
            raise InputError(f"{part / config} is damaged: its {key} is {json.dumps(value)}")
    if name == "transformer":
        describe_transformer(part)
    if weights:
        check_weights(part, weights, objects.get(f"{weights}.safetensors.index.json"))


def describe_transformer(part):
    """The transformer that the configuration in a folder describes, on the meta device: without weights.

    Raises InputError if there is none such."""
    from diffusers import SD3Transformer2DModel

    try:
        with torch.device("meta"):
            return SD3Transformer2DModel.from_config(read_object(part / "config.json"))
    except Exception as error:  # whatever the values of a damaged configuration lead to
        raise InputError(f"{part / 'config.json'} describes no transformer ({error})") from error


def check_weights(part, weights, index):
    """check_pipeline for the weights of one component. index: of their shards, if there are several."""
    from safetensors import SafetensorError, safe_open

    single, files = f"{weights}.safetensors", set()
    if index is not None:
        shards = index.get("weight_map")
        names = list(shards.values()) if isinstance(shards, dict) else []
        if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise InputError(f"{part / single}.index.json is damaged: its weight_map names no files")
        files |= set(names)
    if index is None or (part / single).exists():
        files.add(single)
    for path in (part / file for file in sorted(files)):
        if not path.is_file():
            pickles = ", ".join(sorted(file.name for file in part.glob("*.bin")))
            why = f" ({pickles} is not read: loading a pickle can run anything)" if pickles else ""
            raise InputError(f"{part} lacks its weights {path.name}{why}")
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise InputError(f"the weights {path} are damaged ({error})") from error


def numbers_in(part):
    """How many numbers the weights of a component's folder hold, by the headers of its files."""
    from safetensors import safe_open

    found = 0
    for path in part.glob("*.safetensors"):
        if "fp16" not in path.name:  # another copy of the same
            with safe_open(path, "pt") as file:
                found += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    return found


def memory_around(folder, bf16, size, state):
    """Bytes a process needs at the peaks before, between and after the steps, by arithmetic: {phase: bytes}.

    size: (H, W) of an image; state: bytes that stay beside a picture. The decoder's peak is in its last
    block, whose first layer holds its input, that normalised and that activated, or, where it has no more
    channels than the rest, in a layer's end. The text encoders' activations are not counted."""
    number = 2 if bf16 else 4  # bytes of a weight of the pipelines; pictures are decoded in float32
    text = sum(numbers_in(folder / name) for name in ENCODERS)
    vae, transformer = numbers_in(folder / "vae"), numbers_in(folder / "transformer")
    channels = read_json(folder / "vae" / "config.json")["block_out_channels"]
    decoding = size[0] * size[1] * max(3 * channels[min(1, len(channels) - 1)], 5 * channels[0])
    return {
        "encoding prompts": text * number,
        "a picture": state + (vae + decoding) * 4,
        "the scores": (text + vae + transformer + decoding) * number,
    }


# ------------------------------------------------------------------------------------------------------------
# Export: a pipeline for unmodified diffusers, a LoRA file
# ------------------------------------------------------------------------------------------------------------


def merge_lora(weights, generator):
    """(weights of a plain transformer with the generator's adapter added, LoRA file's tensors and header).

    weights: those of the transformer with its LoRALinear layers. In the LoRA file c_in is an exact
    convolutional LoRA of the patch embedding: the identity on a patch, times (c_in - 1) of the weight. The
    header gives each layer alpha = rank: left to guess, diffusers 0.36 scales the patch embedding's."""
    lora = {}
    for path in generator.net.paths:
        down, up = weights[f"{path}.down.generator.weight"], weights[f"{path}.up.generator.weight"]
        lora[f"transformer.{path}.lora_A.weight"] = down.contiguous()
        lora[f"transformer.{path}.lora_B.weight"] = up.contiguous()
        weights[f"{path}.weight"] = weights[f"{path}.base.weight"].float() + up @ down
        if f"{path}.base.bias" in weights:
            weights[f"{path}.bias"] = weights[f"{path}.base.bias"]
    parts = (".base.", ".down.", ".up.")
    weights = {name: value for name, value in weights.items() if not any(part in name for part in parts)}

    patch = weights["pos_embed.proj.weight"].float()  # [D, 16, 2, 2]
    inputs = patch[0].numel()  # 64
    down = torch.eye(inputs).view(inputs, *patch.shape[1:])  # [64, 64] -> [64, 16, 2, 2]
    up = ((generator.c_in - 1) * patch).reshape(len(patch), inputs, 1, 1)  # [D, 16, 2, 2] -> [D, 64, 1, 1]
    lora["transformer.pos_embed.proj.lora_A.weight"] = down
    lora["transformer.pos_embed.proj.lora_B.weight"] = up
    rank = len(lora[f"transformer.{generator.net.paths[0]}.lora_A.weight"])
    config = {"r": rank, "lora_alpha": rank, "target_modules": [*generator.net.paths, "pos_embed.proj"]}
    config |= {"rank_pattern": {"pos_embed.proj": inputs}, "alpha_pattern": {"pos_embed.proj": inputs}}
    adapter = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    return weights, lora, {"t_star": str(generator.t_star), "lora_adapter_metadata": adapter}


def export(folder, generator, lora_rank, dtype, out):
    """Write OUT/pipeline, which StableDiffusion3Pipeline runs in one step, and for LoRA OUT/lora.safetensors.

    c_in is folded into the weight of the patch embedding, whose input is c_in z; the scheduler's only sigma
    is t_star = c_out: z + (0 - t_star) net(c_in z, t_star) is eq. (B.1) with c_skip 1. folder: of the source
    pipeline, of which the other components are copied; dtype: of the weights in the file. A collective call.
    Raises InputError, the pipeline before untouched, if there is no space."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors import SafetensorError

    velocity = generator.net.shared[0] if lora_rank else generator.net
    weights = {name: fgm.gathered(value.detach()).cpu() for name, value in velocity.net.state_dict().items()}
    if fgm.process_rank():
        return
    if lora_rank:
        weights, lora, header = merge_lora(weights, generator)
        save_tensors(lora, out / "lora.safetensors", header)
    weights["pos_embed.proj.weight"] = generator.c_in * weights["pos_embed.proj.weight"].float()

    transformer = describe_transformer(folder / "transformer")
    transformer.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_exponential_sigmas=True)
    scheduler.register_to_config(sigma_max=generator.t_star, sigma_min=generator.t_star)
    temporary, target = out / "pipeline.tmp", out / "pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with bar(f"writing {target}"):
            copy_source(folder, temporary)
            transformer.save_pretrained(temporary / "transformer")
        scheduler.save_pretrained(temporary / "scheduler")
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(f"cannot write {target} ({error}); the generator is safe: "
                         "free some space and run again") from error


def copy_source(folder, target):
    """Copy what an exported pipeline has from its source: all but transformer, scheduler and what is no part.

    Copies, not links: neither folder may change with the other, nor the hub's cache with either."""
    target.mkdir()
    unused = shutil.ignore_patterns(".*", "*.fp16.*", "*.bin", "*.msgpack", "*.h5")
    for path in folder.iterdir():
        if path.name in COMPONENTS and path.is_dir() and path.name not in ("transformer", "scheduler"):
            shutil.copytree(path, target / path.name, ignore=unused)
        elif path.name.startswith(("model_index.json", "LICENSE", "README")) and path.is_file():
            shutil.copy2(path, target / path.name)


# ------------------------------------------------------------------------------------------------------------
# Images, by unmodified diffusers
# ------------------------------------------------------------------------------------------------------------


def open_pipeline(folder, device, dtype):
    """The pipeline in a folder, on the device. Raises InputError if it cannot be loaded."""
    check_pipeline(Path(folder), folder)
    networks = [name for name, (_, weights) in COMPONENTS.items() if weights]
    with bar(f"loading {folder}"):
        pipe = load_pipeline(folder, networks, device, dtype)
    pipe.vae.enable_slicing()  # images are decoded one by one: at 1024 pixels, several fill the memory
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, steps, guidance, size, seed=0, batch=50, what=None):
    """One uint8 image per prompt, stacked: [N, 3, H, W], size = (H, W).

    Image i depends on (seed + i, its prompt) alone, whatever the batch. what: the title of a progress bar."""
    height, width = size
    check_memory(f"{len(prompts)} images", 2 * 3 * height * width * len(prompts))
    scale = pipe.vae_scale_factor
    shape = (pipe.transformer.config.in_channels, height // scale, width // scale)
    images = []
    for i in batches(len(prompts), batch, what):
        texts = prompts[i : i + batch]
        seeds = torch.arange(seed + i, seed + i + len(texts))
        latents = noise_from(seeds, shape, pipe.device).to(pipe.transformer.dtype)
        with torch.no_grad():
            output = pipe(texts, num_inference_steps=steps, guidance_scale=guidance, latents=latents,
                          height=height, width=width, output_type="pt")
        images.append((output.images * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(images)


def decode(folder, latents):
    """uint8 images [N, 3, H, W] of latents [N, 16, h, w] by the pipeline's VAE, which is loaded for it."""
    vae = load_component(folder, "vae", torch.float32).to(latents.device)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    images = []
    for part in latents.float().split(1):  # one by one, as open_pipeline has it
        with torch.no_grad():
            images.append(to_uint8(vae.decode(part / scale + shift).sample).cpu())
    return torch.cat(images)  # N x [1, 3, H, W] -> [N, 3, H, W]


def pictures(folder, out, teacher, draw, samples, judged=None):
    """A picture(step, generator) for FolderRun: 8 decoded images as a grid in out, and a score for the log.

    draw(sampler, n, first) -> n latents, by noise seeds from first; every process calls it. The score of
    `samples` images is judged(uint8 images), or without one the Fréchet distance of latents, averaged over
    the quarters of an image, to latents of the teacher's 50 steps from other noise."""

    def quarters(latents):
        return F.adaptive_avg_pool2d(latents.float(), 2).flatten(1).cpu()  # [N, 16, h, w] -> [N, 64]

    @cache
    def reference():
        return quarters(draw(partial(fgm.sample_ode, teacher, steps=50), samples, first=samples))

    def measure(sampler):
        latents = draw(sampler, samples)
        if judged:
            return judged(decode(folder, latents))
        return frechet_distance(reference(), quarters(latents))

    scored = scores(teacher, measure)

    def picture(step, generator):
        latents = draw(generator, 8)
        if fgm.process_rank() == 0:
            save_grid(out / f"distill-{step:07d}.png", decode(folder, latents))
        return scored(step, generator)

    return picture


def geneval(pipe, metadata, target, steps, guidance, size, seed):
    """Four images for each line of METADATA.jsonl in GenEval's folder layout: NNNNN/metadata.jsonl and
    NNNNN/samples/0000.png to 0003.png. Raises InputError if it holds no prompts."""
    from PIL import Image

    wanted = 'a JSON object with a "prompt"'
    lines = read_json_lines(metadata, lambda record: (record, text_of(record["prompt"])), wanted)
    if not lines:
        raise InputError(f"{metadata} holds no prompts")
    for i, (line, prompt) in enumerate(lines):
        folder = open_folder(target / f"{i:05d}")
        open_folder(folder / "samples")
        with atomically(folder / "metadata.jsonl") as temporary:
            temporary.write_text(json.dumps(line) + "\n")
        for k, image in enumerate(draw(pipe, [prompt] * 4, steps, guidance, size, seed + 4 * i)):
            pixels = image.permute(1, 2, 0).numpy()  # [3, H, W] -> [H, W, 3]
            with atomically(folder / "samples" / f"{k:04d}.png") as temporary:
                Image.fromarray(pixels).save(temporary)
    print(f"{len(lines)} prompts, 4 images each, in {target}")


# ------------------------------------------------------------------------------------------------------------
# Real images, for the GAN
# ------------------------------------------------------------------------------------------------------------


def load_real(folder, size):
    """(paths of the images, captions) of a folder, size = (H, W).

    Captions come from metadata.jsonl {"file_name", "text"} or NAME.txt, else they are empty. Raises
    InputError, naming the file, for what is no image, images of another size than the run's (of both the
    header is read alone), and captions that are links out of the folder."""
    folder = Path(folder)
    paths = image_files(folder, (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        raise InputError(f"--real {folder} holds no images (png, jpg, webp)")
    texts = {}
    if is_caption_file(folder / "metadata.jsonl", folder):
        texts = dict(read_json_lines(
            folder / "metadata.jsonl", lambda record: (text_of(record["file_name"]), text_of(record["text"])),
            '{"file_name": ..., "text": ...}'))
    captions = []
    for path in paths:
        check_size(path, header_size(path), size)
        beside = path.with_suffix(".txt")
        own = "\n".join(read_lines(beside)) if is_caption_file(beside, folder) else ""
        captions.append(texts.get(str(path.relative_to(folder))) or own)
    return paths, captions


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


def is_caption_file(path, folder):
    """Whether there is such a file. Raises InputError for a link out of the folder and what is no file."""
    refuse_link_out(path, folder)
    if path.exists() and not path.is_file():
        raise InputError(f"the captions {path} are no regular file")
    return path.exists()


def mark_of(path):
    """[name, length, checksum of the last kilobyte] of an image file: all of 500,000 would take too long, and
    another image that ends in the same compressed bytes will not have the same length."""
    with open(path, "rb") as file:
        length = file.seek(0, os.SEEK_END)
        file.seek(max(0, length - 1024))
        return [path.name, length, zlib.crc32(file.read())]


def encode_images(folder, paths, size, shape, cache, device, dtype):
    """Latents of image files of size (H, W) by the pipeline's VAE, scaled as SD3 scales them: Rows of
    {"latents": shape}.

    They are kept in files of 128 in the folder cache, named after what they are made of: what exists is not
    made again, what belongs to an image that was mended is. The images are read one by one. A collective
    call. Raises InputError, naming the file, for an image that cannot be read."""
    cache, vae_key = open_folder(cache), contents(folder, "vae/*")
    files = {}
    for i, part in enumerate(files_of(paths)):
        key = json.dumps([vae_key, str(dtype), [mark_of(path) for path in part]])
        files[f"latents-{i:06d}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"] = part

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

    fill(cache, files, lambda: load_component(folder, "vae", torch.float32).to(device), encode)
    return Rows([cache / f"{name}.safetensors" for name in files], len(paths), {"latents": shape}, device)
