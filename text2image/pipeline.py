"""Stable Diffusion 3 pipelines: found and loaded, exported after distillation, and images drawn with them."""

import gc
import json
import shutil
import time
import warnings
from pathlib import Path

import torch

import fgm
from fgm import InputError
from images.data import to_uint8
from training.files import open_folder, read_json, reason, save_tensors
from training.processes import noise_from
from training.progress import bar, batches

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = ("transformer", "vae", "scheduler", *ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3")
UNUSED = ("*fp16*", "*.bin", "*.msgpack", "*.h5")  # the same weights in other forms

# ---- Finding a pipeline ------------------------------------------------------------------------------------


def quiet():
    """Keep the libraries' progress bars and notices out of ours."""
    import diffusers
    import transformers

    warnings.filterwarnings("ignore", "`torch_dtype` is deprecated")  # its successor is not in diffusers 0.36
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def find_model(model):
    """The local folder of a pipeline: model itself, or for a hub id its files in the hub's cache.

    Raises InputError if it cannot be found, downloaded or distilled."""
    folder = Path(model) if Path(model).is_dir() else download(model)
    check_pipeline(folder, model)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    if scheduler.get("sigma_max") is not None and scheduler["sigma_max"] == scheduler.get("sigma_min"):
        raise InputError(f"{model} makes one step: as --model name the one that it was distilled from")
    return folder


def download(model):
    """The folder of a hub id in the hub's cache, downloaded where it is not there yet."""
    from huggingface_hub import snapshot_download

    patterns = ["model_index.json", "LICENSE*", *(f"{name}/*" for name in COMPONENTS)]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns, ignore_patterns=UNUSED))
    except Exception as error:  # the hub's errors have no common base
        raise InputError(
            f"{model} is no folder, and its download failed ({type(error).__name__}: {reason(error)}); "
            "without a network, `python tiny_sd3.py --out runs/tiny-sd3` makes a small model") from error


def check_pipeline(folder, model):
    """Raise InputError unless the folder holds an SD3 flow-matching pipeline. model: its name in messages."""
    index = read_json(folder / "model_index.json")
    if index.get("_class_name") != "StableDiffusion3Pipeline":
        raise InputError(f"{model} is a {index.get('_class_name')}, not a StableDiffusion3Pipeline")

    for name, entry in index.items():
        if not isinstance(entry, list) or entry == [None, None]:  # not a component, or left out as T5
            continue
        if entry[:1] not in (["diffusers"], ["transformers"]):  # whatever is named here, diffusers imports it
            raise InputError(f"{model}/model_index.json: its {name} is {json.dumps(entry)}, "
                             "not a class of diffusers or transformers")
        if not (folder / name).is_dir():
            raise InputError(f"{model} lacks its component {name}")

    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"{model} samples with {scheduler}: "
                         "it is no flow-matching model (v = noise - data), which FGM needs")


# ---- Loading its parts -------------------------------------------------------------------------------------


def network_class(name):
    import diffusers

    return {"transformer": diffusers.SD3Transformer2DModel, "vae": diffusers.AutoencoderKL}[name]


def empty_network(folder, name):
    """The transformer or VAE that a pipeline's configuration describes, on the meta device: without weights.

    Raises InputError if it describes none."""
    path = folder / name / "config.json"
    try:
        with torch.device("meta"):
            return network_class(name).from_config(read_json(path))
    except Exception as error:  # whatever the values of a damaged configuration lead to
        raise InputError(f"{path} describes no {name} of SD3 ({reason(error)})") from error


