"""Several processes: they equal one, and none waits for another that has ended."""

import copy
import functools
import shutil

import pytest
import torch
import torch.distributed.fsdp  # here, for all forks
from helpers import TOY, call, forked, joined, json_lines
from safetensors.torch import load_file

import fgm
import toy2d
from training import processes
from training.run import FolderRun, command, save_weights


def as_command(work, *arguments):
    command(functools.partial(work, *arguments))


def outputs(folder):
    return [(folder / f"{rank}.txt").read_text() for rank in (0, 1)]


def test_two_processes_equal_one(toy_run, tmp_path):
    out = tmp_path / "out"
    arguments = toy2d, *TOY, "--out", out, "--micro-batch", 4
    statuses = joined(forked(call, *arguments, processes=2, out=tmp_path))
    assert statuses == [0, 0], outputs(tmp_path)
    for one, two in zip(json_lines(toy_run[0] / "log.jsonl"), json_lines(out / "log.jsonl"), strict=True):
        for name in {"flow_loss", "flow_loss_by_t", "bound", "bound_error", "bound_by_t"} & one.keys():
            assert one[name] == pytest.approx(two[name], rel=1e-3, abs=1e-5), name
    for name in ("teacher.safetensors", "generator.safetensors"):
        one, two = load_file(toy_run[0] / name), load_file(out / name)
        assert all((one[key] - two[key]).norm() <= 1e-4 * one[key].norm() for key in one)


@pytest.mark.parametrize("share, limit, micro_batch", [(512, 128, 128), (100, 128, 100), (6, 4, 3)])
def test_default_micro_batch_divides_the_share(share, limit, micro_batch):
    assert processes.largest_divisor(share, limit) == micro_batch


def distil_with_pictures(folder):
    """As a large network, which several processes share, and as a small one; goes on with what is there."""
    processes.setup("cpu")
    for processes.GATHERED_WHOLE in (0, 1e9):
        torch.manual_seed(0)
        net = toy2d.VelocityMLP(width=16, depth=2)
        networks = [net, copy.deepcopy(net), copy.deepcopy(net)]
        for network in networks:
            layers = [layer for layer in network.net if isinstance(layer, torch.nn.Linear)]
            processes.shard(network, layers)
        z, out = torch.randn(4, 2), folder / f"{processes.GATHERED_WHOLE:g}"
        run = FolderRun(out, save_every=2, picture_every=2)
        run.picture = lambda step, generator, z=z: {"mean": generator(z).mean().item()}
        generator = fgm.OneStepGenerator(networks[1], 0.8)
        settings = dict(steps=6, batch=8, lr=1e-2, ema_decay=0.9)
        fgm.distill(networks[0], generator, networks[2], (2,), run=run, **settings)
        save_weights(generator.net, out / "generator.safetensors")


def test_sharded_networks_and_replicas_on_two_processes_equal_one(tmp_path):
    """Pictures between steps change nothing; two go on with what one has begun, and the other way round."""
    results = []
    for turn in ((("one", None), ("two", 2)), (("one", 2), ("two", None))):
        for name, number in turn:
            work = as_command, distil_with_pictures, tmp_path / name
            started = forked(*work, processes=number, out=tmp_path)
            assert {*joined(started)} == {0}, outputs(tmp_path)

        for path in tmp_path.glob("*/*/generator.safetensors"):
            results.append(torch.cat([value.flatten() for value in load_file(path).values()]))
            shutil.rmtree(path.parent / "checkpoints/distill-000000006")
    assert len(results) == 8
    assert all((result - results[0]).norm() < 1e-6 * results[0].norm() for result in results)


def fail_alone(kind):
    processes.setup("cpu")

    def fail():
        raise kind("no such luck")

    processes.first_process(fail)


@pytest.mark.parametrize("kind, status, message", [
    (fgm.InputError, 2, "no such luck"), (KeyError, 1, "another process has ended"),
])
def test_the_wait_ends_where_the_first_process_fails(kind, status, message, tmp_path):
    assert joined(forked(as_command, fail_alone, kind, processes=2, out=tmp_path)) == [status, 2]
    assert message in outputs(tmp_path)[1].splitlines()[-1]


def test_noise_of_a_seed_is_its_own():
    """Alone, in company, and for seeds that are neighbours or differ only above 32 bits."""
    seeds = torch.tensor([5, 6, 5 + 2**32, 2**62])
    noise = processes.noise_from(seeds, (4, 500), "cpu")
    assert noise.dtype == torch.float32
    assert torch.equal(noise[1:2], processes.noise_from(seeds[1:2], (4, 500), "cpu"))
    covariance = torch.cov(noise.flatten(1)) - torch.eye(4)
    assert covariance.abs().max() < 0.1
