"""`make bench-peers`: docs/peers.md, the same questions to Posterity and to its nearest peers, a process for each cell.

python bench/peers.py             all cells that are not finished yet; then docs/peers.md
python bench/peers.py --again --models default --contexts 1024 2048           some of them, even if finished
python bench/peers.py --table     only docs/peers.md, from the finished cells

Environments of the peers, inputs and finished cells are in `.peers/`. A process that needs more than --memory GB counts
as out of memory; one that needs more than ten minutes is ended.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".peers"
SCRIPTS = ROOT / "bench" / "peers"
MODELS = {"tiny": "a random llama of 2 layers, 4 heads of 16, 2 key/value heads", "default": "SmolLM2-135M-Instruct"}
CONTEXTS = (128, 256, 512, 1024, 2048)
BUDGET = 180  # seconds: single losses that would take longer together are timed for eight of them
LIMIT = 600  # seconds after which a cell is ended


@dataclass(frozen=True)
class Peer:
    """A row of a table: a tool, its question and its script; `environment` is None for the project's own."""

    name: str
    question: str
    script: str
    what: str
    environment: str | None = None
    options: tuple[str, ...] = ()
    longest: int = max(CONTEXTS)

    @property
    def label(self):
        """Its name in a cell's file and in the option --peers."""
        return "-".join((self.script.removeprefix("with_").removesuffix(".py").replace("_", "-"), *self.options))


QUESTIONS = {
    "lags": "Credit by lag of queries, keys and values, in every layer",
    "losses": "Own and later losses in the gradient of every key and value, in every layer",
}
PEERS = (
    Peer(
        "Posterity", "lags", "with_posterity.py",
        '`measure(lags="all", weights=False)`: one forward and one backward pass, no N × N memory; also mass, '
        "attention, counts, credit by position, all by head", options=("lags",),
    ),
    Peer(
        "TransformerLens", "lags", "with_transformer_lens.py",
        "one forward and one backward pass with hooks on rotated q and k, v, pattern and z; the N × N credits of a "
        "layer are formed as soon as its gradients are there, and forgotten", "transformer-lens",
    ),
    Peer(
        "Posterity", "losses", "with_posterity.py",
        '`measure(losses=True, lags="self", weights=False)`: one forward and two backward passes; own loss, self edge '
        "paid by later losses, future edge; also of the hidden states", options=("losses",),
    ),
    Peer(
        "Posterity, `inspect`", "losses", "with_posterity.py",
        "the same, and every loss against every key and value (N × N for each layer), by one backward pass per loss; "
        "256 tokens at most", options=("inspect",), longest=256,
    ),
    Peer(
        "Captum", "losses", "with_captum.py",
        "`LayerGradientXActivation(multiply_by_inputs=False)` at all k_proj and v_proj, one call per loss, each a "
        "forward and a backward pass over the prefix: every loss against every key and value", "captum",
    ),
    Peer(
        "autograd", "losses", "with_autograd.py",
        "`torch.autograd.grad(retain_graph=True)`: one forward pass, and one backward pass per loss: every loss "
        "against every key and value",
    ),
    Peer(
        "autograd, float64", "losses", "with_autograd.py",
        "the same in double precision: how far the others are from it is what float32 is worth", options=("float64",),
        longest=128,
    ),
)  # fmt: skip
SHORT_QUESTIONS = {"lags": "credit by lag", "losses": "own and later losses"}
SHORT = 512  # tokens: the context of the lines in docs/cost.md
OURS = {"lags": PEERS[0], "losses": PEERS[2]}
INSPECT = PEERS[3]


# Cells


def cell_path(peer, model, context):
    return FOLDER / "cells" / f"{model}-{context}-{peer.label}"


