"""Hostile inputs for the fuzz tests and bench/fuzz.py: the targets, the inputs of each, and the law that it must keep.

A target takes one input that hypothesis or a coverage-guided fuzzer made. It either works or raises InputError with one
line that a terminal can show; whatever else it raises is a failure.
"""

import io
import json
import os
import re
import tempfile
from collections.abc import Callable
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from hypothesis import strategies as st
from rich.console import Console
from support.sample import sample
from typer.main import get_command
from typer.testing import CliRunner

import posterity
from posterity.cli.main import app
from posterity.errors import InputError
from posterity.inputs.model_files import check_model_folder
from posterity.inputs.text_sources import SkippedLines, open_documents
from posterity.inputs.windows import cut_windows
from posterity.results import netcdf

WORK = Path(tempfile.mkdtemp(prefix="posterity-fuzz-"))


class CharacterTokenizer:
    """A tokenizer for fuzzing: one token for each character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(sign) % 60 for sign in text]}


def accepts(use: Callable[[], Any]) -> bool:
    """Return whether an input is accepted; AssertionError if it is refused in any but the one right way."""
    try:
        use()
    except InputError as error:
        message = str(error)
    else:
        return True
    assert message.isprintable(), ascii(message)
    assert len(message) < 2000
    return False


# The targets


def read_text_file(data: bytes) -> bool:
    """Read a text file to its end and cut it into windows."""
    path = WORK / "a.txt"
    path.write_bytes(data)

    def use():
        text = "".join("".join(stream.pieces()) for _, stream in open_documents([str(path)]))
        assert text == re.sub("\r\n?", "\n", data.decode().removeprefix("\ufeff"))
        cut_windows(open_documents([str(path)]), CharacterTokenizer(), 4, 9)

    return accepts(use)


def read_json_lines(data: bytes) -> bool:
    """Read a .jsonl file, with and without its broken lines; and as the other files of rows."""
    path, skipped = WORK / "a.jsonl", SkippedLines()
    path.write_bytes(data)
    accepted = accepts(lambda: list(open_documents([str(path)])))
    accepts(lambda: list(open_documents([str(path)], skipped=skipped)))
    assert not (accepted and skipped.total)
    for ending in (".json", ".csv", ".tsv"):
        path.with_suffix(ending).write_bytes(data)
        accepts(lambda ending=ending: list(open_documents([str(path.with_suffix(ending))])))
    return accepted


def cut_token_ids(ids: Any) -> bool:
    """Cut token ids of any type and shape into windows."""

    def use():
        for window in cut_windows(ids, None, 2, 5):
            assert window.ids.dtype == torch.int64
            assert window.ids.min() >= 0

    return accepts(use)


@cache
def result_file(sealed: bool) -> bytes:
    """Return the file of a small result."""
    variables = {"losses": True, "horizons": (1, 4), "parameters": ["a"], "tokens": ["t"] * 8}
    data = netcdf.pack(sample(layers=2, heads=2, context=8, documents=2, **variables))
    return data if sealed else data[: data.rindex(netcdf.SEAL)]


def load_result_bytes(data: bytes) -> bool:
    """Load any bytes as a result file; a sealed one loads only if it is what was written."""
    path = WORK / "a.nc"
    path.write_bytes(data)

    def use():
        result = posterity.load(path)
        if netcdf.SEAL in data:
            assert data == result_file(True)
        posterity.summary(result, _silent_console())

    return accepts(use)


def load_changed_result(changes: list[tuple[str, str, Any]]) -> bool:
    """Load a result file whose variables and attributes were changed by h5py."""
    path = WORK / "b.nc"
    path.write_bytes(result_file(False))
    with h5py.File(path, "r+") as file:
        names = [*file]
        for change, name, value in changes:
            name = name if name in file else names[len(name) % len(names)]
            try:
                _change_file(file, change, name, value)
            except (KeyError, ValueError, TypeError, RuntimeError, OSError, OverflowError):
                continue  # h5py's own refusal: nothing was changed

    def use():
        result = posterity.load(path)
        posterity.summary(result, _silent_console())
        posterity.report(result)

    return accepts(use)


def _change_file(file: h5py.File, change: str, name: str, value: Any) -> None:
    if change == "attribute of the file":
        file.attrs[name] = value
    elif change == "attribute":
        file[name].attrs["units"] = value
    elif change == "remove":
        del file[name]
    elif change == "rename":
        file.move(name, "renamed")
    elif change == "fill":
        file[name][...] = value
    elif change == "first number":
        file[name][(0,) * file[name].ndim] = value
    else:
        data = file[name][()]
        del file[name]
        file[name] = {"flatten": np.ravel, "transpose": np.transpose, "text": lambda x: str(x[:1])}[change](data)


def check_json_config(data: bytes) -> bool:
    """Check a config.json beside intact weights."""
    folder = WORK / "model"
    folder.mkdir(exist_ok=True)
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (folder / "config.json").write_bytes(data)
    return accepts(lambda: check_model_folder(folder))


def check_weights_file(data: bytes) -> bool:
    """Check any bytes as weights."""
    folder = WORK / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(data)
    (folder / "config.json").write_text('{"num_hidden_layers": 1}')
    return accepts(lambda: check_model_folder(folder))


def run_command(arguments: list[str]) -> bool:
    """Run a command line: it works (only --help and --version can), or it is exit code 2, one line, and no file."""
    folder = WORK / "empty"
    folder.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(folder)
    try:
        result = CliRunner().invoke(app, arguments)
        files = os.listdir(folder)
    finally:
        os.chdir(before)
    if result.exit_code == 0:
        return True
    assert result.exit_code == 2, (result.exception, result.stderr[-500:])
    assert result.stderr.startswith("posterity: "), result.stderr[-500:]
    assert result.stderr.count("\n") == 1
    assert result.stderr[:-1].isprintable(), ascii(result.stderr)
    assert not files
    return False


def _silent_console() -> Console:
    return Console(file=io.StringIO(), width=80)


# Their inputs

# fmt: off
PIECES = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b"\xed\xa0\x80", b"\xe2\x82", b"a" * 5000, b" " * 999,
          "é漢🙂\u202e\u0301".encode(), b"\x1b[2J", b"the cat sat on the mat "]
LINES = [b'{"text": "a b c d e f g h"}', b'{"text": ', b"[" * 9999, b'{"text": NaN}', b"{}", b"null", b'"text"',
         b'{"text": 1e999}', b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b'{"text": ' + b"9" * 5000 + b"}",
         b"\xff", b"", b"\0"]
WORDS = ["", "-", "--", "-1", "0", "1", "9" * 400, "1e400", "nan", "inf", "-inf", "1,2,,4", ",", "1,1", "x=", "=1",
         "chance=nan", "a\0b", "\ud800", "\x1b[31m", "\u202e", "/", "..", "/dev/null", "/dev/zero", "/proc/self/mem",
         "~", "~x", "x" * 9000, "%s{0}", "discount:nan", "window:-1", "leak:2", "discount:", "cuda:99", "float8",
         "None", "[/red]", "🙂", "--output", "a\nb", "sines"]
DTYPES = ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8", "c8", "?", "O", "U3", "S3", "M8[s]", ">i4",
          ">f8"]
CHANGES = ["attribute of the file", "attribute", "remove", "rename", "fill", "first number", "flatten", "transpose",
           "text"]
NAMES = ["credit", "loss", "text", "edges", "lag", "document", "token", "horizon", "tokens", "model", "kind", "step",
         "parameters", "schema_version", "stream", "inspect_credit", "weight_mean"]
VALUES = [np.nan, np.inf, -1.0, 0, 2**62, -1, "x", "\x1b[2J\u202e", "", b"\xff", np.zeros((2, 3)), np.bool_(True), 1j,
          h5py.Empty("f8"), "x" * 60_000, [1, 2], ["a", "b"], np.float16(1)]
CONFIG_KEYS = ["num_hidden_layers", "hidden_size", "model_type", "attn_implementation", "text_config", "n_layer"]
# fmt: on


def join_pieces(pieces: list[bytes], separator: bytes, max_size: int) -> st.SearchStrategy[bytes]:
    """Known pieces and random ones, joined."""
    return st.lists(st.one_of(st.sampled_from(pieces), st.binary(max_size=30)), max_size=max_size).map(separator.join)


def command_lines() -> st.SearchStrategy[list[str]]:
    """Command lines from typer's own parameters; the model is one that is not there, so nothing is ever computed."""
    words = st.one_of(st.sampled_from(WORDS), st.text(max_size=20))
    strategies = []
    for name, command in get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("-")]
        flags = st.sampled_from(["--help", *options])
        part = st.one_of(words.map(lambda word: [word]), st.tuples(flags, words).map(list))
        model = {"train": ["--model", "./none"], "compare": [], "report": [], "summary": []}.get(name, ["./none"])
        parts = st.lists(part, max_size=5)
        strategies.append(parts.map(lambda parts, head=(name, *model): [*head, *chain(*parts)]))
    return st.one_of(strategies)


