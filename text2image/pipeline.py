"""Stable Diffusion 3 pipelines: the source, the exported one-step pipeline, images from them."""

import json
import math
import shutil
import time
from functools import cache, partial

import torch
from torch.nn import functional as F

import fgm
from fgm import InputError
from images.data import save_grid, to_uint8
from images.scores import frechet_distance
from text2image import prompts
from training.bars import bar, batches
from training.files import atomically, open_folder, reason, save_tensors
from training.progress import scores
from training.run import noise_from, read_json

# ---- The source pipeline -----------------------------------------------------------------------------------

NETWORKS = ("transformer", "vae", *prompts.ENCODERS)
COMPONENTS = (*NETWORKS, "scheduler", "tokenizer", "tokenizer_2", "tokenizer_3")
OPTIONAL = ("text_encoder_3", "tokenizer_3")  # T5


def quiet():
    """Keep the libraries' progress bars and notices out of ours."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def check_kind(folder, model):
    """The index of a pipeline; model: what to call it. Raises InputError unless it is of SD3's kind."""
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    if kind != "StableDiffusion3Pipeline":
        raise InputError(f"{model} is a {kind}; sd3.py distils StableDiffusion3Pipeline")
    return index


def check_pipeline(folder, model):
    """Raise InputError unless the folder holds a whole SD3 flow-matching pipeline, as far as files tell: what
    is in them the libraries check when they load it."""
    index = check_kind(folder, model)
    for name in COMPONENTS:
        entry = index.get(name, [None, None])
        if entry == [None, None] and name in OPTIONAL:
            continue
        # diffusers would import whatever else is named here.
        if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")):
            raise InputError(f"model_index.json of {model} is damaged: its {name} is {json.dumps(entry)}, "
                             "not a class of diffusers or transformers")
        if not (folder / name).is_dir():
            raise InputError(f"{model} lacks its component {name}")
        if name in NETWORKS:
            numbers_in(folder / name)
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"{model} samples with {scheduler}: "
                         "it is no flow-matching model (v = noise - data), which FGM needs")
    prompts.described(folder, "transformer")
    if prompts.described(folder, "vae").config.shift_factor is None:
        raise InputError(f"{folder / 'vae'} has no shift_factor: it is not SD3's")


def numbers_in(part):
    """How many numbers the weights of a component's folder hold, by the headers of its files.

    Raises InputError if they are missing, or a file of them is, or is damaged."""
    from safetensors import SafetensorError, safe_open

    paths, found = [path for path in part.glob("*.safetensors") if "fp16" not in path.name], 0
    try:
        for index in part.glob("*.safetensors.index.json"):  # of many files
            paths = {part / name for name in read_json(index)["weight_map"].values()}
        for path in paths:
            with safe_open(path, "pt") as file:
                found += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())
    except (OSError, SafetensorError, AttributeError, KeyError, TypeError) as error:
        raise InputError(f"the weights of {part} are damaged ({reason(error)})") from error
    if not found:
        raise InputError(f"{part} lacks its weights in safetensors (pickles are not read: they run code)")
    return found


# ---- Export: a pipeline for unmodified diffusers, a LoRA file ----------------------------------------------


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
    name, rank = "transformer.pos_embed.proj", len(down)
    lora[f"{name}.lora_A.weight"] = torch.eye(inputs).view(inputs, *patch.shape[1:])  # [64, 16, 2, 2]
    lora[f"{name}.lora_B.weight"] = ((generator.c_in - 1) * patch).reshape(-1, inputs, 1, 1)  # [D, 64, 1, 1]
    config = {"r": rank, "lora_alpha": rank, "target_modules": [*generator.net.paths, "pos_embed.proj"]}
    config |= {"rank_pattern": {"pos_embed.proj": inputs}, "alpha_pattern": {"pos_embed.proj": inputs}}
    adapter = json.dumps({f"transformer.{name}": value for name, value in config.items()})
    return weights, lora, {"t_star": str(generator.t_star), "lora_adapter_metadata": adapter}


