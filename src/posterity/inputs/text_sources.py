"""The texts that a command line names: files, datasets and standard input, as named documents."""

import mimetypes
import os
import re
import sys
from collections.abc import Iterable
from itertools import chain
from typing import Any

from posterity.errors import InputError, first_line
from posterity.inputs.documents import TextStream, default_text
from posterity.inputs.row_files import Documents, SkippedLines, row_document, row_reader
from posterity.inputs.text_files import decode_text, read_text


def open_documents(args: Iterable[str], field: str | None = None, skipped: SkippedLines | None = None) -> Documents:
    """Return named documents for the TEXT arguments of the command line; for none of them, the default text.

    An argument is a UTF-8 file, `-` for standard input, or holds one document in `field` (by default "text") of each
    row: a file of lines of JSON (`.jsonl`), an array in JSON (`.json`; its entries may be texts), a table with a first
    row of names (`.csv`, `.tsv`), or a dataset `name`, `name:config` or `name:config:split` of the datasets library
    (split "train" unless said). Line ends of files are read as LF, whatever they are.

    All arguments are opened here, so that a wrong one is found before the work; they are read later, as far as needed.
    With `skipped`, a line of a .jsonl file or a row of a table that holds no document is noted there and left out.

    Raises:
        InputError: for a missing, empty, binary or unreadable file, a broken line, an unknown field or dataset.
    """
    sources = [_open_source(arg, field, skipped) for arg in args]
    return chain.from_iterable(sources) if sources else iter([default_text()])


def _open_source(arg: str, field: str | None, skipped: SkippedLines | None) -> Documents:
    if arg == "-":
        return iter([("standard input", TextStream(lambda: decode_text(sys.stdin.buffer, "standard input")))])
    if os.path.isdir(arg):
        raise InputError(f"expected a text file; {arg} is a folder: name the files in it")
    if os.path.exists(arg):
        if os.path.isfile(arg) and os.path.getsize(arg) == 0:
            raise InputError(f"expected text; {arg} is empty: give another file")
        if (read_rows := row_reader(arg)) is not None:
            return _require_documents(read_rows(arg, field, skipped), arg)
        if os.path.isfile(arg):  # a pipe can be read only once, so it is left alone
            next(read_text(arg), None)
        return iter([(arg, TextStream(lambda: read_text(arg)))])
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[^:]*){0,2}", arg)
    if not is_name or arg.lower().endswith(".jsonl") or mimetypes.guess_type(arg)[0]:
        raise InputError(f"expected a file, '-' or the name of a dataset; there is no file {arg}: check the path")
    return _require_documents(_read_dataset(arg, _open_dataset(arg), field), f"the dataset {arg}")


def _require_documents(documents: Documents, source: str) -> Documents:
    """Yield documents; raise InputError if there is none."""
    first = next(documents, None)
    if first is None:
        raise InputError(f"expected at least one row with a document; {source} has none: give another")
    yield first
    yield from documents


# Datasets


def _open_dataset(arg: str) -> Iterable[Any]:
    import datasets  # here, for it is slow to import

    name, config, split = [*arg.split(":"), "", ""][:3]
    try:
        return datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
    except Exception as error:  # a name that is no dataset, or a broken one, can fail anywhere inside datasets
        reason = first_line(error)
        raise InputError(f"expected a file or a dataset; {arg} is no file, and as a dataset: {reason}") from error


def _read_dataset(arg: str, rows: Iterable[Any], field: str | None) -> Documents:
    from datasets.exceptions import DatasetsError

    try:
        for number, row in enumerate(rows):
            yield f"{arg}#{number}", row_document(row, field, f"{arg}, row {number}")
    except (OSError, DatasetsError) as error:
        raise InputError(f"expected to read the dataset {arg}; {first_line(error)}: try again") from error