def damaged_bytes(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with a few of them changed, or cut."""
    places = st.integers(0, len(data) - 1)

    def damage(changes, end):
        copy = bytearray(data)
        for index, value in changes:
            copy[index] = value
        return bytes(copy[:end])

    changes = st.lists(st.tuples(places, st.integers(0, 255)), max_size=6)
    return st.builds(damage, changes, st.one_of(st.just(len(data)), places))


arrays = st.builds(
    lambda dtype, shape, value: np.full(shape, value).astype(dtype),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.integers(-3, 200),
)
values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**30), st.floats(), st.text(max_size=5), st.binary(max_size=3)
)
configs = st.dictionaries(
    st.sampled_from(CONFIG_KEYS),
    st.recursive(
        values.filter(lambda x: not isinstance(x, bytes)), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ),
)
changes = st.tuples(st.sampled_from(CHANGES), st.sampled_from(NAMES), st.sampled_from(VALUES))
TARGETS: dict[str, tuple[Callable[[Any], bool], st.SearchStrategy[Any]]] = {
    "text files": (read_text_file, join_pieces(PIECES, b"", 12)),
    "lines of JSON": (read_json_lines, join_pieces(LINES, b"\n", 8)),
    "token ids": (
        cut_token_ids,
        st.one_of(arrays, values, st.lists(st.one_of(values, arrays, st.lists(values)), max_size=5)),
    ),
    "configs": (check_json_config, st.one_of(configs.map(lambda x: json.dumps(x).encode()), st.binary(max_size=50))),
    "headers of weights": (
        check_weights_file,
        st.builds(lambda n, b: n.to_bytes(8, "little") + b, st.integers(0, 300), st.binary(max_size=300)),
    ),
    "sealed results, bytes changed": (load_result_bytes, st.deferred(lambda: damaged_bytes(result_file(True)))),
    "results, changed by h5py": (load_changed_result, st.lists(changes, min_size=1, max_size=3)),
    "command lines": (run_command, command_lines()),
}
BYTES = {"text files", "lines of JSON", "configs", "headers of weights", "sealed results, bytes changed"}  # take bytes
