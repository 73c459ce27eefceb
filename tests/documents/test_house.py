"""The house rules: what imports what, how long the files are, a range for every numeric flag."""

import ast
import graphlib
import io
import math
import sys
import tokenize
from pathlib import Path

import pytest

import bench
import cifar
import sd3
import tiny_sd3
import toy2d
from training.flags import Parser, path

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
    """What breaks the order of ROOMS in {module: source}, or goes in a circle. bench may import commands."""
    graph = {}
    for module, source in sources.items():
        names = imported(source)
        graph[module] = {other for other in sources for name in names if f"{name}.".startswith(f"{other}.")}

    broken = []
    for module, uses in graph.items():
        for other in sorted(uses):
            between_commands = room(module) == room(other) == room("commands") and module != "bench"
            if room(other) > room(module) or between_commands:
                broken.append(f"{module} imports {other}")
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        broken.append(f"circle {sorted(set(error.args[1]))}")
    return broken


def test_imports_run_downwards():
    assert {"fgm", *COMMANDS, "training.run", "images.unet", "text2image.prompts"} <= set(SOURCES)
    assert faults(SOURCES) == []


@pytest.mark.parametrize(
    "change, fault",
    [
        ({"fgm": "def f():\n    from training import low"}, "fgm imports training.low"),
        ({"one": "def f():\n    import two"}, "one imports two"),
        ({"training.low": "if True:\n    from images.high import main"}, "training.low imports images.high"),
        ({"training.low": "import bench as b"}, "training.low imports bench"),
        ({"training.low": "from training.mid import name"}, "circle ['training.low', 'training.mid']"),
    ],
)
def test_a_wrong_import_is_noticed(change, fault):
    sources = {
        "fgm": "import torch", "training.low": "import fgm", "training.mid": "from training import low",
        "images.high": "def f():\n    from training import low",
        "one": "from images.high import name", "two": "import training.low, fgm", "bench": "import one, two",
    }
    assert faults(sources) == []
    assert fault in faults(sources | change)


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


COUNTED = '''"""A
docstring."""

x = """a
text"""  # two lines of code
# a comment

def f():
    "another docstring"
    return x
'''


def test_code_lines_are_counted():
    assert code_lines(COUNTED) == 4


def test_the_house_stays_small():
    """Air and explanations are free: what counts is lines of code."""
    tests = [path.read_text() for path in ROOT.glob("tests/**/*.py")]
    assert code_lines(SOURCES["fgm"]) <= 470
    assert sum(map(code_lines, SOURCES.values())) <= 4165
    assert sum(map(code_lines, tests)) <= 3350


def flags_of(command, monkeypatch):
    """The actions of a command's parser, caught before it parses anything."""
    caught = []

    def stop(parser, choose, needs=()):
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
    assert numeric and all(flag.type in (None, int, float, str, path) for flag in flags)
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
