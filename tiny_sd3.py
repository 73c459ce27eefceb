"""A complete Stable Diffusion 3 pipeline in miniature, for sd3.py to run without network or GPU.

    python tiny_sd3.py --out runs/tiny-sd3        # 10 to 20 minutes on one CPU core
    python sd3.py --model runs/tiny-sd3           # distil it

The folder holds what SD3's holds: transformer (MM-DiT), VAE with 16 latent channels, two CLIP text encoders
and T5 with their tokenizers, scheduler; diffusers' StableDiffusion3Pipeline runs it as it runs any other.
Transformer and VAE are trained here, on scikit-learn's 1,797 digits with captions; the text encoders stay as
they are initialised: they tell the prompts apart, which is all that is needed.

OUT appears when all of it is there. A command that was interrupted is simply given again.
With --hold-out a fifth of the digits is kept from the training and from OUT/images, and sd3.py reports
whether samples are nearer to the digits that were trained on than to those.
"""

import json
import math
import re
import time
from pathlib import Path

import torch

import fgm
from fgm import InputError
from images.data import save_grid, to_uint8
from text2image.digits import PROMPTS, SIZE, captions, digits_to_train_on, judge
from text2image.pipeline import draw, quiet, text_embeddings
from text2image.transformer import SD3Velocity
from training import flags, report
from training.files import atomically, open_folder, write_json
from training.flags import COUNT, RUN_FLAGS, Parser, Setting
from training.progress import bar, batches
from training.run import command, with_sum

CPU = torch.device("cpu")
TRANSFORMER = dict(
    sample_size=4, patch_size=1, in_channels=16, out_channels=16, num_layers=4, num_attention_heads=2,
    attention_head_dim=16, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
    pos_embed_max_size=4)

# ---- The parts that are not trained: tokenizers and text encoders ------------------------------------------


def clip_parts(words):
    """(config of a CLIP encoder, tokenizer): one piece for each word, letters for the rest."""
    from transformers import CLIPTextConfig, CLIPTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    merges = []
    for word in words:
        for i in range(1, len(word)):  # letter by letter from the front, so that every word becomes one piece
            end = "</w>" if i == len(word) - 1 else ""
            merges.append((word[:i], word[i] + end))
    merges = list(dict.fromkeys(merges))  # several words may begin alike

    letters = bytes_to_unicode().values()
    pieces = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges),
              "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)
    config = CLIPTextConfig(
        vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=32, max_position_embeddings=16,
        bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1)
    return config, tokenizer


def t5_parts(words):
    """(config of a T5 encoder, tokenizer): one piece for each word, letters for the rest."""
    from transformers import T5Config, T5TokenizerFast

    letters = sorted({letter for word in words for letter in word} - set(words))
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(f"▁{word}" for word in words), *words, *letters]
    score = -1.0  # the same for all, so that a text is cut into as few pieces as possible
    tokenizer = T5TokenizerFast(vocab=[(piece, score) for piece in pieces], extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=2,
                      feed_forward_proj="gated-gelu")
    return config, tokenizer


def text_parts():
    """Two CLIP encoders and T5, with tokenizers that need no download."""
    from transformers import CLIPTextModelWithProjection, T5EncoderModel

    words = sorted({word for prompt in PROMPTS for word in re.findall(r"\w+|,", prompt)})
    clip_config, clip_tokenizer = clip_parts(words)
    t5_config, t5_tokenizer = t5_parts(words)
    return {
        "text_encoder": CLIPTextModelWithProjection(clip_config).eval(), "tokenizer": clip_tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(clip_config).eval(), "tokenizer_2": clip_tokenizer,
        "text_encoder_3": T5EncoderModel(t5_config).eval(), "tokenizer_3": t5_tokenizer}


# ---- The parts that are trained: VAE and transformer -------------------------------------------------------


