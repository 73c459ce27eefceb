"""Inputs from disk, bad and strange: images, folders of images, texts, SD3 pipelines, caches.

Each ends in fgm.InputError, which a command prints as one line, or works."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fgm
from images import data as images
from images import scores
from text2image import hub, pipeline, prompts, real
from tiny_sd3 import TRANSFORMER, text_parts, train_vae
from training import files, run

CPU = torch.device("cpu")
VALUES = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)


def refused(message):
    return pytest.raises(fgm.InputError, match=message)


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def cut(path, share=0.5):
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


# Images


def grey16(path):
    Image.fromarray(np.full((8, 8), 100 * 257, np.uint16)).save(path)


def grey16_big_endian(path):
    Image.fromarray(np.full((8, 8), 100 * 257, ">u2")).save(path)


def integers(path, value=100 * 257):
    Image.fromarray(np.full((8, 8), value, np.int32)).save(path)


def floats(path, value=100 / 255):
    Image.fromarray(np.full((8, 8), value, np.float32)).save(path)


def photograph(path):
    """A JPEG of two pictures, as telephones write them."""
    plain = Image.new("RGB", (8, 8), (100, 100, 100))
    plain.save(path, "MPO", save_all=True, append_images=[plain])


@pytest.mark.parametrize("name, make", [
    ("a.png", grey16), ("a.tif", grey16), ("a.tif", grey16_big_endian), ("a.tif", integers),
    ("a.tif", floats), ("a.jpg", photograph),
])
def test_image_keeps_its_brightness(tmp_path, name, make):
    make(tmp_path / name)
    image = images.read_image(tmp_path / name)
    assert image.mode == "RGB" and (np.asarray(image) == 100).all()


def test_image_is_turned_as_its_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 270 degrees
    Image.fromarray(VALUES[:, :32]).save(tmp_path / "a.png", exif=exif)
    found = np.asarray(images.read_image(tmp_path / "a.png"))
    np.testing.assert_array_equal(found, np.rot90(VALUES[:, :32], 3))


@pytest.mark.parametrize("name, mode", [("a.png", "RGBA"), ("a.png", "LA"), ("a.gif", "P"), ("a.png", "RGB"),
                                        ("a.webp", "RGBA")])
def test_what_is_transparent_is_white_whatever_lies_below(tmp_path, name, mode):
    values = np.full((8, 8, 4), 102, np.uint8)  # a colour of the palette
    values[:4, :, 3], values[4:, :, 3], values[4:, :, :3] = 255, 0, 51
    below, options = Image.fromarray(values), {}
    if mode in ("P", "RGB"):
        below = below.convert("RGB").convert(mode)
        options = {"transparency": below.getpixel((0, 7))}
    (below if mode == "RGBA" else below.convert(mode)).save(tmp_path / name, lossless=True, **options)
    found = np.asarray(images.read_image(tmp_path / name))
    assert (found[:4] == 102).all() and (found[4:] == 255).all()


def animated(path):
    frames = [Image.fromarray(VALUES), Image.fromarray(255 - VALUES)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def truncated(path):
    Image.fromarray(VALUES).save(path)
    cut(path)


@pytest.mark.parametrize("name, make, message", [
    ("a.png", truncated, "cannot read"),
    ("a.jpg", truncated, "cannot read"),
    ("a.gif", truncated, "cannot read"),
    ("a.tif", truncated, "cannot read"),
    ("a.bmp", truncated, "cannot read"),
    ("a.webp", truncated, "cannot read"),
    ("a.gif", animated, "holds 2 pictures"),
    ("a.png", animated, "holds 2 pictures"),
    ("a.webp", animated, "holds 2 pictures"),
    ("a.tif", animated, "holds 2 pictures"),
    ("a.tif", lambda path: floats(path, 100.0), r"100..100 are not in 0..1\)"),
    ("a.tif", lambda path: floats(path, -0.5), r"not in 0..1\)"),
    ("a.tif", lambda path: floats(path, np.nan), r"not in 0..1\)"),
    ("a.tif", lambda path: integers(path, 70_000), "not in 0..65535"),
    ("a.tif", lambda path: integers(path, 200), "are of 8 bits, in a file of 16"),
    ("a.png", os.mkfifo, "no regular file"),
    ("a.png", lambda path: path.symlink_to("/dev/zero"), "a link out of"),
    ("a.png", lambda path: path.symlink_to(__file__), "a link out of"),
    ("a", lambda path: path.symlink_to("/"), "a link out of"),
    ("a.png", lambda path: path.symlink_to("a.png"), "no regular file"),
    ("a.png", lambda path: path.symlink_to("nowhere"), "no regular file"),
    ("a.png", lambda path: path.mkdir(), "no regular file"),
    ("a.png", lambda path: path.write_bytes(b""), "cannot read"),
    ("a.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "cannot read"),
    ("a.jpg", lambda path: path.write_text("<html>not found</html>"), "cannot read"),
])
def test_bad_image_is_named(tmp_path, name, make, message):
    path = tmp_path / "class" / name
    path.parent.mkdir()
    make(path)
    with refused(message) as found:
        images.load_images(str(tmp_path))
    assert str(path) in str(found.value)


def test_classes_and_real_images_that_are_links_out_of_the_folder_are_refused(tmp_path):
    Image.fromarray(VALUES).save(tmp_path / "0.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "cat").symlink_to(tmp_path)
    for load in (lambda: images.load_images(str(tmp_path / "data")),
                 lambda: real.load_real(tmp_path / "data")):
        with refused("data/cat is a link out of .*/data, which is not followed"):
            load()
    (tmp_path / "link").symlink_to(tmp_path / "real")  # the folder itself may be one, and so may links in it
    (tmp_path / "real" / "cat").mkdir(parents=True)
    Image.fromarray(VALUES).save(tmp_path / "real" / "cat" / "0.png")
    (tmp_path / "real" / "cat" / "1.png").symlink_to("0.png")
    assert len(images.load_images(str(tmp_path / "link")).pixels) == 2


def test_hidden_files_are_no_images_and_hidden_folders_no_classes(tmp_path):
    hidden = ("cat/._0.png", "cat/.ipynb_checkpoints/0.png", ".ipynb_checkpoints/0.png", ".0.png")
    for name in hidden:
        write(tmp_path / name, b"no image")
    Image.fromarray(VALUES).save(tmp_path / "cat" / "0.png")
    data = images.load_images(str(tmp_path))
    assert data.classes == ["cat"] and len(data.pixels) == 1
    (tmp_path / "cat" / "metadata.jsonl").write_text('{"file_name": "0.png", "text": "a cat"}\n')
    assert real.load_real(tmp_path / "cat")[1] == ["a cat"]


def test_what_a_folder_is_read_as_is_said(tmp_path, capsys):
    """The classes in their order, and what is left out."""
    for name in ("2/a.png", "10/b.png", "1/c.jfif", "1/d.heic", "1/notes.txt"):
        write(tmp_path / name, b"")
    for name in ("2/a.png", "10/b.png", "1/c.jfif"):
        Image.fromarray(VALUES).save(tmp_path / name, "PNG")
    assert images.load_images(str(tmp_path)).classes == ["1", "10", "2"]
    printed = capsys.readouterr().out
    assert f"2 files in {tmp_path / '1'} are of other kinds and left out, {tmp_path}/1/d.heic the" in printed
    assert f"3 images of 3 classes in {tmp_path}: 1, 10, 2\n" in printed


def test_a_grid_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    images.save_grid(tmp_path / "grid.png", torch.zeros(1, 1, 8, 8, dtype=torch.uint8))
    before = (tmp_path / "grid.png").read_bytes()

    def fail(image, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    with refused("grid.png .*No space left"):
        images.save_grid(tmp_path / "grid.png", torch.ones(1, 1, 8, 8, dtype=torch.uint8))
    assert (tmp_path / "grid.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


# Scores


@pytest.mark.parametrize("sizes, own", [([20, 20], True), ([20, 3], True), ([20, 1], False), ([1, 1], False)])
def test_judge_of_small_classes(sizes, own):
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    pixels = (labels * 200).view(-1, 1, 1, 1).expand(-1, 1, 4, 4).to(torch.uint8)
    data = images.Images(pixels, labels, ["a", "b"])
    judge = scores.train_judge(data, limit=len(labels) - 1)  # even where a class is not among those chosen
    assert scores.accuracy(judge, scores.raw_pixels(pixels), labels) == (1, 1)
    assert judge.own_accuracy == (pytest.approx(1) if own else None)


def test_judge_of_one_class():
    with refused("at least two classes"):
        scores.Judge(torch.randn(5, 3), torch.zeros(5))


@pytest.mark.parametrize("a, message", [
    (torch.zeros(1, 3), "two images on either side, got 1"),
    (torch.zeros(0, 3), "got 0"),
    (torch.full((4, 3), torch.nan), "not finite"),
    (torch.full((4, 3), torch.inf), "not finite"),
])
def test_frechet_distance_of_too_little(a, message):
    with refused(message):
        scores.frechet_distance(a, torch.randn(4, 3))
    with pytest.raises(fgm.InputError):
        scores.frechet_distance(torch.randn(4, 3), a)


def test_fid_tells_its_failures_apart_and_counts_real_images_once(tmp_path, monkeypatch):
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Means(FeatureExtractorBase):
        """Two features an image, in place of Inception's 2048."""

        seen, scale = 0, 1.0

        def __init__(self):
            super().__init__("means", ["2048"])

        def forward(self, x):
            Means.seen += len(x)
            return (self.scale * torch.stack([x.double().mean((1, 2, 3)), x[:, 0, 0, 0].double()], 1),)

        @staticmethod
        def get_provided_features_list():
            return ("2048",)

    real, fake = torch.from_numpy(VALUES[:40]).permute(0, 2, 1)[..., None].split(20)
    write(tmp_path / "weights", b"no weights")
    with refused("Inception weights .* cannot be used"):
        scores.fid(real, fake, tmp_path / "weights", CPU)
    monkeypatch.setattr(scores, "inception", lambda weights, device: Means())
    scores.real_statistics.cache_clear()
    features = [torch.stack([x.double().mean((1, 2, 3)), x[:, 0, 0, 0].double()], 1) for x in (real, fake)]
    for i in range(3):
        found = scores.fid(real, fake, None, CPU)
        assert found == pytest.approx(scores.frechet_distance(*features)) and Means.seen == 20 * (i + 2)
    with refused("two images on either side, got 1"):
        scores.fid(real, fake[:1], None, CPU)
    Means.scale = float("nan")
    with refused("features are not finite"):
        scores.fid(real, fake, None, CPU)


