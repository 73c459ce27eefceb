"""The house rules: what imports what, how long the files are, a range for every numeric flag."""

import ast
import graphlib
import math
import sys
from pathlib import Path

import pytest

import bench
import cifar
import sd3
import tiny_sd3
import toy2d
from parts.flags import Parser

ROOT = Path(__file__).parent.parent
SOURCES = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
SOURCES |= {f"parts.{path.stem}": path.read_text() for path in ROOT.glob("parts/*.py")}


def imported(source):
    """The full names of all that a source imports, at its top level or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["parts"] * node.level + [node.module] * bool(node.module)  # a relative one is of parts
            found |= {".".join([*package, alias.name]) for alias in node.names}
    return found


def faults(sources):
    """What breaks the order commands -> parts -> fgm in {module: source}. bench may import commands."""
    graph = {}
    for module, source in sources.items():
        names = imported(source)
        graph[module] = {other for other in sources for name in names if f"{name}.".startswith(f"{other}.")}
    found = []
    for module, uses in graph.items():
        for other in sorted(uses):
            into_parts = other.startswith("parts.")
            if module == "fgm" or other == "bench" or not (into_parts or other == "fgm" or module == "bench"):
                found.append(f"{module} imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        found.append(f"circle {sorted(set(error.args[1]))}")
    return found


def test_imports_run_downwards():
    assert {"fgm", "bench", "toy2d", "cifar", "sd3", "tiny_sd3", "parts.run", "parts.flags"} <= set(SOURCES)
    assert faults(SOURCES) == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"fgm": "def f():\n    from parts import low"}, "fgm imports parts.low"),
        ({"one": "def f():\n    import two"}, "one imports two"),
        ({"parts.low": "if True:\n    from one import main"}, "parts.low imports one"),
        ({"parts.low": "import bench as b"}, "parts.low imports bench"),
        ({"parts.low": "from parts.high import name"}, "circle ['parts.high', 'parts.low']"),
        ({"parts.low": "from . import high"}, "circle ['parts.high', 'parts.low']"),
        ({"parts.low": "from .high import name"}, "circle ['parts.high', 'parts.low']"),
    ],
)
def test_a_wrong_import_is_noticed(change, fault):
    sources = {
        "fgm": "import torch", "parts.low": "import fgm", "parts.high": "def f():\n    from parts import low",
        "one": "from parts.high import name", "two": "import parts.low, fgm", "bench": "import one, two",
    }
    assert faults(sources) == []
    assert fault in faults(sources | change)


def test_fgm_stands_alone_and_talks_to_nobody():
    names = {name.partition(".")[0] for name in imported(SOURCES["fgm"])}
    assert names <= {*sys.stdlib_module_names, "numpy", "torch"}
    assert not names & {"argparse", "json", "parts", "os", "sys", "pathlib"}
    nodes = ast.walk(ast.parse(SOURCES["fgm"]))
    calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
    assert "torch.optim.Adam" in calls and not calls & {"open", "print", "exec", "eval"}


def test_files_stay_short():
    lines = {module: len(source.splitlines()) for module, source in SOURCES.items()}
    limits = {"fgm": 746, "cifar": 405, "sd3": 350, "bench": 275, "toy2d": 270, "tiny_sd3": 240}
    assert {module: lines[module] for module, limit in limits.items() if lines[module] > limit} == {}


@pytest.mark.parametrize("path", [*ROOT.glob("*.py"), *ROOT.glob("*/*.py")], ids=lambda path: path.name)
def test_lines_end_at_column_110(path):
    assert [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 110] == []


def flags_of(command, monkeypatch):
    """The actions of a command's parser, caught before it parses anything."""
    caught = []

    def stop(parser, choose, needs=(), modes=()):
        caught.extend(parser._actions)
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_with", stop)
    with pytest.raises(SystemExit):
        command.main()
    return caught


@pytest.mark.parametrize("command", [toy2d, cifar, sd3, tiny_sd3, bench], ids=lambda module: module.__name__)
def test_every_numeric_flag_has_a_range(command, monkeypatch):
    flags = flags_of(command, monkeypatch)
    numeric = [flag for flag in flags if flag.type in (int, float)]
    assert numeric and all(flag.type in (None, int, float, str) for flag in flags)
    bounded = [flag for flag in numeric if hasattr(flag, "setting") and flag.setting.allowed is not None]
    assert [flag.dest for flag in numeric if flag not in bounded] == []


@pytest.mark.parametrize("command", [toy2d, cifar, sd3, tiny_sd3, bench], ids=lambda module: module.__name__)
def test_no_flag_takes_nonsense(command, monkeypatch, capsys):
    """Every flag with a value, given every odd one: one line and status 2, or a value within its range."""
    flags = [flag for flag in flags_of(command, monkeypatch) if flag.type]
    monkeypatch.undo()
    accepted = 0
    for flag in flags:
        for text in ("nan", "inf", "-inf", "-1", "0", str(2**70), "1e400", "", "word"):
            number = flag.nargs if isinstance(flag.nargs, int) else 1
            monkeypatch.setattr(sys, "argv", ["command", flag.option_strings[0], *[text] * number])
            parsed = parse(command, monkeypatch)
            error = capsys.readouterr().err
            if parsed is None:
                begins = error.startswith(f"{command.__name__}.py: ")
                assert begins and error.count("\n") == 1, (flag.dest, text, error)
                continue
            value = getattr(parsed, flag.dest)
            values = value if isinstance(value, list) else [value]
            assert text and all(math.isfinite(v) and abs(v) < 2**70 for v in values if not isinstance(v, str))
            accepted += 1
    assert accepted


def parse(command, monkeypatch):
    """The parsed command line, or None where the parser refused it; nothing runs."""
    kept, original = [], Parser.parse_with

    def parse_and_stop(parser, *arguments):
        kept.append(original(parser, *arguments))
        raise SystemExit

    monkeypatch.setattr(Parser, "parse_with", parse_and_stop)
    with pytest.raises(SystemExit):
        command.main()
    monkeypatch.setattr(Parser, "parse_with", original)
    return kept[0] if kept else None
