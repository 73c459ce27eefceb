"""SD3 in miniature: gradients of both memory recipes, export to diffusers, caches, the whole command."""

import contextlib
import copy
import gc
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SHAPES
from diffusers import AutoencoderKL, SD3Transformer2DModel
from helpers import ROOT, assert_refused, drive, drive_here
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import CLIPTextModelWithProjection, T5EncoderModel

import bench
import fgm
import sd3
from images.data import save_grid, to_uint8
from text2image import pipeline, prompts
from text2image.digits import PROMPTS, captioned_digits, captions, judge
from text2image.pipeline import draw, export
from text2image.prompts import (
    ENCODERS,
    Rows,
    encode_prompts,
    grammar,
    load_component,
    load_pipeline,
)
from text2image.transformer import memory_around, memory_estimate, networks
from training import progress
from training.files import save_tensors
from training.gan import GAN
from training.run import noise_from

SMALL = [
    "--kimg", "0.048", "--batch", "8", "--samples", "6", "--save-every", "3", "--picture-every", "6",
    "--device", "cpu",
]
CPU = torch.device("cpu")
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES)


@pytest.fixture(scope="session")
def embeddings(model, tmp_path_factory):
    """Of the prompts, by the text encoders that all shapes share."""
    cache = tmp_path_factory.mktemp("embeddings")
    return encode_prompts(model, PROMPTS, cache, CPU, torch.float32)


def shaken(*nets):
    """Networks whose adapters, or weights, have all moved, so that nothing is zero or equal."""
    torch.manual_seed(1)
    for p in {id(p): p for net in nets for p in net.parameters()}.values():
        p.data.add_(0.05 * torch.randn_like(p))
    return nets


def losses(teacher, flow, net, cond, null, guidance=4.0, c_in=0.8):
    """One flow loss and one FGM loss of fixed draws; gradients are left in the networks."""
    generator = fgm.OneStepGenerator(net, 0.97, c_in)
    dtype = next(net.parameters()).dtype
    z, noise = (noise_from(torch.arange(i, i + 3), (16, 4, 4), "cpu").to(dtype) for i in (0, 10))
    t = torch.tensor([0.2, 0.6, 0.95])
    with torch.no_grad():
        x0 = generator(z, **cond)
    fgm.reflow_loss(flow, x0, noise, t, **cond).mean().backward()
    with fgm.frozen(teacher, flow):
        guided = fgm.Guided(teacher, guidance, null)
        l1, l2 = fgm.fgm_losses(guided, flow, generator(z, **cond), noise, t, **cond)
        (l2 - 0.4 * l1).mean().backward()


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# The recipes


@pytest.mark.parametrize("checkpointing", [False, True])
@ALL_SHAPES
def test_two_adapters_equal_three_networks(models, embeddings, shape, checkpointing):
    model, cond = models[shape], embeddings(torch.tensor([0, 90, 200]))
    teacher, flow, net = networks(model, 4, checkpointing, False, CPU)
    shaken(flow, net)
    plain = networks(model, 4, False, False, CPU)[1:]
    apart = []
    for adapter, source in zip(plain, (flow, net), strict=True):  # whole networks, the other adapter unused
        for mine, moved in zip(adapter.parameters(), source.parameters(), strict=True):
            mine.data.copy_(moved)
        apart.append(copy.deepcopy(adapter))
    base = networks(model, 0, False, False, CPU)[0]
    assert apart[0].shared[0] is not apart[1].shared[0]
    losses(teacher, flow, net, cond, embeddings.null)
    losses(base, *apart, cond, embeddings.null)
    for mine, theirs in zip((flow, net), apart, strict=True):
        assert len(gradients(mine)) == sum(p.numel() for p in mine.parameters()) > 1000
        assert relative(gradients(mine), gradients(theirs)) < 1e-6
    assert relative(gradients(flow), gradients(net)) > 0.1
    assert all(p.grad is None for p in flow.shared[0].parameters() if not p.requires_grad)
    second = [path for path in flow.paths if "attn2" in path]
    assert len(second) == (8 if shape == "3.5-medium" else 0)  # q, k, v and output of two blocks


@ALL_SHAPES
def test_checkpointing_changes_no_gradient(models, embeddings, shape):
    model, cond, found = models[shape], embeddings(torch.tensor([5, 100, 239])), []
    for checkpointing in (False, True):
        teacher, flow, net = networks(model, 0, checkpointing, False, CPU)
        shaken(flow, net)
        losses(teacher, flow, net, cond, embeddings.null)
        assert all(p.grad is None for p in teacher.parameters())
        found.append(torch.cat([gradients(flow), gradients(net)]))
    assert relative(found[1], found[0]) < 1e-6


