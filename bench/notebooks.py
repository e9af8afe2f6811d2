"""Run the notebooks of docs/notebooks, in order, and keep what they print and draw.

python bench/notebooks.py            all; what they show is written into the files
python bench/notebooks.py --quick 06 those that begin so, on less text and with fewer steps, and nothing is written
"""

import argparse
import os
import re
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parent.parent / "docs" / "notebooks"
TIMEOUT = 900  # seconds of a cell
LESS = {  # what --quick puts in place of numbers
    r"\blimit=\d+": "limit=2",
    r"\bcontext=512": "context=256",
    r"\bmax_steps=\d+": "max_steps=50",
}


def run(path, quick):
    """Run one notebook in a folder of its own; return its seconds."""
    start = time.monotonic()
    book = nbformat.read(path, as_version=4)
    for cell in book.cells:
        for pattern, number in LESS.items() if quick and cell.cell_type == "code" else ():
            cell.source = re.sub(pattern, number, cell.source)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=TIMEOUT, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)  # times of the run
        # what libraries log is no result
        outputs = [x for x in cell.get("outputs", ()) if not (x.output_type == "stream" and x.name == "stderr")]
        if cell.cell_type == "code":
            cell.outputs = outputs
    if not quick:
        nbformat.write(book, path)
    return time.monotonic() - start


def main():
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of names; all by default")
    parser.add_argument("--quick", action="store_true", help="on less text; write nothing")
    options = parser.parse_args()
    paths = [x for x in sorted(FOLDER.glob("*.ipynb")) if not options.names or x.name.startswith(tuple(options.names))]
    processes = max(1, min(4, os.cpu_count() or 1)) if options.quick else 1
    if processes > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(processes) as pool:
        for path, seconds in zip(paths, pool.map(partial(run, quick=options.quick), paths), strict=True):
            print(f"{path.name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
