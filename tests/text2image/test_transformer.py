"""SD3's transformer: gradients of both memory recipes, several processes, the GAN, compilation."""

import copy

import pytest
import torch
from conftest import SHAPES
from helpers import forked, joined

import bench
import fgm
from text2image.digits import PROMPTS
from text2image.prompts import cached_embeddings
from text2image.real import cached_latents
from text2image.transformer import networks
from training import processes
from training.gan import GAN
from training.processes import noise_from

CPU = torch.device("cpu")
ALL_SHAPES = pytest.mark.parametrize("shape", SHAPES)
ALL_KINDS = "3.5-medium"  # the shape that has all kinds of blocks


def shaken(*nets):
    """Networks whose adapters, or weights, have all moved, so that nothing is zero or equal."""
    torch.manual_seed(1)
    for p in {id(p): p for net in nets for p in net.parameters()}.values():
        p.data.add_(0.05 * torch.randn_like(p))
    return nets


def losses(teacher, flow, net, cond, null, guidance=4.0, c_in=0.8):
    """One flow loss and one FGM loss of fixed draws; gradients are left in the networks."""
    generator = fgm.OneStepGenerator(net, 0.97, c_in)
    dtype = next(net.parameters()).dtype
    z, noise = (noise_from(torch.arange(i, i + 3), (16, 4, 4), "cpu").to(dtype) for i in (0, 10))
    t = torch.tensor([0.2, 0.6, 0.95])
    with torch.no_grad():
        x0 = generator(z, **cond)
    fgm.reflow_loss(flow, x0, noise, t, **cond).mean().backward()
    with fgm.frozen(teacher, flow):
        guided = fgm.Guided(teacher, guidance, null)
        l1, l2 = fgm.fgm_losses(guided, flow, generator(z, **cond), noise, t, **cond)
        (l2 - 0.4 * l1).mean().backward()


def gradients(net):
    return torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


# ---- The recipes -------------------------------------------------------------------------------------------


@ALL_SHAPES
def test_two_adapters_equal_three_networks(models, embeddings, shape):
    """The adapters with checkpointing, the networks without."""
    model, cond = models[shape], embeddings(torch.tensor([0, 90, 200]))
    teacher, flow, net = networks(model, 4, True, False, CPU)
    shaken(flow, net)
    plain = networks(model, 4, False, False, CPU)[1:]
    apart = []
    for adapter, source in zip(plain, (flow, net), strict=True):  # whole networks, the other adapter unused
        for mine, moved in zip(adapter.parameters(), source.parameters(), strict=True):
            mine.data.copy_(moved)
        apart.append(copy.deepcopy(adapter))
    base = networks(model, 0, False, False, CPU)[0]
    assert apart[0].shared is not apart[1].shared
    losses(teacher, flow, net, cond, embeddings.null)
    losses(base, *apart, cond, embeddings.null)
    for mine, theirs in zip((flow, net), apart, strict=True):
        assert len(gradients(mine)) == sum(p.numel() for p in mine.parameters()) > 1000
        assert relative(gradients(mine), gradients(theirs)) < 1e-6
    assert relative(gradients(flow), gradients(net)) > 0.1
    assert all(p.grad is None for p in flow.shared.parameters() if not p.requires_grad)
    second = [path for path in flow.paths if "attn2" in path]
    assert len(second) == (8 if shape == "3.5-medium" else 0)  # q, k, v and output of two blocks