# Texts


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", b"\xff\xfea\x00", "as text in UTF-8"),
    ("a.txt", "caf\xe9".encode("latin-1"), "as text in UTF-8"),
    ("a.txt", "\ufeff\n \n", "holds no prompts"),
    ("a.jsonl", '{"prompt": 5}', "5 is no text"),
    ("a.jsonl", '{"prompt": ["a"]}', "no text"),
    ("a.jsonl", '{"prompt": null}', "KeyError"),
    ("a.jsonl", '{"prompt": ""}', "KeyError"),
    ("a.jsonl", r'{"prompt": "\ud800"}', "surrogates not allowed"),
    ("a.jsonl", '["prompt"]', "every line must be"),
    ("a.jsonl", "5", "every line must be"),
    ("a.jsonl", '{"prompt": "a"', "every line must be"),
    ("a.jsonl", "[" * 100_000, "every line must be"),
    ("a.jsonl", b"\xff", "as text in UTF-8"),
    ("a.jsonl", "", "holds no prompts"),
    ("b/a.txt", "the folder a.txt is asked for", "Is a directory"),
    ("a.csv", "prompt,category\na cat,animal", "is a table"),
    ("a.TSV", "Prompt\tCategory\na cat\tanimal", "is a table"),
])
def test_bad_prompts_are_named(tmp_path, name, content, message):
    write(tmp_path / name, content)
    path = tmp_path / name.split("/")[0]
    with refused(message) as found:
        prompts.read_prompts(path)
    assert str(path) in str(found.value)


