"""Laws of the files: what is read is what was written, in this file and no other, and never more than it holds."""

import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import xarray as xr
from support.sample import sample

import posterity
from posterity.errors import LONGEST, InputError
from posterity.results import netcdf
from posterity.results.files import save


@pytest.fixture(scope="module")
def plain():
    return sample(layers=2, heads=2, context=16, documents=2)


@pytest.fixture
def path(tmp_path, plain):
    """A whole file without its seal, to be spoiled by the test."""
    data = netcdf.pack(plain)
    (tmp_path / "run.nc").write_bytes(data[: data.rindex(netcdf.SEAL)])
    (tmp_path / "numbers.bin").write_bytes(np.array([5.0, 6.0]).tobytes())
    with h5py.File(tmp_path / "other.nc", "w") as file:
        file["loss"] = np.array([7.0, 8.0])
    return tmp_path / "run.nc"


def refusal(path):
    with pytest.raises(InputError) as caught:
        posterity.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def replaced(file, make):
    del file["loss"]
    make(file)
    if isinstance(file.get("loss", getlink=True), h5py.HardLink):
        file["loss"].dims[0].attach_scale(file["document"])


def virtual(file):
    layout = h5py.VirtualLayout((2,), "f8")
    layout[:] = h5py.VirtualSource(Path(file.filename).parent / "other.nc", "loss", shape=(2,))
    file.create_virtual_dataset("loss", layout)


def outside(file):
    file.create_dataset("loss", (2,), "f8", external=[(str(Path(file.filename).parent / "numbers.bin"), 0, 16)])


def elsewhere(file):
    file["loss"] = h5py.ExternalLink(str(Path(file.filename).parent / "other.nc"), "/loss")


def chunked(number, size):
    return lambda file: file.create_dataset("loss", (number,), "f8", chunks=(size,), maxshape=(None,))


NOT_HERE = {
    "numbers of another file, virtually": (virtual, "'loss' is kept in another file"),
    "numbers in another file": (outside, "'loss' is kept in another file"),
    "a link into another file": (elsewhere, "'loss' is a link to something else"),
    "a link that leads to itself": (lambda file: file.update(loss=h5py.SoftLink("/loss")), "'loss' is a link"),
    "a group": (lambda file: file.create_group("loss"), "'loss' is no array"),
    "numbers that were never written": (chunked(2, 2), "'loss' claims 2 values that are not in it"),
    "a chunk of two gigabytes": (chunked(2, 1 << 28), "'loss' claims 2 values that are not in it"),
    "as many numbers as no machine holds": (chunked(10**14, 1 << 20), "100,000,000,000,000 values that are not in it"),
    "numbers of another kind": (lambda file: file.update(loss=np.array([1j, 2])), "'loss' holds complex128"),
    "a filter of a plugin": (
        lambda file: file.create_dataset("loss", (8,), "f8", chunks=(8,), compression="lzf"),
        "'loss' is packed by a filter",
    ),
}


@pytest.mark.parametrize("name", NOT_HERE)
def test_a_file_is_read_only_if_its_numbers_are_in_it(path, name):
    make, reason = NOT_HERE[name]
    with h5py.File(path, "r+") as file:
        if name == "a group":
            del file["loss"]
            make(file)
        elif name == "a link that leads to itself":
            del file["loss"]
            file["loss"] = h5py.SoftLink("/loss")
        else:
            replaced(file, make)
    assert reason in refusal(path)


def test_a_text_that_stands_for_many_is_not_unpacked(path):
    """Every element of an array of text can point at the same long one: 4 MB become 40 GB."""
    with h5py.File(path, "r+") as file:
        del file["text"]
        text = file.create_dataset("text", (10_000,), h5py.string_dtype())
        text[0] = "x" * 4_000_000
    data = bytearray(path.read_bytes())
    with h5py.File(path) as file:
        start = file["text"].id.get_offset()
    data[start : start + 160_000] = bytes(data[start : start + 16]) * 10_000
    path.write_bytes(data)
    assert "'text' claims more text than is in it" in refusal(path)


