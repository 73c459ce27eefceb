"""bench.py: every row's code on tiny networks, and what the loops beside fgm.distill's compute."""

import json
from functools import partial

import pytest
import torch
from helpers import drive_here

import bench
import fgm
import tiny_sd3
import toy2d
from training import loops, run

CPU = torch.device("cpu")
TINY = dict(model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4])
CONFIG = tiny_sd3.TRANSFORMER | dict(num_layers=1, num_attention_heads=1, caption_projection_dim=16)
ROWS = [
    "step / bare passes: {}, fp32", "former step / step: {}, fp32", "SiD's loop / step: {}, fp32",
]


def test_every_row(tmp_path, monkeypatch):
    """But those of torch.compile."""
    plain = bench.unet
    tiny = partial(bench.miniature, batch=2, config=CONFIG)
    monkeypatch.setattr(bench, "keep_memory", lambda: None)  # it would hold for all tests of this process
    monkeypatch.setattr(bench, "TURN", 0)
    monkeypatch.setattr(run.FolderRun, "draw_progress", lambda folder_run: None)  # no row's
    monkeypatch.setattr(bench, "unet", lambda device, batch, size, channels, **network:
                        plain(device, min(batch, 4), 8, 1, **TINY))
    monkeypatch.setattr(bench, "SUBJECTS", {
        "toy": partial(bench.toy, batch=8), "LoRA": partial(tiny, lora_rank=2)})
    done = drive_here(bench, "--repeats", 1, "--full", "--json", tmp_path / "bench.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    subjects = ["toy, batch 8", "LoRA, batch 2", "EDM U-Net, CIFAR-10 size, batch 4"]
    expected = {row.format(name) for row in ROWS for name in subjects}
    expected |= {"peak memory, step / former step: EDM U-Net, CIFAR-10 size, batch 4",
                 "logging + checkpoints + pictures / run time: digits"}
    assert rows.keys() == expected and all(name[:40] in done.stdout for name in rows)
    assert all(row["least"] <= row["median"] <= row["most"] for row in rows.values())


def test_operations_are_counted_with_those_back_to_inputs():
    """A 1x1 convolution: forward 1; generator and flow backward 2, of which the generator's input needs none;
    the teacher back to its input 1."""
    nets = [Field() for _ in range(3)]
    passes = loops.bare_passes(*nets, (3, 4, 4), 2, lambda seeds: {})
    with bench.FlopCounterMode(display=False) as counter:
        passes()
    assert counter.get_total_flops() == 2 * (2 * 16 * 3 * 3) * (2 + 3 + 2)


class Field(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(3, 3, 1)

    def forward(self, x, t):
        return self.net(x) * fgm.per_sample(t, x)


@pytest.fixture
def subject():
    torch.manual_seed(0)
    generator = fgm.OneStepGenerator(toy2d.VelocityMLP(), 0.97)
    nets = toy2d.VelocityMLP(), generator, toy2d.VelocityMLP()
    for net in nets:
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    drawn = [(torch.randn(16, 2), torch.randn(16, 2), torch.rand(16), {}) for _ in range(2)]
    learners = [fgm.Learner(nets[i], 1e-9, (0.0, 0.999), 1e-8) for i in (2, 1)]
    return nets, learners, drawn


def norm(loss, net):
    return torch.nn.utils.get_total_norm(torch.autograd.grad(loss.mean(), list(net.parameters())))


@pytest.mark.parametrize("step", [loops.former_step, loops.sid_step])
def test_other_loops_make_the_gradients_of_their_losses(subject, step):
    (teacher, generator, flow), learners, drawn = subject
    found = step(teacher, generator, flow, learners, drawn.__getitem__, torch.autocast("cpu", enabled=False))
    former = step is loops.former_step
    (z, noise, t, _), (z2, noise2, t2, _) = drawn[0], drawn[0 if former else 1]
    flow_loss = fgm.reflow_loss(flow, generator(z).detach(), noise, t)
    weight = None if former else fgm.sid_weight
    l1, l2 = fgm.fgm_losses(teacher, flow, generator(z2), noise2, t2, weight=weight)
    expected = {"flow_loss": flow_loss, "l1": l1, "l2": l2, "flow_gradient": norm(flow_loss, flow),
                "gradient": norm(l1 + l2, generator)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)