@pytest.mark.parametrize("name, content, expected", [
    ("a.txt", "\ufeffa cat\r\na dog\r\n", ["a cat", "a dog"]),
    ("a.txt", "caf\xe9\u2028au lait", ["caf\xe9\u2028au lait"]),
    ("a.jsonl", '\ufeff{"prompt": "a cat"}\n{"text": "a dog"}', ["a cat", "a dog"]),
    ("a.jsonl", '{"prompt": "one\u2028line"}', ["one\u2028line"]),
    ("a.JSONL", '{"prompt": "a cat"}', ["a cat"]),
    ("a.ndjson", '{"prompt": "a cat"}', ["a cat"]),
])
def test_strange_prompts_work(tmp_path, name, content, expected):
    write(tmp_path / name, content)
    assert prompts.read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize("content, message", [
    ('{"prompt": 5}', "no text"), ('"prompt"', "every line must be"), (b"\xff", "as text in UTF-8"),
    ("", "no prompts"),
])
def test_bad_geneval_metadata_is_named(tmp_path, content, message):
    write(tmp_path / "metadata.jsonl", content)
    with refused(message):
        pipeline.geneval(tmp_path / "metadata.jsonl", tmp_path / "geneval", None)


@pytest.mark.parametrize("name, content, message", [
    ("metadata.jsonl", '{"file_name": ["a.png"], "text": "a"}', "no text"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": 7}', "7 is no text"),
    ("metadata.jsonl", '{"file_name": "a.png"}', "KeyError"),
    ("a.txt", b"\xff", "as text in UTF-8"),
    ("a.txt", None, "link out of"),
    ("metadata.jsonl", None, "link out of"),
])
def test_bad_captions_are_named(tmp_path, name, content, message):
    folder = tmp_path / "real"
    write(tmp_path / "secret", '{"file_name": "a.png", "text": "secret"}')
    folder.mkdir()
    Image.fromarray(VALUES).save(folder / "a.png")
    if content is None:
        (folder / name).symlink_to(tmp_path / "secret")
    else:
        write(folder / name, content)
    with refused(message) as found:
        real.load_real(folder)
    assert str(folder / name) in str(found.value)


# SD3 pipelines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An untrained miniature: all that a pipeline's folder holds."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    folder = tmp_path_factory.mktemp("whole")
    pipeline.quiet()
    torch.manual_seed(0)
    transformer, (vae, _) = SD3Transformer2DModel(**TRANSFORMER), train_vae(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    StableDiffusion3Pipeline(transformer, scheduler, vae, **text_parts()).save_pretrained(folder)
    return folder


@pytest.fixture
def source(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "source")


def pickled(part):
    """The weights of a component as a pickle, which must not be opened."""
    weights = next(part.glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))


def without(path):
    """Weights in sound files of which one tensor is missing."""
    tensors = load_file(path)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, path)


