"""Stable Diffusion 3 pipelines: the source, the exported one-step pipeline, images from and for them."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

import fgm
from fgm import InputError
from parts.images import read_image, to_float, to_uint8
from parts.prompts import read_json_lines
from parts.run import noise_from, open_folder, read_json, save_tensors

# ------------------------------------------------------------------------------------------------------------
# The source pipeline
# ------------------------------------------------------------------------------------------------------------

COMPONENTS = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3",
              "tokenizer", "tokenizer_2", "tokenizer_3")


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
    try:
        components = json.loads((folder / "model_index.json").read_text())
        kind = components["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{model} is not a diffusers pipeline: "
                         "it has no readable model_index.json") from error
    if kind != "StableDiffusion3Pipeline":
        raise InputError(f"{model} is a {kind}; sd3.py distils StableDiffusion3Pipeline")
    for name in COMPONENTS:
        if not (folder / name).is_dir() and components.get(name, [None])[0]:
            raise InputError(f"{model} lacks its component {name}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"{model} samples with {scheduler}: "
                         "it is no flow-matching model (v = noise - data), which FGM needs")
    return folder


# ------------------------------------------------------------------------------------------------------------
# Export: a pipeline for unmodified diffusers, a LoRA file
# ------------------------------------------------------------------------------------------------------------


def link_or_copy(source, target):
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def merge_lora(weights, generator):
    """(weights of a plain transformer with the generator's adapter added, tensors of the LoRA file).

    weights: those of the transformer with its LoRALinear layers. In the LoRA file c_in is an exact
    convolutional LoRA of the patch embedding: the identity on a patch, times (c_in - 1) of the weight."""
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
    return weights, lora


def export(folder, generator, lora_rank, dtype, out):
    """Write OUT/pipeline, which StableDiffusion3Pipeline runs in one step, and for LoRA OUT/lora.safetensors.

    c_in is folded into the weight of the patch embedding, whose input is c_in z; the scheduler's only sigma
    is t_star = c_out: z + (0 - t_star) net(c_in z, t_star) is eq. (B.1) with c_skip 1. folder: of the source
    pipeline; dtype: of the weights in the file. A collective call."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel

    velocity = generator.net.shared[0] if lora_rank else generator.net
    weights = {name: fgm.gathered(value.detach()).cpu() for name, value in velocity.net.state_dict().items()}
    if fgm.process_rank():
        return
    if lora_rank:
        weights, lora = merge_lora(weights, generator)
        save_tensors(lora, out / "lora.safetensors", {"t_star": str(generator.t_star)})
    weights["pos_embed.proj.weight"] = generator.c_in * weights["pos_embed.proj.weight"].float()

    temporary, target = out / "pipeline.tmp", out / "pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    ours = shutil.ignore_patterns("transformer", "scheduler", "images", "prompts.txt", "tiny_sd3.json",
                                  "*.png", ".*", "*.fp16.*")
    shutil.copytree(folder, temporary, copy_function=link_or_copy, ignore=ours)
    with torch.device("meta"):
        transformer = SD3Transformer2DModel.from_config(read_json(folder / "transformer" / "config.json"))
    transformer.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    transformer.save_pretrained(temporary / "transformer")
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_exponential_sigmas=True)
    scheduler.register_to_config(sigma_max=generator.t_star, sigma_min=generator.t_star)
    scheduler.save_pretrained(temporary / "scheduler")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(temporary, target)


# ------------------------------------------------------------------------------------------------------------
# Images, by unmodified diffusers
# ------------------------------------------------------------------------------------------------------------


