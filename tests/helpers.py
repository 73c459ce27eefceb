"""What the tests of the commands share: commands run as a user would, and refusals checked."""

import contextlib
import importlib
import io
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training import run

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite compares bits, those of a CPU, wherever it runs
ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def command(script, *arguments, processes=None):
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(ROOT / script), *map(str, arguments)]


def drive(script, *arguments, processes=None, **more):
    line = command(script, *arguments, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=3600, **more)


def drive_here(driver, *arguments):
    """drive in this process, which saves a start of Python and torch."""
    printed, errors, before, threads = io.StringIO(), io.StringIO(), sys.argv, torch.get_num_threads()
    status, sys.argv = 0, [Path(driver.__file__).name, *map(str, arguments)]
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            run.command(driver.main)
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.argv = before
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(arguments, status, printed.getvalue(), errors.getvalue())


def forked(work, *arguments, processes=None, out):
    """Start work(*arguments) in processes that begin as this one is, which saves their imports, joined as
    torchrun would join them (None: one that is not). What they print goes to out/RANK.txt. Returns them."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    joins = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes),
             "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(processes or 1):
        env = joins | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {}
        started.append(context.Process(target=begin, args=(work, arguments, env, Path(out) / f"{rank}.txt")))
        started[-1].start()
        started[-1].store = store  # lives as long
    return started


def begin(work, arguments, env, printed):
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(printed, "w", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        work(*arguments)


def joined(processes):
    """The exit statuses of processes, when they have ended."""
    for process in processes:
        process.join(3600)
    return [process.exitcode for process in processes]


def call(driver, *arguments):
    """A command in this process, which ends with its exit status."""
    sys.argv = [Path(driver).name, *map(str, arguments)]
    run.command(importlib.import_module(Path(driver).stem).main)


def assert_refused(driver, cases, out, monkeypatch, capfd):
    """Each command line ends with status 2 and its message, one line on stderr; no weights in out change."""
    name = Path(driver.__file__).name
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    for arguments, message in cases:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run.command(driver.main)
        line = capfd.readouterr().err.splitlines()[-1]
        assert stopped.value.code == 2 and line.startswith(f"{name}: ") and message in line, (arguments, line)
    assert before and before == {path: path.read_bytes() for path in out.rglob("*.safetensors")}
