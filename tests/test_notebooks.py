"""The notebooks of the documents: without outputs, linked, and run from above in an empty folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
PROVED = {
    "first-model": r"(\d+)% of 100 held-out digits are read right",
    "your-own-folder": r"([\d.]+)% of the pixels are right",
    "clocks": r"strength 0.2: its pixels correlate with those given by (\d+)%",
    "your-own-modality": r"(it) does",
}
"""What each prints that shows whether it worked: a share in percent, which is to be above three quarters."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def test_there_are_four() -> None:
    assert sorted(PROVED) == [path.stem for path in NOTEBOOKS]


@every_notebook
def test_its_outputs_are_stripped(path: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(path, "code"))


@every_notebook
def test_its_links_lead_somewhere_and_the_site_and_the_first_page_link_it(path: Path) -> None:
    text = "".join("".join(cell["source"]) for cell in cells(path, "markdown"))
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (path.parent / target).exists(), target
    assert f"(notebooks/{path.name})" in (ROOT / "docs/index.md").read_text()
    assert f": notebooks/{path.stem}.md\n" in (ROOT / "mkdocs.yml").read_text()


@pytest.mark.long
@every_notebook
def test_it_runs_and_shows_pictures(path: Path, tmp_path: Path) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    found = re.search(PROVED[path.stem], printed)
    assert found, printed
    if found[1] != "it":
        assert float(found[1]) > 75
