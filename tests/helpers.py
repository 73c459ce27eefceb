"""What the tests of the commands share: commands run as a user would, here, in forks, and refused."""

import contextlib
import gc
import io
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from training import run
from training.flags import Parser

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the suite compares bits, those of a CPU, wherever it runs
ROOT = Path(__file__).parent.parent
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}

TOY = ["--device", "cpu", "--batch", "16", "--teacher-steps", "30", "--steps", "40", "--save-every", "10",
       "--log-every", "10", "--samples", "500"]  # a run of toy2d.py of a few seconds


def command_line(script, *arguments):
    """That of a script of the project."""
    return [sys.executable, str(ROOT / script), *map(str, arguments)]


def call(driver, *arguments):
    """A command in this process, which ends with its exit status. driver: its module."""
    sys.argv = [Path(driver.__file__).name, *map(str, arguments)]
    run.command(driver.main)


def drive_here(driver, *arguments):
    """The finished process of a command; it runs in this one, which saves a start of Python and torch."""
    stdout, stderr, argv, threads = io.StringIO(), io.StringIO(), sys.argv, torch.get_num_threads()
    status = 0
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            call(driver, *arguments)
    except SystemExit as stopped:
        status = stopped.code
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
    return subprocess.CompletedProcess(arguments, status, stdout.getvalue(), stderr.getvalue())


def succeed(driver, *arguments):
    """What a command prints, which must succeed."""
    done = drive_here(driver, *arguments)
    gc.collect()  # unlocks the folders of its runs
    assert done.returncode == 0, done.stderr
    return done.stdout


def refusal(driver, *arguments):
    """The line on stderr with which a command is refused, after warnings at most; its status is 2."""
    done = drive_here(driver, *arguments)
    *others, line = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith(f"{Path(driver.__file__).name}: "), done.stderr
    assert all(other.startswith("warning: ") for other in others), done.stderr
    return line


def assert_refused(driver, cases, out):
    """Each command line is refused with its message; no weights in out change."""
    before = contents(out, "*.safetensors")
    for arguments, message in cases:
        line = refusal(driver, *arguments)
        assert message in line, (arguments, line)
    assert before and contents(out, "*.safetensors") == before


def parse(driver, words, monkeypatch):
    """A command's settings from its command line, or None where that is refused; nothing runs."""
    kept, original = [], Parser.parse_with

    def parse_and_stop(parser, *arguments):
        kept.append(original(parser, *arguments))
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_with", parse_and_stop)
        patch.setattr(sys, "argv", [driver.__file__, *words])
        with pytest.raises(SystemExit):
            driver.main()
    return kept[0] if kept else None


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


def contents(folder, pattern="*"):
    """{path: bytes} of the files in a folder, at any depth, but its lock."""
    return {path: path.read_bytes() for path in folder.rglob(pattern)
            if path.is_file() and path.name != ".lock"}


def json_lines(path):
    """The objects in a JSON-lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