def test_bf16_gradient_is_near_that_of_fp32_and_the_timestep_stays_float32(models, embeddings):
    model, cond, found = models[ALL_KINDS], embeddings(torch.tensor([0, 90, 200])), []
    seen = []

    def record(module, args, kwargs):
        seen.append(kwargs["timestep"])

    for bf16 in (False, True):
        teacher, flow, net = networks(model, 0, False, bf16, CPU)
        shaken(flow, net)
        for velocity in (teacher, flow, net):
            velocity.net.register_forward_pre_hook(record, with_kwargs=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses(teacher, flow, net, cond, embeddings.null)
        found.append(gradients(net))
    assert all(t.dtype == torch.float32 for t in seen)
    assert sum(torch.equal(t, torch.full_like(t, 970.0)) for t in seen) == 4  # the generator's two passes
    assert next(teacher.parameters()).dtype == torch.bfloat16 and found[1].dtype == torch.float32
    assert 1e-5 < relative(found[1], found[0]) < 0.06  # a timestep in bfloat16: 0.18


def parameters(nets):
    named = ((f"{name}.{key}", p) for name, net in nets.items() for key, p in net.named_parameters())
    return {name: fgm.gathered(p.detach()).clone() for name, p in named}


def steps_of_weights(model, embeddings, lora_rank, folder):
    """{name: how far a step moves this weight}: with checkpointing, accumulation and the GAN."""
    torch.manual_seed(0)
    teacher, flow, net = networks(model, lora_rank, True, False, "cpu", keep_features=True)
    paths = [model / "images" / f"{i:04d}.png" for i in range(5)]
    latents = cached_latents(model, paths, (32, 32), folder / "latents", "cpu", torch.float32)

    def real(seeds):
        return latents(seeds % 5)["latents"], embeddings(seeds % 5)

    gan = GAN(32, real, (-1.0, 2.0), 2e-3, 1e-2, (4, 4))
    processes.shard(gan.head)
    nets = {"flow": flow, "net": net, "gan": gan}
    before = parameters(nets)
    guided, generator = fgm.Guided(teacher, 4.0, embeddings.null), fgm.OneStepGenerator(net, 0.97, 0.8)
    fgm.distill(
        guided, generator, flow, (16, 4, 4), steps=1, batch=8, micro_batch=2, lr=1e7, flow_lr=1e7,
        eps=1e6, conditions=lambda seeds: embeddings(seeds % 240), l1_weight=-0.4, extra=gan, ema_decay=None,
        precision="fp32")
    return {name: value - before[name] for name, value in parameters(nets).items()}


def save_steps(model, folder):
    processes.GATHERED_WHOLE = 0  # block by block, as a large network
    processes.setup("cpu")
    embeddings = cached_embeddings(model, PROMPTS, folder / "cache", "cpu", torch.float32)
    steps = {rank: steps_of_weights(model, embeddings, rank, folder) for rank in (0, 4)}
    if fgm.process_rank() == 0:
        torch.save(steps, folder / "steps.pt")


def test_two_processes_move_the_weights_as_one(models, tmp_path):
    """With Adam's epsilon far above the gradients, a step moves each weight by its gradient times a constant.

    Both recipes, on the shape that has all kinds of blocks; the micro-batches are of the same samples."""
    model = models[ALL_KINDS]
    statuses = joined(forked(save_steps, model, tmp_path, processes=2, out=tmp_path))
    assert statuses == [0, 0], (tmp_path / "0.txt").read_text()

    embeddings = cached_embeddings(model, PROMPTS, tmp_path / "cache", CPU, torch.float32)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as each of the two has: other sums of float32 differ by 2e-6
    for lora_rank, shared in torch.load(tmp_path / "steps.pt").items():
        alone = steps_of_weights(model, embeddings, lora_rank, tmp_path)
        for part in ("flow.", "net.", "gan."):
            one, two = (torch.cat([value.flatten() for name, value in side.items() if name.startswith(part)])
                        for side in (alone, shared))
            assert one.norm() > 0 and relative(two, one) < 1e-6, (lora_rank, part)
    torch.set_num_threads(threads)


# ---- The GAN -----------------------------------------------------------------------------------------------


def test_the_gan_sees_the_hidden_states_of_block_2(models, embeddings):
    """And gradients reach its input by all paths. (The losses of the GAN are tested on images.)"""
    _, flow, _ = networks(models[ALL_KINDS], 0, True, False, CPU, keep_features=True)
    shaken(flow)
    torch.manual_seed(2)
    gan = GAN(32, None, (-1.0, 2.0), 0.5, 0.25, (4, 4))
    cond, t = embeddings(torch.tensor([3, 4])), torch.rand(2)
    x = torch.randn(2, 16, 4, 4, requires_grad=True)
    found = gan.logit(flow.features_of(x, t, **cond))

    net = flow.net  # blocks 0 to 2, called one by one
    h, c = net.pos_embed(x), net.context_embedder(cond["encoder_hidden_states"])
    e = net.time_text_embed(1000 * t, cond["pooled_projections"])
    for block in net.transformer_blocks[:3]:
        c, h = block(hidden_states=h, encoder_hidden_states=c, temb=e)
    expected = gan.head(h.mT.reshape(2, 32, 4, 4)).mean((1, 2, 3))
    torch.testing.assert_close(found, expected)
    ours, theirs = (torch.autograd.grad(logit.sum(), x)[0] for logit in (found, expected))
    assert ours.norm() > 0 and relative(ours, theirs) < 1e-5


# ---- Compilation -------------------------------------------------------------------------------------------


def test_recomputed_blocks_are_compiled_too():
    """With checkpointing and LoRA, where recomputation once left the blocks uncompiled."""
    config = SHAPES[ALL_KINDS] | {"num_layers": 1}
    _, flow, _, shape, _, conditions = bench.miniature(CPU, 2, 4, True, config)
    calls = []

    def backend(graph, inputs):
        def counted(*values):
            calls.append(graph)
            return graph(*values)

        return counted

    flow.compile(backend=backend)
    x0, noise, t, cond = torch.randn(2, *shape), torch.randn(2, *shape), torch.rand(2), conditions([0, 1])
    for _ in range(2):  # traced, run
        calls.clear()
        loss = fgm.reflow_loss(flow, x0, noise, t, **cond).sum()
        forward = list(calls)
        loss.backward()
    assert len(forward) == len(list(flow.shared.net.children()))
    assert len(calls) == len(forward) + 1
