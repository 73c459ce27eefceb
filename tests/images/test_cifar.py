"""The image command: network, published teachers, network files, and all of it as users run it."""

import copy
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
from helpers import ENV, assert_refused, command, drive, drive_here
from PIL import Image
from safetensors.torch import load_file
from test_images import folder
from torch import nn
from torch._subclasses import FakeTensorMode

import cifar
import fgm
from images.data import draw_images, load_images
from images.scores import frechet_distance, raw_pixels
from images.unet import (
    Conv,
    EDMUNet,
    EDMVelocity,
    GroupNorm,
    keep_features,
    load_edm,
    load_network,
    load_teacher,
)
from points.data import GaussianMixture
from training import progress, run, sizes
from training.gan import GAN
from training.run import noise_from

SMALL = [
    "--data", "digits", "--model-channels", "8", "--num-blocks", "1", "--batch", "16", "--kimg", "0.32",
    "--teacher-kimg", "0.32", "--save-every", "5", "--log-every", "10", "--picture-every", "20",
    "--samples", "60", "--device", "cpu", "--teacher-t", "3", "0.1",
]


def small_net(seed=0, **arguments):
    """A small EDMUNet whose last layers are not zero, so that every parameter matters."""
    torch.manual_seed(seed)
    defaults = dict(
        img_resolution=8, in_channels=1, out_channels=1, model_channels=16, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(4,),
    )
    net = EDMUNet(**(defaults | arguments))
    for p in net.parameters():
        nn.init.normal_(p, std=0.2)
    return net.eval()


# The network


def test_block_against_plain_mathematics():
    """Encoder block 4x4_block0, from its description, with explicit softmax and interleaved q, k, v."""
    net = small_net().double()
    block = net.enc["4x4_block0"]
    x, embedding = torch.randn(2, 16, 4, 4).double(), torch.randn(2, 64).double()

    def norm(layer, v):
        return nn.functional.group_norm(v, min(32, v.shape[1] // 4), layer.weight, layer.bias, 1e-6)

    def silu(v):
        return v * torch.sigmoid(v)

    def conv(layer, v):
        return nn.functional.conv2d(v, layer.weight, layer.bias, padding=layer.weight.shape[-1] // 2)

    added = embedding @ block.affine.weight.T + block.affine.bias
    h = conv(block.conv0, silu(norm(block.norm0, x))) + added[:, :, None, None]
    h = (conv(block.conv1, silu(norm(block.norm1, h))) + conv(block.skip, x)) / math.sqrt(2)
    qkv = conv(block.qkv, norm(block.norm2, h)).flatten(2)  # [2, 96, 16]
    q, k, v = qkv[:, 0::3], qkv[:, 1::3], qkv[:, 2::3]
    attention = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / math.sqrt(32), 2)
    attended = torch.einsum("bij,bcj->bci", attention, v).view(2, 32, 4, 4)
    expected = (h + conv(block.proj, attended)) / math.sqrt(2)
    torch.testing.assert_close(block(x, embedding), expected, rtol=1e-10, atol=1e-10)


def test_full_size_network_has_the_published_number_of_parameters():
    with torch.device("meta"):
        unconditional = EDMUNet(32, 3, 3, augment_dim=9)
        conditional = EDMUNet(32, 3, 3, label_dim=10, augment_dim=9)
    for net, parameters, entries in ((unconditional, 55_733_891, 425), (conditional, 55_735_299, 427)):
        assert (sum(p.numel() for p in net.parameters()), len(net.state_dict())) == (parameters, entries)


def test_network_compiles_without_graph_breaks():
    net = small_net(label_dim=10)
    x, t, labels = torch.randn(2, 1, 8, 8), torch.rand(2), torch.eye(10)[:2]
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, t, labels), net(x, t, labels))