@pytest.mark.parametrize("value", [np.zeros(1), h5py.Empty("f8"), "x"], ids=["numbers", "nothing", "text"])
@pytest.mark.parametrize("name", ["DIMENSION_LIST", "REFERENCE_LIST", "CLASS", "units"])
def test_attributes_at_which_the_c_library_would_crash_are_refused(path, name, value):
    """In a process of its own: without the check some of these end it with `free(): invalid pointer`."""
    if name == "units" and not isinstance(value, h5py.Empty):
        return
    with h5py.File(path, "r+") as file:
        file["document" if name in ("REFERENCE_LIST", "CLASS") else "loss"].attrs[name] = value
    code = f"import posterity\ntry: posterity.load({str(path)!r})\nexcept posterity.InputError as error: print(error)"
    environment = {**os.environ, "PYTHONPATH": str(Path(netcdf.__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert f"has an attribute '{name}' of a kind that is never written" in run.stdout, run.stderr


def test_every_changed_byte_of_a_file_is_found(tmp_path, plain):
    path = save(plain, tmp_path / "run.nc")
    data = path.read_bytes()
    for place in (0, 9, 40, len(data) // 3, len(data) // 2, len(data) - 200, len(data) - 1):
        path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        assert "its bytes are not those that were written" in refusal(path)
    path.write_bytes(data)
    assert posterity.load(path).identical(plain)


def test_other_programs_read_a_sealed_file_and_their_changes_are_kept(tmp_path, plain):
    path = save(plain, tmp_path / "run.nc")
    with xr.open_dataset(path, engine="h5netcdf", decode_times=False, mask_and_scale=False) as file:
        assert file.load().equals(plain)
    with h5py.File(path, "r+") as file:
        file.attrs["model"] = "a much longer name " * 100
    assert posterity.load(path).attrs["model"] == "a much longer name " * 100


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero"):
        assert "no ordinary file" in refusal(path)  # and does not wait for ever


def test_an_unknown_kind_of_file_is_named(path):
    with h5py.File(path, "r+") as file:
        file.attrs["kind"] = "\x1b[31mzorg\n"
    assert "it is of kind '\ufffd[31mzorg" in refusal(path)


def test_a_message_is_one_line_that_a_terminal_can_show_and_a_person_can_read():
    text = "a\x1b[2Jb\r\nc\u202ed\ud800e\x9b31m" + "x" * 10_000 + " the end"
    message = str(InputError(text))
    assert message.startswith("a\ufffd[2Jb c\ufffdd?e\ufffd31mxxx")
    assert message.endswith("xxx the end")
    assert len(message) <= LONGEST + 3
    assert message.isprintable()


COMPARISON = xr.Dataset(
    {"loss": (("run", "document", "position"), np.ones((2, 3, 4)), {"units": "nats"})},
    {"folder": ("run", ["a", "b"]), "arm": ("run", ["vanilla", "myopic"]), "seed": ("run", [0, 0]),
     "document": range(3), "position": range(4)},
    {"kind": "comparison", "data": "text", "steps": 5},
)  # fmt: skip
SPOILED = {
    "not every run": lambda comparison: comparison.assign_coords(seed=("run", [0, 1])),
    "plain run": lambda comparison: comparison.assign_coords(arm=("run", ["a", "b"])),
    "one plain run": lambda comparison: comparison.assign_coords(arm=("run", ["vanilla", "vanilla"])),
    "it does not say its units": lambda comparison: comparison.assign(
        loss=comparison.loss.assign_attrs(units=1).drop_attrs()
    ),
    "it does not say its data": lambda comparison: comparison.drop_attrs(deep=False).assign_attrs(
        kind="comparison", steps=5
    ),
    "'seed' is float64 by run": lambda comparison: comparison.assign_coords(seed=("run", [0.0, np.nan])),
    "it has no 'position'": lambda comparison: comparison.drop_vars("position"),
    "a loss is infinite": lambda comparison: comparison * np.inf,
}


@pytest.mark.parametrize("reason", SPOILED)
def test_a_comparison_that_is_none_is_neither_read_nor_written_nor_shown(tmp_path, reason):
    posterity.load(posterity.save(COMPARISON, tmp_path / "whole.nc"))
    with xr.set_options(keep_attrs=True):
        spoiled = SPOILED[reason](COMPARISON)
    (tmp_path / "gap.nc").write_bytes(netcdf.pack(spoiled))
    for use in (
        lambda: posterity.load(tmp_path / "gap.nc"),
        lambda: posterity.save(spoiled, tmp_path / "other.nc"),
        lambda: posterity.report(spoiled),
        lambda: posterity.summary(spoiled),
    ):
        with pytest.raises(InputError, match=reason):
            use()
