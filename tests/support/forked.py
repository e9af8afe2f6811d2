"""Measures in processes of its own, forked from one that has imported everything: quick to start, easy to kill.

python -m support.forked killed FOLDER SEED KILLS   kill runs at random, resume them, compare with one that ran through
python -m support.forked points FOLDER              the same, killed at every single step of writing the state
python -m support.forked shared FOLDER              several processes; some killed, resumed by another number of them
python -m support.forked audited FOLDER             an audit by one process, by several, and killed at its rows

Each prints what happened as JSON.
"""

import json
import os
import random
import shutil
import signal
import socket
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from support.tiny import tiny, tokens

from posterity import audit
from posterity.clauses.saved_findings import SavedFindings
from posterity.measurement import run_state
from posterity.measurement.distributed import Processes
from posterity.measurement.measure import measure

WINDOWS, CONTEXT = 9, 12
EVERYTHING = {"losses": True, "horizons": (1, 2, 4), "parameters": True}


def measured_arrays(model, state=None, windows=WINDOWS, processes=None, **options):
    """Every number of a result, by name."""
    result = measure(
        model,
        None,
        tokens(windows, CONTEXT),
        context=CONTEXT,
        progress=False,
        state=state,
        processes=processes,
        **options,
    )
    return {name: x.values for name, x in result.variables.items() if x.dtype.kind in "if"}


def fork(work):
    """Run in a child process; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ends(child):
    """Wait; True if it comes to its end, False if it is killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def saved_windows(state, rank=0):
    """How many windows the state of one process holds."""
    file = state / run_state.STATE_FILE.format(rank)
    if not file.exists():
        return 0
    with run_state.safe_open(file, "pt") as tensors:
        return len(tensors.get_tensor("done"))


def same_bits(path, expected_path):
    """Whether two files of arrays are the same bits."""
    arrays, expected = np.load(path), np.load(expected_path)
    assert arrays.files == expected.files
    return all(arrays[name].tobytes() == expected[name].tobytes() for name in arrays.files)


def save_measurement(model, path, state=None, **options):
    np.savez(path, **measured_arrays(model, state, **options))


def killed(folder, seed, kills):
    """Kill runs at random moments, and go on with each until it ends."""
    generator, model = random.Random(seed), tiny("llama", torch.float32)
    expected, resumed, state = folder / "expected.npz", folder / "resumed.npz", folder / "state"
    start = time.monotonic()
    assert ends(fork(lambda: save_measurement(model, expected)))
    duration = time.monotonic() - start
    counts = {"killed": 0, "with something kept": 0, "ended": 0, "same": 0, "resumed and ended": 0}
    while counts["killed"] < kills:
        run_state.WRITE_SHARE = generator.choice((0.02, 1e9))  # the rule as it is, or a state after every window
        before = saved_windows(state)
        child = fork(lambda: save_measurement(model, resumed, state))
        time.sleep(generator.uniform(0, 1.2 * duration))
        os.kill(child, signal.SIGKILL)
        if ends(child):
            counts["ended"] += 1
            counts["resumed and ended"] += before > 0
            counts["same"] += same_bits(resumed, expected)
            shutil.rmtree(state)
            resumed.unlink()
        else:
            counts["killed"] += 1
            counts["with something kept"] += saved_windows(state) > 0
    if state.exists():
        assert ends(fork(lambda: save_measurement(model, resumed, state)))
        counts["ended"] += 1
        counts["same"] += same_bits(resumed, expected)
    return counts


@contextmanager
def kill_at(owner, name, count, after=True):
    """Within the block, the process kills itself at this call of a function, before it or after it."""
    function, calls = getattr(owner, name), 0

    def call(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        value = function(*args, **kwargs)
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, function)


def points(folder):
    """Kill a run before and after each call by which the state is written."""
    model, counts = tiny("llama", torch.float32), {"killed": 0, "same": 0}
    expected, resumed, state = folder / "expected.npz", folder / "resumed.npz", folder / "state"
    assert ends(fork(lambda: save_measurement(model, expected, **EVERYTHING)))
    run_state.WRITE_SHARE = 1e9
    for name, module in (("save_file", run_state), ("fsync", os), ("replace", os)):
        for count in (2, WINDOWS):
            for after in (False, True):
                with kill_at(module, name, count, after):
                    assert not ends(fork(lambda: save_measurement(model, resumed, state, **EVERYTHING)))
                counts["killed"] += 1
                assert ends(fork(lambda: save_measurement(model, resumed, state, **EVERYTHING)))
                counts["same"] += same_bits(resumed, expected)
                shutil.rmtree(state)
    return counts


