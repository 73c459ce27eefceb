"""A run in a folder: it goes on bit for bit after a kill, and refuses what is not its own."""

import functools
import json
import math
import os
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from helpers import ENV, TOY, call, command_line, contents, forked, joined, json_lines, refusal, succeed
from safetensors.torch import load_file
from test_loops import distilled, networks

import fgm
import toy2d
from training import checkpoint
from training.run import STOPPED, FolderRun, command

ALL_LINES = [("teacher", s) for s in (10, 20, 30)] + [("distill", s) for s in (10, 20, 30, 40)]


def assert_same_networks(out, other):
    for name in ("teacher.safetensors", "generator.safetensors"):
        a, b = load_file(out / name), load_file(other / name)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def logged(out):
    """(phase, step) of every line of the log."""
    return [(line["phase"], line["step"]) for line in json_lines(out / "log.jsonl")]


@pytest.fixture
def copied(toy_run, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(toy_run[0], tmp_path / "out")


# ---- What a run writes -------------------------------------------------------------------------------------


def test_command_line_writes_what_it_promises(toy_run):
    """The table, metrics.json and the log's last score are of the generator that was written."""
    out, printed = toy_run
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["teacher"].keys() == {"1", "2", "5", "10", "50"}
    assert f"one-step generator {1000 * metrics['one_step']:27.3f}" in printed

    config = json.loads((out / "config.json").read_text())
    net = toy2d.VelocityMLP(**config["network"])
    net.load_state_dict(load_file(out / "generator.safetensors"))
    z = fgm.Draws(500, "cpu", 0, fgm.SCORES).normal((2,))
    samples = fgm.OneStepGenerator(net, **config["generator"])(z).detach()
    distance = toy2d.energy_distance(samples, toy2d.toy_data("rings", 500, 1))
    assert distance == pytest.approx(metrics["one_step"], rel=1e-5)

    assert logged(out) == ALL_LINES
    last = json_lines(out / "log.jsonl")[-1]
    assert last["score"] == pytest.approx(distance, rel=1e-5)
    teacher_scores = {k: metrics["teacher"][k] for k in ("1", "10", "50")}
    assert last["teacher_scores"] == pytest.approx(teacher_scores, rel=1e-5)
    assert last["bound_error"] > 0 and len(last["bound_by_t"]) == 10
    assert (out / "samples.png").stat().st_size > 1000 and (out / "progress.png").stat().st_size > 10_000


def test_the_log_by_t_and_its_standard_error_are_those_of_the_steps(tmp_path):
    """Two lines of three and of one step, bins with and without samples, several calls a step."""
    net = torch.nn.Linear(1, 1)
    learners, run = {"flow": fgm.Learner(net, 1.0, (0.0, 0.9), 1e-8)}, FolderRun(tmp_path, log_every=3)
    t = torch.tensor([0.05, 0.55, 0.58, 1.0])
    for step in run.steps("distill", 4, learners, {"batch": 4}):
        for half in (slice(0, 2), slice(2, 4)):
            run.log_by_t(t[half], bound=torch.tensor([1.0, 2.0, 4.0, 8.0])[half] + step)
        run.log_by_t(t[:1], flow_loss=torch.ones(1))
        run.log(flow_loss=torch.ones(4), bound=torch.tensor([1.0, 2.0, 4.0, 8.0]) + step**2)
    first, second = json_lines(tmp_path / "log.jsonl")
    assert first["bound_by_t"] == [2.0, *[None] * 4, 4.0, *[None] * 3, 9.0]
    assert first["flow_loss_by_t"] == [1.0, *[None] * 9]
    assert first["bound"] == pytest.approx(3.75 + 5 / 3)
    assert first["bound_error"] == pytest.approx(np.std([0, 1, 4], ddof=1) / 3**0.5)
    assert second["bound"] == pytest.approx(3.75 + 9) and "bound_error" not in second


def test_divergence_names_step_and_term_and_keeps_the_checkpoint(tmp_path):
    calls = iter(range(1000))
    teacher, generator, flow = networks()

    def failing_from_13(x, t):
        return teacher(x, t) * (math.nan if next(calls) >= 13 else 1)

    run = FolderRun(tmp_path, save_every=5, log_every=20)
    message = r"bound is not finite at step 13; the last good checkpoint is .*distill-000000010"
    with pytest.raises(fgm.Diverged, match=message):
        fgm.distill(failing_from_13, generator, flow, (2,), steps=20, batch=8, run=run)
    names = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert names == ["distill-000000005", "distill-000000010"]
    last = json_lines(tmp_path / "log.jsonl")[-1]
    assert last["step"] == 15 and last["l1"] is None and (tmp_path / "progress.png").stat().st_size > 10_000


# ---- Going on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("phase, number", [
    ("teacher-000000010", signal.SIGKILL),
    ("distill-000000020", signal.SIGTERM),
])
def test_stopped_and_resumed_equals_uninterrupted(toy_run, tmp_path, phase, number):
    out = tmp_path / "out"
    (process,) = forked(call, toy2d, *TOY, "--out", out, out=tmp_path)
    while not (out / "checkpoints" / phase).exists() and process.is_alive():
        time.sleep(0.002)
    os.kill(process.pid, number)
    (status,) = joined([process])
    assert not (out / "metrics.json").exists()
    if number == signal.SIGTERM:
        assert status == 143 and (tmp_path / "0.txt").read_text().endswith(f"toy2d.py: {STOPPED}\n")

    succeed(toy2d, *TOY, "--out", out)
    assert_same_networks(toy_run[0], out)
    assert logged(out) == ALL_LINES