def run(peer, model, context, memory):
    """Run one cell and save its numbers, with arrays beside them."""
    files = inputs(model, context)
    finished = cell_path(peer, model, context)
    finished.parent.mkdir(exist_ok=True)
    for suffix in (".npz", ".json"):
        finished.with_suffix(suffix).unlink(missing_ok=True)
    work = finished.with_name(f"{finished.name}-working.npz")
    command = [python(peer.environment), SCRIPTS / peer.script, *files, work, str(BUDGET), *peer.options]
    cell = {"machine": machine(), "load": os.getloadavg()[0], "date": time.strftime("%Y-%m-%d")}
    ceiling = int(memory * 1e9)

    def limit():  # private writable memory: much of the address space is only mapped
        resource.setrlimit(resource.RLIMIT_DATA, (ceiling, ceiling))

    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    if peer.environment:
        offline.pop("PYTHONPATH", None)  # set for the project's own environment
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=LIMIT, preexec_fn=limit, env=offline
        )
    except subprocess.TimeoutExpired:
        cell["failed"] = f"> {LIMIT // 60} min"
    else:
        if process.returncode == 0:
            output = work.with_suffix(".json")
            cell |= json.loads(output.read_text())
            output.unlink()
            work.replace(finished.with_suffix(".npz"))
        elif process.returncode == -9 or "allocate" in process.stderr or "MemoryError" in process.stderr:
            cell["failed"] = f"out of memory ({memory:.0f} GB)"
        else:
            raise SystemExit(f"{peer.label}, {model}, {context}:\n{process.stderr}")
    finished.with_suffix(".json").write_text(json.dumps(cell))
    return cell


def inputs(model, context):
    """A model folder in the format of transformers and a file of token ids, made unless they exist."""
    folder, ids = FOLDER / "models" / model, FOLDER / "models" / f"{model}-{context}.npy"
    if not ids.exists():
        tokens = make_tiny(folder, context) if model == "tiny" else make_default(folder, context)
        np.save(ids, tokens)
    return folder, ids


def make_tiny(folder, context):
    import torch
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=max(CONTEXTS), initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    if not folder.exists():
        LlamaForCausalLM(config).save_pretrained(folder)
        words = models.WordLevel({str(token): token for token in range(256)}, unk_token="0")
        # TransformerLens asks for an end token
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="0")
        tokenizer.save_pretrained(folder)
    return torch.randint(256, (context,), generator=torch.Generator().manual_seed(context)).numpy()


def make_default(folder, context):
    from posterity.inputs.documents import default_text
    from posterity.inputs.model import load_model
    from posterity.inputs.windows import cut_windows

    loaded = load_model(None)
    if not folder.exists():
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    return cut_windows([default_text()], loaded.tokenizer, context, 1)[0].ids.numpy()