@ALL_SHAPES
def test_bf16_gradient_is_near_that_of_fp32_and_the_timestep_stays_float32(models, embeddings, shape):
    model, cond, found = models[shape], embeddings(torch.tensor([0, 90, 200])), []
    for bf16 in (False, True):
        teacher, flow, net = networks(model, 0, False, bf16, CPU)
        shaken(flow, net)
        seen = []

        def record(module, args, kwargs, seen=seen):
            seen.append(kwargs["timestep"])

        for velocity in (teacher, flow, net):
            velocity.net.register_forward_pre_hook(record, with_kwargs=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses(teacher, flow, net, cond, embeddings.null)
        assert all(t.dtype == torch.float32 for t in seen)
        assert any(torch.equal(t, torch.full_like(t, 970.0)) for t in seen)
        found.append(gradients(net))
    assert next(teacher.parameters()).dtype == torch.bfloat16 and found[1].dtype == torch.float32
    # Random weights differ a little more; a timestep in bfloat16, by 0.18.
    assert 1e-5 < relative(found[1], found[0]) < (0.03 if shape == "3-medium" else 0.06)


RANKS = '''
import sys
from pathlib import Path

import torch

import fgm
from text2image import prompts
from training import run
from training.gan import GAN
from text2image.transformer import networks
from text2image.digits import PROMPTS
from text2image.prompts import encode_prompts
from text2image.real import encode_images


def parameters(nets):
    named = ((f"{name}.{key}", p) for name, net in nets.items() for key, p in net.named_parameters())
    return {name: fgm.gathered(p.detach()).clone() for name, p in named}


def moved(model, embeddings, lora_rank, out):
    """{name: how far a step moves this weight}: with checkpointing, accumulation and the GAN."""
    torch.manual_seed(0)
    teacher, flow, net = networks(model, lora_rank, True, False, "cpu", keep_features=True)
    paths = [model / "images" / f"{i:04d}.png" for i in range(5)]
    found = []
    for prompts.ROWS_PER_FILE in (2, 128):  # three files, shared by the processes; one file
        folder = Path(out).with_suffix(f".{model.parent.name}-{fgm.world_size()}-{prompts.ROWS_PER_FILE}")
        latents = encode_images(model, paths, (32, 32), (16, 4, 4), folder, "cpu", torch.float32)
        found.append(latents(torch.arange(5))["latents"])
        made = len(list(folder.iterdir()))
        assert made == len(latents.slices) == -(-5 // prompts.ROWS_PER_FILE), made
    assert torch.equal(*found)

    def real(seeds):
        return latents(seeds % 5)["latents"], embeddings(seeds % 5)

    gan = GAN(32, real, (-1.0, 2.0), 2e-3, 1e-2, (4, 4))
    run.shard(gan.head)
    nets = {"flow": flow, "net": net, "gan": gan}
    before = parameters(nets)
    guided, generator = fgm.Guided(teacher, 4.0, embeddings.null), fgm.OneStepGenerator(net, 0.97, 0.8)
    fgm.distill(
        guided, generator, flow, (16, 4, 4), steps=1, batch=8, micro_batch=2, lr=1e7, flow_lr=1e7,
        eps=1e6, conditions=lambda seeds: embeddings(seeds % 240), l1_weight=-0.4, extra=gan, ema_decay=None,
        precision="fp32",
    )
    return {name: value - before[name] for name, value in parameters(nets).items()}


def main():
    cache, out, *models = sys.argv[1:]
    run.GATHERED_WHOLE = 0  # block by block, as a large network
    run.setup("cpu")
    embeddings, found = encode_prompts(Path(models[0]), PROMPTS, Path(cache), "cpu", torch.float32), {}
    for model in models:
        for lora_rank in (0, 4):
            found[model, lora_rank] = moved(Path(model), embeddings, lora_rank, out)
    if fgm.process_rank() == 0:
        torch.save(found, out)


if __name__ == "__main__":
    run.command(main)
'''


def test_two_processes_move_the_weights_as_one(models, tmp_path, monkeypatch):
    """With Adam's epsilon far above the gradients, a step moves each weight by its gradient times a constant.

    Both recipes, on the shape that has all kinds of blocks; the micro-batches are of the same samples."""
    (tmp_path / "ranks.py").write_text(RANKS)
    arguments = tmp_path / "cache", tmp_path / "moved.pt", models["3.5-medium"]
    done = drive(tmp_path / "ranks.py", *arguments, processes=2, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "moved.pt")
    spec = importlib.util.spec_from_file_location("ranks", tmp_path / "ranks.py")
    ranks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ranks)
    monkeypatch.setattr(prompts, "ROWS_PER_FILE", 128)
    embeddings = encode_prompts(models["3.5-medium"], PROMPTS, tmp_path / "cache", CPU, torch.float32)
    assert len(found) == 2
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has: other sums of float32 differ by 2e-6
    moved = [ranks.moved(Path(model), embeddings, rank, tmp_path / "moved.pt") for model, rank in found]
    torch.set_num_threads(threads)
    for ((model, lora_rank), shared), alone in zip(found.items(), moved, strict=True):
        for part in ("flow.", "net.", "gan."):
            one, two = (torch.cat([value.flatten() for name, value in side.items() if name.startswith(part)])
                        for side in (alone, shared))
            assert one.norm() > 0 and relative(two, one) < 1e-6, (model, lora_rank, part)


