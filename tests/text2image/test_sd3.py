"""The commands sd3.py and tiny_sd3.py, on the miniature: what they write, resume, report and refuse."""

import json
import shutil

import pytest
import torch
from diffusers import SD3Transformer2DModel
from helpers import assert_refused, drive_here, refusal, succeed
from safetensors.torch import load_file

import sd3
import tiny_sd3
from images.data import save_grid
from text2image.digits import PROMPTS, judge
from text2image.pipeline import draw
from training import progress

SMALL = [
    "--kimg", "0.048", "--batch", "8", "--samples", "6", "--save-every", "3", "--picture-every", "6",
    "--device", "cpu",
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """A run of SD3.5-medium's shape, three networks and GAN: its folder, and the finished process."""
    out, model = tmp_path_factory.mktemp("run") / "whole", models["3.5-medium"]
    done = drive_here(sd3, "--model", model, "--out", out, "--real", model / "images", *SMALL)
    assert done.returncode == 0, done.stderr
    return out, done


def images_of(folder, prompts, steps, guidance, seed=0):
    images, _ = draw(folder, prompts, steps, guidance, (32, 32), CPU, torch.float32, seed)
    return torch.stack(list(images))


def test_command_writes_what_it_promises(finished):
    out, done = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher"].keys() == {"1", "28"} and f"{metrics['one_step']:.4f}" in done.stdout
    images = images_of(out / "pipeline", PROMPTS[:6], 1, 0)
    assert judge(images, PROMPTS[:6])[1] == pytest.approx(metrics["one_step"], rel=1e-3)
    for row in (metrics["rows"]["teacher, 28 steps"], metrics["rows"]["one step"]):
        assert row["copy_ratio"] == pytest.approx(1, abs=0.1)  # noise is as far from either part
        assert row["to_training"] == pytest.approx(row["to_held_out"], rel=0.05)
        assert row["to_training"] != row["to_held_out"]
    curves, teacher = progress.read(out / "log.jsonl")
    assert curves["score"][0] == [6] and teacher.keys() == {"1", "10", "50"}
    card = (out / "pipeline" / "README.md").read_text(encoding="utf-8")
    assert "num_inference_steps=1" in card and "t* = 0.97" in card and "on 40 images" in card
    for name in ("samples.png", "progress.png", "distill-0000006.png", "config.json"):
        assert (out / name).stat().st_size > 100


def test_a_model_that_is_no_flow_is_told_by_its_defect_and_the_run_goes_on(finished):
    """The random transformer's velocity is no mean."""
    out, done = finished
    defect = json.loads((out / "metrics.json").read_text())["defect"]
    assert abs(defect["value"]) > 0.3 and f"{defect['value']:.2f} at t = {defect['t']}" in done.stderr
    assert "paired noise with data" in done.stderr and "opposite sign" in done.stderr
    assert f"velocity: {defect['value']:.3f} +- {defect['standard_error']:.3f}" in done.stdout


def test_the_teacher_that_is_drawn_from_is_the_runs_own(finished, models, tmp_path):
    """With its guidance and size, too."""
    out, pictures = finished[0], []
    for seed in (0, 1):
        succeed(sd3, "--out", out, "--sample", "the digit 7", "--n", 2, "--ode-steps", 2, "--seed", seed)
        pictures.append((out / "sample.png").read_bytes())
    expected = images_of(models["3.5-medium"], ["the digit 7"] * 2, 2, 4.0, seed=1)
    save_grid(tmp_path / "grid.png", expected, 2)
    assert pictures[1] == (tmp_path / "grid.png").read_bytes()
    assert pictures[0] != pictures[1]


def test_geneval_layout(finished, tmp_path):
    out, _ = finished
    lines = '{"tag": "a", "prompt": "the digit 3"}\n{"tag": "b", "prompt": "4"}\n'
    (tmp_path / "metadata.jsonl").write_text(lines)
    (out / "geneval" / "00002" / "samples").mkdir(parents=True)  # of an earlier call with more prompts
    succeed(sd3, "--out", out, "--geneval", tmp_path / "metadata.jsonl")
    assert len(list((out / "geneval").iterdir())) == 2
    for i, tag in enumerate("ab"):
        folder = out / "geneval" / f"{i:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text())["tag"] == tag
        assert len(list((folder / "samples").glob("000?.png"))) == 4


# ---- Resuming ----------------------------------------------------------------------------------------------


def test_interrupted_run_resumed_equals_uninterrupted_wherever_its_files_lie(
        finished, models, tmp_path, monkeypatch):
    """The run stops at step 3, whose checkpoint is the last. Run, model and images have other paths then."""
    shutil.copytree(finished[0], tmp_path / "resumed")
    model = shutil.copytree(models["3.5-medium"], tmp_path / "model")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "distill-000000006")
    for name in ("metrics.json", "generator.safetensors"):
        (tmp_path / "resumed" / name).unlink()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(model.parent)
    succeed(sd3, "--model", "model", "--out=~/resumed", "--real", "./model/../model/images", *SMALL)
    whole, resumed = (load_file(out / "generator.safetensors") for out in (finished[0], tmp_path / "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_lora_run_resumes_writes_its_file_and_refuses_another_base(models, tmp_path):
    """Of SD3.5-large's shape, and without the GAN."""
    model = shutil.copytree(models["3.5-large"], tmp_path / "model")
    arguments = ["--model", model, "--out", tmp_path, "--lora", 4, *SMALL, "--samples", 2]
    succeed(sd3, *arguments)
    lora = load_file(tmp_path / "lora.safetensors")
    assert all(name.startswith("transformer.") for name in lora)
    assert lora["transformer.pos_embed.proj.lora_A.weight"].shape == (16, 16, 1, 1)
    before = (tmp_path / "generator.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "checkpoints" / "distill-000000006")
    succeed(sd3, *arguments)
    assert (tmp_path / "generator.safetensors").read_bytes() == before

    torch.manual_seed(5)
    SD3Transformer2DModel.from_config(
        SD3Transformer2DModel.load_config(model / "transformer")).save_pretrained(model / "transformer")
    assert "teacher_weights" in refusal(sd3, *arguments)


# ---- Refusals ----------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_status_2(finished, model, models, tmp_path, monkeypatch):
    out, same = finished[0], models["3.5-medium"]
    (tmp_path / "bad.jsonl").write_text('{"tag": "no prompt"}\n')
    (tmp_path / "a.txt").write_text("the digit 3 or 4")
    (tmp_path / "real").mkdir()
    whole = ["--model", same, "--out", out, "--real", same / "images", *SMALL]
    monkeypatch.chdir(tmp_path)  # the default OUT lies there
    assert_refused(sd3, [
        (["--model", model, "--prompts", tmp_path / "a.txt"], "does not name one digit"),
        (["--model", model, "--real", tmp_path / "real"], "holds no images"),
        (["--model", model, "--height", "40"], "divisible by 16"),
        (["--model", model, "--lora", "33"], "more than the width of the model's layers: give 32 or less"),
        (["--model", model, "--height", "512"], "larger than"),
        (["--model", out / "pipeline"], "makes one step: as --model name the one that it was distilled from"),
        ([*whole, "--prompts", same / "images" / "metadata.jsonl", "--embeddings", tmp_path / "others"],
         "run with other settings (prompts "),
        ([*whole, "--lora", "4"], "lora None -> 4"),
        (["--out", out, "--geneval", tmp_path / "bad.jsonl"], 'a text as "prompt"'),
        (["--out", tmp_path / "new", "--sample", "7"], "has not finished"),
        (["--model", model, "--gan-generator", "1"], "--gan-generator means nothing without --real"),
        (["--out", out, "--geneval", "x", "--sample", "7"], "give one of them"),
    ], out)


def test_what_cannot_be_loaded_is_found_before_anything_is_encoded_or_removed(model, tmp_path):
    checkpoint = tmp_path / "out" / "checkpoints" / "distill-000000003"
    checkpoint.mkdir(parents=True)
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"half")
    line = refusal(sd3, "--model", broken, "--out", tmp_path / "out", *SMALL, "--overwrite")
    assert "cannot load" in line and "broken/vae" in line
    assert checkpoint.exists() and not (tmp_path / "out" / "embeddings").exists()


@pytest.mark.parametrize("name, guidance", [
    ("owner/stable-diffusion-3-medium-diffusers", 4.0), ("folder/stable-diffusion-3.5-large", 3.5),
    ("folder/3.5-large/another", 4.0), ("owner/stable-diffusion-3.5-large-turbo", 1.0)])
def test_guidance_is_the_models(name, guidance, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sd3.py", "--model", name])
    assert sd3.arguments().guidance == guidance


# ---- The miniature -----------------------------------------------------------------------------------------

def test_an_interrupted_miniature_leaves_nothing_and_the_same_command_makes_it(tmp_path, monkeypatch):
    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    out = tmp_path / "tiny"
    command = ["--out", out, "--vae-steps", 2, "--kimg", 0.032, "--samples", 4]
    with monkeypatch.context() as patch:
        patch.setattr(tiny_sd3, "score", stop)
        assert drive_here(tiny_sd3, *command).returncode == 130
    assert list(tmp_path.iterdir()) == []
    succeed(tiny_sd3, *command)
    assert f"{out} exists already: remove it" in refusal(tiny_sd3, *command)
    seconds = json.loads((out / "tiny_sd3.json").read_text())["seconds"]
    assert seconds["all"] >= sum(seconds[phase] for phase in ("vae", "transformer", "scores"))
