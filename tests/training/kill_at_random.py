"""A script, not a test: kill -9 runs of toy2d.py at random moments, go on with them, compare bit for bit.

    PYTHONPATH=.:tests python tests/training/kill_at_random.py 20  # kills per phase, 20 s each on a core
"""

import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import ENV, command_line
from safetensors.torch import load_file

SMALL = ["--device", "cpu", "--batch", "16", "--teacher-steps", "300", "--steps", "200", "--save-every", "20",
         "--log-every", "10", "--samples", "500"]


def drive(out, kill_after=None, phase=None):
    """Run toy2d.py in out; with kill_after, kill it that many seconds after the first checkpoint of phase."""
    line = command_line("toy2d.py", *SMALL, "--out", out)
    process = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if kill_after is not None:
        while not list(Path(out).glob(f"checkpoints/{phase}-*")) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(kill_after)
        process.kill()
    return process.wait()


def main():
    folder = Path(tempfile.mkdtemp())
    choose = random.Random(0)
    assert drive(folder / "whole") == 0
    whole = [load_file(folder / "whole" / f"{name}.safetensors") for name in ("teacher", "generator")]
    for phase in ("teacher", "distill"):
        equal = killed = 0
        for _ in range(int(sys.argv[1])):
            out = folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            killed += drive(out, choose.uniform(0, 0.8), phase) != 0
            assert drive(out) == 0
            resumed = [load_file(out / f"{name}.safetensors") for name in ("teacher", "generator")]
            pairs = list(zip(whole, resumed, strict=True))
            equal += all(a[key].equal(b[key]) for a, b in pairs for key in a)
        print(f"{phase}: {killed} of {sys.argv[1]} killed, {equal} equal bit for bit", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