@pytest.mark.parametrize("published", [False, True])
def test_gan_on_images_against_plain_mathematics(published):
    """The head sees the encoder's end at the t of the flow's pass; gradients reach x0 by all paths."""
    net = small_net(label_dim=10)
    flow, block = EDMVelocity(net) if published else net, net.enc["4x4_block0"]
    torch.manual_seed(2)
    real, one_hot, seeds = torch.randn(5, 1, 8, 8), torch.eye(10), torch.tensor([7, 11])

    def data(seeds):
        return real[seeds % 5], {"class_labels": one_hot[seeds % 5]}

    gan = GAN(keep_features(flow), data, (-1.0, 2.0), 0.5, 0.25)
    x0, noise = torch.randn(2, 1, 8, 8, requires_grad=True), torch.randn(2, 1, 8, 8)
    t, cond = torch.tensor([0.1, 0.4]), {"class_labels": one_hot[[3, 4]]}

    def logit(x, noise, t, cond):
        seen, t = [], t[:, None, None, None]
        hook = block.register_forward_hook(lambda block, inputs, output: seen.append(output))
        flow((1 - t) * x + t * noise, t.flatten(), **cond)
        hook.remove()
        return gan.head(seen[0]).mean((1, 2, 3))

    fgm.reflow_loss(flow, x0.detach(), noise, t, **cond)
    found = gan.flow_loss(flow, x0.detach(), seeds, cond)
    drawn = noise_from(seeds ^ 1, (1, 8, 8), "cpu")
    fake_logit = logit(x0.detach(), noise, t, cond)
    real_logit = logit(real[[2, 1]], drawn, t, {"class_labels": one_hot[[2, 1]]})
    expected = -64 * 0.25 * (torch.log(torch.sigmoid(-fake_logit)) + torch.log(torch.sigmoid(real_logit)))
    torch.testing.assert_close(found, expected)

    found = gan.generator_loss(flow, x0, seeds, cond)
    t = torch.sigmoid(-1 + 2 * noise_from(seeds ^ 2, (1,), "cpu")[:, 0])
    expected = -64 * 0.5 * torch.log(torch.sigmoid(logit(x0, drawn, t, cond)))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(loss.sum(), x0)[0] for loss in (found, expected))
    assert ours.norm() > 0
    torch.testing.assert_close(ours, theirs)


def test_network_names_what_does_not_fit():
    with pytest.raises(fgm.InputError, match="halved"):
        EDMUNet(9, 1, 1)
    net = small_net(label_dim=10)
    with pytest.raises(fgm.InputError, match=r"class_labels of shape \[2, 10\]"):
        net(torch.zeros(2, 1, 8, 8), torch.ones(2))
    with pytest.raises(fgm.InputError, match=r"takes images of shape \[1, 8, 8\], got \[1, 16, 16\]"):
        net(torch.zeros(2, 1, 16, 16), torch.ones(2), torch.zeros(2, 10))


def test_gradients_in_bfloat16_are_those_of_float32():
    net = small_net(label_dim=10)
    x, t, labels = torch.randn(16, 1, 8, 8), torch.rand(16), torch.eye(10)[torch.arange(16) % 10]
    found = []
    for bf16 in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = fgm.reflow_loss(net, x, x.flip(0), t, class_labels=labels).mean()
        gradients = torch.autograd.grad(loss, list(net.parameters()))
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    assert (found[1] - found[0]).norm() < 0.05 * found[0].norm()


def test_norms_stay_in_bfloat16_under_the_rules_of_cuda():
    """On tensors that only claim to be on a GPU; plain group norm turns to float32 there."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    with FakeTensorMode(), torch.device("cuda"):
        x, norm = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16), GroupNorm(8)
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            assert nn.functional.group_norm(x, 2).dtype == torch.float32 and norm(x).dtype == torch.bfloat16
        finally:
            torch.set_autocast_enabled("cuda", before[0])
            torch.set_autocast_dtype("cuda", before[1])


# Memory


def test_memory_that_distillation_lacks_is_missed_before_the_teacher_trains(tmp_path, monkeypatch, capfd):
    def distill(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(fgm, "distill", distill)
    monkeypatch.setattr(sys, "argv", ["cifar.py", *SMALL, "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        run.command(cifar.main)
    assert "cifar.py: out of memory" in capfd.readouterr().err
    assert list((tmp_path / "checkpoints").iterdir()) == []


# Published teachers


def denoiser(net, y, sigma, **cond):
    """EDM's D(y; s), from table 1 of arXiv 2206.00364."""
    s = fgm.per_sample(sigma, y)
    skip, out, scale = 0.25 / (s**2 + 0.25), s * 0.5 / (s**2 + 0.25).sqrt(), 1 / (s**2 + 0.25).sqrt()
    return skip * y + out * net(scale * y, sigma.log() / 4, **cond)


