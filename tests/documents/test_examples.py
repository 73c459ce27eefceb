"""examples/: each file runs as its docstring says, with fgm.py alone, and prints the right numbers."""

import re
import shutil
import subprocess
import sys

import pytest
from helpers import ENV, ROOT


@pytest.fixture
def alone(tmp_path):
    """A function that runs the example in a folder of its own, with fgm.py alone."""
    for name in ("fgm.py", "examples/own_network.py"):
        shutil.copy(ROOT / name, tmp_path)

    def run(steps, *launcher):
        (tmp_path / "run.py").write_text(f"import own_network\nown_network.main(steps={steps})\n")
        done = subprocess.run([sys.executable, *launcher, "run.py"], cwd=tmp_path, capture_output=True,
                              text=True, env=ENV | {"PYTHONPATH": ""}, timeout=3600)
        assert done.returncode == 0, done.stderr
        return {name: float(number) for name, number in re.findall(r"^(.+): (-?[\d.]+)", done.stdout, re.M)}

    return run


def test_a_network_of_ones_own_needs_fgm_alone(alone):
    printed = alone(600)
    assert len(printed) == 7
    assert printed["one step"] < 0.02 < 0.3 < printed["teacher, 1 step"]
    assert printed["teacher, 50 steps"] < 0.02
    assert max(abs(value) for name, value in printed.items() if "defect" in name) < 0.2


def test_two_processes_print_the_numbers_of_one(alone):
    one, two = alone(30), alone(30, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert len(one) == 7
    assert two == pytest.approx(one, abs=1.1e-3)  # a last digit
    assert one["teacher, 50 steps"] > 0.02  # 30 steps of training are few


def test_the_table_of_wrappers_may_be_cut_off():
    line = f"set -o pipefail; {sys.executable} -m examples.wrappers | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("defect at t =")
