"""Run the notebooks of docs/notebooks, in order, and keep what they print and draw.

python bench/notebooks.py            all; what they show is written into the files
python bench/notebooks.py --check 06 those that begin so; nothing is written: a notebook that fails is an error
"""

import argparse
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
TIMEOUT = 900  # seconds of a cell


def run(path, check):
    """Run one notebook in a folder of its own; return its seconds."""
    start = time.monotonic()
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=TIMEOUT, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of the run
        # what libraries log is no result
        outputs = [x for x in cell.get("outputs", ()) if not (x.output_type == "stream" and x.name == "stderr")]
        if cell.cell_type == "code":
            cell.outputs = outputs
    if not check:
        nbformat.write(book, path)
    return time.monotonic() - start


def main():
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    for path in sorted(FOLDER.glob("*.ipynb")):
        if not options.names or path.name.startswith(tuple(options.names)):
            print(f"{path.name}: {run(path, options.check):.0f} s", flush=True)


if __name__ == "__main__":
    main()
