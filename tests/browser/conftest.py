import shutil

import nbformat
import pytest
from lab_server import NOTEBOOKS, chromium_page, jupyter_lab, open_notebook, run_all


@pytest.fixture
def page():
    with chromium_page() as page:
        yield page


@pytest.fixture
def run_notebook(tmp_path, page):
    """Opens a copy of one of the project's notebooks in a real JupyterLab and runs all its cells."""
    with jupyter_lab(tmp_path) as address:
        def run(notebook: str) -> None:
            shutil.copy(NOTEBOOKS / notebook, tmp_path)
            open_notebook(page, address, notebook)
            run_all(page)
        yield run


@pytest.fixture
def run_cells(tmp_path, page):
    """Opens a notebook of these cells in a real JupyterLab and runs them all."""
    with jupyter_lab(tmp_path) as address:
        def run(*cells: str) -> None:
            kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
            notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
                                                metadata={"kernelspec": kernel})
            nbformat.write(notebook, tmp_path / "cells.ipynb")
            open_notebook(page, address, "cells.ipynb")
            run_all(page)
        yield run