def test_velocity_of_a_denoiser_and_back():
    net = small_net(label_dim=3).double()
    x, t = torch.randn(5, 1, 8, 8).double(), torch.tensor([0.01, 0.3, 0.5, 0.9, 0.98]).double()
    cond = {"class_labels": torch.eye(3)[[0, 1, 2, 0, 1]].double()}
    v, time = EDMVelocity(net)(x, t, **cond), fgm.per_sample(t, x)
    d = denoiser(net, x / (1 - time), t / (1 - t), **cond)
    torch.testing.assert_close(v, (x - d) / time, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x - time * v, d, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("deviation", [0.2, 0.5, 2.0])
def test_velocity_of_a_gaussian_data_set(deviation):
    """With the optimal denoiser of N(0, deviation^2), v is GaussianMixture's, down to t = 1e-6 in float32."""

    def optimal(x, label, **cond):  # the F whose D(y; s) is y deviation^2 / (s^2 + deviation^2)
        s = (4 * label.double()).exp()[:, None]
        y = x.double() * (s**2 + 0.25).sqrt()
        denoised_minus_skip = (deviation**2 / (s**2 + deviation**2) - 0.25 / (s**2 + 0.25)) * y
        return (denoised_minus_skip * (s**2 + 0.25).sqrt() / (s * 0.5)).to(x.dtype)

    mixture = GaussianMixture([1.0], [[0.0, 0.0]], [[[deviation**2, 0.0], [0.0, deviation**2]]])
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 2e-4)):
        t = torch.tensor([0.003, 0.1, 0.5, 0.9, 0.98], dtype=dtype)
        x = torch.randn(len(t), 2, dtype=dtype)
        v = EDMVelocity(optimal)(x, t)
        torch.testing.assert_close(v, mixture.velocity(x, t), rtol=tolerance, atol=tolerance)
    if deviation == 0.5:  # F = 0: exact at any t, without cancellation
        t = torch.tensor([1e-6, 1.0])
        x = torch.randn(2, 2)
        v = EDMVelocity(lambda x, label: torch.zeros_like(x))(x, t)
        torch.testing.assert_close(v, mixture.velocity(x, t), rtol=1e-6, atol=1e-6)


class Persistent:
    """Pickles as EDM's persistent classes do: a call of torch_utils.persistence with source and state."""

    def __init__(self, class_name, state):
        source = "raise SystemExit('embedded source was executed')"
        self.meta = dict(type="class", version=6, module_src=source, class_name=class_name, state=state)

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,)


def persistent(module, class_name=None):
    if isinstance(module, nn.ModuleDict):
        container = nn.ModuleDict()
        container._modules = OrderedDict((name, persistent(child)) for name, child in module.items())
        return container
    kept = ("training", "dropout", "in_channels")
    state = {name: value for name, value in module.__dict__.items() if name in kept}
    state["_parameters"] = module._parameters
    buffers = ((name, value) for name, value in module._buffers.items() if name != "frequencies")
    state["_buffers"] = OrderedDict(buffers)
    children = {name: child for name, child in module.named_children() if not isinstance(child, nn.Identity)}
    state["_modules"] = OrderedDict((name, persistent(child)) for name, child in children.items())
    return Persistent(class_name or type(module).__name__, state)


