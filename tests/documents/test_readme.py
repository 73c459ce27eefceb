"""The README and RESULTS.md: their command lines parse, their numbers are stored, their example runs."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_house import parse

import bench
import cifar
import sd3
import tiny_sd3
import toy2d

ROOT = Path(__file__).parents[2]
COMMANDS = {f"{module.__name__}.py": module for module in (bench, cifar, sd3, tiny_sd3, toy2d)}


def command_lines(text):
    """(script, [arguments]) of every call of one of our commands in the code of a Markdown text."""
    blocks = re.findall(r"^    (.+)$", text, re.M)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S):
        blocks += block.splitlines()
    prose = re.sub(r"^    .+$", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    blocks += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    found = []
    for line in blocks:
        for call in re.split(r"&&|;", line):
            script = re.search(r"(?:^|\s)(?:python|torchrun)\s.*?(\w+\.py)\b(.*)", call)
            if script and script[1] in COMMANDS:
                found.append((script[1], shlex.split(script[2], comments=True)))
    return found


def test_command_lines_are_found_wherever_they_stand():
    text = "Run `python\ncifar.py --cond`.\n\n    torchrun --nproc-per-node 2 sd3.py --n 3   # draws\n\n" \
           "```bash\npip install x && python toy2d.py --data moons\n```\n| `python bench.py` |\n"
    expected = [("sd3.py", ["--n", "3"]), ("toy2d.py", ["--data", "moons"]), ("cifar.py", ["--cond"])]
    assert command_lines(text) == [*expected, ("bench.py", [])]


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_every_command_line_parses(name, monkeypatch):
    lines = command_lines((ROOT / name).read_text())
    assert lines
    for script, arguments in lines:
        arguments = ["moons" if argument == "NAME" else argument for argument in arguments]
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        assert parse(COMMANDS[script], monkeypatch), f"{name}: {script} {shlex.join(arguments)}"


def key(command):
    """A command line without its folder: results are moved about."""
    return re.sub(r" --(overwrite|out \S+)", "", command).strip()


STORED = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "results").glob("*.json"))}


@pytest.mark.skipif(not STORED, reason="no metrics.json stored under results/")
def test_the_headline_table_shows_the_stored_numbers():
    """Columns: command (its last made the file), distance ("x 1000" scales it), teacher, one step."""
    readme = (ROOT / "README.md").read_text()
    (rows,) = re.findall(r"^\| command \|.*one step.*\n\|[-|: ]+\n((?:\|.*\n)+)", readme, re.M)
    results = {key(metrics["command"]): metrics for metrics in STORED.values()}
    for row in rows.splitlines():
        code, distance, teacher, one_step = [cell.strip(" *`") for cell in row.split("|")[1:5]]
        ((script, arguments),) = command_lines(f"`{code}`")[-1:]
        metrics = results[key(" ".join([script, *arguments]))]
        assert metrics["commit"] and metrics["versions"]["torch"] and metrics["hardware"]
        scale = 1000 if "x 1000" in distance else 1
        most_steps = max(metrics["teacher"], key=int)
        for shown, value in ((teacher, metrics["teacher"][most_steps]), (one_step, metrics["one_step"])):
            decimals = len(shown.partition(".")[2])
            assert float(shown) == pytest.approx(scale * value, abs=0.501 * 10**-decimals), row


def test_example_of_a_model_of_ones_own_needs_fgm_alone(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) <= 30 and "class Net" in code
    shutil.copy(ROOT / "fgm.py", tmp_path)
    (tmp_path / "example.py").write_text(code)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [sys.executable, "example.py"]
    done = subprocess.run(line, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    pattern = r"(teacher, 1 step|teacher, 50 steps|one step): *(-?[\d.]+)"
    distance = {name: float(value) for name, value in re.findall(pattern, done.stdout)}
    assert distance["one step"] < 0.02 < 0.3 < distance["teacher, 1 step"]
    assert distance["teacher, 50 steps"] < 0.02
