"""What the tests of the commands share: commands run as a user would, and refusals checked."""

import contextlib
import gc
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
    """The command line of a script of the project, started by torchrun if processes are given."""
    launcher = [sys.executable]
    if processes is not None:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [*launcher, str(ROOT / script), *map(str, arguments)]


def drive(script, *arguments, processes=None, **more):
    """The finished process of a command. more: arguments of subprocess.run."""
    line = command(script, *arguments, processes=processes)
    return subprocess.run(line, capture_output=True, text=True, env=ENV, timeout=3600, **more)


def drive_here(driver, *arguments):
    """drive in this process, which saves a start of Python and torch."""
    stdout, stderr, argv, threads = io.StringIO(), io.StringIO(), sys.argv, torch.get_num_threads()
    status, sys.argv = 0, [Path(driver.__file__).name, *map(str, arguments)]
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            run.command(driver.main)
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        gc.collect()  # unlocks the folders of its runs
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def forked(work, *arguments, processes=None, out):
    """Start work(*arguments) in forks of this process, which saves their imports, and return them.

    They are joined as torchrun would join them (None: one that is not); their output goes to out/RANK.txt."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    launcher = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(processes),
                "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    context = multiprocessing.get_context("fork")
    started = []
    for rank in range(processes or 1):
        env = launcher | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes else {}
        output = Path(out) / f"{rank}.txt"
        started.append(context.Process(target=begin, args=(work, arguments, env, output)))
        started[-1].start()
        started[-1].store = store  # lives as long
    return started


def begin(work, arguments, env, output):
    os.environ.update(env)
    torch.set_num_threads(1)
    with open(output, "w", buffering=1) as file:
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