@pytest.fixture
def edm_pickle(monkeypatch, tmp_path):
    """Write a network as EDM publishes it; returns the path."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("embedded source was executed")

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    module._reconstruct_persistent_obj = _reconstruct_persistent_obj
    monkeypatch.setitem(sys.modules, "torch_utils", package)
    monkeypatch.setitem(sys.modules, "torch_utils.persistence", module)

    def write(net, inner="SongUNet", outer="EDMPrecond", **extra):
        net = copy.deepcopy(net)
        channels, resolution = net.input_shape[:2]
        state = dict(
            img_resolution=resolution, img_channels=channels, label_dim=net.label_dim, use_fp16=False,
            sigma_min=0, sigma_max=float("inf"), sigma_data=np.float64(0.5), _parameters={}, _buffers={},
            _modules=OrderedDict(model=persistent(net, inner)),
        )
        path = tmp_path / f"{inner}.pkl"
        path.write_bytes(pickle.dumps({"ema": Persistent(outer, state), **extra}))
        return path

    return write


CONDITIONAL = dict(label_dim=10, augment_dim=9, channel_mult=(2, 2), num_blocks=2, attn_resolutions=(8, 4))


@pytest.mark.parametrize("arguments", [dict(), CONDITIONAL, dict(attn_resolutions=())])
def test_published_pickle_round_trip(edm_pickle, arguments):
    net = small_net(**arguments)
    loaded = load_edm(edm_pickle(net))
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([0.2, 0.9])
    cond = {"class_labels": torch.eye(10)[:2]} if net.label_dim else {}
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, t, **cond), EDMVelocity(net)(x, t, **cond), rtol=0, atol=0)


class Attack:
    def __init__(self, call, argument):
        self.call, self.argument = call, argument

    def __reduce__(self):
        return self.call, (self.argument,)


def test_foreign_pickles_are_refused_and_never_executed(edm_pickle, tmp_path):
    ran = tmp_path / "ran"
    net = small_net()
    for call, argument in ((os.system, f"touch {ran}"), (eval, f"open({str(ran)!r}, 'w')")):
        with pytest.raises(fgm.InputError, match=call.__name__):
            load_edm(edm_pickle(net, hidden=Attack(call, argument)))
    inner = pickle.dumps(Attack(os.system, f"touch {ran}"))  # the same, inside what poses as a tensor's bytes
    with pytest.raises(fgm.InputError):
        load_edm(edm_pickle(net, hidden=Attack(torch.storage._load_from_bytes, inner)))
    assert not ran.exists()
    whole = edm_pickle(net).read_bytes()
    broken = tmp_path / "broken.pkl"
    for content in (whole[: len(whole) // 2], b"", pickle.dumps({"ema": 3}), pickle.dumps([1])):
        broken.write_bytes(content)
        with pytest.raises(fgm.InputError, match="damaged"):
            load_edm(broken)
    with pytest.raises(fgm.InputError, match="VPPrecond"):
        load_edm(edm_pickle(net, outer="VPPrecond"))
    net.dec["8x8_aux_skip"] = Conv(16, 1, 3)
    with pytest.raises(fgm.InputError, match=r"NCSN\+\+"):
        load_edm(edm_pickle(net))
    with pytest.raises(fgm.InputError, match="cannot read"):
        load_edm(tmp_path / "missing.pkl")


# Drawing


def test_image_i_is_the_same_whatever_the_batch():
    net = small_net(label_dim=10)
    generator = fgm.OneStepGenerator(net, 0.9)
    some, labels = draw_images(generator, 12, (1, 8, 8), [1] * 10, "cpu", seed=3, batch=5)
    more, _ = draw_images(generator, 30, (1, 8, 8), [1] * 10, "cpu", seed=3, batch=30)
    assert (some.int() - more[:12].int()).abs().max() <= 1 and sorted(labels[:10].tolist()) == [*range(10)]
    others, _ = draw_images(generator, 12, (1, 8, 8), [1] * 10, "cpu", seed=4)
    assert (others.int() - some.int()).abs().max() > 10
    assert draw_images(generator, 4, (1, 8, 8), [1] * 10, "cpu", classes=[7, 2])[1].tolist() == [7, 2, 7, 2]


# The command


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
    assert f"{metrics['one_step']:.4f}" in printed and "GB, in a distillation step" in printed
    net, description = load_network(out / "generator.safetensors")
    generator, real = fgm.OneStepGenerator(net, **description["generator"]), load_images("digits")
    assert description["class_counts"] == real.class_counts()
    assert metrics["labels"] == "drawn as often as the data has each class"
    pixels, labels = draw_images(generator, 60, (1, 8, 8), real.class_counts(), "cpu")
    distance = frechet_distance(raw_pixels(real.pixels), raw_pixels(pixels))
    assert distance == pytest.approx(metrics["one_step"], rel=1e-3)
    curves, teacher = progress.read(out / "log.jsonl")  # on as few samples, the same distance
    assert curves["score"] == ([20], [pytest.approx(metrics["one_step"])])
    assert teacher == pytest.approx(metrics["teacher"])
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    drawn = {line["phase"]: [loss is not None for loss in line["flow_loss_by_t"]] for line in lines
             if "flow_loss_by_t" in line}
    assert drawn == {"teacher": [False] * 9 + [True], "distill": [True] * 10}  # --teacher-t: its own t
    names = ("one-step.png", "teacher-50-steps.png", "distill-0000020.png", "samples.png", "progress.png")
    for name in names:
        assert (out / name).stat().st_size > 100
    for name in ("config.json", "log.jsonl", "teacher.safetensors"):
        assert (out / name).stat().st_size > 100


MOMENTS = ["checkpoints/teacher-000000010", "checkpoints/distill-000000010", "generator.safetensors"]


def test_killed_at_three_moments_and_resumed_equals_uninterrupted(finished, tmp_path):
    line = [*SMALL, "--cond", "--out", tmp_path, "--samples", "20"]
    for moment in MOMENTS:
        started = command("cifar.py", *line)
        process = subprocess.Popen(started, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while not (tmp_path / moment).exists() and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (tmp_path / moment).exists() and not (tmp_path / "metrics.json").exists()
    done = drive_here(cifar, *line)
    assert done.returncode == 0, done.stderr
    for name in ("teacher", "generator"):
        whole, resumed = (load_file(path / f"{name}.safetensors") for path in (finished[0], tmp_path))
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_sampling_from_a_run_and_from_a_file_alone(finished, tmp_path):
    out, _ = finished
    arguments = ["--sample", 6, "--classes", 3, 1, "--npz", "--out", out, "--seed", 2]
    done = drive("cifar.py", *arguments, processes=2)
    assert done.returncode == 0, done.stderr
    of_run = np.load(out / "samples-one-step.npz")
    assert of_run["images"].shape == (6, 8, 8, 1) and of_run["labels"].tolist() == [3, 1] * 3
    assert of_run["classes"].tolist() == [str(i) for i in range(10)] and "6 images of 3, 1 in" in done.stdout
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
    teacher, cut = out / "teacher.safetensors", tmp_path / "cut.safetensors"
    cut.write_bytes(teacher.read_bytes()[:-100])
    flat = folder(tmp_path / "folder", [(8, 8), (8, 8)])
    cases = [
        (["--data", "nowhere"], "neither cifar10, digits nor a folder"),
        (["--data", "digits", "--teacher", teacher], "conditional on 10 classes, asked for is unconditional"),
        (["--data", flat, "--cond", "--teacher", teacher], "shape [1, 8, 8], the data has [3, 8, 8]"),
        (["--data", "digits", "--teacher", cut], "damaged"),
        (["--data", "digits", "--teacher", tmp_path / "none.safetensors"], "cannot read"),
        (["--sample", "4", "--out", tmp_path], "has not finished"),
        (["--sample", "4", "--classes", "10", "--out", out], "--classes must lie in 0..9"),
        (["--sample", "0", "--out", out], "argument --sample: must be in [1, 1e9], got 0"),
        (["--data", "digits", "--attention", "7"], "the network's resolutions are [8, 4]"),
        (["--data", "digits", "--model-channels", "130"], "130 channels do not divide into 32 groups"),
        (["--data", "digits", "--resume", "--overwrite"], "give one of them"),
        (["--data", "digits", "--classes", "3"], "--classes means nothing without --sample"),
        (["--sample", "4", "--lr", "1", "--out", out], "--lr means nothing with --sample"),
        (["--data", "digits", "--device", "tpu"], "cpu, cuda or cuda:N"),
        (["--data", "digits", "--teacher", ""], "argument --teacher: is empty"),
        (["--data", "digits", "--teacher", teacher, "--dropout", ".1"], "--dropout means nothing with"),
        (["--data", "digits", "--cond", "--teacher", out / "generator.safetensors"], "generator, no teacher"),
        (["--sample", "4", "--ode-steps", "2", "--teacher", out / "generator.safetensors"], "no teacher"),
        (["--cond", "--teacher", teacher, "--teacher-kimg", "9"], "--teacher-kimg means nothing with"),
        (["--data", "digits", "--batch", "0"], "argument --batch: must be in [1, 1e9], got 0"),
        (["--data", "nowhere", "--t-star", "1.5"], "argument --t-star: must be in (0, 1], got 1.5"),
        (["--data", "nowhere", "--channel-mult", "1", "0"], "argument --channel-mult: must be in [1"),
        (["--data", "nowhere", "--batch", "16", "--micro-batch", "5"], "micro-batch"),
        ([*SMALL, "--cond", "--out", out, "--lr", "0.5"], "resume"),
        ([*SMALL, "--cond", "--out", out, "--fid", "--inception-weights", cut], "no FID"),
        ([*SMALL, "--cond", "--out", out, "--overwrite", "--fid", "--inception-weights", cut], "no FID"),
        (["--data", "digits", "--out", out / "config.json"], "cannot write"),
        (["--colour"], "unrecognized arguments"),
        (["--quick", "--paper"], "--quick and --paper contradict each other"),
        (["--quick", "--data", "digits"], "--quick is for photographs"),
        (["--data", "digits", "--gan", "0"], "argument --gan: must be in (0, 1e9], got 0"),
        (["--sample", "4", "--gan", "1", "--out", out], "--gan means nothing with --sample"),
        (["--quick", "--sample", "4", "--out", out], "--quick means nothing with --sample"),
        (["--sample", "4", "--teacher", teacher, "--out", out], "nothing without --ode-steps"),
        (["--sample", "4", "--generator", teacher, "--data", "digits"], "--data means nothing with"),
        (["--sample", "4", "--generator", teacher, "--ode-steps", "2"], "--ode-steps means nothing with"),
        (["--data", "digits", "--batch", "1000000000"], "--batch 1000000000 would need"),
        (["--data", "digits", "--batch", "1000000000", "--micro-batch", "1"], "1000000000 would need"),
        (["--data", "digits", "--samples", "1000000000"], "--samples 1000000000 would need"),
        (["--data", "digits", "--model-channels", "65536"], "the network would need"),
        (["--data", flat, "--resolution", "1000000"], "--resolution 1000000 would need"),
        (["--sample", "1000000000", "--out", out], "1000000000 images would need"),
    ]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sizes, "memory_of", lambda device: 64e9)
    assert_refused(cifar, cases, out, monkeypatch, capfd)


def test_a_teacher_of_other_classes_or_in_another_order_is_refused(finished):
    teacher, real = finished[0] / "teacher.safetensors", load_images("digits")
    assert load_teacher(teacher, real, True)[1]["label_dim"] == 10
    for names in (real.classes[::-1], [f"digit {name}" for name in real.classes]):
        with pytest.raises(fgm.InputError, match=r"has the classes \['0', '1', .* the data \['"):
            load_teacher(teacher, real._replace(classes=names), True)


def test_two_processes_equal_one(finished, tmp_path):
    done = drive("cifar.py", *SMALL, "--cond", "--out", tmp_path, "--samples", "4", processes=2)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(path / "teacher.safetensors") for path in (finished[0], tmp_path))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    "device, can, precision, resolution",
    [("cpu", {"amx_bf16": True}, "bf16", 16), ("cpu", {"amx_bf16": False}, "auto", 16),
     ("cpu", {}, "auto", 16), ("cuda", {"amx_bf16": True}, "auto", 32)],
)
def test_quick_runs_in_bfloat16_on_a_cpu_that_is_fast_in_it(device, can, precision, resolution, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    monkeypatch.setattr(sys, "argv", ["cifar.py", "--quick", "--device", device])
    args = cifar.arguments()
    assert (args.precision, args.resolution) == (precision, resolution)
    monkeypatch.setattr(sys, "argv", ["cifar.py", "--quick", "--device", device, "--precision", "fp32"])
    assert cifar.arguments().precision == "fp32"


def test_quick_run_on_photographs(tmp_path, monkeypatch, capfd):
    """The whole command on a folder of colour images of unequal classes: --quick's settings, shortened."""
    data, out = tmp_path / "data", tmp_path / "out"
    values = np.random.default_rng(0).integers(0, 256, (24, 20, 20, 3)).astype(np.uint8)
    for i, value in enumerate(values):
        path = data / ("often" if i < 20 else "seldom") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(value).save(path)
    line = ["--quick", "--cond", "--data", data, "--out", out, "--device", "cpu", "--model-channels", "8",
            "--channel-mult", "1", "--gan", "0.01",
            "--teacher-kimg", ".008", "--kimg", ".008", "--batch", "4", "--samples", "20", "--attention"]
    done = drive_here(cifar, *line)
    assert done.returncode == 0, done.stderr
    metrics, config = (json.loads((out / name).read_text()) for name in ("metrics.json", "config.json"))
    assert metrics["metric"] == "judge Frechet distance" and config["class_counts"] == [20, 4]
    assert config["network"]["img_resolution"] == 16 and config["settings"]["weight"] == "sid"
    row = metrics["rows"]["one step"]
    assert row["judge_frechet"] == metrics["one_step"] and row["noise"] > 0
    assert "extra_flow_loss" in (out / "log.jsonl").read_text() and config["settings"]["gan"] == 0.01
    assert f"{row['judge_frechet']:.4f} +- {row['noise']:.4f}" in done.stdout

    # Images of the same name that changed are noticed before anything is lost.
    Image.fromarray(values[0]).save(data / "often" / "1.png")
    assert_refused(cifar, [(line, "trained for other images; remove it")], out, monkeypatch, capfd)

    # Samples drawn later have the data's shares.
    assert drive_here(cifar, "--sample", "12", "--npz", "--out", out).returncode == 0
    assert np.load(out / "samples-one-step.npz")["labels"].sum() == 2
