"""bench.py: every row's code on tiny networks, and what the loops beside fgm.distill's compute."""

import json
from functools import partial

import torch
from helpers import drive_here

import bench
import fgm
import tiny_sd3
import toy2d

TINY = dict(model_channels=8, channel_mult=[1, 1], num_blocks=1, attn_resolutions=[4])
CONFIG = tiny_sd3.TRANSFORMER | dict(num_layers=1, num_attention_heads=1, caption_projection_dim=16)


def test_every_row(tmp_path, monkeypatch):
    """But those of torch.compile and of a GPU."""
    monkeypatch.setattr(bench, "TURN", 0)
    monkeypatch.setattr(bench, "SUBJECTS", {
        "toy": partial(bench.toy, batch=8),
        "U-Net": partial(bench.unet, batch=4, size=8, channels=1, **TINY),
        "LoRA": partial(bench.miniature, batch=2, lora_rank=2, config=CONFIG),
    })
    done = drive_here(bench, "--repeats", 1, "--json", tmp_path / "bench.json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    expected = set()
    for name in ("toy", "U-Net", "LoRA"):
        expected |= {f"step / bare passes: {name}, fp32", f"SiD's loop / step: {name}, fp32"}
    assert rows.keys() == expected and all(name in done.stdout for name in rows)
    assert all(row["least"] <= row["median"] <= row["most"] for row in rows.values())


def norm(loss, net):
    return torch.nn.utils.get_total_norm(torch.autograd.grad(loss.mean(), list(net.parameters())))


def test_sids_loop_makes_the_gradients_of_its_losses():
    torch.manual_seed(0)
    generator = fgm.OneStepGenerator(toy2d.VelocityMLP(), 0.97)
    teacher, flow = toy2d.VelocityMLP(), toy2d.VelocityMLP()
    for net in (teacher, generator, flow):
        for p in net.parameters():
            torch.nn.init.normal_(p, std=0.2)
    draws = [(torch.randn(16, 2), torch.randn(16, 2), torch.rand(16), {}) for _ in range(2)]
    learners = [fgm.Learner(net, 1e-9, (0.0, 0.999), 1e-8) for net in (flow, generator)]
    bf16 = torch.autocast("cpu", enabled=False)
    terms = bench.sid_step(teacher, generator, flow, learners, draws.__getitem__, bf16)

    (z, noise, t, _), (z2, noise2, t2, _) = draws
    flow_loss = fgm.reflow_loss(flow, generator(z).detach(), noise, t)
    l1, l2 = fgm.fgm_losses(teacher, flow, generator(z2), noise2, t2, weight=fgm.sid_weight)
    expected = {"flow_loss": flow_loss, "l1": l1, "l2": l2, "flow_gradient": norm(flow_loss, flow),
                "gradient": norm(l1 + l2, generator)}
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value, rtol=1e-4, atol=1e-4)