def open_pipeline(folder, device, dtype):
    """The pipeline in a folder, on the device. Raises InputError if it cannot be loaded."""
    from diffusers import StableDiffusion3Pipeline

    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load the pipeline {folder} ({str(error).splitlines()[0]})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, steps, guidance, size, seed=0, batch=50):
    """One uint8 image per prompt, stacked: [N, 3, H, W], size = (H, W).

    Image i depends on (seed + i, its prompt) alone, whatever the batch."""
    height, width = size
    scale = pipe.vae_scale_factor
    shape = (pipe.transformer.config.in_channels, height // scale, width // scale)
    images = []
    for i in range(0, len(prompts), batch):
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
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(latents.device).eval()
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    with torch.no_grad():
        images = torch.cat([vae.decode(part / scale + shift).sample for part in latents.float().split(4)])
    return to_uint8(images).cpu()


def geneval(pipe, metadata, target, steps, guidance, size, seed):
    """Four images for each line of METADATA.jsonl in GenEval's folder layout: NNNNN/metadata.jsonl and
    NNNNN/samples/0000.png to 0003.png. Raises InputError if it holds no prompts."""
    from PIL import Image

    wanted = 'a JSON object with a "prompt"'
    lines = read_json_lines(metadata, lambda record: (record, record["prompt"]), wanted)
    if not lines:
        raise InputError(f"{metadata} holds no prompts")
    for i, (line, prompt) in enumerate(lines):
        folder = open_folder(target / f"{i:05d}")
        open_folder(folder / "samples")
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        for k, image in enumerate(draw(pipe, [prompt] * 4, steps, guidance, size, seed + 4 * i)):
            pixels = image.permute(1, 2, 0).numpy()  # [3, H, W] -> [H, W, 3]
            Image.fromarray(pixels).save(folder / "samples" / f"{k:04d}.png")
    print(f"{len(lines)} prompts, 4 images each, in {target}")


# ------------------------------------------------------------------------------------------------------------
# Real images, for the GAN
# ------------------------------------------------------------------------------------------------------------


def load_real(folder, size):
    """(uint8 images [N, 3, H, W], captions) of a folder, size = (H, W).

    Captions come from metadata.jsonl {"file_name", "text"} or NAME.txt, else they are empty. Raises
    InputError, naming the file, for unreadable images and those of another size than the run's."""
    folder = Path(folder)
    suffixes = (".png", ".jpg", ".jpeg", ".webp")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes)
    if not paths:
        raise InputError(f"--real {folder} holds no images (png, jpg, webp)")
    texts = {}
    if (folder / "metadata.jsonl").exists():
        texts = dict(read_json_lines(
            folder / "metadata.jsonl", lambda record: (record["file_name"], record["text"]),
            '{"file_name": ..., "text": ...}'))
    images, captions = [], []
    for path in paths:
        image = read_image(path)
        if image.size != (size[1], size[0]):
            raise InputError(f"{path} is {image.width}x{image.height}, the run makes {size[1]}x{size[0]}; "
                             "resize the images, or change --height and --width")
        images.append(np.asarray(image))
        beside = path.with_suffix(".txt")
        own = beside.read_text().strip() if beside.exists() else ""
        captions.append(texts.get(str(path.relative_to(folder))) or own)
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # [N, H, W, 3] -> [N, 3, H, W]
    return pixels.contiguous(), captions


def encode_images(folder, images, path, device, batch=8):
    """Latents [N, 16, h, w] of uint8 images by the pipeline's VAE, scaled as SD3 scales them.

    They are cached in the file path, keyed by the images. A collective call."""
    from diffusers import AutoencoderKL
    from safetensors import safe_open

    config = (Path(folder) / "vae" / "config.json").read_bytes()
    key = hashlib.sha256(images.numpy().tobytes() + config).hexdigest()
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata().get("images") == key:
                return file.get_tensor("latents")
    if fgm.process_rank() == 0:
        vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(device).eval()
        shift, scale = vae.config.shift_factor, vae.config.scaling_factor
        latents = []
        for i in range(0, len(images), batch):
            with torch.no_grad():
                mean = vae.encode(to_float(images[i : i + batch].to(device))).latent_dist.mean
            latents.append(((mean - shift) * scale).cpu())
        save_tensors({"latents": torch.cat(latents)}, path, {"images": key})
    if fgm.world_size() > 1:
        dist.barrier()
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")
