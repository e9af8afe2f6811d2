"""Measures in processes of its own, forked from one that has imported everything: quick to start, easy to kill.

python -m support.forked killed FOLDER SEED KILLS   kill runs at random, resume them, compare with one that ran through
python -m support.forked points FOLDER              the same, killed at every single step of writing the state
python -m support.forked shared FOLDER              several processes; some killed, and resumed by another number of them
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
from posterity.clauses import saved_findings as kept
from posterity.measurement import run_state as resume
from posterity.measurement.distributed import Processes
from posterity.measurement.measure import measure

WINDOWS, CONTEXT = 9, 12
EVERYTHING = {"losses": True, "horizons": (1, 2, 4), "parameters": True}


def numbers(model, state=None, windows=WINDOWS, processes=None, **options):
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


def forked(work):
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


def ended(child):
    """Wait; True if it came to its end, False if it was killed."""
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code == 0


def counted(state):
    """How many windows the state of one process holds."""
    file = state / resume.FILE.format(0)
    if not file.exists():
        return 0
    with resume.safe_open(file, "pt") as opened:
        return len(opened.get_tensor("done"))


def compare(found, expected):
    """Whether two files of numbers are the same bits."""
    one, two = np.load(found), np.load(expected)
    assert one.files == two.files
    return all(one[name].tobytes() == two[name].tobytes() for name in one.files)


def measured(model, path, state=None, **options):
    np.savez(path, **numbers(model, state, **options))


def killed(folder, seed, kills):
    """Kill runs at random moments, and go on with each until it ends."""
    generator, model = random.Random(seed), tiny("llama", torch.float32)
    expected, found, state = folder / "expected.npz", folder / "found.npz", folder / "state"
    started = time.monotonic()
    assert ended(forked(lambda: measured(model, expected)))
    longest = time.monotonic() - started
    counts = {"killed": 0, "with something kept": 0, "ended": 0, "same": 0, "resumed and ended": 0}
    while counts["killed"] < kills:
        resume.SHARE = generator.choice((0.02, 1e9))  # the rule as it is, or a state after every window
        before = counted(state)
        child = forked(lambda: measured(model, found, state))
        time.sleep(generator.uniform(0, 1.2 * longest))
        os.kill(child, signal.SIGKILL)
        if ended(child):
            counts["ended"] += 1
            counts["resumed and ended"] += before > 0
            counts["same"] += compare(found, expected)
            shutil.rmtree(state)
            found.unlink()
        else:
            counts["killed"] += 1
            counts["with something kept"] += counted(state) > 0
    if state.exists():
        assert ended(forked(lambda: measured(model, found, state)))
        counts["ended"] += 1
        counts["same"] += compare(found, expected)
    return counts


@contextmanager
def deadly(owner, name, calls, late=True):
    """Inside, a process dies at so many calls of a function, before it or after it."""
    original, seen = getattr(owner, name), 0

    def call(*args, **kwargs):
        nonlocal seen
        seen += 1
        if seen == calls and not late:
            os.kill(os.getpid(), signal.SIGKILL)
        value = original(*args, **kwargs)
        if seen == calls:
            os.kill(os.getpid(), signal.SIGKILL)
        return value

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, original)


def points(folder):
    """Kill a run before and after each call by which the state is written."""
    model, counts = tiny("llama", torch.float32), {"killed": 0, "same": 0}
    expected, found, state = folder / "expected.npz", folder / "found.npz", folder / "state"
    assert ended(forked(lambda: measured(model, expected, **EVERYTHING)))
    resume.SHARE = 1e9
    for name, module in (("save_file", resume), ("fsync", os), ("replace", os)):
        for calls in (2, WINDOWS):
            for late in (False, True):
                with deadly(module, name, calls, late):
                    assert not ended(forked(lambda: measured(model, found, state, **EVERYTHING)))
                counts["killed"] += 1
                assert ended(forked(lambda: measured(model, found, state, **EVERYTHING)))
                counts["same"] += compare(found, expected)
                shutil.rmtree(state)
    return counts


def together(count, work, port):
    """Run `work(processes)` in so many processes that find each other; their numbers."""

    def one(rank):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
        os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes = Processes.join()
        assert (processes.rank, processes.count) == (rank, count)
        work(processes)

    return [forked(lambda rank=rank: one(rank)) for rank in range(count)]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def shares(model, folder, windows, count, options):
    """How far several processes are from one."""
    expected = folder / "one.npz"
    assert ended(forked(lambda: measured(model, expected, windows=windows, **options)))

    def work(processes):
        measured(model, folder / f"rank{processes.rank}.npz", windows=windows, processes=processes, **options)

    assert all(map(ended, together(count, work, free_port())))
    return max(apart(folder / f"rank{rank}.npz", expected) for rank in range(count))


def shared(folder):
    """The same windows by one process, by several, and by several that were killed and others that went on."""
    model = tiny("llama", torch.float64)
    largest = {
        "everything": shares(model, folder, 5, 2, EVERYTHING),
        "three processes, batches": shares(model, folder, 7, 3, {"batch": 2, "lags": "all"}),
        "more processes than windows": shares(model, folder, 1, 2, {}),
    }
    resume.SHARE, state = 1e9, folder / "state"

    def dies(processes):
        """Each process is killed after some windows: one, two, ..."""
        with deadly(resume.State, "add", processes.rank + 1):
            measured(model, folder / "never.npz", state, processes=processes, **EVERYTHING)

    assert not any(map(ended, together(3, dies, free_port())))
    left = sum(len(resume.safe_open(file, "pt").get_tensor("done")) for file in state.glob("*.safetensors"))
    assert left == 1 + 2 + 3
    for count in (1, 2):
        again = folder / f"state{count}"
        shutil.copytree(state, again)

        def work(processes, again=again):
            measured(model, folder / f"rank{processes.rank}.npz", again, processes=processes, **EVERYTHING)

        assert all(map(ended, together(count, work, free_port()) if count > 1 else [forked(lambda: work(Processes()))]))
        assert ended(forked(lambda: measured(model, folder / "expected.npz", **EVERYTHING)))
        largest[f"killed with 3, resumed with {count}"] = apart(folder / "rank0.npz", folder / "expected.npz")
    return largest


PLAN = {"context": 12, "limit": 2, "contexts": (4, 8), "span": 12, "short": 6, "budget": 12, "prefix": 6, "future": 4}
PLAN |= {"prefixes": 2, "draws": 2, "positions": 1}


def audited(folder):
    """An audit by one process, by two, and by two after it was killed in one at each row; what differs."""
    model, control, counts = tiny("llama", torch.float64), "random", {"same": 0, "killed": 0}

    def run(path, state=None, processes=None):
        found = audit(
            model, None, tokens(6, 12), control=control, progress=False, state=state, processes=processes, **PLAN
        )
        path.write_bytes(found.drop_attrs().to_netcdf(engine="h5netcdf"))

    assert ended(forked(lambda: run(folder / "one.nc")))
    for count in (2, 3):
        ranks = together(count, lambda p: run(folder / f"{p.count}-{p.rank}.nc", processes=p), free_port())
        assert all(map(ended, ranks))
        for rank in range(count):
            counts["same"] += same(folder / f"{count}-{rank}.nc", folder / "one.nc")
    state = folder / "state"
    while True:
        with deadly(kept.Kept, "put", 3):
            if ended(forked(lambda: run(folder / "resumed.nc", state))):
                break
        counts["killed"] += 1
    assert all(map(ended, together(2, lambda p: run(folder / f"again-{p.rank}.nc", state, p), free_port())))
    for name in ("resumed", "again-0", "again-1"):
        counts["same"] += same(folder / f"{name}.nc", folder / "one.nc")
    return counts


def same(one, two):
    with xr.open_dataset(one) as x, xr.open_dataset(two) as y:
        return x.identical(y)


def apart(one, two):
    """The largest difference of two files of numbers, relative to the largest number of each variable."""
    one, two = np.load(one), np.load(two)
    assert one.files == two.files
    found = 0.0
    for name in one.files:
        x, y = one[name], two[name]
        assert x.shape == y.shape, name
        assert (np.isnan(x) == np.isnan(y)).all(), name
        scale = np.nanmax(np.abs(y)) if y.size and not np.isnan(y).all() else 0
        found = max(found, float(np.nanmax(np.abs(x - y)) / scale) if scale else float(np.nan_to_num(x - y).max()))
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]), *map(int, sys.argv[3:]))))
