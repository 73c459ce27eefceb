"""SD3 pipelines: found, loaded, exported, drawn from."""

import json
import shutil

import pytest
import torch
from conftest import SHAPES
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

import fgm
from text2image import pipeline
from text2image.digits import PROMPTS
from text2image.transformer import networks
from training.processes import noise_from

CPU = torch.device("cpu")
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES)
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(model, tmp_path):
    return shutil.copytree(model, tmp_path / "source")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- The hub -----------------------------------------------------------------------------------------------


def test_a_model_of_the_hubs_cache_works_without_network_and_another_is_named(model, tmp_path, monkeypatch):
    cache, commit = tmp_path / "models--owner--name", "1" * 40
    folder = shutil.copytree(model, cache / "snapshots" / commit, ignore=lambda path, names: ["images"])
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert pipeline.find_model("owner/name") == folder
    with pytest.raises(fgm.InputError, match="nobody/nothing is no folder, .*tiny_sd3.py") as error:
        pipeline.find_model("nobody/nothing")
    assert "\n" not in str(error.value)


# ---- Bad pipelines -----------------------------------------------------------------------------------------


def drop_a_tensor(path):
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


@pytest.mark.parametrize("damage, message", [
    (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline, not a Stable"),
    (lambda f: edit(f / "model_index.json", tokenizer=["antigravity", "Tokenizer"]), "its tokenizer is"),
    (lambda f: shutil.rmtree(f / "tokenizer_2"), "lacks its component tokenizer_2"),
    (lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDPMScheduler"), "no flow-matching"),
    (lambda f: drop_a_tensor(f / WEIGHTS), "transformer lacks 1 of its weights"),
    (lambda f: (f / WEIGHTS).rename((f / WEIGHTS).with_suffix(".bin")), "cannot load .*transformer"),
])
def test_bad_pipeline_is_refused(source, damage, message):
    damage(source)
    with pytest.raises(fgm.InputError, match=message):
        pipeline.find_model(str(source))
        pipeline.draw(source, ["7", "8"], 1, 1.0, (32, 32), CPU, torch.float32)


def test_pipeline_without_t5_and_with_shards_works(source):
    shutil.rmtree(source / "text_encoder_3")
    shutil.rmtree(source / "tokenizer_3")
    edit(source / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    weights = source / "text_encoder/model.safetensors"
    weight_map = dict.fromkeys(load_file(weights), "shard.safetensors")
    weights.rename(weights.with_name("shard.safetensors"))
    index = {"metadata": {}, "weight_map": weight_map}
    weights.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    images, _ = pipeline.draw(pipeline.find_model(source), ["7", "8"], 1, 1.0, (32, 32), CPU, torch.float32)
    assert [image.shape for image in images] == [(3, 32, 32)] * 2


def test_parts_are_loaded_in_the_precision_asked_for(model):
    parts = [pipeline.load_network(model, name, torch.bfloat16) for name in ("transformer", "vae")]
    pipe = pipeline.load_pipeline(model, pipeline.ENCODERS, CPU, torch.bfloat16)
    for part in (*parts, pipe.text_encoder, pipe.text_encoder_2):  # transformers keeps parts of T5 in float32
        assert {p.dtype for p in part.parameters()} == {torch.bfloat16}


# ---- Export and images -------------------------------------------------------------------------------------


def export(model, lora_rank, out, shape=None):
    """A generator with random weights, exported to OUT/pipeline."""
    net = networks(model, lora_rank, False, False, CPU)[2]
    torch.manual_seed(1)
    for p in net.parameters():
        p.data.add_(0.05 * torch.randn_like(p))
    generator = fgm.OneStepGenerator(net, 0.97, 0.8)
    pipeline.export(model, generator, lora_rank, torch.float32, out, shape)
    return generator


@pytest.mark.parametrize("lora_rank", [0, 4])
@ALL_SHAPES
def test_stock_pipeline_draws_what_our_generator_draws(models, embeddings, tmp_path, shape, lora_rank):
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    model = models[shape]
    generator = export(model, lora_rank, tmp_path)
    z = noise_from(torch.arange(3), (16, 4, 4), CPU)
    index = torch.tensor([0, 90, 200])
    with torch.no_grad():
        expected = generator(z, **embeddings(index))
    texts = [PROMPTS[i] for i in index.tolist()]

    def latents(pipe):
        return pipe(texts, num_inference_steps=1, guidance_scale=0, latents=z, height=32, width=32,
                    output_type="latent").images

    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    assert (latents(pipe) - expected).abs().max() < 1e-5 * expected.abs().max()
    other = StableDiffusion3Pipeline.from_pretrained(model)
    other.scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(
        tmp_path / "pipeline", subfolder="scheduler")
    assert (latents(other) - expected).abs().max() > 0.01  # the source does not
    if lora_rank:
        other.load_lora_weights(tmp_path, weight_name="lora.safetensors")
        assert (latents(other) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_stock_pipeline_draws_the_size_that_it_was_distilled_at(models, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    export(models["3.5-large"], 0, tmp_path, (16, 8, 8))  # whose own size is 32
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "pipeline")
    images = pipe("7", num_inference_steps=1, guidance_scale=0, output_type="pt").images
    assert images.shape == (1, 3, 64, 64)


def test_an_export_that_fails_is_no_pipeline_and_the_next_one_is_whole(source, tmp_path, monkeypatch):
    def fail(source, target, **options):
        raise OSError(28, "No space left on device")

    export(source, 0, tmp_path)
    (source / "LICENSE.md").write_text("licence")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copy2", fail)
        with pytest.raises(fgm.InputError, match="cannot write .*pipeline .*No space left"):
            export(source, 0, tmp_path)
    assert not (tmp_path / "pipeline" / "model_index.json").exists()
    export(source, 0, tmp_path)
    assert (tmp_path / "pipeline" / "LICENSE.md").read_text() == "licence"
    pipeline.check_pipeline(tmp_path / "pipeline", "the export")


def test_images_are_those_of_the_stock_pipeline(models):
    from diffusers import StableDiffusion3Pipeline

    model, texts = models["3.5-medium"], ["the digit 7", "4"]
    images, _ = pipeline.draw(model, texts, 3, 2.0, (32, 32), CPU, torch.float32)
    pipe = StableDiffusion3Pipeline.from_pretrained(model)
    z = noise_from(torch.arange(2), (16, 4, 4), CPU)
    expected = pipe(texts, num_inference_steps=3, guidance_scale=2.0, latents=z, height=32, width=32,
                    output_type="pt").images
    assert (torch.stack(list(images)) - 255 * expected).abs().max() < 1