def test_a_step_makes_no_needless_pass(model, embeddings):
    teacher, flow, net = networks(model, 0, False, False, CPU)
    passes = []
    for name, velocity in (("teacher", teacher), ("flow", flow), ("generator", net)):

        def record(module, inputs, name=name):
            passes.append((name, len(inputs[0])))

        velocity.register_forward_pre_hook(record)
    guided, generator = fgm.Guided(teacher, 4.0, embeddings.null), fgm.OneStepGenerator(net, 0.97, 0.8)
    conditions = lambda seeds: embeddings(seeds % 240)  # noqa: E731
    settings = dict(steps=2, batch=2, conditions=conditions, t_flow=(-1.0, 2.0))
    fgm.distill(guided, generator, flow, (16, 4, 4), **settings)
    expected = [("flow", 2), ("flow", 2), ("generator", 2), ("teacher", 4)]
    assert sorted(passes[:4]) == sorted(passes[4:]) == expected


# The GAN


@ALL_SHAPES
def test_gan_losses_against_plain_mathematics(models, embeddings, tmp_path, shape):
    """The head sees block 2's hidden states at the t of the flow's pass; gradients reach x0 by all paths.

    Both terms are per element: times the 256 numbers of a latent beside FGM's sums over them."""
    _, flow, _ = networks(models[shape], 0, True, False, CPU, keep_features=True)
    shaken(flow)
    torch.manual_seed(2)
    real = torch.randn(5, 16, 4, 4)
    save_tensors({"latents": real}, tmp_path / "latents.safetensors")
    rows = Rows([tmp_path / "latents.safetensors"], 5, {"latents": (16, 4, 4)}, CPU)
    gan = GAN(32, lambda seeds: (rows(seeds % 5)["latents"], embeddings(seeds % 5)), (-1.0, 2.0), 0.5, 0.25,
              (4, 4))
    seeds, cond = torch.tensor([7, 11]), embeddings(torch.tensor([3, 4]))
    x0, noise = torch.randn(2, 16, 4, 4, requires_grad=True), torch.randn(2, 16, 4, 4)
    t = torch.tensor([0.1, 0.4])

    def hidden(xt, t, cond):  # blocks 0 to 2, called one by one
        net = flow.net
        h, c = net.pos_embed(xt), net.context_embedder(cond["encoder_hidden_states"])
        e = net.time_text_embed(1000 * t, cond["pooled_projections"])
        for block in net.transformer_blocks[:3]:
            c, h = block(hidden_states=h, encoder_hidden_states=c, temb=e)
        return gan.head(h.mT.reshape(len(h), 32, 4, 4)).mean((1, 2, 3))

    fgm.reflow_loss(flow, x0.detach(), noise, t, **cond)
    found = gan.flow_loss(flow, x0.detach(), seeds, cond)
    chosen = seeds % 5
    noised = fgm.interpolate(real[chosen], noise_from(seeds ^ 1, (16, 4, 4), "cpu"), t)
    fake_logit = hidden(fgm.interpolate(x0.detach(), noise, t), t, cond)
    real_logit = hidden(noised, t, embeddings(chosen))
    expected = -256 * 0.25 * (torch.log(torch.sigmoid(-fake_logit)) + torch.log(torch.sigmoid(real_logit)))
    torch.testing.assert_close(found, expected)

    found = gan.generator_loss(flow, x0, seeds, cond)
    t = torch.sigmoid(-1 + 2 * noise_from(seeds ^ 2, (1,), "cpu")[:, 0])
    noised = fgm.interpolate(x0, noise_from(seeds ^ 1, (16, 4, 4), "cpu"), t)
    expected = -256 * 0.5 * torch.log(torch.sigmoid(hidden(noised, t, cond)))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss.sum(), x0)[0] for loss in (found, expected))
    assert ours.norm() > 0 and relative(ours, theirs) < 1e-5


class Still(torch.nn.Module):
    """A flow of velocity 0 whose features are its input, one token a position."""

    def forward(self, x, t):
        return 0 * x

    def features_of(self, x, t):
        return x.flatten(2).mT  # [B, 16, H, W] -> [B, HW, 16]


