"""Stable Diffusion 3 in one step: its MM-DiT distilled by FGM (arXiv 2410.19310, sections 5.2 and B.2) into a pipeline that stock diffusers runs.

    python tiny_sd3.py --out runs/tiny-sd3 && python sd3.py --model runs/tiny-sd3     # the whole method in miniature, no GPU, no network
    torchrun --nproc-per-node 8 sd3.py                                                # SD3-medium, the paper's settings
    python sd3.py --lora 64 --micro-batch 1                                           # SD3-medium on one GPU: one base, two adapters
    python sd3.py --sample "a red fox in the snow" --n 4 --out runs/sd3               # draw from a finished run

The run writes OUT/pipeline; afterwards only diffusers is needed:

    pipe = StableDiffusion3Pipeline.from_pretrained("OUT/pipeline")
    image = pipe("a red fox in the snow", num_inference_steps=1, guidance_scale=0).images[0]
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import math
import os
import random
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

import fgm
from fgm import InputError

# ----------------------------------------------------------------------------------------------------------------------
# SD3's transformer as a velocity network
# ----------------------------------------------------------------------------------------------------------------------

FEATURE_BLOCK = 2  # whose hidden states the discriminator sees (B.2: "layer 2")


class SD3Velocity(nn.Module):
    """An SD3Transformer2DModel as net(x, t, encoder_hidden_states=..., pooled_projections=...) -> v, x [B, 16, H, W], t [B].

    SD3's sigma is our t, its timestep 1000 t (kept in float32: bfloat16 turns 970 into 968), its output noise - x0. With keep_features,
    the image tokens after block 2 of the last call, and its t, are kept in .features [B, H W / 4, D] and .t [B]."""

    def __init__(self, transformer, keep_features=False):
        super().__init__()
        self.net, self.features, self.t = transformer, None, None
        if keep_features:
            transformer.transformer_blocks[FEATURE_BLOCK].register_forward_hook(self.keep)

    @torch.compiler.disable  # inside a compiled graph the old features would be one of its inputs, with the graph that they came from
    def keep(self, block, inputs, output):
        self.features = output[1]

    def forward(self, x, t, encoder_hidden_states, pooled_projections, skip_layers=None):
        self.t = t
        return self.net(hidden_states=x, timestep=1000 * t, encoder_hidden_states=encoder_hidden_states, pooled_projections=pooled_projections,
                        skip_layers=skip_layers, return_dict=False)[0]  # fmt: skip

    def early_exit(self):
        """The blocks that a call for features alone can skip."""
        return list(range(FEATURE_BLOCK + 1, len(self.net.transformer_blocks)))


class LoRALinear(nn.Module):
    """A frozen linear layer plus up(down(x)) of the adapter that is switched on (arXiv 2106.09685, alpha = rank). switch: {"on": name or None}."""

    def __init__(self, base, rank, names, switch):
        super().__init__()
        self.base, self.switch = base, switch
        self.down = nn.ModuleDict({name: nn.Linear(base.in_features, rank, bias=False) for name in names})
        self.up = nn.ModuleDict({name: nn.Linear(rank, base.out_features, bias=False) for name in names})
        for name in names:
            nn.init.normal_(self.down[name].weight, std=base.in_features**-0.5)
            nn.init.zeros_(self.up[name].weight)

    def forward(self, x):
        y, on = self.base(x), self.switch["on"]
        return y if on is None else y + self.up[on](self.down[on](x))


def add_lora(transformer, rank, names=("flow", "generator")):
    """Freeze a transformer and give every linear layer of its blocks' attention and feed-forward parts a LoRA pair for each name. Returns the switch."""
    switch = {"on": None}
    transformer.requires_grad_(False)
    for block in transformer.transformer_blocks:
        for path, module in list(block.named_modules()):
            if isinstance(module, nn.Linear) and not path.startswith("norm"):
                parent, _, name = path.rpartition(".")
                setattr(block.get_submodule(parent), name, LoRALinear(module, rank, names, switch))
    return switch


class Adapter(nn.Module):
    """A shared SD3Velocity with one adapter on (name None: all off, the teacher). Its parameters are those of its adapter alone."""

    def __init__(self, velocity, switch, name):
        super().__init__()
        self.shared = [velocity]  # in a list, so that the shared weights are nobody's parameters
        self.switch, self.name = switch, name
        pairs = {path: module for path, module in velocity.net.named_modules() if isinstance(module, LoRALinear)} if name else {}
        self.paths = list(pairs)
        self.down = nn.ModuleList(module.down[name] for module in pairs.values())
        self.up = nn.ModuleList(module.up[name] for module in pairs.values())

    def forward(self, x, t, **cond):
        with switched(self.switch, self.name):
            return self.shared[0](x, t, **cond)

    features = property(lambda self: self.shared[0].features)
    t = property(lambda self: self.shared[0].t)

    def early_exit(self):
        return self.shared[0].early_exit()


