"""The two training loops and the runs around them: learning, resuming, several processes, faults."""

import copy
import functools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, call, drive, drive_here, forked, joined
from PIL import Image
from safetensors.torch import load_file

import fgm
import toy2d
from points.data import GaussianMixture
from training import checkpoint, progress, run, sizes
from training.flags import Setting

SMALL = ["--device", "cpu", "--batch", "16", "--teacher-steps", "30", "--steps", "40", "--save-every", "10"]
SMALL += ["--log-every", "10", "--samples", "500"]
MUTATIONS = int(os.environ.get("FGM_MUTATIONS", 100))  # by hand: 2000
COMPILER = shutil.which("g++") or shutil.which("clang++")


def networks(seed=0):
    torch.manual_seed(seed)
    teacher = toy2d.VelocityMLP(width=16, depth=2)
    return teacher, fgm.OneStepGenerator(copy.deepcopy(teacher), 0.8), copy.deepcopy(teacher)


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def distilled(**settings):
    teacher, generator, flow = networks()
    settings = {"steps": 8, "batch": 12, "lr": 1e-3, "l1_weight": 1.0} | settings
    return weights(fgm.distill(teacher, generator, flow, (2,), **settings)[0])


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_networks(out, other):
    for name in ("teacher.safetensors", "generator.safetensors"):
        a, b = load_file(out / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(out):
    """(phase, step) of every line of the log."""
    return [(line["phase"], line["step"]) for line in json_lines(out / "log.jsonl")]


ALL_LINES = [("teacher", s) for s in (10, 20, 30)] + [("distill", s) for s in (10, 20, 30, 40)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run of the command line."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    done = drive_here(toy2d, *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


# ------------------------------------------------------------------------------------------------------------
# The loops
# ------------------------------------------------------------------------------------------------------------


class Small(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)

    def forward(self, x, t):
        return self.layer(torch.cat([x, t[:, None]], 1)).tanh()


@pytest.mark.skipif(not COMPILER, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_run_moves_the_weights_alike(tmp_path):
    found = []
    for compile in (False, True):
        torch.manual_seed(0)
        teacher = Small()
        nets = teacher, fgm.OneStepGenerator(copy.deepcopy(teacher), 0.8), copy.deepcopy(teacher)
        around = run.FolderRun(tmp_path / str(compile), log_every=1)
        settings = dict(steps=3, batch=12, lr=1e-2, run=around, compile=compile)
        found.append(weights(fgm.distill(*nets, (2,), **settings)[0]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-5)
    assert (found[0] - weights(teacher)).norm() > 1e-3


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_a_learner_is_adam_and_keeps_no_moment_that_is_never_used(beta1):
    net = torch.nn.Linear(9, 7)
    other = copy.deepcopy(net)
    learner = fgm.Learner(net, 1e-2, (beta1, 0.999), 1e-8, clip=0.1)
    adam = torch.optim.Adam(other.parameters(), lr=1e-2, betas=(beta1, 0.999), fused=True)
    for _ in range(5):
        x = torch.randn(8, 9)
        net(x).square().mean().backward()
        learner.update(1.0, passes=1)
        other(x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 0.1)
        adam.step()
        adam.zero_grad()
    assert torch.equal(weights(net), weights(other))
    kept = {name.partition(".")[2] for name in checkpoint.state_tensors({"net": learner})}
    moments = ("exp_avg", "exp_avg_sq") if beta1 else ("exp_avg_sq",)
    assert kept == {f"{kind}.{name}" for kind in ("parameter", *moments) for name in ("weight", "bias")}


def test_log_and_checkpoints_change_nothing(tmp_path):
    assert torch.equal(distilled(), distilled(run=run.FolderRun(tmp_path, save_every=3, log_every=2)))


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

    plain = distilled(t_flow=(1e-30, 2.0))  # the flow draws times of its own, as with an extra loss
    nothing, something = distilled(extra=Extra(0.0)), distilled(extra=Extra(5.0))
    assert torch.equal(plain, nothing) and not torch.equal(plain, something)


def test_networks_that_share_weights_are_refused():
    """What a forgotten deepcopy makes; a frozen part may be shared."""
    for shared in ("teacher, generator", "teacher, flow", "generator, flow"):
        teacher, generator, flow = networks()
        if shared == "teacher, generator":
            generator = fgm.OneStepGenerator(teacher, 0.8)
        elif shared == "teacher, flow":
            flow = teacher
        else:
            flow = generator.net
        with pytest.raises(fgm.InputError, match=shared.replace(", ", " and ") + " share parameters"):
            fgm.distill(teacher, generator, flow, (2,), steps=1, batch=4)
    teacher, generator, flow = networks()
    for net in (generator.net, flow):
        net.net[0] = teacher.net[0].requires_grad_(False)
    before = weights(teacher)
    fgm.distill(teacher, generator, flow, (2,), steps=2, batch=4, lr=1e-2)
    assert torch.equal(weights(teacher), before) and not torch.equal(weights(generator), before)


class Sometimes(torch.nn.Module):
    """A network one part of which takes part in every third pass only."""

    def __init__(self, passes=0):
        super().__init__()
        self.always, self.rarely, self.passes = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), passes

    def forward(self, x, t):
        self.passes += 1
        return self.always(x) + (self.rarely(x) if self.passes % 3 == 0 else 0)


def trained(net, folder, steps=10):
    data = torch.linspace(-1, 1, 128).view(64, 2)
    around = run.FolderRun(folder, save_every=5)
    fgm.train_flow(net, lambda seeds: (data[seeds % 64], {}), steps=steps, batch=8, lr=1e-2, run=around)
    run.FolderRun.unlock()
    return weights(net)


def test_a_part_without_gradients_in_some_steps_is_resumed_exactly(tmp_path):
    torch.manual_seed(0)
    whole, half = Sometimes(), Sometimes(passes=5)
    expected = trained(whole, tmp_path)
    shutil.rmtree(tmp_path / "checkpoints/teacher-000000010")
    assert torch.equal(trained(half, tmp_path), expected)


def test_checkpoint_of_a_larger_network_is_not_read_in_part(tmp_path):
    trained(Sometimes(), tmp_path)
    smaller = Sometimes()
    smaller.rarely = None
    with pytest.raises(fgm.InputError, match="teacher-000000010 is damaged or not a checkpoint of this run"):
        trained(smaller, tmp_path)
    run.FolderRun.unlock()


def test_functions_and_partials_are_told_apart_in_settings():
    class Weight:
        def __call__(self, t, u, target):
            return t

    found = [checkpoint.described(weight) for weight in (
        functools.partial(fgm.logit_normal, 1), functools.partial(fgm.logit_normal, 2), fgm.sid_weight,
        fgm.noise_weight, functools.partial(fgm.sid_weight, t=torch.ones(2)), Weight())]
    assert len({json.dumps(one) for one in found}) == 6 and found[2] == "sid_weight"
    assert not any("0x" in json.dumps(one) for one in found)  # an address is another in the next process


def test_what_a_checkpoint_cannot_keep_is_said_before_the_first_step(tmp_path):
    steps = []
    around = run.FolderRun(tmp_path, fingerprint={"data": tmp_path})
    with pytest.raises(fgm.InputError, match="cannot keep the setting .*Path"):
        distilled(run=around, weight=lambda t, u, target: steps.append(t))
    assert not steps
    kept = distilled(run=run.FolderRun(tmp_path), lr=np.float32(1e-3), seed=np.int64(3))
    saved = json.loads((tmp_path / "checkpoints/distill-000000008/checkpoint.json").read_text())
    assert saved["settings"]["seed"] == 3 and saved["settings"]["lr"] == float(np.float32(1e-3))
    assert torch.equal(kept, distilled(lr=np.float32(1e-3), seed=3))
    run.FolderRun.unlock()


def test_the_log_holds_the_scores_of_generator_and_teacher(finished):
    """The last point is the energy distance of the generator that was written, on the noise of the run."""
    out = finished[0]
    curves, teacher = progress.read(out / "log.jsonl")
    assert curves["score"][0] == [40] and curves["flow_loss"][0] == [10, 20, 30, 40]
    net = toy2d.VelocityMLP()
    test, z = toy2d.toy_data("8gaussians", 500, 1), fgm.Draws(500, "cpu", 0, fgm.SCORES).normal((2,))

    def distance(name, draw):
        net.load_state_dict(load_file(out / f"{name}.safetensors"))
        with torch.no_grad():
            return toy2d.energy_distance(draw(net), test)

    start = json.loads((out / "config.json").read_text())["generator"]
    assert curves["score"][1] == [distance("generator", lambda net: fgm.OneStepGenerator(net, **start)(z))]
    expected = {str(k): distance("teacher", lambda net, k=k: fgm.sample_ode(net, z, k)) for k in (1, 10, 50)}
    assert teacher == pytest.approx(expected)
    with Image.open(out / "progress.png") as picture:
        assert picture.size == (1400, 750)


def stop_at(path, blow, *arguments, out):
    """toy2d.py with these arguments, ended by a signal when path has appeared; its exit status."""
    (process,) = forked(call, "toy2d.py", *arguments, out=out)
    while not path.exists() and process.is_alive():
        time.sleep(0.002)
    os.kill(process.pid, blow)
    return joined([process])[0]


def test_another_teacher_is_not_taken_for_the_first(finished, tmp_path):
    """Run A; then other teacher settings with --overwrite, killed; then the same without: A is gone."""
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    other = [*SMALL, "--teacher-lr", "0.01", "--out"]
    first = out / "checkpoints/teacher-000000010"
    assert stop_at(first, signal.SIGKILL, *other, out, "--overwrite", out=tmp_path) == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    assert not list((out / "checkpoints").glob("distill-*"))
    for folder in (out, tmp_path / "fresh"):
        done = drive_here(toy2d, *other, folder)
        assert done.returncode == 0, done.stderr
    assert_same_networks(out, tmp_path / "fresh")


def test_starting_again_leaves_nothing_that_an_earlier_run_drew_or_wrote(tmp_path):
    mine = ["mine.png", "teacher.safetensors", "sample.png", "pipeline/mine.py", "movie/mine.png",
            "movie/mypicture.png", "distill-results.png", "teacher-my-steps.png"]
    results = ["distill-0000500.png", "one-step.png", "teacher-50-steps.png", "lora.safetensors",
               "config.json", "metrics.json", "judge.safetensors", "pipeline/model_index.json",
               "movie/000000166.png"]
    for name in mine + results:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("earlier")
    run.FolderRun(tmp_path, resume="no")
    run.FolderRun.unlock()
    left = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(left) == sorted([".lock", *mine])


def test_distillation_is_tied_to_the_weights_of_its_teacher(tmp_path):
    teacher, generator, flow = networks()
    settings = dict(steps=2, batch=4)
    fingerprint = {"teacher_weights": run.fingerprint_of(teacher)}
    first = run.FolderRun(tmp_path, fingerprint=fingerprint)
    fgm.distill(teacher, generator, flow, (2,), run=first, **settings)
    run.FolderRun.unlock()
    teacher, generator, flow = networks(seed=1)
    fingerprint = {"teacher_weights": run.fingerprint_of(teacher)}
    with pytest.raises(fgm.InputError, match="teacher_weights [0-9a-f]{8} -> [0-9a-f]{8}"):
        other = run.FolderRun(tmp_path, fingerprint=fingerprint)
        fgm.distill(teacher, generator, flow, (2,), run=other, **settings)
    run.FolderRun.unlock()


def distil_with_pictures(folder):
    """As a large network, which several processes share, and as a small one; goes on with what is there."""
    run.setup("cpu")
    for run.GATHERED_WHOLE in (0, 1e9):
        torch.manual_seed(0)
        net = toy2d.VelocityMLP(width=16, depth=2)
        nets = [net, copy.deepcopy(net), copy.deepcopy(net)]
        for one in nets:
            run.shard(one, [layer for layer in one.net if isinstance(layer, torch.nn.Linear)])
        z, out = torch.randn(4, 2), folder / f"{run.GATHERED_WHOLE:g}"
        around = run.FolderRun(out, save_every=2, picture_every=2)
        around.picture = lambda step, generator, z=z: {"mean": generator(z).mean().item()}
        generator = fgm.OneStepGenerator(nets[1], 0.8)
        settings = dict(steps=6, batch=8, lr=1e-2, ema_decay=0.9)
        fgm.distill(nets[0], generator, nets[2], (2,), run=around, **settings)
        run.save_weights(generator.net, out / "generator.safetensors")


def as_command(work, *arguments):
    run.command(functools.partial(work, *arguments))


def test_sharded_networks_and_replicas_on_two_processes_equal_one(tmp_path, monkeypatch):
    """Pictures between steps change nothing; two go on with what one has begun, and the other way round."""
    monkeypatch.setattr(run, "GATHERED_WHOLE", run.GATHERED_WHOLE)
    folders, found = (tmp_path / "one", tmp_path / "two"), []

    def two(folder):
        statuses = joined(forked(as_command, distil_with_pictures, folder, processes=2, out=tmp_path))
        assert statuses == [0, 0], "".join(path.read_text() for path in tmp_path.glob("?.txt"))

    def look():
        for path in tmp_path.glob("*/*/generator.safetensors"):
            found.append(torch.cat([value.flatten() for value in load_file(path).values()]))
            path.unlink()
            shutil.rmtree(path.parent / "checkpoints/distill-000000006")

    distil_with_pictures(folders[0])
    run.FolderRun.unlock()
    two(folders[1])
    look()
    two(folders[0])
    distil_with_pictures(folders[1])
    run.FolderRun.unlock()
    look()
    assert len(found) == 8 and all((one - found[0]).norm() < 1e-6 * found[0].norm() for one in found)


def work_alone(folder):
    """The first process works for longer than the process group waits: alone, in a picture, at the end.

    It knows that it does by an exchange of its own with nobody, which the group's limit, then short, ends."""
    run.setup("cpu")
    set_limit = dist.distributed_c10d._set_pg_timeout
    alone, limit = [dist.new_group() for _ in range(3)], timedelta(seconds=1)

    def outlast(*_):
        if fgm.process_rank() == 0:
            group = alone.pop()
            set_limit(2 * limit, group)
            with pytest.raises(RuntimeError, match="[Tt]imed out"):
                dist.barrier(group)
        return {}

    def within_the_limit(wait):
        def waiting(*work):
            set_limit(limit)
            said = wait(*work)
            set_limit(run.TIME_LIMIT)
            return said
        return waiting

    run.wait_for_first = within_the_limit(run.wait_for_first)
    assert within_the_limit(run.first_process)(outlast) == {}
    around = run.FolderRun(folder)
    around.picture = outlast
    distilled(run=around)
    outlast()
    assert fgm.process_rank() or not alone


def test_the_others_wait_for_the_first_process_without_a_limit(tmp_path):
    statuses = joined(forked(as_command, work_alone, tmp_path / "out", processes=2, out=tmp_path))
    assert statuses == [0, 0], "".join(path.read_text() for path in tmp_path.glob("?.txt"))


def fail_alone(kind, place):
    run.setup("cpu")
    if place == "end" and fgm.process_rank() > 0:
        return

    def fail():
        raise kind("no such luck")

    run.first_process(fail)


@pytest.mark.parametrize("place", ["call", "end"])
@pytest.mark.parametrize("kind, status", [(fgm.InputError, 2), (OSError, 2), (KeyError, 1), (SystemExit, 1)])
def test_the_wait_ends_where_the_first_process_fails(kind, status, place, tmp_path):
    """Whatever it raises, and where the others wait: in the same call, or at the end of the command."""
    statuses = joined(forked(as_command, fail_alone, kind, place, processes=2, out=tmp_path))
    assert statuses == [status, 2]
    first, second = ((tmp_path / f"{rank}.txt").read_text() for rank in (0, 1))
    assert ("no such luck" in first) == (kind is not KeyError)  # whose traceback is Python's own to print
    assert ("no such luck" if status == 2 else "the first process has gone") in second.splitlines()[-1]


def vanish():
    """The first process, which holds the store where no launcher does, is killed."""
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    launcher = dist.TCPStore("127.0.0.1", port, is_master=False)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        launcher.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(launcher.get("port")), is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    run.first_process(lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_the_wait_ends_where_the_first_process_vanishes(tmp_path):
    assert joined(forked(as_command, vanish, processes=2, out=tmp_path)) == [-signal.SIGKILL, 2]
    assert "the first process has gone" in (tmp_path / "1.txt").read_text()


def run_in_a_folder_of_its_own(folder):
    run.setup("cpu")
    here = folder / str(fgm.process_rank())
    here.mkdir()
    os.chdir(here)
    distilled(run=run.FolderRun("out"))


def test_processes_without_a_common_folder_are_told_at_the_start(tmp_path):
    """As two machines whose disks are their own. Nothing is left behind."""
    statuses = joined(forked(as_command, run_in_a_folder_of_its_own, tmp_path, processes=2, out=tmp_path))
    assert statuses == [2, 2]
    for rank in (0, 1):
        said = (tmp_path / f"{rank}.txt").read_text()
        assert "out is not one folder for all processes: process 1 does" in said and said.count("\n") == 1
        assert list((tmp_path / str(rank) / "out").iterdir()) == []


def test_the_own_network_of_the_readme_trains_alike_on_two_processes(tmp_path, monkeypatch):
    """As written there, but for fewer steps: started by torchrun, and alone."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert "steps=2000" in code and "batch=512" in code
    keep = "\nimport os\ntorch.save(generator.state_dict(), os.environ.get('RANK', 'alone') + '.pt')\n"
    keep += "assert fgm.world_size() == int(os.environ.get('WORLD_SIZE', 1))\n"
    (tmp_path / "own.py").write_text(code.replace("steps=2000", "steps=20") + keep)
    done = drive(tmp_path / "own.py", processes=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    runpy.run_path("own.py")
    alone, *both = (torch.load(f"{name}.pt") for name in ("alone", 0, 1))
    for one in both:
        assert all((one[name] - value).norm() <= 1e-5 * value.norm() for name, value in alone.items())


def test_mutated_checkpoints_are_refused_or_harmless(tmp_path, monkeypatch):
    """Random bytes changed, cut off or added in any file of a checkpoint: refused, or the same state."""
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 4000)
    teacher, generator, flow = networks()
    fgm.distill(teacher, generator, flow, (2,), steps=4, batch=4, run=run.FolderRun(tmp_path, save_every=2))
    run.FolderRun.unlock()
    newest = tmp_path / "checkpoints/distill-000000004"
    original = contents(newest)
    files = sorted(newest.glob("*.safetensors"))
    assert len(files) > 3 and all(path.stat().st_size < 12_000 for path in files)
    settings = json.loads((newest / "checkpoint.json").read_text())["settings"]
    choose, refused = random.Random(0), 0
    for _ in range(MUTATIONS):
        path = choose.choice(sorted(original))
        content, place = bytearray(original[path]), choose.randrange(len(original[path]))
        kind = choose.randrange(3)
        content[place : place + (kind != 1)] = [] if kind == 0 else [choose.randrange(256)]
        path.write_bytes(content)
        learners = {"generator": fgm.Learner(networks(1)[1], 1e-3, (0.0, 0.999), 1e-8, None, 0.999)}
        learners["flow"] = fgm.Learner(networks(1)[2], 1e-3, (0.0, 0.999), 1e-8)
        try:
            step, _ = checkpoint.load(tmp_path / "checkpoints", "distill", learners, settings, "same")
            state = checkpoint.state_tensors(learners)
            expected = {name: value for path in files for name, value in load_file(path).items()}
            assert step == 4 and all(torch.equal(state[name], expected[name]) for name in expected)
        except fgm.InputError:
            refused += 1
        path.write_bytes(original[path])
    assert refused > 0.8 * MUTATIONS


def test_what_is_written_is_finite(tmp_path):
    run.write_json(tmp_path / "a.json", {"a": math.nan, "b": [1.0, math.inf], "c": {"d": 2}})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": None, "b": [1.0, None], "c": {"d": 2}}
    net = networks()[0]
    net.net[0].weight.data[0, 0] = math.nan
    with pytest.raises(fgm.Diverged, match="net.0.weight"):
        run.save_weights(net, tmp_path / "net.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_tied_weights_are_written(tmp_path):
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[1].weight = net[0].weight
    run.save_weights(net, tmp_path / "net.safetensors")
    written = load_file(tmp_path / "net.safetensors")
    assert torch.equal(written["0.weight"], net[0].weight) and torch.equal(written["1.weight"], net[0].weight)


def test_pictures_and_extra_losses_of_ones_own(tmp_path):
    """A picture may return numpy's and torch's numbers, an extra loss may be a constant in warm-up."""

    class Constant(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(2, 1)

        def flow_loss(self, flow, x0, seeds, cond):
            return self.head(x0)[:, 0]

        def generator_loss(self, flow, x0, seeds, cond):
            return torch.zeros(len(x0))

    around = run.FolderRun(tmp_path, picture_every=4)
    around.picture = lambda step, generator: {"score": np.float32(0.5), "other": torch.tensor(step)}
    assert torch.equal(distilled(run=around, extra=Constant()), distilled(extra=Constant()))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(line["score"], line["other"]) for line in lines] == [(0.5, 4), (0.5, 8)]
    assert lines[0]["extra"] == 0 and lines[0]["extra_gradient"] > 0
    run.FolderRun.unlock()


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
    settings = dict(steps=2, batch=6, conditions=lambda seeds: {"labels": seeds % 10})
    labels = [(fgm.Draws(6, "cpu", 0, fgm.DISTILLATION, 0, k).seeds() % 10).tolist() for k in (0, 1)]
    fgm.distill(nets[0], generator, nets[2], (2,), **settings, flow_updates=2)
    # generator, flow; generator, flow, teacher: no other pass
    assert seen[:5] == [labels[0]] * 2 + [labels[1]] * 3 and len(seen) == 10
    seen.clear()
    fgm.distill(nets[0], generator, nets[2], (2,), **settings)
    assert seen[:3] == [labels[0]] * 3 and len(seen) == 6


def test_train_flow_learns_a_gaussian():
    """The velocity of N(0, s^2) is linear in x; a network trained by ReFlow must find it."""
    torch.manual_seed(0)
    data = 0.5 * torch.randn(50_000, 2)
    net = toy2d.VelocityMLP(width=32, depth=2)
    settings = dict(steps=400, batch=256, lr=3e-3, betas=(0.9, 0.999), lr_decay=0.5, ema_decay=0.99)
    net, _ = fgm.train_flow(net, lambda seeds: (data[seeds % len(data)], {}), **settings)
    mixture = GaussianMixture([1.0], torch.zeros(1, 2), 0.25 * torch.eye(2)[None])
    t = torch.full((4000,), 0.5)
    x = fgm.interpolate(data[:4000], torch.randn(4000, 2), t)
    exact = mixture.velocity(x, t)
    error = net(x, t) - exact
    assert fgm.dot(error, error).mean() < 0.02 * fgm.dot(exact, exact).mean()


def test_divergence_names_step_and_term_and_keeps_the_checkpoint(tmp_path):
    calls = iter(range(1000))

    def failing_from_13(teacher):
        return lambda x, t: teacher(x, t) * (math.nan if next(calls) >= 13 else 1)

    teacher, generator, flow = networks()
    kept = r"distance is not finite at step 13; the last good checkpoint is .*distill-000000010"
    with pytest.raises(fgm.Diverged, match=kept):
        around = run.FolderRun(tmp_path, save_every=5, log_every=20)
        fgm.distill(failing_from_13(teacher), generator, flow, (2,), steps=20, batch=8, run=around)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["distill-000000005", "distill-000000010"]
    last = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 15 and last["l1"] is None and (tmp_path / "progress.png").stat().st_size > 10_000

    teacher, generator, flow = networks()
    calls = iter(range(1000))
    with pytest.raises(fgm.Diverged, match="distance is not finite at step 13"):
        fgm.distill(failing_from_13(teacher), generator, flow, (2,), steps=20, batch=8)


# ------------------------------------------------------------------------------------------------------------
# A run in a folder: what it writes, and going on with it
# ------------------------------------------------------------------------------------------------------------


def test_command_line_writes_what_it_promises(finished):
    out, printed = finished
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher"].keys() == {"1", "2", "5", "10", "50"} and math.isfinite(metrics["one_step"])
    assert f"{1000 * metrics['one_step']:.3f}" in printed
    z = fgm.Draws(500, "cpu", 0, fgm.SCORES).normal((2,))
    config = json.loads((out / "config.json").read_text())
    net = toy2d.VelocityMLP(**config["network"])
    net.load_state_dict(load_file(out / "generator.safetensors"))
    samples = fgm.OneStepGenerator(net, **config["generator"])(z).detach()
    distance = toy2d.energy_distance(samples, toy2d.toy_data("8gaussians", 500, 1))
    assert distance == pytest.approx(metrics["one_step"], rel=1e-5)
    assert logged(out) == ALL_LINES
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert last["distance_error"] > 0 and len(last["distance_by_t"]) == 10
    assert (out / "samples.png").stat().st_size > 1000


@pytest.mark.parametrize(
    "phase, blow",
    [
        ("teacher-000000010", signal.SIGKILL),
        ("distill-000000020", signal.SIGKILL),
        ("distill-000000010", signal.SIGTERM),
    ],
)
def test_stopped_and_resumed_equals_uninterrupted(finished, tmp_path, phase, blow):
    out = tmp_path / "out"
    status = stop_at(out / "checkpoints" / phase, blow, *SMALL, "--out", out, out=tmp_path)
    assert not (out / "metrics.json").exists()
    if blow == signal.SIGTERM:
        assert status == 143
        said = (tmp_path / "0.txt").read_text()
        assert said.endswith("toy2d.py: stopped; the same command goes on from the last checkpoint\n")
    done = drive_here(toy2d, *SMALL, "--out", out)
    assert done.returncode == 0, done.stderr
    assert_same_networks(finished[0], out)
    assert logged(out) == ALL_LINES


def test_stopping_while_a_checkpoint_is_written_is_no_fault_of_the_disk(tmp_path, monkeypatch, capfd):
    """And leaves nothing half-written."""
    def main():
        distilled(run=run.FolderRun(tmp_path, save_every=4))

    handler = signal.getsignal(signal.SIGTERM)
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        blow = lambda *_, number=number: signal.raise_signal(number)  # noqa: E731
        monkeypatch.setattr(checkpoint, "checksum", blow)
        with pytest.raises(SystemExit) as stopped:
            run.command(main)
        assert stopped.value.code == status
        assert capfd.readouterr().err.splitlines()[-1].endswith(run.STOPPED)
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == []
    signal.signal(signal.SIGTERM, handler)


def test_two_processes_equal_one(finished, tmp_path):
    out = tmp_path / "out"
    arguments = "toy2d.py", *SMALL, "--out", out, "--micro-batch", 4
    statuses = joined(forked(call, *arguments, processes=2, out=tmp_path))
    assert statuses == [0, 0], (tmp_path / "0.txt").read_text()
    lines, other_lines = (json_lines(folder / "log.jsonl") for folder in (finished[0], out))
    for line, other in zip(lines, other_lines, strict=True):
        for name in ("flow_loss", "flow_loss_by_t", "distance", "distance_error", "distance_by_t"):
            if name in line:
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), name
    for name in ("teacher.safetensors", "generator.safetensors"):
        one, other = load_file(finished[0] / name), load_file(out / name)
        assert all((one[key] - other[key]).norm() <= 1e-4 * one[key].norm() for key in one)
    # two processes' checkpoint, resumed by one
    more = drive_here(toy2d, *SMALL, "--out", out, "--steps", 50, "--resume")
    assert more.returncode == 0 and "steps 40 -> 50" in more.stdout, more.stderr


def test_broken_log_line_and_folders_of_others(finished, tmp_path):
    """A last line that is cut off does not keep a run from going on; it removes its own checkpoints only."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "distill-000000040")
    with open(tmp_path / "log.jsonl", "ab") as log:
        log.write(b'{"phase": "distill", "st\xff')
    others = ["distill-000000005-keep", "distill-1", "teacher-old"]
    for name in others:
        (folder / name).mkdir()
        (folder / name / "note.txt").write_text("mine")
    done = drive_here(toy2d, *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_networks(finished[0], tmp_path)
    assert logged(tmp_path) == ALL_LINES
    own = ["distill-000000030", "distill-000000040", "teacher-000000020", "teacher-000000030"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(own + others)
    run.FolderRun(tmp_path, resume="no")
    run.FolderRun.unlock()
    assert sorted(path.name for path in folder.iterdir()) == others
    assert all((folder / name / "note.txt").read_text() == "mine" for name in others)


def test_second_run_in_the_same_folder_is_refused(finished, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(finished[0], out)
    first = run.FolderRun(out)
    before = contents(out)
    assert joined(forked(call, "toy2d.py", *SMALL, "--out", out, "--overwrite", out=tmp_path)) == [2]
    said = (tmp_path / "0.txt").read_text()
    assert f"another run is at work in {out}" in said and said.count("\n") == 1
    assert contents(out) == before
    assert run.FolderRun(out).locks.keys() == first.locks.keys() == {out}  # a notebook's cell again
    run.FolderRun.unlock()


def test_damaged_checkpoint_is_refused_and_the_one_before_still_works(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    newest, before = (tmp_path / "checkpoints" / f"distill-{step:09d}" for step in (40, 30))
    tensors = next(newest.glob("*.safetensors"))
    intact = tensors.read_bytes()
    content = bytearray(intact)
    for damaged in (content[: len(content) // 2], content[:-8] + bytes(8)):
        tensors.write_bytes(damaged)
        done = drive_here(toy2d, *SMALL, "--out", tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert f"{newest} is damaged" in done.stderr and before.name in done.stderr
    tensors.write_bytes(intact)
    saved = json.loads((newest / "checkpoint.json").read_text())
    for damaged in ("null", "[" * 100_000, json.dumps(saved | {"updates": {}})):
        (newest / "checkpoint.json").write_text(damaged)
        done = drive_here(toy2d, *SMALL, "--out", tmp_path)
        assert done.returncode == 2 and f"{newest} is damaged" in done.stderr and done.stderr.count("\n") == 1
    shutil.rmtree(newest)
    done = drive_here(toy2d, *SMALL, "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_networks(finished[0], tmp_path)


def test_checkpoint_of_another_network_is_refused(finished, tmp_path):
    """Whole and unchanged, but of tensors that do not fit: the same refusal, whatever torch raises."""
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    teacher, generator, flow = networks()
    around = run.FolderRun(tmp_path, resume="any")
    with pytest.raises(fgm.InputError, match="distill-000000040 is damaged or not a checkpoint of this run"):
        fgm.distill(teacher, generator, flow, (2,), steps=50, batch=8, run=around)


def test_other_settings_in_the_folder(finished):
    out, _ = finished
    before = contents(out)
    done = drive_here(toy2d, *SMALL, "--out", out, "--lr", "0.003")
    assert done.returncode == 2 and "lr 0.001 -> 0.003" in done.stderr and done.stderr.count("\n") == 1
    assert contents(out) == before


# ------------------------------------------------------------------------------------------------------------
# Command lines, files, noise
# ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data", "nothing"], "invalid choice: 'nothing'"),
        (["--colour", "red"], "unrecognized arguments"),
        (["--steps", "0"], "argument --steps: must be in [1, 1e9], got 0"),
        (["--batch", "-4"], "argument --batch: must be in [1, 1e9], got -4"),
        (["--lr", "nan"], "argument --lr: must be in (0, 1e9], got nan"),
        (["--lr", "inf"], "argument --lr: must be in (0, 1e9], got inf"),
        (["--lr", "many"], "invalid float value"),
        (["--lr-decay", "1.5"], "argument --lr-decay: must be in [0, 1], got 1.5"),
        (["--ema", "1"], "argument --ema: must be in [0, 1), got 1.0"),
        (["--t-star", "1.5"], "argument --t-star: must be in (0, 1], got 1.5"),
        (["--t-flow", "0", "-1"], "argument --t-flow: must be in [0, 20], got -1.0"),
        (["--micro-batch", "5"], "global batch 16"),
        (["--out", str(ROOT / "README.md")], "cannot write to the output folder"),
        (["--out", "/proc/runs"], "cannot write to the output folder"),
        (["--out", "x" * 300], "File name too long"),
        (["--batch", "1000000000"], "would need 4,112.0 GB of memory or more, the cpu has"),
        (["--batch", "1000000000", "--micro-batch", "1"], "--batch 1000000000 would need"),
    ],
)
def test_bad_command_lines(arguments, message, tmp_path, monkeypatch, capfd):
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "x")]
    monkeypatch.setattr(sys, "argv", ["toy2d.py", *SMALL, *out, *arguments])
    monkeypatch.setattr(sizes, "memory_of", lambda device: 64e9)
    with pytest.raises(SystemExit) as stopped:
        run.command(toy2d.main)
    error = capfd.readouterr().err
    assert stopped.value.code == 2 and error.startswith("toy2d.py: ") and message in error, error
    assert error.count("\n") == 1 and not list(tmp_path.glob("x/*"))


def test_a_list_of_numbers_is_checked_one_by_one():
    widths = Setting(int, "[1, 8]", "", "+")
    widths.check("widths", [1, 8])
    with pytest.raises(fgm.InputError, match=r"widths must be in \[1, 8\], got 9"):
        widths.check("widths", [1, 9])


def test_a_file_that_cannot_be_written_leaves_the_one_before(tmp_path):
    path = tmp_path / "metrics.json"
    run.write_json(path, {"a": 1})
    refused = pytest.raises(fgm.InputError, match=r"cannot write .*metrics\.json")
    with refused, run.atomically(path) as temporary:
        temporary.write_text("half of")
        raise OSError(28, "No space left on device")
    assert run.read_json(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_the_log_by_t_and_its_standard_error_are_those_of_the_steps(tmp_path):
    """Two lines of three and of one step, bins with and without samples, several calls a step."""
    net = torch.nn.Linear(1, 1)
    learners, around = {"flow": fgm.Learner(net, 1.0, (0.0, 0.9), 1e-8)}, run.FolderRun(tmp_path, log_every=3)
    t = torch.tensor([0.05, 0.55, 0.58, 1.0])
    for step in around.steps("distill", 4, learners, {"batch": 4}):
        for half in (slice(0, 2), slice(2, 4)):
            around.log_by_t(t[half], distance=torch.tensor([1.0, 2.0, 4.0, 8.0])[half] + step)
        around.log_by_t(t[:1], flow_loss=torch.ones(1))
        around.log(flow_loss=torch.ones(4), distance=torch.tensor([1.0, 2.0, 4.0, 8.0]) + step**2)
    first, second = json_lines(tmp_path / "log.jsonl")
    assert first["distance_by_t"] == [2.0, *[None] * 4, 4.0, *[None] * 3, 9.0]
    assert first["flow_loss_by_t"] == [1.0, *[None] * 9]
    assert first["distance"] == pytest.approx(3.75 + 5 / 3)
    assert first["distance_error"] == pytest.approx(np.std([0, 1, 4], ddof=1) / 3**0.5)
    assert second["distance"] == pytest.approx(3.75 + 9) and "distance_error" not in second
    run.FolderRun.unlock()


def test_noise_of_a_seed_is_its_own():
    """Alone, in company, and for seeds that are neighbours or differ only above 32 bits."""
    seeds = torch.tensor([5, 6, 5 + 2**32, 2**62])
    noise = run.noise_from(seeds, (4, 500), "cpu")
    assert torch.equal(noise[1:2], run.noise_from(seeds[1:2], (4, 500), "cpu"))
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(4)
    assert correlation.abs().max() < 0.1 and abs(noise.std().item() - 1) < 0.05


def test_noise_is_standard_normal():
    noise = run.noise_from(torch.arange(1000), (10, 100), "cpu")
    assert noise.dtype == torch.float32 and noise.shape == (1000, 10, 100) and noise.isfinite().all()
    noise = noise.double()
    moments = [(noise**k).mean().item() for k in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.02)  # standard deviations: 1, 1.4, 4, 10 / 1000
    between_rows = (noise[1:] * noise[:-1]).mean().item()
    assert abs(between_rows) < 0.005


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(fgm.InputError, match="--device cuda:99: this machine has"):
        run.setup("cuda")


def test_import_is_light():
    heavy = {"diffusers", "transformers", "sklearn", "matplotlib", "PIL", "torchvision"}
    code = f"import sys, fgm, toy2d, cifar, sd3, tiny_sd3, bench; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
