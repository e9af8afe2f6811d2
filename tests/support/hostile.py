"""Hostile inputs for the fuzz tests and bench/fuzz.py: what is fed to each target, and the law that it must keep.

A target takes one input that hypothesis or a coverage-guided fuzzer made. It either works or raises InputError with one
line that a terminal can show; whatever else it raises is a failure.
"""

import json
import os
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
from support.sample import sample
from typer.main import get_command
from typer.testing import CliRunner

import posterity
from posterity.cli import main as cli
from posterity.errors import InputError
from posterity.inputs import model_files as folder
from posterity.inputs import text_sources as sources
from posterity.inputs import windows as corpus
from posterity.results import netcdf

PLACE = Path(tempfile.mkdtemp(prefix="posterity-fuzz-"))
PIECES = [b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\n", b"\r", b"\xed\xa0\x80", b"\xe2\x82", b"a" * 5000, b" " * 999]
PIECES += ["é漢🙂\u202e\u0301".encode(), b"\x1b[2J", b"the cat sat on the mat "]
LINES = [
    b'{"text": "a b c d e f g h"}',
    b'{"text": ',
    b"[" * 9999,
    b'{"text": NaN}',
    b"{}",
    b"null",
    b'"text"',
    b'{"text": 1e999}',
]
LINES += [b'{"text": "\\ud800"}', b'{"text": "a", "text": "b"}', b'{"text": ' + b"9" * 5000 + b"}", b"\xff", b"", b"\0"]
WORDS = [
    "",
    "-",
    "--",
    "-1",
    "0",
    "1",
    "9" * 400,
    "1e400",
    "nan",
    "inf",
    "-inf",
    "1,2,,4",
    ",",
    "1,1",
    "x=",
    "=1",
    "chance=nan",
]
WORDS += [
    "a\0b",
    "\ud800",
    "\x1b[31m",
    "\u202e",
    "/",
    "..",
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "~",
    "~x",
    "x" * 9000,
    "%s{0}",
]
WORDS += [
    "discount:nan",
    "window:-1",
    "leak:2",
    "discount:",
    "cuda:99",
    "float8",
    "None",
    "[/red]",
    "🙂",
    "--output",
    "a\nb",
    "sines",
]


class Plain:
    """A tokenizer for fuzzing: one token for each character."""

    def __call__(self, text, **options):
        return {"input_ids": [ord(sign) % 60 for sign in text]}


def kept(use: Callable[[], Any]) -> bool:
    """Whether the input was taken; AssertionError if it was refused in any but the one right way."""
    try:
        use()
    except InputError as error:
        said = str(error)
    else:
        return True
    assert said.isprintable(), ascii(said)
    assert len(said) < 2000
    return False


def text_file(data: bytes) -> bool:
    """A text file, read whole and cut into windows."""
    path = PLACE / "a.txt"
    path.write_bytes(data)

    def use():
        read = "".join("".join(stream.pieces()) for _, stream in sources.documents([str(path)]))
        assert read == data.decode().removeprefix("\ufeff")
        corpus.windows(sources.documents([str(path)]), Plain(), 4, 9)

    return kept(use)


def json_lines(data: bytes) -> bool:
    """A .jsonl file, with and without its broken lines."""
    path, skipped = PLACE / "a.jsonl", sources.Skipped()
    path.write_bytes(data)
    taken = kept(lambda: list(sources.documents([str(path)])))
    kept(lambda: list(sources.documents([str(path)], skipped=skipped)))
    assert not (taken and skipped.total)
    return taken


def token_ids(ids: Any) -> bool:
    """Token ids of any type and shape."""

    def use():
        for window in corpus.windows(ids, None, 2, 5):
            assert window.ids.dtype == torch.int64
            assert window.ids.min() >= 0

    return kept(use)


@cache
def whole_file(sealed: bool) -> bytes:
    """A file of a small result."""
    more = {"losses": True, "horizons": (1, 4), "parameters": ["a"], "tokens": ["t"] * 8}
    data = netcdf.packed(sample(layers=2, heads=2, context=8, documents=2, **more))
    return data if sealed else data[: data.rindex(netcdf.SEAL)]


def result_bytes(data: bytes) -> bool:
    """Any bytes as a result file; what loads must be what was written if the file is sealed."""
    path = PLACE / "a.nc"
    path.write_bytes(data)

    def use():
        found = posterity.load(path)
        if netcdf.SEAL in data:
            assert data == whole_file(True)
        posterity.summary(found, _nowhere())

    return kept(use)


def result_changes(changes: list[tuple[str, str, Any]]) -> bool:
    """A result file whose variables and attributes were changed by h5py."""
    path = PLACE / "b.nc"
    path.write_bytes(whole_file(False))
    with h5py.File(path, "r+") as file:
        names = [*file]
        for what, name, value in changes:
            name = name if name in file else names[len(name) % len(names)]
            try:
                _change(file, what, name, value)
            except (
                KeyError,
                ValueError,
                TypeError,
                RuntimeError,
                OSError,
                OverflowError,
            ):  # h5py's own refusal: nothing was changed
                continue

    def use():
        found = posterity.load(path)
        posterity.summary(found, _nowhere())
        posterity.report(found)

    return kept(use)


def _change(file: h5py.File, what: str, name: str, value: Any) -> None:
    if what == "attribute of the file":
        file.attrs[name] = value
    elif what == "attribute":
        file[name].attrs["units"] = value
    elif what == "remove":
        del file[name]
    elif what == "rename":
        file.move(name, "renamed")
    elif what == "fill":
        file[name][...] = value
    elif what == "one":
        file[name][(0,) * file[name].ndim] = value
    else:
        data = file[name][()]
        del file[name]
        file[name] = {"flat": np.ravel, "turned": np.transpose, "text": lambda x: str(x[:1])}[what](data)


def json_config(data: bytes) -> bool:
    """A config.json beside whole weights."""
    place = PLACE / "model"
    place.mkdir(exist_ok=True)
    header = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (place / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    (place / "config.json").write_bytes(data)
    return kept(lambda: folder.checked(place))


def weights(data: bytes) -> bool:
    """Any bytes as weights."""
    place = PLACE / "weights"
    place.mkdir(exist_ok=True)
    (place / "model.safetensors").write_bytes(data)
    (place / "config.json").write_text('{"num_hidden_layers": 1}')
    return kept(lambda: folder.checked(place))


def command(arguments: list[str]) -> bool:
    """A command line: works (only --help and --version can), or exit code 2, one line, and nothing is written."""
    place = PLACE / "empty"
    place.mkdir(exist_ok=True)
    before = Path.cwd()
    os.chdir(place)
    try:
        answer = CliRunner().invoke(cli.app, arguments)
        left = os.listdir(place)
    finally:
        os.chdir(before)
    if answer.exit_code == 0:
        return True
    assert answer.exit_code == 2, (answer.exception, answer.stderr[-500:])
    assert answer.stderr.startswith("posterity: "), answer.stderr[-500:]
    assert answer.stderr.count("\n") == 1
    assert answer.stderr[:-1].isprintable(), ascii(answer.stderr)
    assert not left
    return False


def _nowhere() -> Any:
    import io

    from rich.console import Console

    return Console(file=io.StringIO(), width=80)


# ---- inputs


def commands() -> st.SearchStrategy[list[str]]:
    """Command lines from typer's own parameters; the model is one that is not there, so nothing is ever computed."""
    words = st.one_of(st.sampled_from(WORDS), st.text(max_size=20))
    made = []
    for name, one in get_command(cli.app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        flags = ["--help", *(option for each in one.params for option in each.opts if option.startswith("-"))]
        part = st.one_of(words.map(lambda word: [word]), st.tuples(st.sampled_from(flags), words).map(list))
        model = (
            ["--model", "./none"] if name == "train" else [] if name in ("compare", "report", "summary") else ["./none"]
        )
        made.append(st.lists(part, max_size=5).map(lambda parts, begin=(name, *model): [*begin, *chain(*parts)]))
    return st.one_of(made)


def spoiled(data: bytes) -> st.SearchStrategy[bytes]:
    """Bytes with a few of them changed, or cut."""
    place = st.integers(0, len(data) - 1)

    def changed(changes, end):
        found = bytearray(data)
        for at, value in changes:
            found[at] = value
        return bytes(found[:end])

    few = st.lists(st.tuples(place, st.integers(0, 255)), max_size=6)
    return st.builds(changed, few, st.one_of(st.just(len(data)), place))


VALUES = st.sampled_from(
    [np.nan, np.inf, -1.0, 0, 2**62, -1, "x", "\x1b[2J\u202e", "", b"\xff", np.zeros((2, 3)), np.bool_(True), 1j,
     h5py.Empty("f8"), "x" * 60_000, [1, 2], ["a", "b"], np.float16(1)]
)  # fmt: skip
NAMES = st.sampled_from(
    [
        "credit",
        "loss",
        "text",
        "edges",
        "lag",
        "document",
        "token",
        "horizon",
        "tokens",
        "model",
        "kind",
        "step",
        "parameters",
        "schema_version",
        "stream",
        "inspect_credit",
        "weight_mean",
    ]
)
HOW = st.sampled_from(
    ["attribute of the file", "attribute", "remove", "rename", "fill", "one", "flat", "turned", "text"]
)
KINDS = [
    "i1",
    "u1",
    "i2",
    "u2",
    "i4",
    "u4",
    "i8",
    "u8",
    "f2",
    "f4",
    "f8",
    "c8",
    "?",
    "O",
    "U3",
    "S3",
    "M8[s]",
    ">i4",
    ">f8",
]
arrays = st.builds(
    lambda kind, shape, value: np.full(shape, value).astype(kind),
    st.sampled_from(KINDS),
    st.lists(st.integers(0, 5), max_size=4).map(tuple),
    st.integers(-3, 200),
)
values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 10**30), st.floats(), st.text(max_size=5), st.binary(max_size=3)
)
configs = st.dictionaries(
    st.sampled_from(
        ["num_hidden_layers", "hidden_size", "model_type", "attn_implementation", "text_config", "n_layer"]
    ),
    st.recursive(
        values.filter(lambda x: not isinstance(x, bytes)), lambda x: st.lists(x) | st.dictionaries(st.text(), x)
    ),
)
joined = st.lists(st.one_of(st.sampled_from(PIECES), st.binary(max_size=30)), max_size=12).map(b"".join)
TARGETS: dict[str, tuple[Callable[[Any], bool], st.SearchStrategy[Any]]] = {
    "text files": (text_file, joined),
    "lines of JSON": (
        json_lines,
        st.lists(st.one_of(st.sampled_from(LINES), st.binary(max_size=30)), max_size=8).map(b"\n".join),
    ),
    "token ids": (
        token_ids,
        st.one_of(arrays, values, st.lists(st.one_of(values, arrays, st.lists(values)), max_size=5)),
    ),
    "configs": (json_config, st.one_of(configs.map(lambda x: json.dumps(x).encode()), st.binary(max_size=50))),
    "headers of weights": (
        weights,
        st.builds(lambda n, b: n.to_bytes(8, "little") + b, st.integers(0, 300), st.binary(max_size=300)),
    ),
    "sealed results, bytes changed": (result_bytes, st.deferred(lambda: spoiled(whole_file(True)))),
    "results, changed by h5py": (result_changes, st.lists(st.tuples(HOW, NAMES, VALUES), min_size=1, max_size=3)),
    "command lines": (command, commands()),
}
BYTES = {"text files", "lines of JSON", "configs", "headers of weights", "sealed results, bytes changed"}  # take bytes