def load_network(folder, name, dtype):
    """The transformer or VAE of a pipeline. Raises InputError if it cannot be loaded, or lacks a tensor."""
    try:
        network, loading = network_class(name).from_pretrained(
            folder / name, torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    except Exception as error:  # the libraries raise what they like
        raise InputError(f"cannot load {folder / name} ({reason(error)})") from error
    missing = sorted(loading["missing_keys"])
    if missing:
        raise InputError(f"{folder / name} lacks {len(missing)} of its weights, {missing[0]} the first")
    return network


def load_pipeline(folder, networks, device, dtype):
    """A StableDiffusion3Pipeline with some of its networks, loaded from safetensors alone: pickles run code.

    networks: their names. Raises InputError if it cannot be loaded."""
    from diffusers import StableDiffusion3Pipeline

    absent_t5 = {name for name in ("text_encoder_3", "tokenizer_3") if not (folder / name).is_dir()}
    components = dict.fromkeys({"transformer", "vae", *ENCODERS} - set(networks) | absent_t5)
    if "transformer" in networks:
        components["transformer"] = load_network(folder, "transformer", dtype)
    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(
            folder, **components, torch_dtype=dtype, use_safetensors=True).to(device)
    except Exception as error:  # the libraries raise what they like
        raise InputError(f"cannot load the pipeline {folder} ({reason(error)})") from error
    if pipe.transformer is None:  # a pipeline without T5 asks it for the width of a text
        pipe.transformer = empty_network(folder, "transformer")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def free_memory():
    """Give back unused memory: also of pipelines, whose objects refer to each other in circles."""
    gc.collect()
    torch.cuda.empty_cache()


@torch.no_grad()
def text_embeddings(pipe, texts, device, dtype):
    """What a pipeline's text encoders make of N texts, on the CPU:
    {"encoder_hidden_states": [N, tokens, D], "pooled_projections": [N, P]}."""
    hidden_states, pooled = [], []
    for i in range(0, len(texts), 16):
        embeds, _, summary, _ = pipe.encode_prompt(
            texts[i : i + 16], None, None, device=device, do_classifier_free_guidance=False,
            max_sequence_length=256)
        hidden_states.append(embeds.to(dtype).cpu())
        pooled.append(summary.to(dtype).cpu())
    return {"encoder_hidden_states": torch.cat(hidden_states), "pooled_projections": torch.cat(pooled)}


# ---- Export: a pipeline for unmodified diffusers, a LoRA file ----------------------------------------------


def merge_lora(weights, generator):
    """(weights of a plain transformer with the generator's adapter added, LoRA file's tensors and header).

    weights: those of the transformer with its LoRALinear layers. In the LoRA file c_in is an exact
    convolutional LoRA of the patch embedding: the identity on a patch, times (c_in - 1) of the weight. The
    header gives each layer alpha = rank: left to guess, diffusers 0.36 scales the patch embedding's."""
    merged, lora = dict(weights), {}
    for path in generator.net.paths:
        down, up = weights[f"{path}.down.generator.weight"], weights[f"{path}.up.generator.weight"]
        lora[f"transformer.{path}.lora_A.weight"] = down.contiguous()
        lora[f"transformer.{path}.lora_B.weight"] = up.contiguous()
        merged[f"{path}.weight"] = weights[f"{path}.base.weight"].float() + up @ down
        if f"{path}.base.bias" in weights:
            merged[f"{path}.bias"] = weights[f"{path}.base.bias"]
    adapted = (".base.", ".down.", ".up.")
    merged = {name: value for name, value in merged.items() if not any(part in name for part in adapted)}

    patch = weights["pos_embed.proj.weight"].float()  # [D, 16, 2, 2]
    inputs = patch[0].numel()  # 64
    name, rank = "transformer.pos_embed.proj", len(down)
    lora[f"{name}.lora_A.weight"] = torch.eye(inputs).view(inputs, *patch.shape[1:])  # [64, 16, 2, 2]
    lora[f"{name}.lora_B.weight"] = ((generator.c_in - 1) * patch).reshape(-1, inputs, 1, 1)  # [D, 64, 1, 1]

    config = {"r": rank, "lora_alpha": rank, "target_modules": [*generator.net.paths, "pos_embed.proj"]}
    config |= {"rank_pattern": {"pos_embed.proj": inputs}, "alpha_pattern": {"pos_embed.proj": inputs}}
    adapter = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    return merged, lora, {"t_star": str(generator.t_star), "lora_adapter_metadata": adapter}


def export(folder, generator, lora_rank, dtype, out, shape=None):
    """Write OUT/pipeline, which StableDiffusion3Pipeline runs in one step, and for LoRA OUT/lora.safetensors.

    c_in is folded into the weight of the patch embedding, whose input is c_in z; the scheduler's only sigma
    is t_star = c_out: z + (0 - t_star) net(c_in z, t_star) is eq. (B.1) with c_skip 1. folder: of the source
    pipeline, of which the other components are copied; dtype: of the weights in the file; shape: of a latent.
    model_index.json is written last: a folder without it is not finished. A collective call. Raises
    InputError if it cannot be written."""
    from diffusers import FlowMatchEulerDiscreteScheduler
    from safetensors import SafetensorError

    velocity = generator.net.shared if lora_rank else generator.net
    weights = {name: fgm.gathered(value.detach()).cpu() for name, value in velocity.net.state_dict().items()}
    if fgm.process_rank():
        return
    if lora_rank:
        weights, lora, header = merge_lora(weights, generator)
        save_tensors(lora, out / "lora.safetensors", header)
    weights["pos_embed.proj.weight"] = generator.c_in * weights["pos_embed.proj.weight"].float()

    transformer = empty_network(folder, "transformer")
    transformer.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    if shape and shape[1] == shape[2]:  # what diffusers draws where no size is given
        transformer.register_to_config(sample_size=shape[1])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_exponential_sigmas=True)
    scheduler.register_to_config(sigma_max=generator.t_star, sigma_min=generator.t_star)

    target = out / "pipeline"
    try:
        shutil.rmtree(target, ignore_errors=True)
        with bar(f"writing {target}"):
            transformer.save_pretrained(target / "transformer")
            scheduler.save_pretrained(target / "scheduler")
            copy_source(folder, target)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot write {target} ({reason(error)}); call the same command again") from error


