"""SD3 pipelines: downloaded from a hub that a server on this machine plays, loaded, exported, drawn from."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

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
COMMIT = "1" * 40


@pytest.fixture
def source(model, tmp_path):
    return shutil.copytree(model, tmp_path / "source")


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# ---- The hub -----------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """Serves a folder as the model owner/name. asked: the names of the files that were sent.

    fault: an error of the hub's that answers every request, or the end of a name that cannot be had."""

    def __init__(self, folder):
        super().__init__(("127.0.0.1", 0), Answer)
        self.folder, self.asked, self.fault = folder, [], None


class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        hub, path = self.server, self.path.partition("?")[0]
        files = [file for file in hub.folder.rglob("*") if file.is_file()]
        sizes = {file.relative_to(hub.folder).as_posix(): file.stat().st_size for file in files}
        if hub.fault == "GatedRepo":
            self.answer(404, b"", {"X-Error-Code": hub.fault})
        elif hub.fault and path.endswith(hub.fault) and self.command == "GET":
            self.answer(500, b"")
        elif "/resolve/" in path:
            name = path.partition(f"/resolve/{COMMIT}/")[2]
            if self.command == "GET":
                hub.asked.append(name)
            etag = f'"{name.replace("/", "-")}"'
            self.answer(200, (hub.folder / name).read_bytes(), {"ETag": etag, "X-Repo-Commit": COMMIT})
        elif "/tree/" in path:
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self.answer(200, json.dumps(tree).encode())
        else:
            siblings = [{"rfilename": name} for name in sizes]
            self.answer(200, json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())

    do_HEAD = do_GET

    def answer(self, status, content, headers=()):
        self.send_response(status)
        for name, value in (dict(headers) | {"Content-Length": str(len(content))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *words):
        pass


@pytest.fixture
def server(model, tmp_path, monkeypatch):
    server = Hub(model)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    yield server
    server.shutdown()
    server.server_close()


def test_an_interrupted_download_goes_on_and_works_without_network_then(server, model):
    server.fault = WEIGHTS
    with pytest.raises(fgm.InputError, match="owner/name is no folder, and its download failed") as error:
        pipeline.find_model("owner/name")
    assert "\n" not in str(error.value)
    first, server.fault = list(server.asked), None
    server.asked.clear()
    folder = pipeline.find_model("owner/name")
    assert (folder / WEIGHTS).read_bytes() == (model / WEIGHTS).read_bytes()
    assert first and WEIGHTS in server.asked and not set(first) & set(server.asked)
    assert not [name for name in server.asked if name.startswith("images")]  # no part of a pipeline
    server.shutdown()
    server.server_close()
    assert pipeline.find_model("owner/name") == folder


def test_a_model_that_cannot_be_had_is_named(server):
    server.fault = "GatedRepo"
    with pytest.raises(fgm.InputError, match="owner/name.*[Gg]ated.*tiny_sd3.py"):
        pipeline.find_model("owner/name")


# ---- Bad pipelines -----------------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_tensor(path):
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


@pytest.mark.parametrize("damage, message", [
    (lambda f: (f / "model_index.json").write_text("[]"), "must hold a JSON object"),
    (lambda f: edit(f / "model_index.json", _class_name="FluxPipeline"), "is a FluxPipeline, not a Stable"),
    (lambda f: edit(f / "model_index.json", tokenizer=["antigravity", "Tokenizer"]), "its tokenizer is"),
    (lambda f: edit(f / "model_index.json", tokenizer=["transformers", "No"]), "cannot load the pipeline"),
    (lambda f: shutil.rmtree(f / "tokenizer_2"), "lacks its component tokenizer_2"),
    (lambda f: edit(f / "transformer/config.json", patch_size="2"), "describes no transformer of SD3"),
    (lambda f: edit(f / "scheduler/scheduler_config.json", _class_name="DDPMScheduler"), "no flow-matching"),
    (lambda f: cut(f / WEIGHTS), "cannot load .*transformer"),
    (lambda f: drop_a_tensor(f / WEIGHTS), "transformer lacks 1 of its weights"),
    (lambda f: (f / WEIGHTS).rename((f / WEIGHTS).with_suffix(".bin")), "cannot load .*transformer"),
    (lambda f: (f / "unfinished").touch(), "unfinished miniature: `python tiny_sd3.py --out .*source`"),
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