def test_stopping_while_a_checkpoint_is_written_leaves_none(tmp_path, monkeypatch, capfd):
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(checkpoint, "write_tensors", lambda *arguments: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as stopped:
        command(lambda: distilled(run=FolderRun(tmp_path, save_every=4)))
    signal.signal(signal.SIGTERM, handler)
    assert stopped.value.code == 143 and capfd.readouterr().err.endswith(f": {STOPPED}\n")
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_lost_checkpoint_a_broken_log_line_and_folders_of_others(toy_run, copied):
    """A last line that is cut off does not keep a run from going on; it removes its own checkpoints only."""
    folder = copied / "checkpoints"
    shutil.rmtree(folder / "distill-000000040")
    with open(copied / "log.jsonl", "ab") as log:
        log.write(b'{"phase": "distill", "st\xff')
    others = ["distill-000000005-keep", "distill-1", "teacher-old"]
    for name in others:
        (folder / name).mkdir()
    succeed(toy2d, *TOY, "--out", copied)
    assert_same_networks(toy_run[0], copied)
    assert logged(copied) == ALL_LINES
    own = ["distill-000000030", "distill-000000040", "teacher-000000020", "teacher-000000030"]
    assert sorted(path.name for path in folder.iterdir()) == sorted(own + others)
    FolderRun(copied, resume="no")
    assert sorted(path.name for path in folder.iterdir()) == others


def test_starting_again_removes_what_an_earlier_run_wrote_and_nothing_else(tmp_path):
    mine = ["mine.png", "teacher.safetensors", "pipeline/mine.py", "movie/mypicture.png",
            "distill-results.png", "teacher-my-steps.png"]
    results = ["distill-0000500.png", "progress.png", "lora.safetensors", "config.json", "metrics.json",
               "judge.safetensors", "pipeline/model_index.json", "movie.gif", "movie/000000500.png"]
    for name in mine + results:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("earlier")
    FolderRun(tmp_path, resume="no")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in contents(tmp_path)) == sorted(mine)


# ---- Refusals ----------------------------------------------------------------------------------------------


def test_other_settings_in_the_folder_are_refused_without_resume(copied):
    before = contents(copied)
    assert "lr 0.001 -> 0.003" in refusal(toy2d, *TOY, "--out", copied, "--lr", "0.003")
    assert contents(copied) == before
    printed = succeed(toy2d, *TOY, "--out", copied, "--steps", "50", "--resume")
    assert "resuming distill with changed settings: steps 40 -> 50" in printed
    assert logged(copied) == [*ALL_LINES, ("distill", 50)]


def test_a_step_that_cannot_be_made_loses_no_run(copied, monkeypatch):
    def distill(*arguments, **settings):
        raise MemoryError

    monkeypatch.setattr(fgm, "distill", distill)
    before = contents(copied)
    assert "out of memory" in refusal(toy2d, *TOY, "--out", copied, "--overwrite")
    assert contents(copied) == before


def test_a_checkpoint_that_is_damaged_or_of_other_networks_is_refused(copied):
    """The one before is named."""
    newest = copied / "checkpoints" / "distill-000000040"
    tensors = next(newest.glob("*.safetensors"))
    intact = tensors.read_bytes()
    tensors.write_bytes(intact[:-8])
    line = refusal(toy2d, *TOY, "--out", copied)
    assert f"{newest} is damaged" in line and "distill-000000030" in line

    tensors.write_bytes(intact)
    run = FolderRun(copied, resume="any")
    teacher, generator, flow = networks()
    with pytest.raises(fgm.InputError, match="distill-000000040 is damaged or not a checkpoint of this run"):
        fgm.distill(teacher, generator, flow, (2,), steps=50, batch=8, run=run)


def test_a_second_run_in_the_same_folder_is_refused(copied):
    first, before = FolderRun(copied), contents(copied)
    line = command_line("toy2d.py", *TOY, "--out", copied, "--overwrite")
    done = subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=3600)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"another run is at work in {copied}" in done.stderr
    assert contents(copied) == before
    assert FolderRun(copied).lock is first.lock  # a notebook's cell again


def test_functions_and_partials_are_told_apart_in_settings():
    weights = [functools.partial(fgm.logit_normal, 1), functools.partial(fgm.logit_normal, 2), fgm.sid_weight,
               fgm.noise_weight, torch.nn.Identity()]
    texts = [json.dumps(checkpoint.as_json(weight)) for weight in weights]
    assert len(set(texts)) == 5 and texts[2] == '"sid_weight"'
    assert not any("0x" in text for text in texts)  # an address is another in the next process


def test_what_a_checkpoint_cannot_keep_is_said_before_the_first_step(tmp_path):
    calls = []
    run = FolderRun(tmp_path, fingerprint={"data": tmp_path})
    with pytest.raises(fgm.InputError, match="cannot keep the setting .*Path"):
        distilled(run=run, weight=lambda t, u, c: calls.append(t))
    assert calls == []
