"""The image command, as users run it."""

import argparse
import json
import shutil
import sys
import time

import numpy as np
import pytest
import torch
from helpers import assert_refused, call, drive_here, forked, joined
from PIL import Image
from safetensors.torch import load_file
from test_unet import small_net

import cifar
import fgm
from images.data import draw_images, load_images
from images.published import load_network
from images.scores import coarse_pixels, frechet_distance
from training import progress, run

SMALL = [
    "--data", "digits", "--model-channels", "8", "--num-blocks", "1", "--batch", "16", "--kimg", "0.32",
    "--teacher-kimg", "0.32", "--save-every", "5", "--log-every", "10", "--picture-every", "20",
    "--samples", "60", "--device", "cpu", "--teacher-t", "3", "0.1",
]


def test_memory_that_distillation_lacks_is_missed_before_the_teacher_trains(tmp_path, monkeypatch, capfd):
    def distill(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(fgm, "distill", distill)
    monkeypatch.setattr(sys, "argv", ["cifar.py", *SMALL, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run.command(cifar.main)
    assert "cifar.py: out of memory" in capfd.readouterr().err
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
    out = tmp_path_factory.mktemp("digits") / "whole"
    done = drive_here(cifar, *SMALL, "--cond", "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


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
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    filled = {line["phase"]: [loss is not None for loss in line["flow_loss_by_t"]] for line in lines
              if "flow_loss_by_t" in line}
    assert filled == {"teacher": [False] * 9 + [True], "distill": [True] * 10}  # --teacher-t: its own t
    names = ("one-step.png", "teacher-50-steps.png", "distill-0000020.png", "samples.png", "progress.png")
    for name in names:
        assert (out / name).stat().st_size > 100
    for name in ("config.json", "log.jsonl", "teacher.safetensors"):
        assert (out / name).stat().st_size > 100


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path):
    line = [*SMALL, "--cond", "--out", tmp_path, "--samples", "20"]
    (process,) = forked(call, "cifar.py", *line, out=tmp_path)
    while not (tmp_path / "checkpoints/distill-000000010").exists() and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    assert not (tmp_path / "metrics.json").exists()

    done = drive_here(cifar, *line)
    assert done.returncode == 0, done.stderr
    for name in ("teacher", "generator"):
        whole, resumed = (load_file(path / f"{name}.safetensors") for path in (finished[0], tmp_path))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_teacher_under_another_path_goes_on(finished, tmp_path, monkeypatch, capfd):
    """~ is the home. The teacher's defect is told each time."""
    shutil.copy(finished[0] / "teacher.safetensors", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = [*SMALL, "--cond", "--out", "~/out", "--kimg", "0.08", "--samples", "10", "--teacher"]
    assert drive_here(cifar, *line, "~/teacher.safetensors").returncode == 0
    log = (tmp_path / "out" / "log.jsonl").read_bytes()
    done = drive_here(cifar, *line, finished[0] / "teacher.safetensors")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "log.jsonl").read_bytes() == log
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    value, error, t = (metrics["defect"][name] for name in ("value", "standard_error", "t"))
    assert error > 0 and f"flow's velocity: {value:.3f} +- {error:.3f} at t = {t}\n" in done.stdout
    without = [(line[:-1], "holds a run that was given its --teacher")]  # which a new one would replace
    assert_refused(cifar, without, tmp_path / "out", monkeypatch, capfd)


def gaussian_velocity(x, t, class_labels):
    """The velocity of a flow whose data are N(0, 0.1), whatever their class."""
    t = fgm.per_sample(t, x)
    return x * (t - 0.1 * (1 - t)) / (t**2 + 0.1 * (1 - t) ** 2)


@pytest.mark.parametrize("teacher, warned", [
    (gaussian_velocity, False),
    (lambda x, t, **cond: -gaussian_velocity(x, t, **cond), True),
    (lambda x, t, **cond: gaussian_velocity(x, 1 - t, **cond), True),
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
    assert joined(forked(call, "cifar.py", *arguments, processes=2, out=tmp_path)) == [0, 0]
    of_run = np.load(out / "samples-one-step.npz")
    assert of_run["images"].shape == (6, 8, 8, 1) and of_run["labels"].tolist() == [3, 1] * 3
    assert of_run["classes"].tolist() == [str(i) for i in range(10)]
    assert "6 images in" in (tmp_path / "0.txt").read_text()

    alone = tmp_path / "mine.safetensors"
    alone.write_bytes((out / "generator.safetensors").read_bytes())
    done = drive_here(cifar, "--sample", 4, "--classes", 3, 1, "--npz", "--generator", alone, "--seed", 2)
    assert done.returncode == 0, done.stderr
    of_file = np.load(tmp_path / "samples-one-step.npz")
    assert np.abs(of_file["images"].astype(int) - of_run["images"][:4]).max() <= 1
    assert drive_here(cifar, "--sample", 4, "--ode-steps", 3, "--out", out).returncode == 0
    assert (out / "samples-3-steps.png").exists()


def test_bad_input_is_one_line_and_status_2(finished, tmp_path, monkeypatch, capfd):
    out, _ = finished
    teacher, data = out / "teacher.safetensors", photographs(tmp_path / "data", [2, 1], "ab")
    net, about = load_network(teacher)
    next(net.parameters()).data += 0.1
    run.save_weights(net, tmp_path / "other.safetensors", {"about": json.dumps(about)})
    cases = [
        (["--data", "nowhere"], "neither cifar10, digits nor a folder"),
        (["--data", "digits", "--teacher", teacher], "conditional on 10 classes, asked for is 0"),
        (["--sample", "4", "--out", tmp_path], "has not finished"),
        (["--sample", "4", "--classes", "10", "--out", out], "was trained on 10 classes"),
        (["--sample", "4", "--ode-steps", "2", "--teacher", out / "generator.safetensors"], "be a teacher"),
        (["--sample", "4", "--generator", teacher], "teacher.safetensors does not fit"),
        (["--data", "digits", "--classes", "3"], "--classes means nothing without --sample"),
        (["--sample", "4", "--generator", teacher, "--ode-steps", "2"], "and --generator names"),
        (["--quick", "--paper"], "--quick and --paper contradict each other"),
        (["--quick", "--data", "digits"], "digits has resolution 8"),
        (["--data", "digits", "--attention", "7"], "the network's resolutions are [8, 4]"),
        ([*SMALL, "--cond", "--out", out, "--lr", "0.5"], "resume"),
        ([*SMALL, "--cond", "--out", out, "--teacher", tmp_path / "other.safetensors"], "(teacher_weights "),
        (["--data", "digits", "--cond", "--hold-out", "--teacher", teacher], "images that are held out"),
        ([*SMALL, "--cond", "--out", out, "--overwrite", "--fid", "--inception-weights", teacher], "no FID"),
        (["--data", data, "--hold-out"], "--hold-out needs at least ten images"),
        (["--data", data, "--out", data / "runs"], "lies in the data folder"),
    ]
    monkeypatch.chdir(tmp_path)
    assert_refused(cifar, cases, out, monkeypatch, capfd)
    monkeypatch.chdir(data)  # the default OUT would be inside
    inside = [(["--data", "."], "runs/data lies in the data folder .:")]
    assert_refused(cifar, inside, out, monkeypatch, capfd)
    assert not (data / "runs").exists()


@pytest.mark.parametrize(
    "device, can, precision, resolution",
    [("cpu", {"amx_bf16": True}, "bf16", 16), ("cpu", {}, "auto", 16),
     ("cuda", {"amx_bf16": True}, "auto", 32)],
)
def test_quick_runs_in_bfloat16_on_a_cpu_that_is_fast_in_it(device, can, precision, resolution, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    monkeypatch.setattr(sys, "argv", ["cifar.py", "--quick", "--device", device])
    args = cifar.arguments()
    assert (args.precision, args.resolution) == (precision, resolution)
    monkeypatch.setattr(sys, "argv", ["cifar.py", "--quick", "--device", device, "--precision", "fp32"])
    assert cifar.arguments().precision == "fp32"


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


def test_quick_run_on_photographs_a_part_of_which_is_held_out(tmp_path, monkeypatch, capfd):
    """The whole command on a folder of colour images: --quick's settings, shortened, with a GAN.

    The classes are unequal, and have names that a console may not show: of another encoding and alphabet."""
    names, out = ["caf\udce9", "\u0436"], tmp_path / "out"  # a byte of latin-1; a Cyrillic letter
    data = photographs(tmp_path / "data", [20, 10], names)
    line = ["--data", data, "--out", out, "--gan", "0.01", "--hold-out", *QUICK]
    done = drive_here(cifar, *line)
    assert done.returncode == 0, done.stderr
    metrics, config = (json.loads((out / name).read_text()) for name in ("metrics.json", "config.json"))
    assert config["class_counts"] == [16, 8] and metrics["against"].startswith("24 training images")
    assert config["classes"] == load_network(out / "generator.safetensors")[1]["classes"] == names
    assert config["network"]["img_resolution"] == 16 and config["settings"]["weight"] == "sid"
    assert "extra_flow_loss" in (out / "log.jsonl").read_text() and config["settings"]["gan"] == 0.01

    assert metrics["metric"] == "judge Frechet distance"
    row = metrics["rows"]["one step"]
    assert row["judge_frechet"] == metrics["one_step"] and row["noise"] > 0
    (one_step,) = (row for row in done.stdout.splitlines() if row.startswith("  one step"))
    numbers = [f"{row[name]:.4f}" for name in ("judge_frechet", "pixel_frechet", "noise", "accuracy")]
    assert one_step.split()[2:6] == numbers
    for name in ("teacher, 50 steps", "one step"):
        row = metrics["rows"][name]
        assert row["to_trained"] > 0 and row["to_held_out"] > 0 and 0.9 < row["copy_ratio"] < 1.1
    assert "copy_ratio" not in metrics["rows"]["teacher, 1 step"] and "copy ratio" in done.stdout

    # Samples drawn later have the data's shares.
    assert drive_here(cifar, "--sample", "24", "--npz", "--out", out).returncode == 0
    assert np.load(out / "samples-one-step.npz")["labels"].sum() == 8

    # The teacher was trained on the same part, and serves another run.
    other = ["--out", tmp_path / "other", "--teacher", out / "teacher.safetensors"]
    assert drive_here(cifar, *line, *other).returncode == 0
    same = [load_network(folder / "teacher.safetensors")[1] for folder in (out, tmp_path / "other")]
    assert same[0] == same[1]

    # Images of the same name that changed are noticed before anything is lost.
    (data / names[0] / "1.png").write_bytes((data / names[0] / "0.png").read_bytes())
    assert_refused(cifar, [(line, "run with other settings (images ")], out, monkeypatch, capfd)