@contextlib.contextmanager
def switched(switch, name):
    before, switch["on"] = switch["on"], name
    try:
        yield
    finally:
        switch["on"] = before


def checkpoint_blocks(transformer, switch):
    """Recompute each block in the backward pass, with the adapter that was on in the forward pass."""

    def checkpointed(block, *inputs):
        name = switch["on"]

        def run(*inputs):
            with switched(switch, name):
                return block(*inputs)

        return torch.utils.checkpoint.checkpoint(run, *inputs, use_reentrant=False)

    transformer.enable_gradient_checkpointing(checkpointed)


def networks(folder, rank, checkpointing, bf16, device, keep_features=False):
    """(teacher, flow, net of the generator), sharded over the processes. rank 0: three transformers; otherwise one, with two LoRA adapters.

    What never trains is held in bfloat16 where the passes are; what trains in float32."""
    from diffusers import SD3Transformer2DModel

    def load(dtype, keep):
        transformer = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer", dtype=dtype)
        return SD3Velocity(transformer.to(device), keep)

    frozen_dtype = torch.bfloat16 if bf16 else torch.float32
    switch = {"on": None}
    if rank:
        shared = load(frozen_dtype, keep_features)
        switch = add_lora(shared.net, rank)
        shared.to(device)
        velocities = [shared]
    else:
        velocities = [load(frozen_dtype, False).requires_grad_(False), load(torch.float32, keep_features), load(torch.float32, False)]
    for velocity in velocities:
        velocity.eval()
        if checkpointing:
            checkpoint_blocks(velocity.net, switch)
        fgm.shard(velocity, velocity.net.transformer_blocks, bf16)
    return tuple(Adapter(shared, switch, name) for name in (None, "flow", "generator")) if rank else tuple(velocities)


