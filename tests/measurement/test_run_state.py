"""A run that is stopped goes on, and counts no window twice; processes that share the windows give the same numbers."""

import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import torchrun
from support.tiny import tiny, tokens
from typer.testing import CliRunner

import posterity
from posterity import InputError
from posterity.cli import main as cli
from posterity.decomposition.accumulator import Accumulator
from posterity.inputs.model import LoadedModel
from posterity.measurement import run_state
from posterity.measurement.distributed import Processes
from posterity.measurement.state_folder import FolderLock, remove_state

TESTS = Path(__file__).parents[1]


def forked(scenario, folder, *numbers):
    command = [sys.executable, "-m", "support.forked", scenario, str(folder), *map(str, numbers)]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=TESTS)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_run_killed_fifty_times_at_random_gives_the_same_bits(tmp_path):
    counts = forked("killed", tmp_path, 0, 50)
    assert counts["killed"] >= 50
    assert counts["with something kept"] >= 10
    assert counts["resumed and ended"] >= 1
    assert counts["same"] == counts["ended"] >= 1


@pytest.mark.slow
def test_a_run_killed_at_every_step_of_writing_its_state_gives_the_same_bits(tmp_path):
    counts = forked("points", tmp_path)
    assert counts["same"] == counts["killed"] == 12


@pytest.mark.slow
def test_processes_that_share_the_windows_add_up_to_one_process(tmp_path):
    # In float64 sums in another order differ by rounding only: a few units of 1.1e-16 for each of at most 9 terms.
    for case, largest in forked("shared", tmp_path).items():
        assert largest < 1e-13, case


@pytest.mark.slow
def test_an_audit_in_parts_is_the_audit(tmp_path):
    counts = forked("audited", tmp_path)
    assert counts["same"] == 2 + 3 + 3
    assert counts["killed"] >= 5


@pytest.mark.parametrize("changed", [{"seed": 1}, {"documents": tokens(5, 12)}, {"model": tiny("gpt2")}])
def test_the_state_of_another_audit_is_refused(tmp_path, changed):
    def audit(model=None, documents=None, **options):
        plan = {"context": 12, "limit": 2, "rows": [1, 2]} | options
        documents = tokens(4, 12) if documents is None else documents
        return posterity.audit(
            model or tiny("llama"), None, documents, progress=False, state=tmp_path / "state", **plan
        )

    audit()
    with pytest.raises(InputError, match="unfinished run with other settings"):
        audit(**changed)
    (tmp_path / "state" / "0-clause-1.nc").write_bytes(b"no state")
    with pytest.raises(InputError, match="is no state of an audit"):
        audit()


def measure(state=None, model=None, documents=None, **options):
    options = {"context": 12, "weights": False, "progress": False} | options
    documents = tokens(3, 12) if documents is None else documents
    return posterity.measure(model or tiny("llama"), None, documents, state=state, **options)


def test_a_finished_state_gives_the_result_without_a_pass(tmp_path, monkeypatch):
    first = measure(tmp_path / "state")
    monkeypatch.setattr("posterity.measurement.measure.measure_batch", lambda *_: pytest.fail("measured again"))
    again = measure(tmp_path / "state")
    assert first.drop_attrs().identical(again.drop_attrs())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"lags": "all"}, "lags octaves there, all here"),
        ({"weights": True}, "weights False there, True here"),
        ({"horizons": (1, 2)}, "horizons"),
        ({"batch": 3}, "batch 1 there, 3 here"),
        ({"seed": 1}, "seed"),
        ({"documents": tokens(3, 12, seed=5)}, "another text"),
        ({"documents": tokens(2, 12)}, "documents 3 there, 2 here"),
        ({"context": 6}, "context 12 there, 6 here"),
        ({"model": tiny("llama", torch.float32)}, "dtype torch.float64 there, torch.float32 here"),
        ({"model": tiny("gpt2")}, "another model"),
    ],
)
def test_a_state_of_other_settings_is_refused(tmp_path, changed, message):
    measure(tmp_path / "state")
    before = {file: file.read_bytes() for file in (tmp_path / "state").glob("*.safetensors")}
    with pytest.raises(InputError, match=message):
        measure(tmp_path / "state", **changed)
    assert {file: file.read_bytes() for file in (tmp_path / "state").glob("*.safetensors")} == before


