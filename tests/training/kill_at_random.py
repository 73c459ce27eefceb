"""A script, not a test: kill -9 runs of toy2d.py at random moments, go on with them, compare bit for bit.

    PYTHONPATH=.:tests python tests/training/kill_at_random.py 20  # kills per phase, 20 s each on a core
"""

import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from helpers import ENV, TOY, command_line

LONGER = ["--teacher-steps", "300", "--steps", "200", "--save-every", "20"]


def drive(out, kill_after=None, phase=None):
    """Run toy2d.py in out; with kill_after, kill it that many seconds after the first checkpoint of phase."""
    line = command_line("toy2d.py", *TOY, *LONGER, "--out", out)
    process = subprocess.Popen(line, env=ENV, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if kill_after is not None:
        while not list(out.glob(f"checkpoints/{phase}-*")) and process.poll() is None:
            time.sleep(0.001)
        time.sleep(kill_after)
        process.kill()
    return process.wait()


def weights(out):
    return [(out / f"{name}.safetensors").read_bytes() for name in ("teacher", "generator")]


def main(kills):
    choose = random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        assert drive(whole) == 0
        for phase in ("teacher", "distill"):
            equal = killed = 0
            for number in range(kills):
                out = Path(folder) / f"{phase}-{number}"
                killed += drive(out, choose.uniform(0, 0.8), phase) != 0
                assert drive(out) == 0
                equal += weights(out) == weights(whole)
            print(f"{phase}: {killed} of {kills} killed, {equal} equal bit for bit", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