def memory_estimate(config, rank, checkpointing, bf16, micro_batch, height, width, text_tokens, guidance, processes, ema):
    """Bytes a process needs at the peak of a step, by arithmetic: {what: bytes}.

    The peak is the start of the generator's backward pass, when the graphs of generator, flow and teacher live together (beside the gradients, where
    they are accumulated). What a transformer block keeps for its backward pass, in numbers of its width d a token: normed inputs, q k v, attention, 4 d
    twice in the feed-forward part, ...: 21 with weights in training, 17 with adapters, 10 frozen, when neither the inputs of linear layers nor what
    multiplies the modulation are needed; autocast's float32 norms add the 2 to 4. 8 more are in use inside a block's backward pass."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        net = SD3Transformer2DModel.from_config(config)
        weights = trained = sum(p.numel() for p in net.parameters())
        if rank:
            add_lora(net, rank, ("flow",))
            trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    number = 2 if bf16 else 4  # bytes of an activation, and of a frozen weight
    state = weights * number + 2 * trained * 12 + trained * (8 if ema else 4)  # weight and two moments of flow and generator; gradients of one of them, EMA
    d = config["num_attention_heads"] * config["attention_head_dim"]
    tokens = height * width // config["patch_size"] ** 2 + text_tokens
    in_training, frozen = (17 if rank else 21) + bf16 * (2 if rank else 4), 10 + bf16 * 2
    teachers = 2 if guidance != 1 else 1  # samples that the teacher sees for one of ours
    at_work = max(in_training + 8, teachers * (frozen + 8)) if checkpointing else teachers * 8
    between = 2 + teachers if checkpointing else in_training + (1 + teachers) * frozen
    blocks = config["num_layers"] * tokens - text_tokens // 2  # the last block only reads the text
    copies = 2 * weights * (1 if checkpointing else 2) if bf16 and not rank and processes == 1 else 0
    unsharded = 2 * weights / config["num_layers"] * number if processes > 1 else 0
    return {"weights, gradients, Adam, EMA": state / processes, "bf16 copies of weights": copies, "unsharded blocks": unsharded,
            "activations": (blocks * between + tokens * at_work) * d * number * micro_batch}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The source pipeline, prompts, embeddings
# ----------------------------------------------------------------------------------------------------------------------


def model_folder(model):
    """The local folder of a pipeline, downloaded if model is a hub id. Raises InputError if it cannot be had or is not an SD3 flow-matching pipeline."""
    folder = Path(model)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        try:
            for turn in range(2):  # one process of each machine downloads, the others then find it there
                if (int(os.environ.get("LOCAL_RANK", 0)) == 0) == (turn == 0):
                    folder = Path(snapshot_download(model, allow_patterns=["model_index.json", "*/*"], ignore_patterns=["*.bin", "*fp16*", "*.msgpack"]))
                if fgm.world() > 1:
                    dist.barrier()
        except Exception as error:  # the hub's errors have no common base
            raise InputError(
                f"{model} is neither a folder nor a model that can be downloaded ({type(error).__name__}). For Stable Diffusion 3, accept its licence on "
                "huggingface.co and log in with `hf auth login`; without network, `python tiny_sd3.py --out runs/tiny-sd3` makes a small model to go on with"
            ) from error
    try:
        parts = json.loads((folder / "model_index.json").read_text())
        kind = parts["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{model} is not a diffusers pipeline: it has no readable model_index.json") from error
    if kind != "StableDiffusion3Pipeline":
        raise InputError(f"{model} is a {kind}; sd3.py distils StableDiffusion3Pipeline")
    for name in ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"):
        if not (folder / name).is_dir() and parts.get(name, [None])[0]:
            raise InputError(f"{model} lacks its component {name}")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")
    if scheduler != "FlowMatchEulerDiscreteScheduler":
        raise InputError(f"{model} samples with {scheduler}: it is no flow-matching model (v = noise - data), which FGM needs")
    return folder


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path} ({type(error).__name__})") from error


def read_json_lines(path, pick, wanted):
    """pick(object) of every line of a JSON-lines file. Raises InputError if it cannot be read, or for a line that pick cannot use: it must be `wanted`."""
    try:
        return [pick(json.loads(line)) for line in Path(path).read_text().splitlines() if line.strip()]
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: every line must be {wanted} ({type(error).__name__}: {error})") from error


def read_prompts(path):
    """The prompts of a text file, one a line, or of a JSON-lines file with a "prompt" or "text" in each. Raises InputError if there are none."""
    if Path(path).suffix in (".jsonl", ".json"):
        prompts = read_json_lines(path, lambda record: record.get("prompt") or record["text"], '{"prompt": ...}')
    else:
        try:
            prompts = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read the prompts {path}: {error}") from error
    if not prompts:
        raise InputError(f"{path} holds no prompts")
    return prompts


def grammar(n=8192, seed=0):
    """n different prompts from templates: objects, counts, colours, positions, scenes, styles."""
    things = "apple bear bench bicycle bird boat book bottle bowl bus cake car cat chair clock cow cup dog donut elephant fox giraffe guitar horse house kite lamp laptop"
    things = (things + " motorcycle mushroom orange owl pizza rabbit robot sheep skateboard sofa suitcase teapot toaster train tree truck umbrella vase zebra").split()
    colours = "red orange yellow green blue purple pink brown black white golden silver".split()
    scenes = ["in the snow", "on a beach", "in a forest", "on a street at night", "in a kitchen", "under a starry sky", "on a wooden table", "in the rain", ""]
    styles = ["a photo of {}", "an oil painting of {}", "a watercolour of {}", "a pencil drawing of {}", "a photo of {}, highly detailed", "{}, studio light", "{}"]
    counts, positions = ["two", "three", "four"], ["left of", "right of", "above", "below", "next to", "behind"]
    choose, found = random.Random(seed), {}
    while len(found) < n:
        a, b = choose.sample(things, 2)
        one, other = choose.sample(colours, 2)
        subject = choose.choice([f"a {a}", f"a {one} {a}", f"{choose.choice(counts)} {a}s", f"a {a} and a {b}", f"a {one} {a} and a {other} {b}",
                                 f"a {a} {choose.choice(positions)} a {b}", f"{choose.choice(counts)} {one} {a}s {choose.choice(positions)} a {other} {b}"])  # fmt: skip
        found[choose.choice(styles).format(f"{subject} {choose.choice(scenes)}".strip())] = None
    return list(found)


SHARD = 128  # prompts a file


def text_pipeline(folder, device, dtype):
    from diffusers import StableDiffusion3Pipeline

    try:
        return StableDiffusion3Pipeline.from_pretrained(folder, transformer=None, vae=None, dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load the text encoders of {folder} ({str(error).splitlines()[0]})") from error


def encode_prompts(folder, prompts, cache, device, dtype, max_length=256):
    """Embed the prompts, and the empty one for guidance, into files of 128 in the folder cache; files that exist are kept. Then the encoders are freed.

    The processes share the work. Raises InputError if cache holds embeddings of another model, other prompts or another precision."""
    from safetensors.torch import save_file

    weights = sorted(path for path in Path(folder).glob("text_encoder*/*") if path.is_file())
    about = {"model": [[str(path.relative_to(folder)), path.stat().st_size] for path in weights], "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
             "number": len(prompts), "dtype": str(dtype), "max_length": max_length}  # fmt: skip
    cache = fgm.open_folder(cache)
    if (cache / "about.json").exists() and (before := read_json(cache / "about.json")) != about:
        differs = ", ".join(name for name in about if before.get(name) != about[name])
        raise InputError(f"{cache} holds embeddings for another {differs}; remove it, or name another folder with --embeddings")
    if fgm.rank() == 0:
        fgm.write_json(cache / "about.json", about)
    shards = [(f"prompts-{i // SHARD:06d}", prompts[i : i + SHARD]) for i in range(0, len(prompts), SHARD)] + [("null", [""])]
    missing = [(name, texts) for name, texts in shards[fgm.rank() :: fgm.world()] if not (cache / f"{name}.safetensors").exists()]
    if missing:
        pipe, truncated = text_pipeline(folder, device, dtype), 0
        for name, texts in missing:
            truncated += sum(len(pipe.tokenizer(text).input_ids) > pipe.tokenizer.model_max_length for text in texts)
            parts = []
            for i in range(0, len(texts), 16):
                with torch.no_grad():
                    embeds, _, pooled, _ = pipe.encode_prompt(texts[i : i + 16], None, None, device=device, do_classifier_free_guidance=False,
                                                              max_sequence_length=max_length)  # fmt: skip
                parts.append((embeds.to(dtype).cpu(), pooled.to(dtype).cpu()))
            embeds, pooled = (torch.cat(part).contiguous() for part in zip(*parts, strict=True))
            save_file({"encoder_hidden_states": embeds, "pooled_projections": pooled}, cache / f"{name}.tmp")
            os.replace(cache / f"{name}.tmp", cache / f"{name}.safetensors")
        if truncated:
            print(f"{truncated} prompts are longer than CLIP's {pipe.tokenizer.model_max_length} tokens and were cut there", file=sys.stderr)
        del pipe
        torch.cuda.empty_cache()
    if fgm.world() > 1:
        dist.barrier()


def quiet():
    """Keep the libraries' progress bars and notices out of ours."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


