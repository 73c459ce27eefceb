"""The example in the README, exactly as it stands there."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_example_of_a_model_of_ones_own():
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    distance = {name: float(value) for name, value in re.findall(r"(teacher, 1 step|teacher, 50 steps|one step): *(-?[\d.]+)", done.stdout)}
    assert distance["one step"] < 0.02 < 0.3 < distance["teacher, 1 step"] and distance["teacher, 50 steps"] < 0.02