def fork_ranks(count, work, port):
    """Run `work(processes)` in so many processes that find each other; their numbers."""

    def run_rank(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = Processes.join()
        assert (processes.rank, processes.count) == (rank, count)
        work(processes)

    return [fork(lambda rank=rank: run_rank(rank)) for rank in range(count)]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def shares(model, folder, windows, count, options):
    """How far several processes are from one."""
    expected = folder / "one.npz"
    assert ends(fork(lambda: save_measurement(model, expected, windows=windows, **options)))

    def work(processes):
        path = folder / f"rank{processes.rank}.npz"
        save_measurement(model, path, windows=windows, processes=processes, **options)

    assert all(map(ends, fork_ranks(count, work, free_port())))
    return max(largest_difference(folder / f"rank{rank}.npz", expected) for rank in range(count))


def shared(folder):
    """The same windows by one process, by several, and by several that were killed and others that went on."""
    model = tiny("llama", torch.float64)
    largest = {
        "everything": shares(model, folder, 5, 2, EVERYTHING),
        "three processes, batches": shares(model, folder, 7, 3, {"batch": 2, "lags": "all"}),
        "more processes than windows": shares(model, folder, 1, 2, {}),
    }
    run_state.WRITE_SHARE, state = 1e9, folder / "state"

    def die(processes):
        """Each process is killed after some windows: one, two, ..."""
        with kill_at(run_state.RunState, "add_windows", processes.rank + 1):
            save_measurement(model, folder / "never.npz", state, processes=processes, **EVERYTHING)

    assert not any(map(ends, fork_ranks(3, die, free_port())))
    assert sum(saved_windows(state, rank) for rank in range(3)) == 1 + 2 + 3
    for count in (1, 2):
        copy = folder / f"state{count}"
        shutil.copytree(state, copy)

        def work(processes, copy=copy):
            save_measurement(model, folder / f"rank{processes.rank}.npz", copy, processes=processes, **EVERYTHING)

        children = fork_ranks(count, work, free_port()) if count > 1 else [fork(lambda: work(Processes()))]
        assert all(map(ends, children))
        assert ends(fork(lambda: save_measurement(model, folder / "expected.npz", **EVERYTHING)))
        difference = largest_difference(folder / "rank0.npz", folder / "expected.npz")
        largest[f"killed with 3, resumed with {count}"] = difference
    return largest


PLAN = {
    "context": 12,
    "limit": 2,
    "contexts": (4, 8),
    "span": 12,
    "short": 6,
    "pass_tokens": 12,
    "prefix": 6,
    "future": 4,
}
PLAN |= {"prefixes": 2, "draws": 2, "positions": 1}


def audited(folder):
    """An audit by one process, by two, and by two after it was killed in one at each row; what differs."""
    model, control, counts = tiny("llama", torch.float64), "random", {"same": 0, "killed": 0}

    def run(path, state=None, processes=None):
        findings = audit(
            model, None, tokens(6, 12), control=control, progress=False, state=state, processes=processes, **PLAN
        )
        path.write_bytes(findings.drop_attrs().to_netcdf(engine="h5netcdf"))

    assert ends(fork(lambda: run(folder / "one.nc")))
    for count in (2, 3):
        ranks = fork_ranks(count, lambda p: run(folder / f"{p.count}-{p.rank}.nc", processes=p), free_port())
        assert all(map(ends, ranks))
        for rank in range(count):
            counts["same"] += same_dataset(folder / f"{count}-{rank}.nc", folder / "one.nc")
    state = folder / "state"
    while True:
        with kill_at(SavedFindings, "save", 3):
            if ends(fork(lambda: run(folder / "resumed.nc", state))):
                break
        counts["killed"] += 1
    assert all(map(ends, fork_ranks(2, lambda p: run(folder / f"again-{p.rank}.nc", state, p), free_port())))
    for name in ("resumed", "again-0", "again-1"):
        counts["same"] += same_dataset(folder / f"{name}.nc", folder / "one.nc")
    return counts


def same_dataset(left, right):
    with xr.open_dataset(left) as x, xr.open_dataset(right) as y:
        return x.identical(y)


def largest_difference(path, expected_path):
    """The largest difference of two files of arrays, relative to the largest number of each variable."""
    arrays, expected = np.load(path), np.load(expected_path)
    assert arrays.files == expected.files
    largest = 0.0
    for name in arrays.files:
        x, y = arrays[name], expected[name]
        assert x.shape == y.shape, name
        assert (np.isnan(x) == np.isnan(y)).all(), name
        scale = np.nanmax(np.abs(y)) if y.size and not np.isnan(y).all() else 0
        difference = np.nanmax(np.abs(x - y)) / scale if scale else np.nan_to_num(x - y).max()
        largest = max(largest, float(difference))
    return largest


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