def export(folder, generator, lora_rank, dtype, out, shape=None):
    """Write OUT/pipeline, which StableDiffusion3Pipeline runs in one step, and for LoRA OUT/lora.safetensors.

    c_in is folded into the weight of the patch embedding, whose input is c_in z; the scheduler's only sigma
    is t_star = c_out: z + (0 - t_star) net(c_in z, t_star) is eq. (B.1) with c_skip 1. folder: of the source
    pipeline, of which the other components are copied; dtype: of the weights in the file; shape: of a latent.
    A collective call. Raises InputError, the pipeline before untouched, if there is no space."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    velocity = generator.net.shared[0] if lora_rank else generator.net
    weights = {name: fgm.gathered(value.detach()).cpu() for name, value in velocity.net.state_dict().items()}
    if fgm.process_rank():
        return
    if lora_rank:
        weights, lora, header = merge_lora(weights, generator)
        save_tensors(lora, out / "lora.safetensors", header)
    weights["pos_embed.proj.weight"] = generator.c_in * weights["pos_embed.proj.weight"].float()

    transformer = prompts.described(folder, "transformer")
    transformer.load_state_dict({name: value.to(dtype) for name, value in weights.items()}, assign=True)
    if shape and shape[1] == shape[2]:  # what diffusers draws where no size is given
        transformer.register_to_config(sample_size=shape[1])
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0, use_exponential_sigmas=True)
    scheduler.register_to_config(sigma_max=generator.t_star, sigma_min=generator.t_star)
    with atomically(out / "pipeline") as temporary, bar(f"writing {out / 'pipeline'}"):
        copy_source(folder, temporary)
        transformer.save_pretrained(temporary / "transformer")
        scheduler.save_pretrained(temporary / "scheduler")


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


# ---- Images, by unmodified diffusers -----------------------------------------------------------------------


def draw(folder, texts, steps, guidance, size, device, dtype, seed=0, batch=50, what=None):
    """A uint8 image [3, H, W] for each text, one after the other, by the pipeline in a folder; size = (H, W).

    Text encoders, transformer and VAE are on the device in turn. Image i depends on (seed, i, its text)
    alone. what: the title of progress bars. Raises InputError if the pipeline cannot be loaded."""
    check_pipeline(folder, folder)
    encoded, n = prompts.encoded(folder, texts, device, dtype), len(texts)
    latents, _ = draw_latents(folder, *encoded, n, steps, guidance, size, device, dtype, seed, batch, what)
    return decode(folder, latents, device, dtype, what)


def draw_latents(folder, conditions, null, n, steps, guidance, size, device, dtype, seed, batch, what=None):
    """(n latents [n, 16, h, w], on the CPU; seconds spent drawing), by unmodified diffusers.

    conditions(indices [B]), null: as text2image.prompts.encoded gives them."""
    with bar(f"loading {folder}"):
        pipe = prompts.load_pipeline(folder, ["transformer"], device, dtype)
    pipe.set_progress_bar_config(disable=True)
    shape, found, began = latent_shape(folder, size), [], time.perf_counter()
    for i in batches(n, batch, what):
        indices = torch.arange(i, min(i + batch, n))
        noise, cond = noise_from(seed * 2**32 + indices, shape, device).to(dtype), conditions(indices)
        texts = {"prompt_embeds": cond["encoder_hidden_states"],
                 "pooled_prompt_embeds": cond["pooled_projections"]}
        if guidance > 1:
            empty = zip(texts.items(), null.values(), strict=True)
            texts |= {f"negative_{name}": value.expand_as(text) for (name, text), value in empty}
        with torch.no_grad():
            output = pipe(**texts, num_inference_steps=steps, guidance_scale=guidance, latents=noise,
                          height=size[0], width=size[1], output_type="latent")
        found.append(output.images.cpu())
    seconds = time.perf_counter() - began
    del pipe, output
    prompts.free_memory()
    return torch.cat(found), seconds


def latent_shape(folder, size):
    """(channels, height, width) of an image's latent; size: (H, W). Raises InputError if it is too large."""
    config, (height, width) = prompts.described(folder, "transformer").config, size
    scale = 2 ** (len(prompts.described(folder, "vae").config.block_out_channels) - 1)
    if type(config.pos_embed_max_size) is not int:
        raise InputError(f"{folder}/transformer/config.json: its pos_embed_max_size is no whole number")
    largest = config.pos_embed_max_size * config.patch_size * scale
    if max(height, width) > largest:
        raise InputError(f"{height}x{width} is larger than {folder} can make: its largest side is {largest}")
    return config.in_channels, height // scale, width // scale