class Embeddings:
    """Encoded prompts, memory-mapped. Called with indices [B], gives what the network takes: [B, tokens, D] and [B, P] on the device."""

    def __init__(self, cache, number, device):
        from safetensors import SafetensorError, safe_open

        try:
            self.files = [safe_open(Path(cache) / f"prompts-{i:06d}.safetensors", "pt") for i in range(math.ceil(number / SHARD))]
            self.slices = [{name: file.get_slice(name) for name in ("encoder_hidden_states", "pooled_projections")} for file in self.files]
            with safe_open(Path(cache) / "null.safetensors", "pt") as file:
                self.null = {name: file.get_tensor(name).to(device) for name in file.keys()}  # [1, tokens, D], [1, P]
        except (OSError, SafetensorError) as error:
            raise InputError(f"the embeddings in {cache} are damaged ({error}); remove the folder, they are made again") from error
        self.device = device

    def __call__(self, indices):
        rows = [(self.slices[i // SHARD], i % SHARD) for i in indices.tolist()]
        return {name: torch.cat([file[name][i : i + 1] for file, i in rows]).to(self.device) for name in self.null}


# ----------------------------------------------------------------------------------------------------------------------
# The GAN of section B.2, optional
# ----------------------------------------------------------------------------------------------------------------------


class GAN(nn.Module):
    """A light convolutional head on the online flow's block-2 hidden states tells noised real latents from noised generated ones (B.2).

    t is drawn from the flow's own, low-noise distribution. In the flow's update the features of generated latents are those of the pass that the flow
    loss has just made; the real ones, and the generator's, leave the network after block 2. real: latents [N, 16, H, W]; embeddings: of their captions."""

    def __init__(self, width, grid, real, embeddings, t_gan, generator_weight=1e-2, discriminator_weight=5e-2):
        super().__init__()
        inner = min(width, 256)
        self.head = nn.Sequential(nn.Conv2d(width, inner, 3, padding=1), nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, inner, 3, stride=2, padding=1),
                                  nn.GroupNorm(8, inner), nn.SiLU(), nn.Conv2d(inner, 1, 3, padding=1))  # fmt: skip
        self.grid, self.real, self.embeddings, self.t_gan = grid, real, embeddings, t_gan
        self.weights = generator_weight, discriminator_weight

    def logit(self, features):
        b, _, d = features.shape
        return self.head(features.mT.reshape(b, d, *self.grid).float()).mean((1, 2, 3))  # [B, HW/4, D] -> [B, D, H/2, W/2] -> [B]

    def features(self, flow, x0, t, seeds, cond):
        """Hidden states of x0, noised to t with noise that seeds choose, by a pass that stops after block 2."""
        noise = fgm.noise_from(seeds ^ 1, x0.shape[1:], x0.device)
        v = flow(fgm.interpolate(x0, noise, t), t, **cond, skip_layers=flow.early_exit())
        return flow.features + 0 * v.mean()  # FSDP gathers the outermost weights for a backward pass only where it reaches the network's output

    def flow_loss(self, flow, x0, seeds, cond):
        fake, t = flow.features, flow.t
        chosen = seeds % len(self.real)
        real = self.features(flow, self.real[chosen].to(x0.device, torch.float32), t, seeds, self.embeddings(chosen))
        return self.weights[1] * (F.softplus(self.logit(fake)) + F.softplus(-self.logit(real)))

    def generator_loss(self, flow, x0, seeds, cond):
        normal = fgm.noise_from(seeds ^ 2, (1,), x0.device)[:, 0]  # [B, 1] -> [B]
        t = torch.sigmoid(self.t_gan[0] + self.t_gan[1] * normal)
        return self.weights[0] * F.softplus(-self.logit(self.features(flow, x0, t, seeds, cond)))


def load_real(folder, size):
    """(uint8 images [N, 3, H, W], captions) of a folder; captions from metadata.jsonl {"file_name", "text"} or NAME.txt, else empty.

    Raises InputError, naming the file, for unreadable images and those of another size (height, width) than the run's."""
    folder = Path(folder)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not paths:
        raise InputError(f"--real {folder} holds no images (png, jpg, webp)")
    texts = {}
    if (folder / "metadata.jsonl").exists():
        texts = dict(read_json_lines(folder / "metadata.jsonl", lambda record: (record["file_name"], record["text"]), '{"file_name": ..., "text": ...}'))
    images, captions = [], []
    for path in paths:
        image = fgm.read_image(path)
        if image.size != (size[1], size[0]):
            raise InputError(f"{path} is {image.width}x{image.height}, the run makes {size[1]}x{size[0]}; resize the images, or change --height and --width")
        images.append(np.asarray(image))
        beside = path.with_suffix(".txt")
        captions.append(texts.get(str(path.relative_to(folder))) or (beside.read_text().strip() if beside.exists() else ""))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), captions  # [N, H, W, 3] -> [N, 3, H, W]


def encode_images(folder, images, path, device, batch=8):
    """Latents [N, 16, h, w] of uint8 images by the pipeline's VAE, scaled as SD3 scales them; cached in the file path, keyed by the images."""
    from diffusers import AutoencoderKL
    from safetensors import safe_open
    from safetensors.torch import save_file

    key = hashlib.sha256(images.numpy().tobytes() + (Path(folder) / "vae" / "config.json").read_bytes()).hexdigest()
    if path.exists():
        with safe_open(path, "pt") as file:
            if file.metadata().get("images") == key:
                return file.get_tensor("latents")
    if fgm.rank() == 0:
        vae, latents = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(device).eval(), []
        for i in range(0, len(images), batch):
            with torch.no_grad():
                mean = vae.encode(fgm.to_float(images[i : i + batch].to(device))).latent_dist.mean
            latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).cpu())
        save_file({"latents": torch.cat(latents)}, f"{path}.tmp", {"images": key})
        os.replace(f"{path}.tmp", path)
    if fgm.world() > 1:
        dist.barrier()
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents")


