"""The notebook: its stored outputs are those of one whole run, and all cells run, with shorter training."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "toy2d.ipynb"

SHORTER = """
import fgm

def shorter(train):
    def train_shorter(*networks, steps, **settings):
        return train(*networks, steps=max(steps // 100, 10), **settings)
    return train_shorter

fgm.distill, fgm.train_flow = shorter(fgm.distill), shorter(fgm.train_flow)
"""
NUMBERS = {"SAMPLES = 50_000": "SAMPLES = 2_000", "UPDATES = 600": "UPDATES = 20", "51_200": "1_024"}


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(cells):
    """The number of pictures below each code cell."""
    data = [[output.get("data", {}) for output in cell.outputs] for cell in cells]
    return [sum("image/png" in item for item in items) for items in data]


def printed(notebook):
    """All that the cells print."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_stored_outputs_are_of_one_run_in_order_and_small(notebook):
    assert NOTEBOOK.stat().st_size < 1_000_000
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert sum(pictures(cells)) >= 8
    assert not re.search(r"/(tmp|home|work|root)/", NOTEBOOK.read_text())  # paths of the machine


def numbers(text, row):
    """The decimal numbers of the printed line that begins so."""
    (line,) = re.findall(f"^{re.escape(row)}.*$", text, re.MULTILINE)
    return [float(number) for number in re.findall(r"[-+]?\d+\.\d+", line[len(row):])]


def test_stored_numbers_bear_the_text(notebook):
    text = printed(notebook)
    one_step, many_steps = numbers(text, "score of one step")
    assert one_step < 0.3 and many_steps < 0.3

    networks, cure = text.split("defect at t = 0.8")
    defects = {name: [abs(value) for value in numbers(networks, name)[::2]] for name in (
        "independent noise", "optimal transport", "rectified", "wrong sign", "t reversed", "both")}
    assert max(defects.pop("independent noise")) < 0.03
    assert min(max(values) for values in defects.values()) > 0.9

    one_step = {name: numbers(cure, name)[3:] for name in (
        "independent noise", "optimal transport", "the same, trained on")}
    assert min(one_step["optimal transport"]) > 50
    assert max(one_step["the same, trained on"] + one_step["independent noise"]) < 2
    for seed in range(3):
        runs = "healthy", "lags: flow_lr 1e-5", "diverges: lr 3e-2"
        healthy, lags, diverges = (numbers(text, f"{run}, seed {seed}")[0] for run in runs)
        assert healthy < lags < diverges


def test_notebook_runs(notebook):
    stored = pictures(code_cells(notebook))
    for text, shorter in NUMBERS.items():
        assert sum(text in cell.source for cell in code_cells(notebook)) == 1
        for cell in code_cells(notebook):
            cell.source = cell.source.replace(text, shorter)

    first = nbformat.v4.new_code_cell(SHORTER)
    notebook.cells.insert(0, first)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    assert pictures(code_cells(notebook)) == [0, *stored]