def copy_source(folder, target):
    """Copy what an exported pipeline shares with its source: all components but transformer and scheduler.

    Copies, not links: neither folder may change with the other."""
    unused = shutil.ignore_patterns(".*", *UNUSED)
    for path in folder.iterdir():
        if path.name in COMPONENTS and path.name not in ("transformer", "scheduler"):
            shutil.copytree(path, target / path.name, ignore=unused)
        elif path.name.startswith("LICENSE"):
            shutil.copy2(path, target / path.name)
    shutil.copy2(folder / "model_index.json", target / "model_index.json")


def write_card(model, size, coefficients, trained_on, out):
    """Write OUT/pipeline/README.md. size: (H, W) of an image; coefficients: those of the generator."""
    text = f"""# {Path(model).name} in one step

{model}, distilled by Flow Generator Matching (arXiv 2410.19310). Its licence is that of {model}.

    pipe = StableDiffusion3Pipeline.from_pretrained("this folder")  # diffusers 0.33 or newer
    pipe(prompt, height={size[0]}, width={size[1]}, num_inference_steps=1, guidance_scale=0).images[0]

The scheduler's only sigma is t* = {coefficients["t_star"]}; c_in = {coefficients["c_in"]} is in the weights
of the patch embedding. Trained on {trained_on}.
"""
    (out / "pipeline" / "README.md").write_text(text, encoding="utf-8")


# ---- Images, by unmodified diffusers -----------------------------------------------------------------------


def draw(folder, prompts, steps, guidance, size, device, dtype, seed=0, batch=50, title="drawing"):
    """(an iterator of uint8 images [3, H, W], one for each prompt; seconds that the transformer took).

    By the pipeline in a folder; size: (H, W). Text encoders, transformer and VAE are on the device in turn.
    Image i depends on (seed, i, its prompt) alone. Raises InputError if the pipeline cannot be loaded."""
    check_pipeline(folder, folder)
    shape, texts = latent_shape(folder, size), list(dict.fromkeys(["", *prompts]))  # each different text once
    with bar("encoding prompts"):
        embeddings = text_embeddings(load_pipeline(folder, ENCODERS, device, dtype), texts, device, dtype)
    free_memory()
    rows = torch.tensor([texts.index(prompt) for prompt in prompts])
    with bar(f"loading {folder}"):
        pipe = load_pipeline(folder, ["transformer"], device, dtype)

    latents, began = [], time.perf_counter()
    for i in batches(len(prompts), batch, title):
        indices = torch.arange(i, min(i + batch, len(prompts)))
        noise = noise_from(seed * 2**32 + indices, shape, device).to(dtype)
        text = {name: value[rows[indices]].to(device) for name, value in embeddings.items()}
        empty = {name: value[:1].to(device).expand_as(text[name]) for name, value in embeddings.items()}
        with torch.no_grad():
            output = pipe(
                prompt_embeds=text["encoder_hidden_states"], pooled_prompt_embeds=text["pooled_projections"],
                negative_prompt_embeds=empty["encoder_hidden_states"],
                negative_pooled_prompt_embeds=empty["pooled_projections"], num_inference_steps=steps,
                guidance_scale=guidance, latents=noise, height=size[0], width=size[1], output_type="latent")
        latents.append(output.images.cpu())
    seconds = time.perf_counter() - began

    del pipe, output
    free_memory()
    return decode(folder, torch.cat(latents), device, dtype, f"{title}, decoding"), seconds


def latent_shape(folder, size):
    """(channels, height, width) of an image's latent; size: (H, W). Raises InputError if it is too large."""
    config, (height, width) = empty_network(folder, "transformer").config, size
    scale = 2 ** (len(empty_network(folder, "vae").config.block_out_channels) - 1)
    largest = config.pos_embed_max_size * config.patch_size * scale
    if max(height, width) > largest:
        raise InputError(f"{height}x{width} is larger than {folder} can make: its largest side is {largest}")
    return config.in_channels, height // scale, width // scale


@torch.no_grad()
def decode(folder, latents, device, dtype, title=None):
    """uint8 images [3, H, W] of latents [N, 16, h, w], one after the other, by the pipeline's VAE, which is
    loaded for it."""
    vae = load_network(folder, "vae", dtype).to(device)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    for i in batches(len(latents), 1, title):
        pixels = vae.decode(latents[i : i + 1].to(device, dtype) / scale + shift).sample  # [1, 3, H, W]
        yield to_uint8(pixels.float())[0].cpu()  # [1, 3, H, W] -> [3, H, W]


def write_geneval(records, images, target):
    """GenEval's folder layout, for four images in turn of each record, a line of its METADATA.jsonl:
    NNNNN/metadata.jsonl and NNNNN/samples/0000.png to 0003.png."""
    from torchvision.transforms.functional import to_pil_image

    for old in target.glob("[0-9]" * 5):  # the scorer takes every folder that it finds
        shutil.rmtree(old)
    for i, image in enumerate(images):
        folder = target / f"{i // 4:05d}"
        samples = open_folder(folder / "samples")
        if i % 4 == 0:
            (folder / "metadata.jsonl").write_text(json.dumps(records[i // 4]) + "\n", encoding="utf-8")
        to_pil_image(image).save(samples / f"{i % 4:04d}.png")
