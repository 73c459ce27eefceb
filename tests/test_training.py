"""The two training loops: learning, resuming, several processes, faults."""

import copy
import json
import math
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from helpers import ENV, ROOT, command, drive
from safetensors.torch import load_file

import fgm

SMALL = ["--device", "cpu", "--batch", "16", "--teacher-steps", "30", "--steps", "40", "--save-every", "10", "--log-every", "10", "--samples", "500"]


def networks(seed=0):
    torch.manual_seed(seed)
    teacher = fgm.VelocityMLP(width=16, depth=2)
    return teacher, fgm.OneStepGenerator(copy.deepcopy(teacher), 0.8), copy.deepcopy(teacher)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def distilled(**settings):
    teacher, generator, flow = networks()
    return weights(fgm.distill(teacher, generator, flow, (2,), **{"steps": 8, "batch": 12, "lr": 1e-3, "l1_weight": 1.0, **settings})[0])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of the command line."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = drive("fgm.py", *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_command_line_writes_what_it_promises(finished):
    out, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher"].keys() == {"1", "2", "5", "10", "50"} and math.isfinite(metrics["one_step"])
    assert f"{1000 * metrics['one_step']:.3f}" in printed
    z = fgm.Draws(500, "cpu", 0, 9).normal((2,))
    config = json.loads((out / "config.json").read_text())
    net = fgm.VelocityMLP(**config["network"])
    net.load_state_dict(load_file(out / "generator.safetensors"))
    samples = fgm.OneStepGenerator(net, **config["generator"])(z).detach()
    assert fgm.energy_distance(samples, fgm.toy_data("8gaussians", 500, 1)) == pytest.approx(metrics["one_step"], rel=1e-5)
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [(line["phase"], line["step"]) for line in log] == [("teacher", s) for s in (10, 20, 30)] + [("distill", s) for s in (10, 20, 30, 40)]
    assert log[-1]["l2_gradient_at_x0"] > 0 and (out / "samples.png").stat().st_size > 1000


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_run_moves_the_weights_alike():
    plain, compiled = distilled(steps=3, log_every=1), distilled(steps=3, log_every=1, compile=True)
    torch.testing.assert_close(compiled, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("phase", ["teacher-000000010", "distill-000000020"])
def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path, phase):
    process = subprocess.Popen(command("fgm.py", *SMALL, "--out", tmp_path), env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "checkpoints" / phase).exists() and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "metrics.json").exists()
    done = drive("fgm.py", *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("teacher.safetensors", "generator.safetensors"):
        one, other = load_file(finished[0] / name), load_file(tmp_path / name)
        assert all(torch.equal(one[key], other[key]) for key in one)
    steps = [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert steps == [10, 20, 30, 10, 20, 30, 40]


def test_two_processes_equal_one(finished, tmp_path):
    done = drive("fgm.py", *SMALL, "--out", tmp_path, "--micro-batch", 4, processes=2)
    assert done.returncode == 0, done.stderr
    for name in ("teacher.safetensors", "generator.safetensors"):
        one, other = load_file(finished[0] / name), load_file(tmp_path / name)
        assert all((one[key] - other[key]).norm() <= 1e-4 * one[key].norm() for key in one)
    more = drive("fgm.py", *SMALL, "--out", tmp_path, "--steps", 50, "--resume")  # two processes' checkpoint, resumed by one
    assert more.returncode == 0 and "steps 40 -> 50" in more.stdout, more.stderr


def test_accumulation_equals_one_batch():
    assert (distilled() - distilled(micro_batch=4)).norm() < 1e-5 * distilled().norm()
    with pytest.raises(ValueError, match="micro-batch 5"):
        distilled(micro_batch=5)


def test_extra_losses_reach_both_networks():
    class Extra(torch.nn.Module):
        def __init__(self, size):
            super().__init__()
            self.head, self.size = torch.nn.Linear(2, 1), size

        def flow_loss(self, flow, x0, seeds, cond):
            return self.size * self.head(x0)[:, 0]

        generator_loss = flow_loss

    plain, nothing, something = distilled(), distilled(extra=Extra(0.0)), distilled(extra=Extra(5.0))
    assert torch.equal(plain, nothing) and not torch.equal(plain, something)


def test_conditions_reach_every_network_and_follow_the_seeds():
    seen = []

    class Labelled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(2, 2)

        def forward(self, x, t, labels):
            seen.append(labels.tolist())
            return self.net(x) + labels[:, None]

    nets = [Labelled() for _ in range(3)]
    generator = fgm.OneStepGenerator(nets[1], 0.9)
    fgm.distill(nets[0], generator, nets[2], (2,), steps=2, batch=6, conditions=lambda seeds: {"labels": seeds % 10})
    flow_labels, generator_labels = (fgm.Draws(6, "cpu", 0, *key).seeds() % 10 for key in ((1, 0, 0), (2, 0)))
    assert seen[:5] == [flow_labels.tolist()] * 2 + [generator_labels.tolist()] * 3  # generator, flow; generator, teacher, flow: no other pass, unless a step logs


def test_train_flow_learns_a_gaussian():
    """The velocity of N(0, s^2) is linear in x; a network trained by ReFlow must find it."""
    torch.manual_seed(0)
    data = 0.5 * torch.randn(50_000, 2)
    net, _ = fgm.train_flow(fgm.VelocityMLP(width=32, depth=2), lambda seeds: (data[seeds % len(data)], {}), steps=400, batch=256, lr=3e-3,
                            betas=(0.9, 0.999), lr_decay=200, ema_decay=0.99)  # fmt: skip
    exact = fgm.GaussianMixture([1.0], torch.zeros(1, 2), 0.25 * torch.eye(2)[None])
    x, t = fgm.interpolate(data[:4000], torch.randn(4000, 2), torch.full((4000,), 0.5)), torch.full((4000,), 0.5)
    error = fgm.dot(net(x, t) - exact.velocity(x, t), net(x, t) - exact.velocity(x, t)).mean() / fgm.dot(exact.velocity(x, t), exact.velocity(x, t)).mean()
    assert error < 0.02


def test_divergence_names_step_and_term_and_keeps_the_checkpoint(tmp_path):
    teacher, generator, flow = networks()
    calls = iter(range(1000))

    def failing(x, t):
        return teacher(x, t) * (math.nan if next(calls) >= 13 else 1)

    with pytest.raises(fgm.Diverged, match=r"l1 is not finite at step 13; the last good checkpoint is .*distill-000000010"):
        fgm.distill(failing, generator, flow, (2,), steps=20, batch=8, save_every=5, log_every=20, out=tmp_path)
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["distill-000000005", "distill-000000010"]


def test_damaged_checkpoint_is_refused_and_the_one_before_still_works(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    newest, before = (tmp_path / "checkpoints" / f"distill-{step:09d}" for step in (40, 30))
    tensors = next(newest.glob("*.safetensors"))
    content = bytearray(tensors.read_bytes())
    for damaged in (content[: len(content) // 2], content[:-8] + bytes(8)):
        tensors.write_bytes(damaged)
        done = drive("fgm.py", *SMALL, "--out", tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and f"{newest} is damaged" in done.stderr and before.name in done.stderr
    shutil.rmtree(newest)
    done = drive("fgm.py", *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = (load_file(out / "generator.safetensors") for out in (finished[0], tmp_path))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nothing"], "invalid choice: 'nothing'"),
        (["--colour", "red"], "unrecognized arguments"),
        (["--steps", "0"], "argument --steps: must be a positive number, got 0"),
        (["--batch", "-4"], "argument --batch: must be a positive number, got -4"),
        (["--lr", "nan"], "argument --lr: must be a positive number, got nan"),
        (["--lr", "many"], "invalid float value"),
        (["--t-star", "1.5"], "t_star must lie in (0, 1]"),
        (["--micro-batch", "5"], "global batch 16"),
        (["--out", str(ROOT / "README.md")], "cannot write to the output folder"),
        (["--out", "/proc/runs"], "cannot write to the output folder"),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path):
    done = drive("fgm.py", *SMALL, *(["--out", tmp_path / "x"] if "--out" not in arguments else []), *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.glob("x/*"))


def test_other_settings_in_the_folder(finished):
    out, _ = finished
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    done = drive("fgm.py", *SMALL, "--out", out, "--lr", "0.001")
    assert done.returncode == 2 and "lr 0.002 -> 0.001" in done.stderr and done.stderr.count("\n") == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_full_disk_keeps_the_checkpoint_before(finished, tmp_path):
    """A limit on the size of files stands for the disk: the checkpoint cannot be written."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    before = {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()}
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    done = subprocess.run(command("fgm.py", *SMALL, "--out", tmp_path, "--steps", 50, "--resume"), capture_output=True, text=True, env=ENV, preexec_fn=limit)
    assert done.returncode == 2 and "cannot write the checkpoint" in done.stderr and "File too large" in done.stderr and "Traceback" not in done.stderr
    assert {p: p.read_bytes() for p in (tmp_path / "checkpoints").rglob("*") if p.is_file()} == before
