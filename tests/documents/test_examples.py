"""examples/: each file runs as its docstring says, with fgm.py alone, and prints the right numbers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def alone(tmp_path):
    """A folder with fgm.py and the example, and a function that runs a script of it, by torchrun or not."""
    for name in ("fgm.py", "examples/own_network.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "short.py").write_text("import own_network\nown_network.main(steps=30)\n")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def run(script, processes=None):
        launcher = [sys.executable]
        if processes:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        done = subprocess.run([*launcher, script], cwd=tmp_path, env=env, capture_output=True, text=True,
                              timeout=3600)
        assert done.returncode == 0, done.stderr
        return dict(re.findall(r"^(.+): (-?[\d.]+)", done.stdout, re.M))

    return run


def test_a_network_of_ones_own_needs_fgm_alone(alone):
    printed = {name: float(number) for name, number in alone("own_network.py").items()}
    assert len(printed) == 7
    assert printed["one step"] < 0.02 < 0.3 < printed["teacher, 1 step"]
    assert printed["teacher, 50 steps"] < 0.02
    assert max(abs(value) for name, value in printed.items() if "defect" in name) < 0.2


def test_two_processes_print_the_numbers_of_one(alone):
    one, two = alone("short.py"), alone("short.py", processes=2)
    assert len(one) == 7 and one.keys() == two.keys()
    for name in one:
        assert float(two[name]) == pytest.approx(float(one[name]), abs=1.1e-3), name  # a last digit
    assert float(one["teacher, 50 steps"]) > 0.02  # 30 steps of training are few


def test_the_table_of_wrappers_may_be_cut_off():
    line = f"set -o pipefail; {sys.executable} -m examples.wrappers | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("defect at t =")
