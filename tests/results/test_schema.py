"""Laws of the result: its schema, its file, and how files are written."""

import errno
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import h5netcdf
import h5py
import numpy as np
import pytest
import xarray as xr
from support.sample import sample

from posterity import atomic_files
from posterity.atomic_files import check_output_path, write_atomically
from posterity.errors import InputError
from posterity.reporting.report import report
from posterity.results import schema
from posterity.results.files import load, save
from posterity.results.schema import RESULT


@pytest.fixture(scope="module")
def plain():
    return sample()


@pytest.fixture(scope="module")
def uneven():
    """The last layer lacks a head."""
    return sample(missing_heads=1, seed=3)


# ---- the file


def test_a_result_comes_back_from_its_file_as_it_was(tmp_path, plain, uneven):
    for number, result in enumerate((plain, uneven, sample(lags="self", with_weights=False))):
        path = save(result, tmp_path / f"{number}.nc")
        assert load(path).identical(result)


def test_a_loaded_result_holds_no_file(tmp_path, plain):
    path = save(plain, tmp_path / "run.nc")
    loaded = load(path)
    path.unlink()
    assert save(loaded, path).exists()
    assert not [name for name in loaded.variables if not isinstance(loaded[name].variable._data, np.ndarray)
                and name not in loaded.indexes]  # fmt: skip


def full():
    """A result with every variable of the schema."""
    tokens = [f"t{position}" for position in range(64)]
    return sample(
        losses=True, horizons=(1, 8, 64), prices="text", tokens=tokens, parameters=["a", "b"], adapters=["c", "d"]
    )


def test_every_variable_of_a_file_has_units_and_a_long_name(tmp_path):
    loaded = load(save(full(), tmp_path / "run.nc"))
    for name, entry in schema.SCHEMA.items():
        assert loaded[name].attrs == {"units": entry.units, "long_name": entry.long_name}


def test_a_full_result_comes_back_as_it_was(tmp_path):
    assert set(schema.SCHEMA) == set(full().data_vars)
    assert load(save(full(), tmp_path / "run.nc")).identical(full())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss_gram", "it has no 'loss_gram'"),
        ("token", "it has no 'token'"),
        ("weight_mean", "it has no 'weight_mean'"),
        ("horizon", "'horizon_by_document' has no coordinate 'horizon'"),
    ],
)
def test_a_result_that_lacks_half_of_a_group_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        RESULT.check(full().drop_vars(name))


@pytest.mark.parametrize("horizons", [[0, 8, 64], [1, 1, 2]])
def test_horizons_that_do_not_grow_are_refused(horizons):
    with pytest.raises(InputError, match="horizons do not begin at 1 or more and grow"):
        RESULT.check(full().assign_coords(horizon=("horizon", horizons, full().horizon.attrs)))


def test_names_with_control_characters_come_back_readable(tmp_path):
    result = sample(documents=2, texts=["a\x00b\x1b[31m", "c\udcff\u202ed"], model="e\x07\nf")
    assert list(result.text.values) == ["a�b�[31m", "c?�d"]
    assert result.attrs["model"] == "e� f"
    assert load(save(result, tmp_path / "run.nc")).identical(result)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.9999])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, plain, share):
    path = save(plain, tmp_path / "run.nc")
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(InputError, match="cannot be read") as caught:
        load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_damaged_number_is_found(tmp_path, plain):
    path = save(plain, tmp_path / "run.nc")
    data = bytearray(path.read_bytes())
    with xr.open_dataset(path, engine="h5netcdf", decode_times=False) as file:
        encoding = file["credit"].encoding
    assert encoding["fletcher32"]
    with h5py.File(path) as file:
        place = file["credit"].id.get_chunk_info(0).byte_offset
    data[place + 40] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot be read"):
        load(path)