# ----------------------------------------------------------------------------------------------------------------------
# Export: a stock pipeline, a LoRA file
# ----------------------------------------------------------------------------------------------------------------------


def link_or_copy(source, target):
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copy2(source, target)


def export(folder, generator, rank, dtype, out):
    """Write OUT/pipeline, which StableDiffusion3Pipeline runs in one step, and OUT/lora.safetensors if rank; every process must call.

    c_in is folded into the weight of the patch embedding, whose input is c_in z; the scheduler's only sigma is t_star = c_out:
    z + (0 - t_star) net(c_in z, t_star) is (B.1) with c_skip 1. dtype: of the weights in the file."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from safetensors.torch import save_file

    weights = {name: fgm.full(value.detach()).cpu() for name, value in (generator.net.shared[0] if rank else generator.net).net.state_dict().items()}
    if fgm.rank():
        return
    lora = {}
    if rank:
        for path in generator.net.paths:
            down, up = weights[f"{path}.down.generator.weight"], weights[f"{path}.up.generator.weight"]
            lora[f"transformer.{path}.lora_A.weight"], lora[f"transformer.{path}.lora_B.weight"] = down.contiguous(), up.contiguous()
            weights[f"{path}.weight"] = weights[f"{path}.base.weight"].float() + up @ down
            if f"{path}.base.bias" in weights:
                weights[f"{path}.bias"] = weights[f"{path}.base.bias"]
        weights = {name: value for name, value in weights.items() if not any(part in name for part in (".base.", ".down.", ".up."))}
        patch = weights["pos_embed.proj.weight"].float()  # [D, 16, 2, 2]
        inputs = patch[0].numel()  # 64: c_in as an exact convolutional LoRA, the identity on a patch times (c_in - 1) of the weight
        lora["transformer.pos_embed.proj.lora_A.weight"] = torch.eye(inputs).view(inputs, *patch.shape[1:])  # [64, 64] -> [64, 16, 2, 2]
        lora["transformer.pos_embed.proj.lora_B.weight"] = ((generator.c_in - 1) * patch).reshape(len(patch), inputs, 1, 1)  # [D, 16, 2, 2] -> [D, 64, 1, 1]
        save_file(lora, f"{out}/lora.tmp", {"t_star": str(generator.t_star)})
        os.replace(f"{out}/lora.tmp", f"{out}/lora.safetensors")
    weights["pos_embed.proj.weight"] = generator.c_in * weights["pos_embed.proj.weight"].float()

    temporary, target = out / "pipeline.tmp", out / "pipeline"
    shutil.rmtree(temporary, ignore_errors=True)
    ours = shutil.ignore_patterns("transformer", "scheduler", "images", "prompts.txt", "tiny_sd3.json", "*.png", ".*", "*.fp16.*")
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


# ----------------------------------------------------------------------------------------------------------------------
# Sampling and scores, by stock diffusers
# ----------------------------------------------------------------------------------------------------------------------


def open_pipeline(folder, device, dtype):
    from diffusers import StableDiffusion3Pipeline

    try:
        pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"cannot load the pipeline {folder} ({str(error).splitlines()[0]})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts, steps, guidance, size, seed=0, batch=50):
    """One uint8 image [3, H, W] a prompt, stacked; image i depends on (seed + i, its prompt) alone, whatever the batch."""
    images = []
    for i in range(0, len(prompts), batch):
        texts = prompts[i : i + batch]
        seeds = torch.arange(seed + i, seed + i + len(texts))
        shape = (pipe.transformer.config.in_channels, size[0] // pipe.vae_scale_factor, size[1] // pipe.vae_scale_factor)
        latents = fgm.noise_from(seeds, shape, pipe.device).to(pipe.transformer.dtype)
        with torch.no_grad():
            result = pipe(texts, num_inference_steps=steps, guidance_scale=guidance, latents=latents, height=size[0], width=size[1], output_type="pt").images
        images.append((result * 255).round().clamp(0, 255).to(torch.uint8).cpu())
    return torch.cat(images)


def geneval(pipe, metadata, target, steps, guidance, size, seed):
    """GenEval's folder layout: NNNNN/metadata.jsonl and NNNNN/samples/0000.png to 0003.png for each line of METADATA.jsonl."""
    from PIL import Image

    lines = read_json_lines(metadata, lambda record: (record, record["prompt"]), 'a JSON object with a "prompt"')
    if not lines:
        raise InputError(f"{metadata} holds no prompts")
    for i, (line, prompt) in enumerate(lines):
        folder = fgm.open_folder(target / f"{i:05d}")
        fgm.open_folder(folder / "samples")
        (folder / "metadata.jsonl").write_text(json.dumps(line) + "\n")
        for k, image in enumerate(draw(pipe, [prompt] * 4, steps, guidance, size, seed + 4 * i)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / "samples" / f"{k:04d}.png")
    print(f"{len(lines)} prompts, 4 images each, in {target}")


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------