def shards(part, content):
    weights = next(part.glob("*.safetensors"))
    weights.rename(part / "shard.safetensors")
    write(part / f"{weights.name}.index.json", json.dumps(content))


TRANSFORMER_WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def drawn(folder):
    return list(pipeline.draw(folder, ["7", "8"], 1, 1.0, (32, 32), CPU, torch.float32))


@pytest.mark.parametrize("damage, message", [
    (lambda f: write(f / "model_index.json", "{}"), "is a None"),
    (lambda f: write(f / "model_index.json", "[]"), "must hold a JSON object"),
    (lambda f: write(f / "model_index.json", b"\xff"), "cannot read .*model_index.json"),
    (lambda f: edit(f / "model_index.json", vae=5), "its vae is 5"),
    (lambda f: edit(f / "model_index.json", vae=[]), r"its vae is \[\]"),
    (lambda f: edit(f / "model_index.json", vae=[None, None]), "its vae is"),
    (lambda f: edit(f / "model_index.json", tokenizer=["antigravity", "Tokenizer"]), "its tokenizer is"),
    (lambda f: edit(f / "model_index.json", tokenizer=["transformers", 5]), "cannot load the pipeline"),
    (lambda f: edit(f / "model_index.json", tokenizer=["transformers", "No"]), "cannot load the pipeline"),
    (lambda f: shutil.rmtree(f / "tokenizer_2"), "lacks its component tokenizer_2"),
    (lambda f: write(f / "vae/config.json", "{}"), "has no shift_factor"),
    (lambda f: write(f / "vae/config.json", "[]"), "must hold a JSON object|no AutoencoderKL"),
    (lambda f: write(f / "vae/config.json", "[" * 100_000), "cannot read .*config.json|no AutoencoderKL"),
    (lambda f: edit(f / "vae/config.json", shift_factor=None), "has no shift_factor"),
    (lambda f: edit(f / "vae/config.json", block_out_channels=5), "describes no AutoencoderKL"),
    (lambda f: edit(f / "vae/config.json", latent_channels=4), "cannot load"),
    (lambda f: (f / "vae/config.json").unlink(), "cannot read .*vae/config.json|no AutoencoderKL"),
    (lambda f: write(f / "transformer/config.json", "{}"), "transformer lacks|cannot load"),
    (lambda f: edit(f / "transformer/config.json", patch_size="2"), "describes no SD3Transformer2DModel"),
    (lambda f: edit(f / "transformer/config.json", joint_attention_dim="x"), "describes no SD3Transformer2D"),
    (lambda f: edit(f / "transformer/config.json", num_layers=5), "lacks .* of its weights|cannot load"),
    (lambda f: write(f / "scheduler/scheduler_config.json", "[]"), "must hold a JSON object"),
    (lambda f: write(f / "scheduler/scheduler_config.json", "{}"), "samples with None"),
    (lambda f: write(f / "tokenizer/tokenizer_config.json", "5"), "cannot load the pipeline"),
    (lambda f: write(f / "tokenizer/tokenizer.json", "{"), "cannot load the pipeline"),
    (lambda f: write(f / "tokenizer/tokenizer.json", "{}"), "cannot load the pipeline"),
    (lambda f: write(f / "text_encoder_3/config.json", "{}"), "cannot load|lacks"),
    (lambda f: cut(f / TRANSFORMER_WEIGHTS), "weights .*transformer.* are damaged"),
    (lambda f: cut(f / TRANSFORMER_WEIGHTS, 0), "weights .*transformer.* are damaged"),
    (lambda f: (f / TRANSFORMER_WEIGHTS).unlink(), "transformer lacks its weights"),
    (lambda f: without(f / TRANSFORMER_WEIGHTS), "transformer lacks 1 of its weights"),
    (lambda f: cut(f / "text_encoder_3/model.safetensors", 0.99), "weights .*text_encoder_3.* are damaged"),
    (lambda f: without(f / "text_encoder/model.safetensors"), "text_encoder lacks 1 of its weights"),
    (lambda f: pickled(f / "text_encoder_2"), "lacks its weights in safetensors .pickles are not read"),
    (lambda f: pickled(f / "vae"), "lacks its weights .* .pickles are not read"),
    (lambda f: shards(f / "text_encoder", {}), "are damaged .'weight_map'"),
    (lambda f: shards(f / "text_encoder", {"weight_map": {"a": 5}}), "are damaged"),
    (lambda f: shards(f / "text_encoder", {"weight_map": {"a": "../a"}}), "are damaged"),
    (lambda f: shards(f / "text_encoder", {"weight_map": {"a": "b"}}), "are damaged .No such file"),
])
def test_bad_pipeline_is_refused(source, damage, message):
    damage(source)
    with refused(message):
        hub.model_folder(str(source))
        drawn(source)