@pytest.mark.parametrize("side", [4, 16])
def test_ratio_of_the_gans_gradient_to_that_of_l2_by_hand(side):
    """At t = 0.5 with a linear head w near 0, where the sigmoid is 1/2, the GAN's gradient at a position is
    0.01 D w / (4 H W), its norm 0.04 |w| sqrt(H W); for a teacher u everywhere L2's is 2 u, 8 u sqrt(H W)."""
    gan = GAN(16, None, (0.0, 0.0), grid=(side, side))
    gan.head = torch.nn.Conv2d(16, 1, 1)
    torch.nn.init.constant_(gan.head.weight, 1e-3)  # norm 4e-3
    torch.nn.init.zeros_(gan.head.bias)
    x0, noise = torch.randn(2, 2, 16, side, side)
    x0, flow, t = x0.requires_grad_(), Still(), torch.tensor([0.2, 0.9])
    _, l2 = fgm.fgm_losses(lambda x, t: 0 * x + 0.5, flow, x0, noise, t)
    extra = gan.generator_loss(flow, x0, torch.tensor([1, 2]), {})
    l2_norm, gan_norm = (torch.autograd.grad(loss.sum(), x0)[0].norm() / 2**0.5 for loss in (l2, extra))
    assert l2_norm.item() == pytest.approx(2 * 0.5 * 4 * side, rel=1e-5)
    assert (gan_norm / l2_norm).item() == pytest.approx(0.04 * 4e-3 / (8 * 0.5), rel=2e-3)


# Compilation


def test_every_matrix_product_is_in_a_compiled_graph():
    """With checkpointing and LoRA, where recomputation once left the blocks uncompiled."""
    config = SHAPES["3.5-medium"] | {"num_layers": 1}
    _, flow, _, shape, _, conditions = bench.miniature(CPU, 2, 4, False, True, config)

    def backend(graph, inputs):
        def inside(*values):
            with record_function("compiled"):
                return graph(*values)

        return inside

    flow.compile(backend=backend)
    x0, noise, t, cond = torch.randn(2, *shape), torch.randn(2, *shape), torch.rand(2), conditions([0, 1])
    for profiled in (contextlib.nullcontext(), profile(activities=[ProfilerActivity.CPU])):  # traced, run
        with profiled:
            fgm.reflow_loss(flow, x0, noise, t, **cond).sum().backward()
    products = "aten::linear", "aten::conv2d", "aten::scaled_dot_product_attention"
    inside = []
    for event in profiled.events():
        if event.name in products:
            while event and event.name != "compiled":
                event = event.cpu_parent
            inside.append(event is not None)
    assert len(inside) > 50 and sum(inside) >= 0.95 * len(inside)


# Export


