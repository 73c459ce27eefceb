"""The notebook runs from top to bottom; its own assertions hold."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parent.parent / "toy2d.ipynb"


def test_notebook_runs_and_is_stored_with_its_figures():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 1_000_000
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 8
    NotebookClient(notebook, timeout=400, resources={"metadata": {"path": NOTEBOOK.parent}}).execute()
