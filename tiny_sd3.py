"""A complete Stable Diffusion 3 pipeline in miniature, trained on captioned handwritten digits, so that sd3.py runs for real without network or GPU.

    python tiny_sd3.py --out runs/tiny-sd3        # a few minutes on 2 CPU cores
    python sd3.py --model runs/tiny-sd3           # distil it

The folder holds what SD3's holds: transformer (MM-DiT), VAE with 16 latent channels, two CLIP text encoders and T5 with their tokenizers,
scheduler; diffusers' StableDiffusion3Pipeline runs it as it runs any other. Transformer and VAE are trained here, on scikit-learn's 1,797 digits;
the text encoders stay as they are initialised: they tell the prompts apart, which is all that is needed.
"""

import json
import math
import re
import time
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import fgm
from fgm import InputError
from sd3 import SD3Velocity, draw, open_pipeline, quiet

SIZE = 32  # pixels
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATES = ("{}", "the digit {}", "number {}", "a handwritten {}")
STYLES = ("{}, thin", "{}", "{}, bold")

TRANSFORMER = dict(sample_size=4, patch_size=1, in_channels=16, out_channels=16, num_layers=4, num_attention_heads=2, attention_head_dim=16,
                   joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64, pos_embed_max_size=4)  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# Digits, captions, and the judge of both
# ----------------------------------------------------------------------------------------------------------------------


def captions(style, digit):
    """The eight captions of a digit drawn thin (0), normally (1) or boldly (2)."""
    return [STYLES[style].format(template.format(name)) for template in TEMPLATES for name in (NAMES[digit], str(digit))]


PROMPTS = [caption for style in range(3) for digit in range(10) for caption in captions(style, digit)]