def python(environment):
    """The interpreter of an environment, made from its pinned requirements; torch first, by its exact version."""
    if environment is None:
        return sys.executable
    pinned = SCRIPTS / f"requirements-{environment}.txt"
    folder = FOLDER / environment
    mark = folder / f"installed-{hashlib.sha256(pinned.read_bytes()).hexdigest()[:12]}"
    interpreter = folder / "bin" / "python"
    if not mark.exists():
        print(f"making the environment of {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        install = [str(interpreter), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch = next(line for line in pinned.read_text().splitlines() if line.startswith("torch=="))
        subprocess.run([*install, torch], check=True)
        subprocess.run([*install, "--requirement", str(pinned)], check=True)
        mark.touch()
    return str(interpreter)


def machine():
    """Processor and cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
    return f"{name}, {psutil.cpu_count()} cores"


# Disagreement between cells


def disagreement(theirs, ours, positions=slice(None)):
    """Largest difference, relative to the largest of ours in the same layer and stream; `positions` are theirs."""
    size = np.abs(ours).max(-1, keepdims=True)
    return float((np.abs(theirs - ours[..., positions]) / np.where(size > 0, size, 1)).max())


def arrays_disagreement(theirs, ours, inspected):
    """Disagreement of a peer's arrays with Posterity's, each by name; None if one is missing."""
    if theirs is None or ours is None:
        return None
    if "credit" in theirs:
        return disagreement(theirs["credit"], ours["credit"])
    positions = theirs["positions"]
    later = disagreement(theirs["whole"] - theirs["own"], ours["whole"] - ours["own"], positions)
    largest = max(disagreement(theirs["own"], ours["own"], positions), later)
    if inspected is None or len(inspected["rows"]) != len(theirs["rows"]):
        return largest
    return max(largest, disagreement(flat(theirs["rows"]), flat(inspected["rows"])))


def flat(rows):
    """Reshape (loss, layer, written, position) to (layer, written, position and loss)."""
    return np.moveaxis(rows, 0, -2).reshape(*rows.shape[1:3], -1)


def cell_disagreement(peer, model, context):
    """Disagreement of a finished cell with Posterity's cells."""
    if peer is OURS[peer.question]:
        return None
    return arrays_disagreement(*(load(row, model, context) for row in (peer, OURS[peer.question], INSPECT)))


def load(peer, model, context):
    file = cell_path(peer, model, context).with_suffix(".npz")
    return dict(np.load(file)) if file.exists() else None


# The page


def span(seconds):
    """A length of time in words."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    for unit, size in (("s", 1), ("min", 60), ("h", 3600)):
        if unit == "h" or seconds < 100 * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f} {unit}"
    raise AssertionError


def cell_text(cell):
    """A cell of the table: time and memory, or why there are none."""
    if cell is None:
        return "not run"
    if "failed" in cell:
        return cell["failed"]
    return f"{'≈ ' if cell['estimated'] else ''}{span(cell['seconds'])} · {cell['peak'] / 1e9:.1f} GB"


def table(question, model, cells, disagreements):
    """Markdown: a row for each peer, a column for each context; cells by (peer's label, model, context)."""
    yield "| | " + " | ".join(map(str, CONTEXTS)) + " | after loading | largest disagreement |"
    yield "|---" * (len(CONTEXTS) + 3) + "|"
    for peer in PEERS:
        if peer.question != question:
            continue
        keys = [(peer.label, model, context) for context in CONTEXTS]
        row = ["" if key[2] > peer.longest else cell_text(cells.get(key)) for key in keys]
        loaded = [cells[key]["loaded"] for key in keys if "loaded" in cells.get(key, {})]
        row.append(f"{max(loaded) / 1e9:.1f} GB" if loaded else "")
        differences = [disagreements[key] for key in keys if disagreements.get(key) is not None]
        row.append(f"{max(differences):.0e}" if differences else "")
        yield f"| {peer.name} | " + " | ".join(row) + " |"


def summary(cells, disagreements):
    """Markdown: each peer beside Posterity at one context; docs/cost.md quotes it."""
    yield f"| {MODELS['default']}, {SHORT} tokens | Posterity | the nearest | | largest disagreement |"
    yield "|---|---|---|---|---|"
    for peer in PEERS:
        ours, key = OURS[peer.question], (peer.label, "default", SHORT)
        if peer is not ours and peer.longest >= SHORT:
            our_text, their_text = cell_text(cells.get((ours.label, "default", SHORT))), cell_text(cells.get(key))
            difference = "" if disagreements.get(key) is None else f"{disagreements[key]:.0e}"
            row = (SHORT_QUESTIONS[peer.question], our_text, peer.name, their_text, difference)
            yield "| " + " | ".join(row) + " |"


def page(cells, disagreements):
    """docs/peers.md, line by line."""
    versions = {}
    for cell in cells.values():
        for name, version in cell.get("versions", {}).items():
            versions.setdefault(name, set()).add(version)
    yield "# Peers"
    yield ""
    yield from INTRODUCTION.format(minutes=BUDGET // 60).splitlines()
    yield ""
    yield " · ".join(f"{name} {', '.join(sorted(numbers))}" for name, numbers in sorted(versions.items()))
    yield ""
    threads = sorted({cell["threads"] for cell in cells.values() if "threads" in cell})
    days = sorted({cell["date"] for cell in cells.values()})
    machines = "; ".join(sorted({cell["machine"] for cell in cells.values()}))
    load = max((cell["load"] for cell in cells.values() if "load" in cell), default=float("nan"))
    yield f"{machines}; threads: {', '.join(map(str, threads))}; {' to '.join(dict.fromkeys((days[0], days[-1])))};"
    yield f"load average of the machine before a cell at most {load:.1f}"
    yield ""
    yield from summary(cells, disagreements)
    for question, title in QUESTIONS.items():
        yield from ("", f"## {title}", "", "| | what |", "|---|---|")
        yield from (f"| {peer.name} | {peer.what} |" for peer in PEERS if peer.question == question)
        for model in MODELS:
            yield from ("", f"{MODELS[model]}, one window; columns are contexts:", "")
            yield from table(question, model, cells, disagreements)
            keys = [(OURS[question].label, model, context) for context in CONTEXTS]
            once = [cells[key]["once"] for key in keys if "once" in cells.get(key, {})]
            if once:
                yield from (
                    "",
                    f"Once a call, in Posterity's times: looking the model over, {span(statistics.median(once))}.",
                )
    yield from ("", *NOTES)


INTRODUCTION = """What Posterity measures, by Posterity and by the tools nearest to it; `make bench-peers` writes this.
Every cell is a process of its own, with float32 weights on the CPU. Time is the median of up to five passes after a
first one, of as many as a minute holds; of the first itself where that takes more than a minute or goes loss by
loss. Memory is the peak of the whole process. ≈: eight losses were timed, evenly spread, because all of them would
take more than {minutes} minutes. Disagreement is the largest difference to Posterity's number, relative to the
largest credit of the same layer and stream, over all contexts; where single losses were timed, of those."""
NOTES = """## What is not the same

* TransformerLens 4 has no HookedTransformer any more. Its Bridge takes a loaded model, switches it to eager
  attention in place and computes attention itself, so that patterns and their gradients can be hooked; it holds
  them for every head.
* Captum has no notion of an edge: it cannot give a lag profile. What comes nearest is the gradient of one loss at
  the outputs of the key and value projections. Captum takes one target for each input, and every call runs the
  model anew.
* Rounding is largest at the first position, the sink of most heads: its value is used by all, and its own loss is one
  of many that pull on it. The row in float64 says how far float32 is from the truth at 128 tokens. Captum's passes
  over a prefix of a few tokens round a little worse than one pass over all of them.
* Gradients at the output of a key projection differ from those at the rotated key by a rotation; inner products do
  not.
* Autograd and Captum, loss by loss, give more than own and later: every loss against every key and value, which
  here `posterity.inspect` gives. It is the only way to own and later losses that they offer.
""".splitlines()


def finished_cells():
    """All finished cells and their disagreements, by (peer's label, model, context)."""
    cells, disagreements = {}, {}
    for peer in PEERS:
        for model in MODELS:
            for context in CONTEXTS:
                file = cell_path(peer, model, context).with_suffix(".json")
                if file.exists():
                    key = (peer.label, model, context)
                    cells[key] = json.loads(file.read_text())
                    disagreements[key] = cell_disagreement(peer, model, context)
    return cells, disagreements


def main():
    free = psutil.virtual_memory().available / 1e9
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--contexts", nargs="+", type=int, choices=CONTEXTS, default=CONTEXTS)
    parser.add_argument("--peers", nargs="+", choices=[peer.label for peer in PEERS])
    parser.add_argument("--again", action="store_true", help="finished cells too")
    parser.add_argument("--memory", type=float, default=0.9 * free, help="GB that a process may take")
    parser.add_argument("--table", action="store_true", help="run nothing")
    options = parser.parse_args()
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "models").mkdir(exist_ok=True)
    peers = [peer for peer in PEERS if options.peers is None or peer.label in options.peers]
    pending = [(p, model, n) for n in options.contexts for model in options.models for p in peers if n <= p.longest]
    for peer, model, context in [] if options.table else pending:
        if options.again or not cell_path(peer, model, context).with_suffix(".json").exists():
            cell = run(peer, model, context, options.memory)
            print(f"{model}, {context} tokens, {peer.label}: {cell_text(cell)}", flush=True)
    cells, disagreements = finished_cells()
    if not cells:
        raise SystemExit("no cell is finished: leave --table out")
    lines = list(page(cells, disagreements))
    (ROOT / "docs" / "peers.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
