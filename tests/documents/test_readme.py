"""The documents: commands parse, numbers are stored, links lead somewhere, code runs, versions agree."""

import copy
import json
import re
import shlex
import tomllib

import pytest
import torch
from helpers import ROOT, parse

import bench
import cifar
import fgm
import sd3
import tiny_sd3
import toy2d

DOCUMENTS = ["README.md", "RESULTS.md", "HISTORY.md", "CHANGES.md"]
COMMANDS = {f"{module.__name__}.py": module for module in (bench, cifar, sd3, tiny_sd3, toy2d)}


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


def command_lines(text):
    """(script, [arguments]) of every call of one of our commands in the code of a Markdown text."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]

    calls = []
    for line in [*"".join(blocks).splitlines(), *spans]:
        for part in re.split(r"&&|;", line):
            call = re.search(r"(?:^|\s)(?:python|torchrun)\s.*?(\w+\.py)\b(.*)", part)
            if call and call[1] in COMMANDS:
                calls.append((call[1], shlex.split(call[2], comments=True)))
    return calls


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md"])
def test_every_command_line_parses(name, monkeypatch):
    calls = command_lines(read(name))
    assert len(calls) > 5
    for script, arguments in calls:
        arguments = ["moons" if argument == "NAME" else argument for argument in arguments]
        assert parse(COMMANDS[script], arguments, monkeypatch), f"{name}: {script} {shlex.join(arguments)}"


ROW = r"^\| \[[^]]+\]\(results/(\S+)\.json\): `python ([^`]+)` \| (.+) \| (.+) \| .+ \|$"
NUMBERS = r"[\d.]+\*{0,2} \(([\d.]+) to ([\d.]+)\)"  # the median, then the least and the most


def test_the_results_table_shows_the_stored_runs():
    """Each stored run lies in the ranges of its row, and is of the command that stands there."""
    rows = re.findall(ROW, read("README.md"), re.M)
    assert sorted(row[0] for row in rows) == sorted(path.stem for path in ROOT.glob("results/*.json"))

    for name, command, *columns in rows:
        run = json.loads(read(f"results/{name}.json"))
        assert re.sub(r" --(overwrite|movie|out \S+)", "", run["command"]) == command
        assert run["commit"] and run["versions"]["torch"] and run["hardware"]

        scale = 1000 if run["metric"] == "energy distance" else 1
        most_steps = max(run["teacher"], key=int)
        for column, value in zip(columns, (run["teacher"][most_steps], run["one_step"]), strict=True):
            ((least, most),) = re.findall(NUMBERS, column)
            half_a_digit = 0.5 * 10 ** -len(least.partition(".")[2])
            assert float(least) - half_a_digit <= scale * value <= float(most) + half_a_digit, (name, column)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_files_exist(name):
    text = read(name)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        assert (ROOT / path).exists(), target
        headings = re.findall(r"^#+ (.+)$", read(path or name), re.M) if anchor else []
        assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]

    for path in re.findall(r"`((?:tests|examples|training|points|images|text2image)/[\w/.]*)`", text):
        assert (ROOT / path).exists(), path


def test_the_files_of_the_readme_exist():
    (tree,) = re.findall(r"## Files\n+```text\n(.*?)```", read("README.md"), re.S)
    names = re.findall(r"(?:^|  )([\w/]+(?:\.py|\.ipynb|/))", tree, re.M)
    assert len(names) > 10
    assert [name for name in names if not (ROOT / name).exists()] == []
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)


def test_the_python_of_the_readme_runs():
    """In its order and as printed, but for fewer steps."""
    blocks = re.findall(r"```python\n(.*?)```", read("README.md"), re.S)
    code = "".join(block for block in blocks if "fgm." in block)
    assert code.count("fgm.reflow_loss") == 2 and "fgm.defect" in code and "steps=5000" in code

    torch.manual_seed(0)
    teacher = toy2d.VelocityMLP()
    names = {
        "torch": torch, "copy": copy, "fgm": fgm, "teacher": teacher, "flow": copy.deepcopy(teacher),
        "generator": fgm.OneStepGenerator(copy.deepcopy(teacher), 0.5),
        "z": torch.randn(8, 2), "noise": torch.randn(8, 2), "t": torch.rand(8),
    }
    exec(code.replace("steps=5000", "steps=2"), names)
    assert names["x0"].shape == (1000, 2) and names["generator"].t_star == 0.5


def test_package_and_requirements_agree():
    project = tomllib.loads(read("pyproject.toml"))["project"]
    packages = project["dependencies"] + sum(project["optional-dependencies"].values(), [])
    assert sorted(packages) == sorted(read("requirements.txt").split())
    newest = re.search(r"^## (\S+) \(\d{4}-\d\d-\d\d\)$", read("CHANGES.md"), re.M)
    assert newest[1] == project["version"]