def test_one_weight_that_differs_is_another_model(tmp_path):
    model = tiny("llama")
    measure(tmp_path / "state", model)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[3, 5] += 1
    with pytest.raises(InputError, match="another model"):
        measure(tmp_path / "state", model)


@pytest.mark.parametrize("damage", [b"", b"no state", None])
def test_a_damaged_state_is_refused(tmp_path, damage):
    measure(tmp_path / "state")
    file = tmp_path / "state" / "0.safetensors"
    file.write_bytes(file.read_bytes()[:-10] if damage is None else damage)
    with pytest.raises(InputError, match="is no state of a run"):
        measure(tmp_path / "state")


def test_a_window_that_stands_in_two_states_is_refused(tmp_path):
    measure(tmp_path / "state")
    file = tmp_path / "state" / "0.safetensors"
    (tmp_path / "state" / "1.safetensors").write_bytes(file.read_bytes())
    with pytest.raises(InputError, match="counts a window twice"):
        measure(tmp_path / "state")


def test_an_interruption_says_what_is_kept_and_half_a_window_is_not(tmp_path, monkeypatch):
    ledgers = importlib.import_module("posterity.measurement.ledger")
    expected, original, calls = measure(), ledgers.pass_credit, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 5:  # three layers: in the middle of the second window
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(ledgers, "pass_credit", interrupted)
    monkeypatch.setattr(run_state, "WRITE_SHARE", 1e9)
    with pytest.raises(KeyboardInterrupt, match=r"kept in .*state"):
        measure(tmp_path / "state")
    monkeypatch.setattr(ledgers, "pass_credit", original)
    assert expected.drop_attrs().identical(measure(tmp_path / "state").drop_attrs())


def test_a_buffer_that_differs_is_another_model(tmp_path):
    model = tiny("llama")
    model.register_buffer("of_mine", torch.zeros(3))
    measure(tmp_path / "state", model)
    model.of_mine[2] = 1
    with pytest.raises(InputError, match="another model"):
        measure(tmp_path / "state", model)


def test_a_state_is_held_by_one_run(tmp_path):
    lock = FolderLock.acquire(tmp_path / "state", 0)
    with pytest.raises(InputError, match=r"another run is at work on .*state: wait for it, or choose another output"):
        measure(tmp_path / "state")
    lock.release()
    measure(tmp_path / "state")
    measure(tmp_path / "state")  # each has let it go


def test_a_killed_process_frees_its_lock_and_its_part_file_is_removed(tmp_path):
    code = (
        "import os, signal\nfrom pathlib import Path\n"
        "from posterity.measurement.state_folder import FolderLock, write_state_file\n"
        "lock = FolderLock.acquire('state', 0)\n"
        "with write_state_file(Path('state/0.safetensors')) as part:\n"
        "    part.write_bytes(b'a part')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == ["0.lock", "0.part"]
    FolderLock.acquire(tmp_path / "state", 0).release()
    remove_state(tmp_path / "state")
    assert not (tmp_path / "state").exists()


def test_the_model_is_as_before_after_a_refused_state(tmp_path):
    model = tiny("llama").train()
    measure(tmp_path / "state", model)
    with pytest.raises(InputError):
        measure(tmp_path / "state", model, seed=3)
    assert model.training
    assert all(x.requires_grad for x in model.parameters())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.randoms())
def test_sums_over_parts_are_the_sums_over_all(owners, random):
    values = [torch.tensor([float(random.randint(-99, 99)) for _ in range(4)]) for _ in owners]  # exact in any order
    whole, parts = Accumulator(), [Accumulator() for _ in range(4)]
    numbers = [[] for _ in parts]
    for number, (x, owner) in enumerate(zip(values, owners, strict=True)):
        for sums in (whole, parts[owner]):
            sums.add(("layer", "total"), x)
            sums.append_rows((None, "row"), [x])
        numbers[owner].append(number)
    merged = Accumulator()
    for part in parts:
        merged.merge(Accumulator.from_tensors(part.tensors()))
    order = [number for part_numbers in numbers for number in part_numbers]
    merged.reorder(sorted(range(len(order)), key=order.__getitem__))
    assert torch.equal(merged.total["layer", "total"], whole.total["layer", "total"])
    assert torch.equal(torch.stack(merged.rows[None, "row"]), torch.stack(whole.rows[None, "row"]))
    assert torch.equal(torch.stack(whole.rows[None, "row"]), torch.stack(values))


