"""Read UTF-8 text in pieces, with universal newlines: a file gives the same text whichever line ends it has."""

import codecs
import io
from collections.abc import Iterator
from typing import BinaryIO

from posterity.errors import InputError

CHUNK_BYTES = 1 << 20  # read at a time


def read_text(path: str) -> Iterator[str]:
    """Yield the text of a file piece by piece.

    Raises:
        InputError: It cannot be read, or is no UTF-8 text.
    """
    try:
        with open(path, "rb") as file:
            yield from decode_text(file, path)
    except OSError as error:
        raise InputError(f"expected a file that can be read; {path}: {error.strerror or error}") from error


def decode_text(file: BinaryIO, name: str) -> Iterator[str]:
    """Yield the text of a UTF-8 file chunk by chunk, without a byte order mark; CR LF and CR become LF."""
    utf_8 = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    offset = 0
    while True:
        chunk = file.read(CHUNK_BYTES)
        start = offset - len(utf_8.getstate()[0])
        if (nul := chunk.find(b"\0")) >= 0:
            raise InputError(f"expected UTF-8 text; {name} is binary, byte {offset + nul} is zero: convert it to text")
        try:
            text = utf_8.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise InputError(
                f"expected UTF-8 text; {name} has another encoding at byte {start + error.start}: convert it to UTF-8"
            ) from None
        text = newlines.decode(text.removeprefix("\ufeff") if start == 0 else text, final=not chunk)
        offset += len(chunk)
        if text:
            yield text
        if not chunk:
            return