@torch.no_grad()
def decode(folder, latents, device, dtype, what=None):
    """uint8 images [3, H, W] of latents [N, 16, h, w], one after the other, by the pipeline's VAE, which is
    loaded for it."""
    vae = prompts.load_component(folder, "vae", dtype).to(device)
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    for i in batches(len(latents), 1, what and f"{what}, decoding"):
        pixels = vae.decode(latents[i : i + 1].to(device, dtype) / scale + shift).sample  # [1, 3, H, W]
        yield to_uint8(pixels.float())[0].cpu()  # [1, 3, H, W] -> [3, H, W]


def pictures(folder, out, teacher, draw, samples, dtype, judged=None):
    """A picture(step, generator) for FolderRun: 8 decoded images as a grid in out, and a score for the log.

    draw(sampler, n, first) -> n latents, by noise seeds from first; every process calls it. The score of
    `samples` images is judged(uint8 images), or without one the Fréchet distance of latents, averaged over
    the quarters of an image, to latents of the teacher's 50 steps from other noise."""

    def decoded(latents):
        return torch.stack(list(decode(folder, latents, latents.device, dtype)))

    def quarters(latents):
        return F.adaptive_avg_pool2d(latents.float(), 2).flatten(1).cpu()  # [N, 16, h, w] -> [N, 64]

    @cache
    def reference():
        return quarters(draw(partial(fgm.sample_ode, teacher, steps=50), samples, first=samples))

    def measure(sampler):
        latents = draw(sampler, samples)
        if judged:
            return judged(decoded(latents))
        return frechet_distance(reference(), quarters(latents))

    scored = scores(teacher, measure)

    def picture(step, generator):
        latents = draw(generator, 8)
        if fgm.process_rank() == 0:
            save_grid(out / f"distill-{step:07d}.png", decoded(latents))
        return scored(step, generator)

    return picture


def geneval(metadata, target, draw):
    """Four images for each line of METADATA.jsonl in GenEval's folder layout: NNNNN/metadata.jsonl and
    NNNNN/samples/0000.png to 0003.png. draw(prompts) -> images [3, H, W]. Raises InputError if it holds no
    prompts."""
    from torchvision.transforms.functional import to_pil_image

    def pick(record):
        return record, prompts.text_of(record["prompt"])

    lines = prompts.read_json_lines(metadata, pick, 'a JSON object with a "prompt"')
    if not lines:
        raise InputError(f"{metadata} holds no prompts")
    images = draw([prompt for _, prompt in lines for _ in range(4)])
    for old in target.glob("[0-9]" * 5):  # the scorer takes every folder that it finds
        shutil.rmtree(old)
    for i, image in enumerate(images):
        folder = target / f"{i // 4:05d}"
        samples = open_folder(folder / "samples")
        if i % 4 == 0:
            with atomically(folder / "metadata.jsonl") as temporary:
                temporary.write_text(json.dumps(lines[i // 4][0]) + "\n")
        with atomically(samples / f"{i % 4:04d}.png") as temporary:
            to_pil_image(image).save(temporary)
    print(f"{len(lines)} prompts, 4 images each, in {target}")