def test_pipeline_without_t5_and_with_shards_works(source):
    shutil.rmtree(source / "text_encoder_3")
    shutil.rmtree(source / "tokenizer_3")
    edit(source / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    names = list(load_file(source / "text_encoder/model.safetensors"))
    weight_map = dict.fromkeys(names, "shard.safetensors")
    shards(source / "text_encoder", {"metadata": {}, "weight_map": weight_map})
    assert [image.shape for image in drawn(hub.model_folder(source))] == [(3, 32, 32)] * 2


def test_exported_pipeline_is_independent_of_its_source(source, tmp_path):
    from text2image.transformer import networks

    write(tmp_path / "blob", "licence")
    (source / "LICENSE.md").symlink_to(tmp_path / "blob")  # files of the hub's cache are links to blobs
    write(source / "notes" / "private.txt", "not to be exported")
    generator = fgm.OneStepGenerator(networks(source, 0, False, False, CPU)[2], 0.97, 0.8)
    pipeline.export(source, generator, 0, torch.float32, tmp_path)
    exported = tmp_path / "pipeline"
    assert not (exported / "notes").exists() and (exported / "LICENSE.md").read_text() == "licence"
    before = {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}
    for path in exported.rglob("*"):
        assert not path.is_symlink() and (path.is_dir() or path.stat().st_nlink == 1)
        if path.is_file():
            path.write_bytes(b"edited")
    assert before == {path: path.read_bytes() for path in source.rglob("*") if path.is_file()}


def test_a_full_disk_keeps_the_pipeline_before(source, tmp_path, monkeypatch):
    from text2image.transformer import networks

    write(tmp_path / "pipeline" / "model_index.json", "before")
    generator = fgm.OneStepGenerator(networks(source, 0, False, False, CPU)[2], 0.97, 0.8)

    def fail(source, target, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", fail)
    with refused("No space left.*what was there before is untouched"):
        pipeline.export(source, generator, 0, torch.float32, tmp_path)
    assert (tmp_path / "pipeline" / "model_index.json").read_text() == "before"
    assert not [*tmp_path.glob(".tmp-*"), *tmp_path.glob(".old-*")]


# Caches


def exchanged(path):
    """Other weights in a file of the same size and time."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    save_file({name: value + 1 for name, value in load_file(path).items()}, path, {"format": "pt"})
    os.utime(path, ns=times)


@pytest.mark.parametrize("change", [
    lambda source: exchanged(source / "text_encoder/model.safetensors"),
    lambda source: edit(source / "tokenizer/tokenizer_config.json", model_max_length=15),
])
def test_embeddings_of_another_model_are_not_used(source, tmp_path, change):
    cache = tmp_path / "cache"

    def made():
        """The names of the embeddings' files; none is made that is there."""
        prompts.encode_prompts(source, ["7"], cache, CPU, torch.float32)
        return {path.name for path in cache.iterdir()}

    before = made()
    assert len(before) == 2 and made() == before
    change(source)
    assert len(made()) == 4 and made() > before


def test_prompts_with_the_same_lines_are_told_apart(source, tmp_path):
    found = [prompts.encode_prompts(source, texts, tmp_path / "cache", CPU, torch.float32)
             for texts in (["a\nb", "c"], ["a", "b\nc"])]
    assert found[0].names != found[1].names
    first, second = (embeddings(torch.arange(2))["pooled_projections"] for embeddings in found)
    assert not torch.equal(first, second)


def test_embeddings_exchanged_between_two_runs_are_noticed(source, tmp_path):
    found = [prompts.encode_prompts(source, [text], tmp_path / "cache", CPU, torch.float32).names[0]
             for text in ("7", "8")]
    first, second = (tmp_path / "cache" / name for name in found)
    assert first.stat().st_size == second.stat().st_size
    shutil.copy(second, first)
    with refused(f"{first.name} is damaged .{second.name}"):
        prompts.encode_prompts(source, ["7"], tmp_path / "cache", CPU, torch.float32)


def wrong_rows(path):
    save_file({name: value[:1] for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize("number, damage", [(1, cut), (1, wrong_rows), (1, without), (0, cut), (0, without)])
def test_damaged_embeddings_are_named(source, tmp_path, number, damage):
    """The first file is that of the empty prompt."""
    cache = tmp_path / "cache"
    prompts.encode_prompts(source, ["7", "8"], cache, CPU, torch.float32)
    path = sorted(cache.iterdir())[number]
    damage(path)
    with refused(f"{path.name} is damaged .*; remove it, it is made again"):
        prompts.encode_prompts(source, ["7", "8"], cache, CPU, torch.float32)


def test_latents_are_made_again_for_other_images_and_another_vae_alone(source, tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "ROWS_PER_FILE", 2)
    paths = [tmp_path / f"{i}.png" for i in range(5)]
    for i, path in enumerate(paths):
        Image.fromarray(VALUES[i : i + 32, :32]).save(path)
    cache, read = tmp_path / "latents", []

    def read_image(path):
        read.append(path)
        return images.read_image(path)

    def encode():
        """The latents, and which images were read for them."""
        read.clear()
        rows = real.encode_images(source, paths, (32, 32), (16, 4, 4), cache, CPU, torch.float32)
        return rows(torch.arange(5))["latents"], list(read)

    monkeypatch.setattr(real, "read_image", read_image)
    first, names = encode()[0], sorted(cache.iterdir())
    assert read == paths and len(names) == 3
    for damage in (cut, lambda path: write(path, b""), wrong_rows):
        damage(names[1])
        with refused("is damaged .*; remove it, it is made again"):
            encode()
        names[1].unlink()
        again, read_again = encode()
        assert torch.equal(again, first) and read_again == paths[2:4]
    Image.fromarray(VALUES[10:42, 10:42]).save(paths[4])
    again, read_again = encode()
    assert torch.equal(again[:4], first[:4]) and not torch.equal(again[4], first[4])
    assert read_again == paths[4:]
    exchanged(source / "vae/diffusion_pytorch_model.safetensors")
    again, read_again = encode()
    assert not torch.equal(again[:4], first[:4]) and read_again == paths


def test_files_are_written_atomically(source, tmp_path, monkeypatch):
    """geneval's, by a pipeline of which only the images matter."""
    written = []
    atomically = run.atomically
    monkeypatch.setattr(pipeline, "atomically", lambda path: (written.append(path.name), atomically(path))[1])
    write(tmp_path / "metadata.jsonl", '{"prompt": "7"}')
    pipeline.geneval(tmp_path / "metadata.jsonl", tmp_path / "geneval", lambda texts: torch.zeros(
        len(texts), 3, 8, 8, dtype=torch.uint8))
    assert written == ["metadata.jsonl", "0000.png", "0001.png", "0002.png", "0003.png"]


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """A fault before, between and after the two moves; what a killed process left is taken up."""
    target, move = tmp_path / "pipeline", os.replace

    def replace(content, fault=None):
        moves = []

        def watched(source, destination):
            moves.append(destination)
            if len(moves) == fault:
                raise OSError(28, "No space left on device")
            move(source, destination)

        monkeypatch.setattr(os, "replace", watched)
        with files.atomically(target) as temporary:
            temporary.mkdir()
            (temporary / "a").write_text(content)

    replace("first")
    for fault in (1, 2):
        with refused("what was there before is untouched"):
            replace("second", fault)
        assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
        assert (target / "a").read_text() == "first"
    replace("second")
    assert (target / "a").read_text() == "second" and len([*tmp_path.iterdir()]) == 1
    move(target, tmp_path / ".old-pipeline")  # killed between the two
    with refused("another"), files.atomically(target):
        assert (target / "a").read_text() == "second"
        raise OSError(5, "another fault")


def test_rows_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "latents.safetensors"
    save_file({"latents": torch.tensor([[1.0], [float("nan")]])}, path)
    rows = prompts.Rows([path], 2, {"latents": (1,)}, torch.device("cpu"))
    assert rows(torch.tensor([0]))["latents"].item() == 1
    with refused("are not finite: remove it"):
        rows(torch.tensor([0, 1]))