def test_what_is_no_result_is_refused(tmp_path, plain):
    path = tmp_path / "run.nc"
    with pytest.raises(InputError, match="does not exist"):
        load(path)
    with pytest.raises(InputError, match="does not exist"):
        load("a\0b")
    with pytest.raises(InputError, match="is a folder"):
        load(tmp_path)
    path.write_text("layer,head\n")
    with pytest.raises(InputError, match="cannot be read"):
        load(path)
    xr.Dataset({"x": 1.0}).to_netcdf(path, engine="h5netcdf")
    with pytest.raises(InputError, match="schema version is ''"):
        load(path)


WRONG = {
    "schema version is 3": lambda r: r.assign_attrs(schema_version=3),
    "schema version is 'x": lambda r: r.assign_attrs(schema_version="x" * 3),
    "has no 'credit'": lambda r: r.drop_vars("credit"),
    "has no 'module'": lambda r: r.drop_vars("module"),
    "'loss' holds int64": lambda r: r.assign(loss=r.loss.astype("int64")),
    "'credit' holds float32": lambda r: r.assign(credit=r.credit.astype("float32")),
    "'loss' holds <U": lambda r: r.assign(loss=r.loss.astype(str)),
    "'text' holds int64": lambda r: r.assign_coords(text=("document", np.arange(5))),
    "'edges' has the dimensions": lambda r: r.assign(edges=r.edges.T),
    "holds \\['extra'\\]": lambda r: r.assign(extra=r.loss),
    "labels of 'stream'": lambda r: r.assign_coords(stream=["key", "query", "value"]),
    "'layer' does not count": lambda r: r.assign_coords(layer=r.layer + 1),
    "lags do not begin with lag 0": lambda r: r.isel(lag=slice(1, None)),
    "go on without a gap": lambda r: r.isel(lag=[0, 2, 3]),
    "'tokens' holds a negative": lambda r: r.assign(tokens=r.tokens - 1000),
    "'loss' holds an infinite": lambda r: r.assign(loss=r.loss * np.inf),
    "hold nothing": lambda r: r.isel(document=slice(0, 0)),
}


@pytest.mark.parametrize("reason", WRONG)
def test_a_wrong_schema_is_refused_with_the_reason(plain, reason):
    with pytest.raises(InputError, match=reason) as caught:
        RESULT.check(WRONG[reason](plain))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "reason", ["schema version is 3", "'loss' holds <U", "go on without a gap", "holds an infinite"]
)
def test_a_file_with_a_wrong_schema_is_neither_written_nor_read(tmp_path, plain, reason):
    wrong = next(change for name, change in WRONG.items() if reason in name)(plain)
    with pytest.raises(InputError, match=reason):
        save(wrong, tmp_path / "run.nc")
    assert not list(tmp_path.iterdir())
    wrong.to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    with pytest.raises(InputError, match=reason) as caught:
        load(tmp_path / "run.nc")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_a_file_that_claims_more_than_it_holds_is_not_loaded(tmp_path, plain):
    path = tmp_path / "run.nc"
    with h5netcdf.File(path, "w") as file:
        file.attrs["schema_version"] = 2
        file.dimensions = {**plain.sizes, "position": 10**10}
        for name, variable in plain.variables.items():
            kind = h5py.string_dtype() if variable.dtype.kind == "U" else variable.dtype
            chunks = tuple(min(10, file.dimensions[dim].size) for dim in variable.dims)
            file.create_variable(name, variable.dims, kind, chunks=chunks)
    with pytest.raises(InputError, match="that are not in it"):
        load(path)


def test_only_a_dataset_passes_the_check():
    with pytest.raises(InputError, match="but str came"):
        RESULT.check("run.nc")


def test_saving_replaces_the_file_and_leaves_nothing_else(tmp_path, plain, uneven):
    path = save(plain, tmp_path / "run.nc")
    save(uneven, path)
    assert load(path).identical(uneven)
    assert list(tmp_path.iterdir()) == [path]


def test_saving_through_a_link_keeps_the_link(tmp_path, plain):
    (tmp_path / "run.nc").symlink_to(tmp_path / "real.nc")
    save(plain, tmp_path / "run.nc")
    assert (tmp_path / "run.nc").is_symlink()
    assert load(tmp_path / "real.nc").identical(plain)


