"""The notebook runs from top to bottom, with a twentieth of its training; its own assertions hold."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "toy2d.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def pictures(notebook):
    """The number of pictures below each code cell."""
    shown = [[output.get("data", {}) for output in cell.outputs] for cell in code_cells(notebook)]
    return [sum("image/png" in data for data in outputs) for outputs in shown]


def test_stored_outputs_are_of_one_run_in_order_and_small(notebook):
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert len(notebook.cells) <= 24
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output.output_type == "error" for cell in cells for output in cell.outputs)
    assert sum(pictures(notebook)) >= 8
    assert "QUICK = False" in cells[0].source  # the stored run is the whole


def test_notebook_runs(notebook):
    stored, first = pictures(notebook), code_cells(notebook)[0]
    assert first.source.count("QUICK = False") == 1
    first.source = first.source.replace("QUICK = False", "QUICK = True")
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
    assert pictures(notebook) == stored
