"""The notebook runs from top to bottom, and was committed as it ran."""

import os
import re
import sys
from pathlib import Path

import pytest


NOTEBOOK = Path(__file__).parents[1] / "examples" / "notebooks" / "your_pictures_to_a_published_model.ipynb"


def read_notebook():
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed (extra `dev`)")
    return nbformat.read(NOTEBOOK, as_version=4)


def printed_by(outputs):
    return "\n".join(output.get("text", "") or str(output.get("data")) for output in outputs)


def test_it_was_committed_as_it_ran():
    cells = [cell for cell in read_notebook().cells if cell.cell_type == "code"]
    outputs = [output for cell in cells for output in cell.outputs]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for output in outputs if output.output_type == "error"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 4
    printed = printed_by(outputs)
    assert "modeling_llava was imported: False" in printed and "Nothing was sent" in printed
    assert not re.search(r"/(home|root|tmp|work)/|Traceback", printed)


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """With a fiftieth of the training: every cell, and nothing learnt."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (extra `dev`)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (extra `dev`)")
    monkeypatch.setenv("STEPS_SCALE", "0.02")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    notebook = read_notebook()
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=1200, kernel_name="python3", resources=where).execute()
    folder = tmp_path / "my-llava"
    assert list(folder.glob("*to-publish/README.md"))
    assert (folder / "report" / "report.md").is_file()
    printed = printed_by(output for cell in notebook.cells for output in cell.get("outputs", []))
    assert "modeling_llava was imported: False" in printed and "Nothing was uploaded" in printed
    assert not re.search(r"^llava \w+: error", printed, re.MULTILINE)