# The paper's settings (section 5.2, B.2); it gives no length, EMA decay or warm-up: those are ours.
PAPER = dict(height=1024, width=1024, guidance=4.0, batch=192, kimg=1920, lr=5e-6, flow_lr=5e-6, lr_warmup=0, lr_decay=0.0, clip=None, ema=0.999, t_star=0.97, c_in=0.8,
             l1_weight=0.0, weight="none", t_generator=(2.4, 1.0), t_flow=(-1.0, 2.0), loss_scale=100.0, flow_updates=1, samples=8, save_every=250, log_every=10,
             picture_every=250)  # fmt: skip
# Measured on the miniature of tiny_sd3.py, on a laptop's budget.
TINY = PAPER | dict(height=32, width=32, batch=24, kimg=4.8, lr=2e-3, flow_lr=2e-3, lr_warmup=20, lr_decay=0.7, ema=0.95, l1_weight=1.0, t_generator=(0.0, 2.0),
                    samples=500, save_every=100, picture_every=100)  # fmt: skip


def arguments():
    parser = fgm.Parser(prog="sd3.py", description="Distil Stable Diffusion 3 into a one-step pipeline (FGM, arXiv 2410.19310).",
                        epilog="The defaults shown are for SD3; name a folder of tiny_sd3.py with --model to see the miniature's.")  # fmt: skip
    add = parser.add_argument_group("model and prompts").add_argument
    add("--model", default="stabilityai/stable-diffusion-3-medium-diffusers", help="hub id, or folder of a StableDiffusion3Pipeline")
    add("--prompts", metavar="FILE", help="txt or jsonl, one prompt a line (default: the model's own prompts.txt, or a built-in grammar)")
    add("--embeddings", metavar="DIR", help="cache of encoded prompts (default: OUT/embeddings)")
    add("--height", type=fgm.COUNT, help="of the images, in pixels")
    add("--width", type=fgm.COUNT, help="of the images, in pixels")
    add = parser.add_argument_group("run").add_argument
    add("--out", default="runs/sd3", help="output folder")
    fgm.add_run_flags(add)
    add("--picture-every", type=fgm.COUNT, metavar="STEPS", help="distillation steps between pictures")
    add("--paper", action="store_true", help="the paper's settings on any model")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations in the backward pass (default: on a GPU)")
    add = parser.add_argument_group("distillation (Algorithm 1; section 5.2, B.2; on a GPU the micro-batch is 4 unless told)").add_argument
    add("--lora", type=fgm.COUNT, metavar="RANK", help="one base and two LoRA adapters instead of three networks")
    add("--guidance", type=float, help="classifier-free guidance of the teacher")
    add("--kimg", type=fgm.AMOUNT, help="thousand images to distil with")
    fgm.add_distillation_flags(add)
    add = parser.add_argument_group("GAN (B.2)").add_argument
    add("--real", metavar="DIR", help="real images, captions in metadata.jsonl or NAME.txt; turns the GAN on")
    add("--gan-generator", type=float, default=1e-2, help="weight in the generator's loss")
    add("--gan-discriminator", type=float, default=5e-2, help="weight in the flow's loss")
    add = parser.add_argument_group("scores, and drawing samples from a finished run").add_argument
    add("--samples", type=fgm.COUNT, help="images drawn for the scores")
    add("--sample", metavar="PROMPT", help="draw images of PROMPT from the run in OUT")
    add("--n", type=fgm.COUNT, default=4, help="number of images for --sample")
    add("--steps", type=fgm.COUNT, metavar="K", help="draw from the teacher with K steps and guidance instead")
    add("--geneval", metavar="METADATA.jsonl", help="draw 4 images a prompt into OUT/geneval, in the layout of GenEval's scorer")
    args = parser.parse_with(lambda given: TINY if (Path(given.model) / "tiny_sd3.json").exists() and not given.paper else PAPER)
    if args.height % 16 or args.width % 16:
        raise InputError(f"height and width must be divisible by 16, got {args.height} and {args.width}")
    return args