@cache
def digits():
    """Real digits: images in -1..1 [1797, 3, 32, 32], labels [1797], styles [1797] (thirds of the amount of ink)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    small = torch.from_numpy(data.images).float()[:, None] / 8 - 1  # values 0..16, [N, 8, 8] -> [N, 1, 8, 8]
    images = F.interpolate(small, size=(SIZE, SIZE), mode="bilinear").expand(-1, 3, -1, -1)
    ink = small.mean((1, 2, 3))
    styles = torch.bucketize(ink, ink.quantile(torch.tensor([1 / 3, 2 / 3])))
    return images.contiguous(), torch.from_numpy(data.target), styles


def pixels(images):
    """Images [N, 3, 32, 32] in -1..1 as the 64 grey values that a digit has: [N, 64]."""
    return F.avg_pool2d(images.mean(1, keepdim=True), SIZE // 8).flatten(1)  # [N, 1, 8, 8] -> [N, 64]


@cache
def classifier():
    from sklearn.svm import SVC

    images, labels, _ = digits()
    return SVC(C=10).fit(pixels(images).numpy(), labels.numpy())


def judge(images, prompts):
    """(share of the images whose digit, as a classifier trained on the real ones reads it, is the prompt's; Frechet distance to the real ones on 64 pixels).

    images: uint8 [N, 3, 32, 32]. Raises InputError for prompts that name no digit."""
    wanted = []
    for prompt in prompts:
        found = [i for i, name in enumerate(NAMES) if re.search(rf"\b({name}|{i})\b", prompt)]
        if len(found) != 1:
            raise InputError(f"the prompt {prompt!r} does not name one digit")
        wanted.append(found[0])
    drawn = pixels(fgm.to_float(images))
    return float((classifier().predict(drawn.numpy()) == np.array(wanted)).mean()), fgm.frechet_distance(pixels(digits()[0]), drawn)


# ----------------------------------------------------------------------------------------------------------------------
# The parts that are not trained: tokenizers and text encoders
# ----------------------------------------------------------------------------------------------------------------------


def text_parts():
    """Two CLIP encoders and T5, with tokenizers that need no download: one piece for each word of the captions, letters for the rest."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    words = sorted({word for prompt in PROMPTS for word in re.findall(r"\w+|,", prompt)})
    letters = list(bytes_to_unicode().values())
    pieces, merges = letters + [letter + "</w>" for letter in letters], []
    for word in words:  # letter by letter from the front, so that every word becomes one piece
        for i in range(1, len(word)):
            end = word[i] + "</w>" * (i + 1 == len(word))
            merges.append((word[:i], end))
            pieces.append(word[:i] + end)
    merges, pieces = list(dict.fromkeys(merges)), [*dict.fromkeys(pieces), "<|startoftext|>", "<|endoftext|>"]
    clip_tokenizer = CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, model_max_length=16)
    t5_pieces = ["<pad>", "</s>", "<unk>", "▁"] + [f"▁{word}" for word in words] + words + sorted({letter for word in words for letter in word} - set(words))
    t5_tokenizer = T5TokenizerFast(vocab=[(piece, 0.0 if i < 3 else -1.0 if len(piece) > 1 else -9.0) for i, piece in enumerate(t5_pieces)], extra_ids=0)
    clip_config = CLIPTextConfig(vocab_size=len(pieces), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, projection_dim=32,
                                 max_position_embeddings=16, bos_token_id=len(pieces) - 2, eos_token_id=len(pieces) - 1, pad_token_id=len(pieces) - 1)  # fmt: skip
    t5_config = T5Config(vocab_size=len(t5_pieces), d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu")
    return dict(text_encoder=CLIPTextModelWithProjection(clip_config).eval(), tokenizer=clip_tokenizer,
                text_encoder_2=CLIPTextModelWithProjection(clip_config).eval(), tokenizer_2=clip_tokenizer,
                text_encoder_3=T5EncoderModel(t5_config).eval(), tokenizer_3=t5_tokenizer)  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The parts that are trained: VAE and transformer
# ----------------------------------------------------------------------------------------------------------------------


def train_vae(steps, batch=64, lr=3e-3):
    """An AutoencoderKL for the digits: 32x32 -> 16 channels of 4x4. Returns it with SD3's shift and scale set, and the rms error of its reconstruction."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(16, 16, 32, 32),
                        layers_per_block=1, latent_channels=16, norm_num_groups=8, sample_size=SIZE, use_quant_conv=False, use_post_quant_conv=False,
                        mid_block_add_attention=False)  # fmt: skip
    images = digits()[0]
    adam = torch.optim.Adam(vae.parameters(), lr=lr)  # a plain loop: the VAE is not what this project is about
    for step in range(steps):
        for group in adam.param_groups:
            group["lr"] = lr * fgm.schedule(step, steps, 20, steps // 2)
        x = images[torch.randint(len(images), (batch,))]
        posterior = vae.encode(x).latent_dist
        error = (vae.decode(posterior.sample()).sample - x).square().mean()
        loss = error + 1e-5 * posterior.kl().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    vae.eval()
    with torch.no_grad():
        latents = vae.encode(images).latent_dist.mean
        rms = (vae.decode(latents).sample - images).square().mean().sqrt().item()
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    return vae, rms


def train_transformer(pipe, kimg, batch, lr, seed):
    """Train the pipeline's transformer by fgm.train_flow on latents and captions; one prompt in ten is empty, for guidance. Returns the seconds spent."""
    images, labels, styles = digits()
    with torch.no_grad():
        latents = (pipe.vae.encode(images).latent_dist.mean - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
        parts = [pipe.encode_prompt(PROMPTS[i : i + 60], None, None, do_classifier_free_guidance=False) for i in range(0, len(PROMPTS), 60)]
        parts.append(pipe.encode_prompt([""], None, None, do_classifier_free_guidance=False))
    embeds, pooled = torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])  # [241, tokens, 32], [241, 32]

    def data(seeds):
        index, choice = seeds % len(latents), seeds // len(latents)
        prompt = styles[index] * 80 + labels[index] * 8 + choice % 8
        prompt = torch.where(choice // 8 % 10 == 0, len(PROMPTS), prompt)
        return latents[index], {"encoder_hidden_states": embeds[prompt], "pooled_projections": pooled[prompt]}

    steps = math.ceil(1000 * kimg / batch)
    _, seconds = fgm.train_flow(SD3Velocity(pipe.transformer.train()), data, steps=steps, batch=batch, lr=lr, betas=(0.9, 0.99), lr_warmup=50,
                                lr_decay=steps * 2 // 3, t_flow=(0.0, 1.0), ema_decay=0.99, seed=seed)  # fmt: skip
    pipe.transformer.eval()
    return seconds


# ----------------------------------------------------------------------------------------------------------------------
# The command
# ----------------------------------------------------------------------------------------------------------------------


def main():
    parser = fgm.Parser(prog="tiny_sd3.py", description="Build and train a miniature Stable Diffusion 3 pipeline on captioned digits.")
    parser.add_argument("--out", default="runs/tiny-sd3", help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace the pipeline in OUT")
    parser.add_argument("--vae-steps", type=fgm.COUNT, default=300, help="training steps of the VAE")
    parser.add_argument("--kimg", type=fgm.AMOUNT, default=96.0, help="thousand images to train the transformer on")
    parser.add_argument("--batch", type=fgm.COUNT, default=32, help="of the transformer's training")
    parser.add_argument("--lr", type=fgm.AMOUNT, default=1e-2, help="of the transformer")
    parser.add_argument("--samples", type=fgm.COUNT, default=240, help="images judged")
    parser.add_argument("--seed", type=int, default=0, help="of weights and all random draws")
    args = parser.parse_args()
    out = Path(args.out)
    if (out / "model_index.json").exists() and not args.overwrite:
        raise InputError(f"{out} holds a pipeline already; --overwrite replaces it")
    out = fgm.open_folder(out)
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    quiet()
    torch.manual_seed(args.seed)
    began = time.perf_counter()
    vae, rms = train_vae(args.vae_steps)
    vae_seconds = time.perf_counter() - began
    transformer = SD3Transformer2DModel(**TRANSFORMER)
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=1.0), vae, **text_parts())
    flow_seconds = train_transformer(pipe, args.kimg, args.batch, args.lr, args.seed)
    pipe.save_pretrained(out)
    (out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in PROMPTS))
    save_images(out / "images")

    prompts = (PROMPTS * math.ceil(args.samples / len(PROMPTS)))[: args.samples]
    pipe = open_pipeline(out, torch.device("cpu"), torch.float32)
    started = time.perf_counter()
    images = draw(pipe, prompts, 28, 4.0, (SIZE, SIZE), args.seed)
    following, distance = judge(images, prompts)
    fgm.save_grid(out / "samples.png", images[:: len(images) // 64 or 1][:64])
    seconds = {"vae": vae_seconds, "transformer": flow_seconds, "scores": time.perf_counter() - started, "all": time.perf_counter() - began}
    scores = {"vae_rms": rms, "following": following, "pixel_frechet": distance, "samples": len(images)}
    fgm.write_json(out / "tiny_sd3.json", scores | {"seconds": seconds, "settings": vars(args)})
    print(f"miniature SD3, {sum(p.numel() for p in transformer.parameters()):,} parameters in the transformer; 28 steps, guidance 4, {len(images)} samples")
    print(f"  {'VAE, rms error':24}{rms:8.4f}\n  {'prompt followed':24}{following:8.1%}\n  {'pixel Frechet distance':24}{distance:8.4f}")
    print("  " + ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + f"; pictures in {out}/samples.png")


def save_images(folder):
    """The real digits as PNG files with captions in metadata.jsonl, for sd3.py --real."""
    from PIL import Image

    images, labels, styles = digits()
    fgm.open_folder(folder)
    lines = []
    for i, (image, label, style) in enumerate(zip(fgm.to_uint8(images), labels.tolist(), styles.tolist(), strict=True)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
        lines.append(json.dumps({"file_name": f"{i:04d}.png", "text": captions(style, label)[i % 8]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    fgm.run(main)
