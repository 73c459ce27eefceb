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
        return train(*networks, steps=max(steps // 40, 10), **settings)
    return train_shorter

fgm.distill, fgm.train_flow = shorter(fgm.distill), shorter(fgm.train_flow)
"""
NUMBERS = {"SAMPLES = 50_000": "SAMPLES = 5_000", "UPDATES = 600": "UPDATES = 20", "51_200": "2_560"}


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