def print_memory(args, config, bf16, text_tokens, latent):
    parts = memory_estimate(config, args.lora, args.checkpointing, bf16, args.micro_batch or args.batch // fgm.world(), *latent, text_tokens, args.guidance, fgm.world(),
                            args.ema is not None)  # fmt: skip
    total = sum(parts.values())
    print(f"memory a process, estimated: {total / 1e9:.2f} GB (" + ", ".join(f"{name} {value / 1e9:.2f}" for name, value in parts.items() if value) + ")")
    if torch.cuda.is_available() and total > (available := torch.cuda.mem_get_info()[1]):
        print(f"that is more than the {available / 1e9:.0f} GB of the device: try --lora 64, --micro-batch 1, --checkpointing, a smaller size, or more processes")


def main():
    args = arguments()
    device = fgm.setup(args.device)
    quiet()
    bf16 = fgm.wants_bf16(args.precision, device)
    dtype = torch.bfloat16 if bf16 else torch.float32
    size, out = (args.height, args.width), Path(args.out)
    if args.sample or args.geneval:
        source = model_folder(args.model) if args.steps else out / "pipeline"
        if not source.is_dir():
            raise InputError(f"{source} does not exist: the run has not finished, or --out names another folder")
        if not args.steps and (out / "config.json").exists():
            trained = read_json(out / "config.json")["settings"]
            size = (trained["height"], trained["width"])
        pipe, steps, guidance = open_pipeline(source, device, dtype), args.steps or 1, args.guidance if args.steps else 0
        if args.geneval:
            return geneval(pipe, args.geneval, out / (f"geneval-{steps}-steps" if args.steps else "geneval"), steps, guidance, size, args.seed)
        fgm.save_grid(fgm.open_folder(out) / "sample.png", draw(pipe, [args.sample] * args.n, steps, guidance, size, args.seed, batch=4), min(args.n, 8))
        return print(f"{args.n} images: {out}/sample.png")

    folder = model_folder(args.model)
    if args.micro_batch is None and device.type == "cuda":
        args.micro_batch = 4
    fgm.micro_batches(args.batch, args.micro_batch)
    prompts_file = args.prompts or (folder / "prompts.txt" if (folder / "prompts.txt").exists() else None)
    prompts = read_prompts(prompts_file) if prompts_file else grammar()
    if not prompts_file and fgm.rank() == 0:
        print(f"no --prompts given: {len(prompts)} prompts from the built-in grammar, such as {prompts[0]!r}")
    if args.checkpointing is None:
        args.checkpointing = device.type == "cuda"
    config = read_json(folder / "transformer" / "config.json")
    scale = 2 ** (len(read_json(folder / "vae" / "config.json")["block_out_channels"]) - 1)
    shape = (config["in_channels"], args.height // scale, args.width // scale)
    patch = config["patch_size"]
    if shape[1] // patch > config["pos_embed_max_size"] or shape[2] // patch > config["pos_embed_max_size"]:
        raise InputError(f"{args.height}x{args.width} is larger than {args.model} can make: its largest side is {config['pos_embed_max_size'] * patch * scale}")
    real, captions = load_real(args.real, size) if args.real else (None, [])
    out = fgm.open_folder(out)

    torch.manual_seed(args.seed)
    cache = Path(args.embeddings or out / "embeddings")
    encode_prompts(folder, prompts, cache, device, dtype)
    embeddings = Embeddings(cache, len(prompts), device)
    if fgm.rank() == 0:
        print_memory(args, config, bf16, embeddings.null["encoder_hidden_states"].shape[1], shape[1:])
    teacher, flow, net = networks(folder, args.lora, args.checkpointing, bf16, device, keep_features=bool(args.real))
    generator = fgm.OneStepGenerator(net, args.t_star, args.c_in)
    gan = None
    if args.real:
        encode_prompts(folder, captions, out / "captions", device, dtype)
        latents = encode_images(folder, real, out / "latents.safetensors", device)
        width, grid = config["num_attention_heads"] * config["attention_head_dim"], (shape[1] // patch, shape[2] // patch)
        told = Embeddings(out / "captions", len(captions), device)
        gan = GAN(width, grid, latents, told, args.t_flow, args.gan_generator, args.gan_discriminator).to(device)
        fgm.shard(gan.head)

    def picture(step, generator):
        chosen = torch.arange(8) % len(prompts)
        latents = generator(fgm.noise_from(torch.arange(8), shape, device), **embeddings(chosen))
        if fgm.rank() == 0:
            fgm.save_grid(out / f"distill-{step:07d}.png", decode(folder, latents))

    steps = math.ceil(args.kimg * 1000 / args.batch)
    generator, distill_seconds = fgm.distill(
        fgm.guided(teacher, args.guidance, embeddings.null), generator, flow, shape, conditions=lambda seeds: embeddings(seeds % len(prompts)), eps=1e-6,
        extra=gan, picture_every=args.picture_every, picture=picture,
        notes={"model": str(args.model), "lora": args.lora, "prompts": len(prompts), "guidance": args.guidance, "height": args.height, "width": args.width,
               "real": args.real, "gan": [args.gan_generator, args.gan_discriminator]}, **fgm.distillation_settings(args, steps, out))  # fmt: skip
    fgm.save_weights(generator.net, out / "generator.safetensors")
    export(folder, generator, args.lora, dtype, out)
    coefficients = generator.coefficients()
    del teacher, flow, net, generator, gan  # the device is for the pipelines now
    if fgm.rank() == 0:
        torch.cuda.empty_cache()
        score(args, folder, prompts, device, dtype, size, distill_seconds, coefficients, out)


def decode(folder, latents):
    """uint8 images [N, 3, H, W] of latents [N, 16, h, w] by the pipeline's VAE, which is loaded for it."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").to(latents.device).eval()
    with torch.no_grad():
        x = torch.cat([vae.decode(part / vae.config.scaling_factor + vae.config.shift_factor).sample for part in latents.float().split(4)])
    return fgm.to_uint8(x).cpu()


def score(args, folder, prompts, device, dtype, size, distill_seconds, coefficients, out):
    """Draw with stock diffusers from the source pipeline (28 steps with guidance, and 1) and from OUT/pipeline; write pictures and files, print the table.

    On the miniature the digits are judged as well; other models have no metric here (see --geneval)."""
    miniature = (folder / "tiny_sd3.json").exists()
    chosen = list(itertools.islice(itertools.cycle(prompts), args.samples))
    rows, began = {}, time.perf_counter()
    ways = ("teacher, 28 steps", folder, 28, args.guidance), ("teacher, 1 step", folder, 1, args.guidance), ("one step", out / "pipeline", 1, 0)
    for name, source, steps, guidance in ways:
        pipe = open_pipeline(source, device, dtype)
        started = time.perf_counter()
        images = draw(pipe, chosen, steps, guidance, size, args.seed, batch=50 if miniature else 4)
        rows[name] = {"seconds_per_image": (time.perf_counter() - started) / len(chosen)}
        del pipe
        fgm.save_grid(out / f"{name.replace(', ', '-').replace(' ', '-')}.png", images[:240:8] if miniature else images[:8])
        if miniature:
            import tiny_sd3

            rows[name]["following"], rows[name]["pixel_frechet"] = tiny_sd3.judge(images, chosen)
    metric = "pixel_frechet" if miniature else "seconds_per_image"
    seconds = {"distillation": distill_seconds, "scores": time.perf_counter() - began}
    fgm.write_json(out / "config.json", {"generator": coefficients, "settings": vars(args), "torch": torch.__version__, "processes": fgm.world()})
    teacher = {"1": rows["teacher, 1 step"][metric], "28": rows["teacher, 28 steps"][metric]}
    one = rows["one step"][metric]
    fgm.write_json(out / "metrics.json", {"metric": metric, "samples": len(chosen), "teacher": teacher, "one_step": one, "rows": rows, "seconds": seconds})
    print(f"{args.model}: {len(chosen)} samples")
    print(f"  {'':20}" + f"{'prompt followed':>17}{'pixel Frechet distance':>25}" * miniature + f"{'seconds an image':>19}")
    for name, row in rows.items():
        print(f"  {name:20}" + (f"{row['following']:17.1%}{row['pixel_frechet']:25.4f}" if miniature else "") + f"{row['seconds_per_image']:19.4f}")
    print("  " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + f"; pipeline, pictures and metrics.json in {out}")


if __name__ == "__main__":
    fgm.run(main)