@pytest.mark.parametrize("lora_rank", [0, 4])
@ALL_SHAPES
def test_stock_pipeline_draws_what_our_generator_draws(models, embeddings, tmp_path, shape, lora_rank):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    model = models[shape]
    _, _, net = networks(model, lora_rank, False, False, CPU)
    shaken(net)
    generator = fgm.OneStepGenerator(net, 0.97, 0.8)
    export(model, generator, lora_rank, torch.float32, tmp_path)
    z = noise_from(torch.arange(3), (16, 4, 4), CPU)
    index = torch.tensor([0, 90, 200])
    with torch.no_grad():
        expected = generator(z, **embeddings(index))
    texts = [PROMPTS[i] for i in index.tolist()]

    def latents(pipe):
        return pipe(
            texts, num_inference_steps=1, guidance_scale=0, latents=z, height=32, width=32,
            output_type="latent",
        ).images

    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    assert (latents(pipe) - expected).abs().max() < 1e-5 * expected.abs().max()
    source = StableDiffusion3Pipeline.from_pretrained(model)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "pipeline", subfolder="scheduler")
    source.scheduler = scheduler
    assert (latents(source) - expected).abs().max() > 0.01  # the source does not
    if lora_rank:
        source.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        assert (latents(source) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_stock_pipeline_draws_the_size_that_it_was_distilled_at(models, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    model = models["3.5-large"]  # whose own size is 32
    generator = fgm.OneStepGenerator(networks(model, 0, False, False, CPU)[2], 0.97, 0.8)
    export(model, generator, 0, torch.float32, tmp_path, (16, 8, 8))
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    z = noise_from(torch.arange(1), (16, 8, 8), CPU)
    cond, _ = prompts.encoded(model, ["7"], CPU, torch.float32)
    found = pipe("7", num_inference_steps=1, guidance_scale=0, latents=z, output_type="latent").images
    with torch.no_grad():
        expected = generator(z, **cond(torch.tensor([0])))
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    drawn = pipe("7", num_inference_steps=1, guidance_scale=0, output_type="pt").images
    assert drawn.shape == (1, 3, 64, 64)


# Prompts and their embeddings


def test_embeddings_are_the_pipelines_own_and_resume(model, embeddings, tmp_path, capsys):
    texts = [PROMPTS[i] for i in range(200)] + ["x " * 100]
    found = encode_prompts(model, texts, tmp_path, CPU, torch.float32)
    assert "1 prompts are longer than CLIP's 16 tokens" in capsys.readouterr().err
    pipe = load_pipeline(model, ENCODERS, CPU, torch.float32)
    expected = pipe.encode_prompt(texts[150], None, None, do_classifier_free_guidance=False)
    hidden_states = found(torch.tensor([3, 150]))["encoder_hidden_states"]
    torch.testing.assert_close(hidden_states[1:], expected[0], rtol=1e-5, atol=1e-5)
    empty = pipe.encode_prompt("", None, None, do_classifier_free_guidance=False)
    torch.testing.assert_close(found.null["pooled_projections"], empty[2], rtol=1e-5, atol=1e-5)
    _, kept, lost = sorted(tmp_path.iterdir())  # the first is that of the empty prompt
    content, when = lost.read_bytes(), kept.stat().st_mtime_ns
    lost.unlink()
    encode_prompts(model, texts, tmp_path, CPU, torch.float32)
    assert lost.read_bytes() == content and kept.stat().st_mtime_ns == when
    assert encode_prompts(model, texts[128:], tmp_path, CPU, torch.float32).names[0] not in found.names


def test_components_are_loaded_in_the_precision_asked_for(model):
    for name in ("transformer", "vae", "text_encoder"):  # transformers keeps parts of T5 in float32
        assert {p.dtype for p in load_component(model, name, torch.bfloat16).parameters()} == {torch.bfloat16}


def test_grammar_makes_different_prompts_and_the_same_ones_again():
    texts = grammar(500)
    assert len(set(texts)) == 500 and texts == grammar(500) and texts != grammar(500, seed=1)
    assert not [text for text in texts if re.search(r"\ba [aeiou]|foxs|benchs|buss|sheeps", text)]


def test_judge_reads_real_digits():
    images, labels, styles = captioned_digits()
    pairs = zip(styles.tolist(), labels.tolist(), strict=True)
    texts = [captions(style, label)[i % 8] for i, (style, label) in enumerate(pairs)]
    following, distance = judge(to_uint8(images), texts)
    assert following > 0.99 and distance < 0.01
    shifted = [captions(0, (label + 1) % 10)[0] for label in labels.tolist()]
    assert judge(to_uint8(images), shifted)[0] < 0.01
    with pytest.raises(fgm.InputError, match="does not name one digit"):
        judge(images[:1].byte(), ["a cat"])


# The command


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A run of SD3.5-medium's shape, three networks and GAN."""
    out, model = tmp_path_factory.mktemp("run") / "whole", models["3.5-medium"]
    done = drive_here(sd3, "--model", model, "--out", out, "--real", model / "images", *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_command_writes_what_it_promises(finished):
    out, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher"].keys() == {"1", "28"} and f"{metrics['one_step']:.4f}" in printed
    assert "memory per process, estimated" in printed and "GB, in a step (" in printed
    images = torch.stack(list(draw(out / "pipeline", PROMPTS[:6], 1, 0, (32, 32), CPU, torch.float32)))
    assert judge(images, PROMPTS[:6])[1] == pytest.approx(metrics["one_step"], rel=1e-3)
    card = ModelCard.load(out / "pipeline" / "README.md").data.to_dict()
    assert card["library_name"] == "diffusers"
    curves, teacher = progress.read(out / "log.jsonl")
    assert curves["score"][0] == [6] and teacher.keys() == {"1", "10", "50"}
    pictures = ("one-step.png", "teacher-28-steps.png", "distill-0000006.png", "samples.png", "progress.png")
    for name in (*pictures, "config.json", "log.jsonl", "generator.safetensors"):
        assert (out / name).stat().st_size > 100


def test_samples_are_the_stock_pipelines_and_no_two_parts_are_there_at_once(finished, models, monkeypatch):
    """Text encoders, transformer and VAE: while one computes, no other one lives."""
    from diffusers import StableDiffusion3Pipeline

    out, _ = finished
    groups = {"text": (CLIPTextModelWithProjection, T5EncoderModel), "transformer": SD3Transformer2DModel,
              "vae": AutoencoderKL}
    seen, noise = [], torch.zeros(1)

    def watch(module, inputs):
        for name, kinds in groups.items():
            if isinstance(module, kinds):
                there = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.nn.Module)]
                there = [thing for thing in there if next(thing.parameters(), noise).device.type != "meta"]
                alive = {other for other in groups for thing in there if isinstance(thing, groups[other])}
                seen.append((name, alive - {name}))

    decode = AutoencoderKL.decode

    def watched(vae, *given, **settings):
        watch(vae, given)
        return decode(vae, *given, **settings)

    monkeypatch.setattr(AutoencoderKL, "decode", watched)
    with torch.nn.modules.module.register_module_forward_pre_hook(watch):
        done = drive_here(sd3, "--out", out, "--sample", "the digit 7", "--n", 2)
    assert done.returncode == 0 and (out / "sample.png").exists(), done.stderr
    assert {name for name, _ in seen} == set(groups) and all(not others for _, others in seen), seen
    texts = ["the digit 7", "4"]
    ours = torch.stack(list(draw(models["3.5-medium"], texts, 3, 2.0, (32, 32), CPU, torch.float32)))
    pipe = StableDiffusion3Pipeline.from_pretrained(models["3.5-medium"])
    z = noise_from(torch.arange(2), (16, 4, 4), CPU)
    settings = dict(num_inference_steps=3, guidance_scale=2.0, latents=z, height=32, width=32)
    assert (ours - 255 * pipe(texts, **settings, output_type="pt").images).abs().max() < 1


def test_the_teacher_that_is_drawn_from_is_the_runs_own(finished, models, tmp_path):
    """With its guidance and size, too; and other seeds share no noise."""
    out, _ = finished
    text, drawn = "the digit 7", []
    for seed in (0, 1):
        done = drive_here(sd3, "--out", out, "--sample", text, "--n", 2, "--ode-steps", 2, "--seed", seed)
        assert done.returncode == 0, done.stderr
        drawn.append((out / "sample.png").read_bytes())
        expected = list(draw(models["3.5-medium"], [text] * 2, 2, 4.0, (32, 32), CPU, torch.float32, seed))
        save_grid(tmp_path / "grid.png", torch.stack(expected), 2)
        assert drawn[-1] == (tmp_path / "grid.png").read_bytes()
    assert drawn[0] != drawn[1]
    first, second = (list(draw(models["3.5-medium"], [text] * 2, 1, 1, (32, 32), CPU, torch.float32, seed))
                     for seed in (0, 1))
    assert not torch.equal(first[1], second[0])


def test_interrupted_run_resumed_equals_uninterrupted(finished, models, tmp_path):
    """The run stops at step 3, whose checkpoint is the last: what came after is lost."""
    out, model = tmp_path / "resumed", models["3.5-medium"]
    shutil.copytree(finished[0], out)
    shutil.rmtree(out / "checkpoints" / "distill-000000006")
    for name in ("metrics.json", "generator.safetensors"):
        (out / name).unlink()
    done = drive_here(sd3, "--model", model, "--out", out, "--real", model / "images", *SMALL)
    assert done.returncode == 0, done.stderr
    whole, resumed = (load_file(folder / "generator.safetensors") for folder in (finished[0], out))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_geneval_layout(finished, tmp_path):
    out, _ = finished
    lines = '{"tag": "a", "prompt": "the digit 3"}\n{"tag": "b", "prompt": "4"}\n'
    (tmp_path / "metadata.jsonl").write_text(lines)
    (out / "geneval" / "00002" / "samples").mkdir(parents=True)  # of an earlier call with more prompts
    assert drive_here(sd3, "--out", out, "--geneval", tmp_path / "metadata.jsonl").returncode == 0
    assert len(list((out / "geneval").iterdir())) == 2
    for i, tag in enumerate("ab"):
        folder = out / "geneval" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text())["tag"] == tag
        assert len(list((folder / "samples").glob("000?.png"))) == 4