def train_vae(images, steps, batch=64, lr=3e-3):
    """An AutoencoderKL for images [N, 3, 32, 32] in -1..1, with 16 channels of 4x4 and SD3's scaling set.

    Returns it and the root mean square error of its reconstruction."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 16, 32, 32), layers_per_block=1, latent_channels=16, norm_num_groups=8,
        sample_size=SIZE, use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False)
    learner = fgm.Learner(vae, lr, (0.9, 0.999), 1e-8)
    for begin in batches(steps * batch, batch, "VAE"):
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().mean()
        (error + 1e-5 * posterior.kl().mean()).backward()
        learner.update(fgm.schedule(begin // batch, steps, 20, 0.5), 1)
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        rms = (vae.decode(latents).sample - images).square().mean().sqrt().item()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae, rms


def train_transformer(pipe, digits, args):
    """Train the pipeline's transformer by fgm.train_flow on latents and captions. Returns the seconds spent.

    digits: images [N, 3, 32, 32], labels [N], styles [N]. One prompt in ten is empty, for guidance."""
    images, labels, styles = digits
    shift, scale = pipe.vae.config.shift_factor, pipe.vae.config.scaling_factor
    with torch.no_grad():
        latents = (pipe.vae.encode(images).latent_dist.mean - shift) * scale
    texts = text_embeddings(pipe, [*PROMPTS, ""], CPU, torch.float32)

    def data(seeds):
        progress.update(len(seeds))
        index, choice = seeds % len(latents), seeds // len(latents)
        prompt = styles[index] * 80 + labels[index] * 8 + choice % 8
        prompt = torch.where(choice // 8 % 10 == 0, len(PROMPTS), prompt)
        return latents[index], {name: column[prompt] for name, column in texts.items()}

    steps = math.ceil(1000 * args.kimg / args.batch)
    with bar("transformer", steps * args.batch) as progress:
        _, seconds = fgm.train_flow(
            SD3Velocity(pipe.transformer.train()), data, steps=steps, batch=args.batch, lr=args.lr,
            betas=(0.9, 0.99), lr_warmup=50, lr_decay=2 / 3, t_flow=(0.0, 1.0), ema_decay=0.99,
            seed=args.seed)
    pipe.transformer.eval()
    return seconds


def train(digits, args):
    """(a pipeline trained on digits, the VAE's root mean square error, {phase: seconds})."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(args.seed)
    began = time.perf_counter()
    vae, rms = train_vae(digits[0], args.vae_steps)
    seconds = {"vae": time.perf_counter() - began}

    transformer = SD3Transformer2DModel(**TRANSFORMER)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe = StableDiffusion3Pipeline(transformer, scheduler, vae, **text_parts())
    seconds["transformer"] = train_transformer(pipe, digits, args)
    return pipe, rms, seconds


# ---- What is written ---------------------------------------------------------------------------------------


def save_images(digits, folder):
    """Digits (images, labels, styles) as PNG files with captions in metadata.jsonl, for sd3.py --real."""
    from torchvision.transforms.functional import to_pil_image

    folder.mkdir()
    images, labels, styles = digits
    lines = []
    rows = zip(to_uint8(images), labels.tolist(), styles.tolist(), strict=True)
    for i, (image, label, style) in enumerate(rows):
        to_pil_image(image).save(folder / f"{i:04d}.png")
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": captions(style, label)[i % 8]}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def score(folder, args):
    """Draw from the pipeline in a folder, judge, and write a picture: {score: value}."""
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(args.samples)]
    images, _ = draw(folder, prompts, 28, 4.0, (SIZE, SIZE), CPU, torch.float32, args.seed, title="scoring")
    images = torch.stack(list(images))
    save_grid(folder / "samples.png", images[::8])  # a prompt of each digit and style
    following, distance = judge(images, prompts)
    return {"following": following, "pixel_frechet": distance, "samples": len(images)}


# ---- The command -------------------------------------------------------------------------------------------

FLAGS = {
    "out": Setting(flags.path, None, "output folder, a new one"),
    "hold_out": Setting(bool, None, "train on four fifths of the digits; sd3.py then reports whether samples "
                               "are copies"),
    "vae_steps": Setting(int, COUNT, "training steps of the VAE"),
    "kimg": Setting(float, flags.POSITIVE, "thousand images to train the transformer on"),
    "batch": Setting(int, "[1, 1e6]", "of the transformer's training"),
    "lr": Setting(float, flags.POSITIVE, "learning rate of the transformer"),
    "samples": Setting(int, "[2, 1e6]", "images scored"),
    "seed": RUN_FLAGS["seed"],
}
DEFAULTS = dict(out="runs/tiny-sd3", vae_steps=300, kimg=96.0, batch=32, lr=1e-2, samples=240, seed=0)


def main():
    parser = Parser(
        {"settings": FLAGS}, prog="tiny_sd3.py",
        description="Build and train a miniature Stable Diffusion 3 pipeline on captioned digits.")
    args = parser.parse_with(lambda given: DEFAULTS)
    out = Path(args.out)
    if out.exists():
        raise InputError(f"{out} exists already: remove it, or name another --out")
    open_folder(out.parent)
    quiet()

    digits = digits_to_train_on(args.hold_out)
    pipe, rms, seconds = train(digits, args)
    with atomically(out) as folder:
        pipe.save_pretrained(folder)
        (folder / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS), encoding="utf-8")
        save_images(digits, folder / "images")

        began = time.perf_counter()
        scores = {"vae_rms": rms, **score(folder, args)}
        seconds = with_sum(seconds | {"scores": time.perf_counter() - began})
        write_json(folder / "tiny_sd3.json", scores | {"seconds": seconds, "settings": vars(args)})

    print(f"miniature SD3, {pipe.transformer.num_parameters():,} parameters in the transformer; "
          f"28 steps, guidance 4, {args.samples} samples")
    print(f"VAE, rms error {rms:.4f}; prompt followed {scores['following']:.1%}; "
          f"pixel Frechet distance {scores['pixel_frechet']:.4f}")
    print(f"{report.spent(seconds)}; pictures in {out}/samples.png")


if __name__ == "__main__":
    command(main)
