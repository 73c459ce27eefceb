"""The example in the README, exactly as it stands there, beside a copy of fgm.py and nothing else of ours."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_example_of_a_model_of_ones_own_needs_fgm_alone(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30 and "class Net" in code
    shutil.copy(ROOT / "fgm.py", tmp_path)
    (tmp_path / "example.py").write_text(code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "example.py"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    pattern = r"(teacher, 1 step|teacher, 50 steps|one step): *(-?[\d.]+)"
    distance = {name: float(value) for name, value in re.findall(pattern, done.stdout)}
    assert distance["one step"] < 0.02 < 0.3 < distance["teacher, 1 step"]
    assert distance["teacher, 50 steps"] < 0.02
