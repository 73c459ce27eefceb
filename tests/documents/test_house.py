"""The house rules: what imports what, and how long the files are."""

import ast
import io
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("fgm", "training", "points", "images", "text2image", "commands")  # imports go to the left
COMMANDS = ("toy2d", "cifar", "sd3", "tiny_sd3", "bench")
SOURCES = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path.read_text()
           for path in [*ROOT.glob("*.py"), *(path for room in ROOMS for path in ROOT.glob(f"{room}/*.py"))]}


def room(module):
    """The place of a module's room in ROOMS."""
    first = module.partition(".")[0]
    return ROOMS.index(first if first in ROOMS else "commands")


def imported(source):
    """The full names of all that a source imports, at its top level or inside functions."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def faults(sources):
    """What breaks the order of ROOMS in {module: source}. bench may import commands."""
    broken = []
    for module, source in sources.items():
        names = imported(source)
        for other in sources:
            imports_it = any(f"{name}.".startswith(f"{other}.") for name in names)
            between_commands = room(module) == room(other) == room("commands") and module != "bench"
            if imports_it and (room(other) > room(module) or between_commands):
                broken.append(f"{module} imports {other}")
    return broken


def test_imports_run_downwards():
    assert {"fgm", *COMMANDS, "training.run", "images.unet", "text2image.prompts"} <= set(SOURCES)
    assert faults(SOURCES) == []


@pytest.mark.parametrize("change, fault", [
    ({"fgm": "def f():\n    from training import low"}, "fgm imports training.low"),
    ({"one": "def f():\n    import two"}, "one imports two"),
])
def test_a_wrong_import_is_noticed(change, fault):
    sources = {
        "fgm": "import torch", "training.low": "import fgm", "one": "from training.low import name",
        "two": "import training.low, fgm", "bench": "import one, two",
    }
    assert faults(sources) == []
    assert faults(sources | change) == [fault]


def test_fgm_stands_alone_and_talks_to_nobody():
    names = {name.partition(".")[0] for name in imported(SOURCES["fgm"])}
    assert names <= {*sys.stdlib_module_names, "numpy", "torch"}
    assert not names & {"argparse", "json", "os", "sys", "pathlib"}
    nodes = ast.walk(ast.parse(SOURCES["fgm"]))
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert "torch.optim.Adam" in calls and not calls & {"open", "print", "exec", "eval"}


def docstrings(source):
    """The line numbers of a source's docstrings."""
    lines = set()
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            text = node.body[0]
            lines |= {*range(text.lineno, text.end_lineno + 1)}
    return lines


def code_lines(source):
    """How many lines of a source are neither blank, comment nor docstring."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
              tokenize.ENDMARKER)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= {*range(token.start[0], token.end[0] + 1)}
    return len(lines - docstrings(source))


def test_the_house_stays_small():
    """Air and explanations are free: what counts is lines of code."""
    tests = [path.read_text() for path in ROOT.glob("tests/**/*.py")]
    assert code_lines(SOURCES["fgm"]) <= 470
    assert sum(map(code_lines, SOURCES.values())) <= 4110
    assert sum(map(code_lines, tests)) <= 2780