def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, plain):
    path = save(plain, tmp_path / "run.nc")
    old = path.read_bytes()

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    code = f"""
import sys
from support.sample import sample
from posterity import InputError, save
try:
    save(sample(seed=1), {str(path)!r})
except InputError as error:
    print(error)
"""
    folders = [str(Path(__file__).parents[1]), str(Path(schema.__file__).parents[2])]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit,
                         env={"PYTHONPATH": ":".join(folders), "PYTHONDONTWRITEBYTECODE": "1"})  # fmt: skip
    assert "File too large" in run.stdout, run.stderr
    assert run.stdout.count("\n") == 1
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_cannot_be_put_in_place_leaves_the_old_one(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "page.html").write_bytes(b"old")
    monkeypatch.setattr(atomic_files.os, "replace", full)
    with pytest.raises(InputError, match="No space left on device; free some space"):
        write_atomically(tmp_path / "page.html", b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("page.html", b"old")]


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(atomic_files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "page.html", b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written_is_refused_with_the_reason(tmp_path, monkeypatch):
    cases = {
        str(tmp_path): "it is a folder",
        str(tmp_path / "no" / "run.nc"): "does not exist",
        "/proc/run.nc": "nothing can be written",
        "/dev/null": "not a regular file",
        str(tmp_path / ("x" * 300)): "File name too long",
        "a\0b": "null",
    }
    for path, reason in cases.items():
        with pytest.raises(InputError, match=reason) as caught:
            check_output_path(path)
        assert "\n" not in str(caught.value)
    (tmp_path / "run.nc").touch()
    monkeypatch.setattr(atomic_files.os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match="write-protected"):
        check_output_path(tmp_path / "run.nc")


@pytest.mark.parametrize("write", [save, report])
def test_a_path_with_the_ending_of_something_else_is_refused(tmp_path, monkeypatch, plain, write):
    monkeypatch.chdir(tmp_path)
    kind, ending, other = ("result", ".nc", "run.html") if write is save else ("page", ".html", "run.nc")
    message = re.escape(f"expected a {kind} that ends in {ending}; got {other}: name it run{ending}")
    with pytest.raises(InputError, match=message):
        write(plain, other)
    assert list(tmp_path.iterdir()) == []


def test_the_check_of_a_path_leaves_no_trace(tmp_path):
    assert check_output_path(tmp_path / "run.nc") == (tmp_path / "run.nc").resolve()
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_shape_or_name_is_a_bug():
    with pytest.raises(AssertionError):
        sample().pipe(lambda r: _rebuilt(r, loss=np.zeros((5, 1))))
    with pytest.raises(AssertionError):
        _rebuilt(sample(), unknown=np.zeros(5))
    with pytest.raises(AssertionError):
        _rebuilt(sample(), tokens=np.full(5, 0.5))
    with pytest.raises(ValueError, match="conflicting sizes"):
        _rebuilt(sample(), loss=np.zeros(4))


def test_numbers_of_any_precision_become_those_of_the_schema():
    result = _rebuilt(sample(), loss=np.full(5, 0.5, "float32"), tokens=np.full(5, 7, "int32"))
    assert result.loss.dtype == "float64"
    assert result.tokens.dtype == "int64"


def _rebuilt(result, **changes):
    variables = {name: result[name].values for name in schema.SCHEMA if name in result} | changes
    coordinates = {name: result[name].values for name in ("lag", "lag_end", "position", "position_end", "kv_head")}
    texts, modules = list(result.text.values), list(result.module.values)
    return schema.build_result(variables, modules=modules, texts=texts, attrs={}, **coordinates)


def test_result_imports_no_torch():
    code = "import posterity.results.schema, sys; print('torch' in sys.modules)"
    folder = str(Path(schema.__file__).parents[2])
    bare = f"import sys, types; p = types.ModuleType('posterity'); p.__path__ = [{folder + '/posterity'!r}]; "
    code = bare + "sys.modules['posterity'] = p; " + code
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