def test_sums_of_other_lengths_add_from_the_first_entry():
    sums = Accumulator()
    for x in ([1.0, 2], [1.0, 2, 3], [1.0]):
        sums.add((None, "x"), torch.tensor(x))
    assert sums.total[None, "x"].tolist() == [3, 4, 3]


def test_processes_that_cannot_find_each_other_say_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("accelerate.PartialState", lambda **_: (_ for _ in ()).throw(ValueError("no address\nmore")))
    with pytest.raises(InputError, match="expected 2 processes that find each other; no address: use torchrun"):
        Processes.join()


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line on a tiny model, in an empty folder; a call gives exit code, stdout, stderr."""
    model, text = tiny("llama", torch.float32), tmp_path / "text.txt"
    text.write_text("words " * 60)
    tokenizer = lambda text, **_: {"input_ids": [len(word) + 1 for word in text.split()]}  # noqa: E731
    loaded = LoadedModel(model, tokenizer, "tiny", "")
    monkeypatch.setattr("posterity.inputs.model.load_model", lambda *_, **__: loaded)
    monkeypatch.chdir(tmp_path)

    def run(*args):
        arguments = ["measure", "tiny", str(text), "--context", "12", "--documents", "4", "-o", "run.nc", *args]
        monkeypatch.setattr(sys, "argv", ["posterity", *arguments])
        answer = CliRunner().invoke(cli.app, arguments)
        return answer.exit_code, answer.stdout, answer.stderr

    return run


def test_an_unfinished_run_is_kept_until_it_is_resumed(command, tmp_path, monkeypatch):
    original, calls = sys.modules["posterity.measurement.measure"].measure_batch, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr("posterity.measurement.measure.measure_batch", interrupted)
    code, _, message = command()
    assert code == 130
    assert re.search(r"interrupted; [12] of 4 windows are kept in run.nc.state: add --resume to go on", message)
    assert not (tmp_path / "run.nc").exists()
    code, _, message = command()
    assert code == 2
    assert "holds an unfinished run: add --resume" in message
    assert len(calls) == 3
    code, table, _ = command("--resume")
    assert code == 0
    assert "4 windows" in table
    assert not (tmp_path / "run.nc.state").exists()
    assert len(calls) < 3 + 4  # what was kept is not measured again
    result = posterity.load(tmp_path / "run.nc")
    code, table, message = command("--resume")  # a job that is started again when it is done
    assert code == 0
    assert "4 windows" in table
    assert "is finished" in message
    assert len(calls) < 3 + 4
    assert command("--resume", "--report", "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert len(calls) < 3 + 4
    assert command()[0] == 0  # without --resume it is measured anew
    assert len(calls) >= 3 + 4
    assert result.drop_attrs().identical(posterity.load(tmp_path / "run.nc").drop_attrs())
    code, _, message = command("--lags", "all", "--resume")
    assert code == 2
    assert "is the result of another command" in message


def test_resume_needs_an_output(monkeypatch):
    answer = CliRunner().invoke(cli.app, ["measure", "--resume"])
    assert answer.exit_code == 2
    assert "--resume goes on with a run that has an --output" in answer.stderr


def test_checkpoints_are_resumed_each_from_its_own_state(tmp_path, monkeypatch):
    for step in (1, 2):
        measure(tmp_path / "run.nc.state" / f"step-{step}", seed=step)
    remove_state(tmp_path / "run.nc.state")
    assert not (tmp_path / "run.nc.state").exists()


def test_what_else_stands_in_the_folder_of_a_state_stays(tmp_path):
    measure(tmp_path / "state")
    (tmp_path / "state" / "notes.txt").write_text("mine")
    remove_state(tmp_path / "state")
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["inspect", "fold", "report", "summary", "check"])
def test_commands_that_cannot_share_their_work_refuse_several_processes(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    arguments = {
        "inspect": ["--text", "a"],
        "fold": ["-o", str(tmp_path / "x")],
        "report": ["a.nc", "-o", str(tmp_path / "x.html")],
        "summary": ["a.nc"],
        "check": [],
    }
    answer = CliRunner().invoke(cli.app, [name, *arguments[name]])
    assert answer.exit_code == 2
    assert "expected one process" in answer.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with the default tokenizer, as a folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from posterity.inputs import model as loading

    path, tokenizer = tmp_path_factory.mktemp("model"), loading.load_model(None).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def run_processes(folder, *args, count=2):
    # PYTHONUNBUFFERED: what is printed is read while the command runs
    command = [*torchrun(count), "-m", "posterity"]
    return subprocess.Popen(
        [*command, args[0], str(folder), *args[1:]], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.mark.slow
def test_torchrun_measures_what_one_process_measures(folder, tmp_path):
    options = ["measure", "--context", "64", "--documents", "5", "--losses", "-o"]
    run = run_processes(folder, *options, str(tmp_path / "two.nc"))
    table, message = run.communicate(timeout=300)
    assert run.returncode == 0, message
    assert table.count("Credit of the gradient") == 1
    subprocess.run(
        [sys.executable, "-m", "posterity", options[0], str(folder), *options[1:], str(tmp_path / "one.nc")],
        check=True, capture_output=True,
    )  # fmt: skip
    one, two = (posterity.load(tmp_path / f"{name}.nc") for name in ("one", "two"))
    assert two.attrs["processes"] == 2
    assert one.text.equals(two.text)
    for name in one.data_vars:
        scale = abs(one[name]).max()
        # float32 model with another number of threads: products are split otherwise
        assert float(abs(one[name] - two[name]).max() / scale) < 1e-4, name
    assert not (tmp_path / "two.nc.state").exists()


@pytest.mark.slow
def test_a_process_that_dies_stops_the_others_and_the_run_can_go_on(folder, tmp_path):
    options = ["measure", "--context", "128", "--documents", "160", "-o", str(tmp_path / "run.nc")]
    run = run_processes(folder, *options)
    state = tmp_path / "run.nc.state"
    until = time.monotonic() + 200
    while not all((state / f"{rank}.safetensors").exists() for rank in range(2)) and time.monotonic() < until:
        time.sleep(0.1)
    workers = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True).stdout.split()
    ranks = {}
    for worker in workers:
        match = re.search(rb"\0RANK=(\d)\0", Path(f"/proc/{worker}/environ").read_bytes())
        if match:
            ranks[match[1]] = int(worker)
    os.kill(ranks[b"1"], signal.SIGKILL)
    _, message = run.communicate(timeout=120)
    assert run.returncode != 0
    why = "posterity: told to stop from outside, or because another process has ended"
    assert re.search(why + r"; \d+ of 80 windows are kept in .*: add --resume to go on", " ".join(message.split()))
    assert not (tmp_path / "run.nc").exists()
    before = sum(len(run_state.safe_open(file, "pt").get_tensor("done")) for file in state.glob("*.safetensors"))
    assert before
    run = run_processes(folder, *options, "--resume")
    _, message = run.communicate(timeout=500)
    assert run.returncode == 0, message
    assert posterity.load(tmp_path / "run.nc").sizes["document"] == 160
    assert not state.exists()


@pytest.mark.slow
def test_a_mistake_is_said_once_by_all_processes(tmp_path):
    run = run_processes(tmp_path / "nowhere", "measure")
    _, message = run.communicate(timeout=120)
    assert run.returncode != 0
    assert len([line for line in message.splitlines() if line.startswith("posterity: ")]) == 1


@pytest.mark.parametrize("calls_before", [0, 1, 2, 3])
def test_a_state_may_vanish_while_it_is_removed(tmp_path, monkeypatch, calls_before):
    folder, scandir, calls = tmp_path / "run.nc.state", os.scandir, []
    (folder / "step-1").mkdir(parents=True)
    for file in (folder / "0.safetensors", folder / "step-1" / "0.safetensors"):
        file.write_bytes(b"")

    def vanish(path):  # another process removes it just before it is listed
        calls.append(path)
        if len(calls) == calls_before + 1:
            monkeypatch.setattr(os, "scandir", scandir)
            shutil.rmtree(folder)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", vanish)
    remove_state(folder)
    assert not folder.exists()
