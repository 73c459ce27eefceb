"""EDM's U-Net, alone and as the velocity of a published denoiser."""

import math

import pytest
import torch
from torch import nn

import fgm
from images.unet import EDMUNet, EDMVelocity, keep_features
from points.data import GaussianMixture
from training.gan import GAN
from training.processes import noise_from


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
    loss = gan.flow_loss(flow, x0.detach(), seeds, cond)
    drawn = noise_from(seeds ^ 1, (1, 8, 8), "cpu")
    fake_logit = logit(x0.detach(), noise, t, cond)
    real_logit = logit(real[[2, 1]], drawn, t, {"class_labels": one_hot[[2, 1]]})
    expected = -64 * 0.25 * (torch.log(torch.sigmoid(-fake_logit)) + torch.log(torch.sigmoid(real_logit)))
    torch.testing.assert_close(loss, expected)

    loss = gan.generator_loss(flow, x0, seeds, cond)
    t = torch.sigmoid(-1 + 2 * noise_from(seeds ^ 2, (1,), "cpu")[:, 0])
    expected = -64 * 0.5 * torch.log(torch.sigmoid(logit(x0, drawn, t, cond)))
    torch.testing.assert_close(loss, expected)
    gradient, expected_gradient = (torch.autograd.grad(value.sum(), x0)[0] for value in (loss, expected))
    assert gradient.norm() > 0
    torch.testing.assert_close(gradient, expected_gradient)


def test_network_says_what_does_not_fit():
    with pytest.raises(fgm.InputError, match="halved"):
        EDMUNet(9, 1, 1)
    net = small_net(label_dim=10)
    with pytest.raises(fgm.InputError, match=r"class_labels of shape \[2, 10\]"):
        net(torch.zeros(2, 1, 8, 8), torch.ones(2))
    with pytest.raises(fgm.InputError, match=r"takes images of shape \[1, 8, 8\], got \[1, 16, 16\]"):
        net(torch.zeros(2, 1, 16, 16), torch.ones(2), torch.zeros(2, 10))


# The velocity of a denoiser


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


def test_velocity_where_the_network_is_0_is_that_of_a_gaussian_at_any_t():
    """Of N(0, 0.5^2), as EDM takes the data to be; in float32 down to t = 1e-6 nothing cancels."""
    mixture = GaussianMixture([1.0], [[0.0, 0.0]], 0.25 * torch.eye(2)[None])
    x, t = torch.randn(4, 2), torch.tensor([1e-6, 0.1, 0.9, 1.0])
    v = EDMVelocity(lambda x, label: torch.zeros_like(x))(x, t)
    torch.testing.assert_close(v, mixture.velocity(x, t), rtol=1e-5, atol=1e-6)
