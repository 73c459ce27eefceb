"""The image command, as users run it."""

import argparse
import json
import math
import shutil

import numpy as np
import pytest
import torch
from helpers import assert_refused, call, forked, joined, json_lines, refusal, succeed
from PIL import Image
from safetensors.torch import load_file
from test_unet import small_net

import cifar
import fgm
from images.data import draw_images, load_images
from images.published import load_network, load_teacher
from images.scores import coarse_pixels, frechet_distance
from training import progress, run

SMALL = [
    "--data", "digits", "--model-channels", "8", "--num-blocks", "1", "--batch", "16", "--kimg", "0.32",
    "--teacher-kimg", "0.32", "--save-every", "5", "--log-every", "10", "--picture-every", "20",
    "--samples", "60", "--device", "cpu", "--teacher-t", "3", "0.1", "--dropout", "0.1",
]


def test_memory_that_distillation_lacks_is_missed_before_the_teacher_trains(tmp_path, monkeypatch):
    def distill(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(fgm, "distill", distill)
    assert "out of memory" in refusal(cifar, *SMALL, "--out", tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_image_i_is_the_same_whatever_the_batch():
    net = small_net(label_dim=10)
    generator = fgm.OneStepGenerator(net, 0.9)
    some, labels = draw_images(generator, 12, (1, 8, 8), [1] * 10, "cpu", seed=3, batch=5)
    more, _ = draw_images(generator, 30, (1, 8, 8), [1] * 10, "cpu", seed=3, batch=30)
    assert (some.int() - more[:12].int()).abs().max() <= 1 and sorted(labels[:10].tolist()) == [*range(10)]
    others, _ = draw_images(generator, 12, (1, 8, 8), [1] * 10, "cpu", seed=4)
    assert (others.int() - some.int()).abs().max() > 10
    assert draw_images(generator, 4, (1, 8, 8), [1] * 10, "cpu", classes=[7, 2])[1].tolist() == [7, 2, 7, 2]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a whole run, and what it printed."""
    out = tmp_path_factory.mktemp("digits") / "whole"
    return out, succeed(cifar, *SMALL, "--cond", "--out", out)


def test_command_writes_what_it_promises(finished):
    out, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher"].keys() == {"1", "10", "50"} and metrics["metric"] == "pixel Frechet distance"
    assert f"{metrics['one_step']:.4f}" in printed
    net, description = load_network(out / "generator.safetensors")
    generator, real = fgm.OneStepGenerator(net, **description["generator"]), load_images("digits")
    assert description["class_counts"] == real.class_counts()
    assert metrics["labels"] == "drawn as often as the data has each class"
    pixels, labels = draw_images(generator, 60, (1, 8, 8), real.class_counts(), "cpu")
    distance = frechet_distance(coarse_pixels(real.pixels), coarse_pixels(pixels))
    assert distance == pytest.approx(metrics["one_step"], rel=1e-3)
    curves, teacher = progress.read(out / "log.jsonl")  # on as few samples, the same distance
    assert curves["score"] == ([20], [pytest.approx(metrics["one_step"])])
    assert teacher == pytest.approx(metrics["teacher"])
    filled = {line["phase"]: [loss is not None for loss in line["flow_loss_by_t"]]
              for line in json_lines(out / "log.jsonl")}
    assert filled == {"teacher": [False] * 9 + [True], "distill": [True] * 10}  # --teacher-t: its own t
    for name in ("samples.png", "progress.png", "distill-0000020.png", "config.json", "teacher.safetensors"):
        assert (out / name).stat().st_size > 100


def test_a_run_resumed_in_both_phases_equals_uninterrupted(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    for phase in ("teacher", "distill"):
        shutil.rmtree(out / f"checkpoints/{phase}-000000020")
    succeed(cifar, *SMALL, "--cond", "--out", out)
    for name in ("teacher.safetensors", "generator.safetensors"):
        whole, resumed = load_file(finished[0] / name), load_file(out / name)
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_given_teacher_is_distilled_and_its_defect_is_told(finished, tmp_path, monkeypatch):
    """~ is the home."""
    shutil.copy(finished[0] / "teacher.safetensors", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    printed = succeed(cifar, *SMALL, "--cond", "--out", tmp_path / "out", "--kimg", "0.08", "--samples", "10",
                      "--teacher", "~/teacher.safetensors")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    value, error, t = (metrics["defect"][name] for name in ("value", "standard_error", "t"))
    assert error > 0 and f"flow's velocity: {value:.3f} +- {error:.3f} at t = {t}\n" in printed
    without = [*SMALL, "--cond", "--out", tmp_path / "out", "--kimg", "0.08", "--samples", "10"]
    assert_refused(cifar, [(without, "holds a run that was given its --teacher")], tmp_path / "out")


def gaussian_velocity(x, t, class_labels):
    """The velocity of a flow whose data are N(0, 0.1), whatever their class."""
    t = fgm.per_sample(t, x)
    return x * (t - 0.1 * (1 - t)) / (t**2 + 0.1 * (1 - t) ** 2)


@pytest.mark.parametrize("teacher, warned", [
    (gaussian_velocity, False),
    (lambda x, t, **cond: -gaussian_velocity(x, t, **cond), True),
    (lambda x, t, **cond: gaussian_velocity(x, t, **cond) / (t != 0.95).view(-1, 1, 1, 1), True),  # inf, nan
])
def test_a_teacher_that_is_no_flow_is_warned_of(teacher, warned, capsys):
    args = argparse.Namespace(seed=3, teacher="file.pkl")
    defect = cifar.check_teacher(args, teacher, (1, 8, 8), [1] * 4, torch.device("cpu"))
    assert (abs(defect["value"]) < 5 * defect["standard_error"]) != warned
    assert ("warning: file.pkl is not a flow's velocity" in capsys.readouterr().err) == warned


def test_sampling_from_a_run_and_from_a_file_alone(finished, tmp_path):
    out, _ = finished
    arguments = ["--sample", 6, "--classes", 3, 1, "--npz", "--out", out, "--seed", 2]
    assert joined(forked(call, cifar, *arguments, processes=2, out=tmp_path)) == [0, 0]
    of_run = np.load(out / "samples-one-step.npz")
    assert of_run["images"].shape == (6, 8, 8, 1) and of_run["labels"].tolist() == [3, 1] * 3
    assert of_run["classes"].tolist() == [str(i) for i in range(10)]
    assert "6 images in" in (tmp_path / "0.txt").read_text()

    alone = tmp_path / "mine.safetensors"
    alone.write_bytes((out / "generator.safetensors").read_bytes())
    succeed(cifar, "--sample", 4, "--classes", 3, 1, "--npz", "--generator", alone, "--seed", 2)
    of_file = np.load(tmp_path / "samples-one-step.npz")
    assert np.abs(of_file["images"].astype(int) - of_run["images"][:4]).max() <= 1
    succeed(cifar, "--sample", 4, "--ode-steps", 3, "--out", out)
    assert (out / "samples-3-steps.png").exists()


def test_bad_input_is_one_line_and_status_2(finished, tmp_path, monkeypatch):
    out, data = finished[0], photographs(tmp_path / "data", [2, 1], "ab")
    teacher, other = out / "teacher.safetensors", tmp_path / "other.safetensors"
    net, about = load_network(teacher)
    next(net.parameters()).data += 0.1
    run.save_weights(net, other, {"about": json.dumps(about)})
    monkeypatch.chdir(tmp_path)  # the default OUT lies there
    assert_refused(cifar, [
        (["--data", "nowhere"], "neither cifar10, digits nor a folder"),
        (["--sample", "4", "--out", tmp_path], "has not finished"),
        (["--sample", "4", "--classes", "10", "--out", out], "was trained on 10 classes"),
        (["--sample", "4", "--generator", teacher], "teacher.safetensors does not fit"),
        (["--data", "digits", "--classes", "3"], "--classes means nothing without --sample"),
        (["--quick", "--paper"], "--quick and --paper contradict each other"),
        (["--data", "digits", "--attention", "7"], "the network's resolutions are [8, 4]"),
        ([*SMALL, "--cond", "--out", out, "--lr", "0.5"], "resume"),
        ([*SMALL, "--cond", "--out", out, "--teacher", other], "(teacher_weights "),
        (["--data", "digits", "--cond", "--hold-out", "--teacher", teacher], "images that are held out"),
        ([*SMALL, "--cond", "--out", out, "--overwrite", "--fid", "--inception-weights", teacher], "no FID"),
        (["--data", data, "--hold-out"], "--hold-out needs at least ten images"),
        (["--data", data, "--out", data / "runs"], "lies in the data folder"),
    ], out)


def photographs(data, counts, names):
    """A folder of random images of 20x20 pixels, so many of each class."""
    random = np.random.default_rng(0)
    for name, count in zip(names, counts, strict=True):
        (data / name).mkdir(parents=True)
        for i in range(count):
            pixels = random.integers(0, 256, (20, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(data / name / f"{i}.png")
    return data


QUICK = ["--quick", "--cond", "--device", "cpu", "--model-channels", "8", "--channel-mult", "1",
         "--teacher-kimg", ".008", "--kimg", ".008", "--batch", "4", "--samples", "24", "--attention"]


def test_quick_run_on_photographs_a_part_of_which_is_held_out(tmp_path):
    """The whole command on a folder of colour images: --quick's settings, shortened, with a GAN.

    The classes are unequal, and have names that a console may not show: of another encoding and alphabet."""
    names, out = ["caf\udce9", "\u0436"], tmp_path / "out"  # a byte of latin-1; a Cyrillic letter
    data = photographs(tmp_path / "data", [20, 10], names)
    line = ["--data", data, "--out", out, "--gan", "0.01", "--gan-discriminator", "0.2", "--hold-out", *QUICK]
    succeed(cifar, *line)
    metrics, config = (json.loads((out / name).read_text()) for name in ("metrics.json", "config.json"))
    assert config["class_counts"] == [16, 8] and metrics["against"].startswith("24 training images")
    assert config["classes"] == load_network(out / "generator.safetensors")[1]["classes"] == names
    assert config["network"]["img_resolution"] == 16 and config["settings"]["weight"] == "sid"

    # A discriminator that knows nothing yet loses 2 log 2, times its weight and the numbers of a sample.
    last = json_lines(out / "log.jsonl")[-1]
    assert last["extra_flow_loss"] == pytest.approx(2 * math.log(2) * 0.2 * 3 * 16**2, rel=0.05)

    assert metrics["metric"] == "judge Frechet distance"
    row = metrics["rows"]["one step"]
    assert row["judge_frechet"] == metrics["one_step"] and row["noise"] > 0
    for name in ("teacher, 50 steps", "one step"):
        row = metrics["rows"][name]
        assert row["to_trained"] > 0 and row["to_held_out"] > 0 and 0.9 < row["copy_ratio"] < 1.1

    # Samples drawn later have the data's shares.
    succeed(cifar, "--sample", "24", "--npz", "--out", out)
    assert np.load(out / "samples-one-step.npz")["labels"].sum() == 8

    # The teacher was trained on the same part, and may serve another run.
    training, _ = cifar.hold_out(load_images(data, 16, cond=True))
    load_teacher(out / "teacher.safetensors", training, cond=True, hold_out=True)

    # Images of the same name that changed are noticed before anything is lost.
    (data / names[0] / "1.png").write_bytes((data / names[0] / "0.png").read_bytes())
    assert_refused(cifar, [(line, "run with other settings (images ")], out)