def test_bad_input_is_one_line_and_status_2(finished, model, models, tmp_path, monkeypatch, capfd):
    out, _ = finished
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty.txt").write_text("\n\n")
    (tmp_path / "bad.jsonl").write_text('{"tag": "no prompt"}\n')
    (tmp_path / "real").mkdir()
    broken = {name: tmp_path / name for name in ("folder", "component", "epsilon", "kind")}
    for folder in broken.values():
        shutil.copytree(model, folder)
    (broken["folder"] / "model_index.json").unlink()
    shutil.rmtree(broken["component"] / "vae")
    scheduler = broken["epsilon"] / "scheduler" / "scheduler_config.json"
    scheduler.write_text('{"_class_name": "DDPMScheduler"}')
    (broken["kind"] / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    small = tmp_path / "small"
    small.mkdir()
    Image.new("RGB", (48, 48)).save(small / "a.png")
    (small / "a.txt").write_text("the digit 3")
    same = models["3.5-medium"]
    whole = ["--model", same, "--out", out, "--real", same / "images", *SMALL]
    cases = [
        (["--model", "nobody/nothing"], "the hub does not give it"),
        (["--model", broken["folder"]], "cannot read"),
        (["--model", broken["component"]], "lacks its component vae"),
        (["--model", broken["epsilon"]], "no flow-matching model"),
        (["--model", broken["kind"]], "is a FluxPipeline"),
        (["--model", model, "--prompts", tmp_path / "empty.txt"], "holds no prompts"),
        (["--model", model, "--prompts", tmp_path / "bad.jsonl"], "every line must be"),
        (["--model", model, "--real", tmp_path / "real"], "holds no images"),
        (["--model", model, "--real", small], "is 48x48, the run makes 32x32"),
        (["--model", model, "--height", "40"], "divisible by 16"),
        (["--model", model, "--height", "512"], "larger than"),
        (["--model", out / "pipeline"], "makes one step: as --model name the one that it was distilled from"),
        (["--model", model, "--guidance", "0"], "argument --guidance: must be in [1, 1000], got 0"),
        (["--model", model, "--lora", "0"], "argument --lora: must be in [1, 1e9], got 0"),
        (["--model", model, "--batch", "9", "--micro-batch", "2"], "global batch 9"),
        ([*whole, "--prompts", same / "images" / "metadata.jsonl", "--embeddings", tmp_path / "others"],
         "run with other settings (prompts "),
        ([*whole, "--lora", "4"], "lora None -> 4"),
        ([*whole, "--lr", "0.5"], "lr 0.002 -> 0.5"),
        ([*whole, "--t-star", "1.5"], "argument --t-star: must be in (0, 1], got 1.5"),
        (["--model", tmp_path / "nowhere", "--lr", "nan"], "argument --lr: must be in (0, 1e9], got nan"),
        (["--out", out, "--geneval", tmp_path / "bad.jsonl"], 'with a "prompt"'),
        (["--out", tmp_path / "new", "--sample", "7"], "has not finished"),
        (["--out", out, "--sample", "7", "--guidance", "3"], "--guidance means nothing without --ode-steps"),
        (["--out", out, "--geneval", "x", "--model", model], "--model means nothing without --ode-steps"),
        (["--out", out, "--geneval", "x", "--sample", "7"], "--sample means nothing with --geneval"),
        (["--model", model, "--lora", "1000000000"], "--lora 1000000000 would need"),
        (["--model", model, "--batch", "1000000000"], "--batch 1000000000 would need"),
        (["--model", model, "--samples", "1000000000"], "--samples 1000000000 would need"),
    ]
    monkeypatch.chdir(tmp_path)
    assert_refused(sd3, cases, out, monkeypatch, capfd)


def test_lora_run_resumes_and_writes_its_file(models, tmp_path):
    """Of SD3.5-large's shape, and without the GAN."""
    model = shutil.copytree(models["3.5-large"], tmp_path / "model")
    arguments = ["--model", model, "--out", tmp_path, "--lora", 4, *SMALL]
    done = drive_here(sd3, *arguments)
    assert done.returncode == 0, done.stderr
    lora = load_file(tmp_path / "lora.safetensors")
    assert all(name.startswith("transformer.") for name in lora)
    assert lora["transformer.pos_embed.proj.lora_A.weight"].shape == (16, 16, 1, 1)
    before = (tmp_path / "generator.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / "distill-000000006")
    done = drive_here(sd3, *arguments)
    assert done.returncode == 0 and (tmp_path / "generator.safetensors").read_bytes() == before
    weights = load_file(model / "transformer" / "diffusion_pytorch_model.safetensors")
    SD3Transformer2DModel.from_pretrained(model / "transformer").to(torch.bfloat16).save_pretrained(
        model / "transformer")  # other weights of the base in the same place
    assert not torch.equal(weights["proj_out.weight"], load_file(
        model / "transformer" / "diffusion_pytorch_model.safetensors")["proj_out.weight"])
    done = drive_here(sd3, *arguments)
    assert done.returncode == 2 and "teacher_weights" in done.stderr


@pytest.mark.parametrize("name, guidance", [
    ("owner/stable-diffusion-3-medium-diffusers", 4.0), ("owner/stable-diffusion-3.5-medium", 4.5),
    ("folder/stable-diffusion-3.5-large", 3.5), ("folder/3.5-large/another", 4.0),
    ("owner/stable-diffusion-3.5-large-turbo", 1.0)])
def test_guidance_is_the_models(name, guidance, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sd3.py", "--model", name])
    assert sd3.arguments().guidance == guidance
    monkeypatch.setattr("sys.argv", ["sd3.py", "--model", name, "--guidance", "2"])
    assert sd3.arguments().guidance == 2


# Memory

STEPS = {  # fgm.distill's settings, and the same for the estimate
    "one pass": ({}, {}),
    "paper": (dict(l1_weight=0.0, t_flow=(-1.0, 2.0)), dict(shared=False, together=True)),
    "two graphs": (dict(l1_weight=0.0, two_graphs=True), {}),
}


@pytest.mark.parametrize("shape, lora_rank, checkpointing, step", [
    ("3-medium", 16, True, "paper"), ("3.5-medium", 0, False, "paper"), ("3.5-medium", 16, True, "one pass"),
    ("3.5-large", 16, False, "two graphs"), ("3.5-large", 0, True, "one pass"),
])
def test_memory_estimate_against_the_allocator(shape, lora_rank, checkpointing, step):
    config, (settings, estimated) = SHAPES[shape], STEPS[step]

    def work():
        subject = bench.miniature(CPU, 4, lora_rank, False, checkpointing, config)
        generator = fgm.OneStepGenerator(subject.net, 0.97)
        fgm.distill(subject.teacher, generator, subject.flow, subject.shape, steps=1, batch=4, micro_batch=2,
                    conditions=subject.conditions, precision="fp32", **settings)

    recipe = config, lora_rank, checkpointing, False
    estimate = memory_estimate(*recipe, 2, 4, 4, 272, 4.0, 1, True, **estimated)
    assert sum(estimate.values()) == pytest.approx(bench.peak_bytes(work, CPU), rel=0.1)


def test_memory_estimate_counts_the_state():
    medium = dict(
        sample_size=128, patch_size=2, in_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536,
        pooled_projection_dim=2048, out_channels=16, pos_embed_max_size=192,
    )

    def state(config, lora_rank, processes, ema):
        estimate = memory_estimate(config, lora_rank, True, True, 1, 128, 128, 333, 4.0, processes, ema)
        return estimate["weights, Adam, EMA"] + estimate["gradients"]

    weights, places = 2_028_328_000, 192**2 * 1536  # as published: 2.03 billion; the table of positions
    alone = state(medium, None, 1, True)
    expected = weights * (2 + 2 * 8 + 4 + 8) + places * (2 + 4 + 4)
    assert alone == pytest.approx(expected, rel=0.001) and alone < 62e9
    assert state(medium, None, 2, True) == pytest.approx(weights * 15 + places * 10, rel=0.001)
    # Eight square layers, two feed-forward parts of two layers with 1 and 4 times the width.
    block = 64 * 1536 * (2 * 4 * 2 + 2 * 2 * 5)
    missing = 64 * 1536 * (2 + 2 * 5)  # the last block's text stream ends with its attention
    expected = (weights + places) * 2 + (24 * block - missing) * (2 * 8 + 8)
    assert state(medium, 64, 1, False) == pytest.approx(expected, rel=0.001)
    # SD3.5-medium: in 13 blocks a second attention (four layers, three modulations); norms of q and k.
    second = 13 * (4 * (1536 + 1) * 1536 + 3 * (1536 + 1) * 1536) + 64 * (24 * 4 + 13 * 2)
    larger = medium | dict(dual_attention_layers=tuple(range(13)), qk_norm="rms_norm", pos_embed_max_size=384)
    expected = (weights + second) * 30 + 4 * places * 10
    assert state(larger, None, 1, True) == pytest.approx(expected, rel=0.001)
    adapters = 24 * block - missing + 13 * 64 * 1536 * 4 * 2
    expected = (weights + second + 4 * places) * 2 + adapters * 24
    assert state(larger, 64, 1, False) == pytest.approx(expected, rel=0.001)


@pytest.mark.parametrize("lora_rank", [0, 16])
def test_memory_estimate_counts_what_the_learners_keep(models, lora_rank):
    """After a step: weights, gradients, Adam's second moment and the average, beside nothing else."""
    model = models["3.5-medium"]
    config = json.loads((model / "transformer" / "config.json").read_text())
    teacher, flow, net = networks(model, lora_rank, False, False, CPU)
    kept = {}

    class Watch(fgm.Run):
        def steps(self, phase, steps, learners, settings):
            yield from super().steps(phase, steps, learners, settings)
            for learner in learners.values():
                state = [value for moments in learner.adam.state.values() for value in moments.values()]
                held = [*learner.parameters.values(), *learner.ema.values(), *state]
                held += [p.grad for p in learner.parameters.values()]
                kept.update({value.data_ptr(): value.nbytes for value in held if value.dim()})

    cond = {"encoder_hidden_states": torch.randn(1, 8, 64), "pooled_projections": torch.randn(1, 64)}
    generator = fgm.OneStepGenerator(net, 0.97)
    conditions = lambda seeds: cond  # noqa: E731
    fgm.distill(teacher, generator, flow, (16, 4, 4), steps=1, batch=1, conditions=conditions, run=Watch())
    estimate = memory_estimate(config, lora_rank, False, False, 1, 4, 4, 8, 1, 1, True)
    nets = flow.shared if lora_rank else (teacher, flow, net)
    frozen = sum(p.nbytes for p in nets[0].parameters() if not p.requires_grad)
    frozen += sum(buffer.nbytes for velocity in nets for buffer in velocity.buffers())
    expected = estimate["weights, Adam, EMA"] + estimate["gradients"]
    assert sum(kept.values()) + frozen == pytest.approx(expected, rel=0.001)


def test_memory_of_decoding_against_the_allocator(model):
    latents = torch.randn(1, 16, 8, 8)

    def decode():
        return list(pipeline.decode(model, latents, CPU, torch.float32))

    decode()
    files = {path: load_file(path) for path in model.rglob("*.safetensors")}
    held = {path.parent.name: sum(value.nbytes for value in file.values()) for path, file in files.items()}
    phases = memory_around(model, False, (64, 64), 5)
    assert phases["encoding prompts"] == sum(held[name] for name in ENCODERS)
    assert bench.peak_bytes(decode, CPU) == pytest.approx(phases["a picture"] - 5, rel=0.1)
    assert phases["the scores"] == max(held["transformer"], phases["a picture"] - 5)
