"""Scores of cached keys and values by NVIDIA's kvpress, for `posterity evict --scores`; it imports nothing of ours.

python bench/peers/kvpress_scores.py MODEL_FOLDER WINDOWS.safetensors OUTPUT_FOLDER [--windows N] [--kvzap TEXT_WINDOWS]

WINDOWS is what `posterity evict --save-windows` wrote. For each press one file: `scores`, (window, layer, group, key),
higher is kept. A press sees the prompt alone. Its environment: bench/peers/requirements-kvpress.txt (kvpress needs
transformers < 5.3).

KVzap (arXiv 2601.07891) predicts the logarithm of KVzip+ scores from hidden states; its weights are published for other
models, so with --kvzap TEXT_WINDOWS its linear form is fitted here, on the whole windows of another such file, by ridge
regression for each layer.

KVzip repeats the context; it is told that there is no chat template around it, as there is none in the windows. The
scores of CriticalKV depend on the share that is kept: here 1/4.
"""

import argparse
import json
from importlib.metadata import version
from pathlib import Path

import torch
from kvpress import (
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ObservedAttentionPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from safetensors.torch import safe_open, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

RATIO = 0.75  # of the pairs that a press would drop
PRESSES = {
    "StreamingLLM": lambda: StreamingLLMPress(RATIO),
    "SnapKV": lambda: SnapKVPress(RATIO),
    "TOVA": lambda: TOVAPress(RATIO),
    "ObservedAttention": lambda: ObservedAttentionPress(RATIO),
    "Knorm": lambda: KnormPress(RATIO),
    "KeyDiff": lambda: KeyDiffPress(RATIO),
    "ExpectedAttention": lambda: ExpectedAttentionPress(RATIO),
    "CriticalKV": lambda: CriticalKVPress(SnapKVPress(RATIO)),
}
ZIPS = {
    "KVzip": lambda: KVzipPress(RATIO),
    "KVzip+": lambda: KVzipPress(RATIO, kvzip_plus_normalization=True),
}


def press_scores(press, model, ids):
    """Return the scores that a press gives the pairs of a prompt: (layer, group, key)."""
    scores, score = {}, press.score

    def record(module, *args, **kwargs):
        result = score(module, *args, **kwargs)
        scores[module.layer_idx] = result[0].float()
        return result

    press.score = record
    with torch.no_grad(), press(model):
        model.model(ids, past_key_values=DynamicCache())  # without the head: no logits are needed
    return torch.stack([scores[layer] for layer in sorted(scores)])


def zip_scores(press, model, ids, newline):
    """Return the scores of KVzip: (layer, group, key)."""
    scores, compress = [], press.compress_post

    def record(model):
        compress(model)
        scores.append(press.score_val[:, 0].float().clone())

    press.compress_post = record
    with torch.no_grad(), press(model):
        press.prefix_length, press._suffix_ids = 0, newline
        model(ids, past_key_values=DynamicCache())
    for layer in model.model.layers:
        layer.self_attn.masked_key_indices = None
    return scores[0]


def attention_inputs(model, ids):
    """Return the inputs of all attention modules: (layer, position, width)."""
    inputs = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.update({module.layer_idx: kwargs["hidden_states"][0].double()}),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    hidden = torch.stack([inputs[layer] for layer in sorted(inputs)])
    return torch.cat((hidden, torch.ones_like(hidden[..., :1])), -1)


def fit_zap(model, windows, newline):
    """Return the linear form of KVzap: weights from hidden states to logarithms of KVzip+ scores, by layer."""
    gram = cross = 0
    for window in windows:
        hidden = attention_inputs(model, window[None])
        logs = zip_scores(ZIPS["KVzip+"](), model, window[None], newline).double().clamp(min=1e-12).log()
        hidden, logs = hidden[:, 4:], logs[:, :, 4:]  # attention sinks have the largest score by decree
        gram, cross = gram + hidden.mT @ hidden, cross + hidden.mT @ logs.mT
    rows = len(windows) * (windows.shape[1] - 4)
    variance = gram.diagonal(dim1=-2, dim2=-1) / rows - (gram[:, -1] / rows) ** 2
    return torch.linalg.solve(gram + torch.diag_embed(3e-3 * rows * variance.clamp(min=0)), cross)


def main():
    """Score all windows by all presses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("windows", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--windows", dest="count", type=int, help="only the first so many")
    parser.add_argument("--presses", nargs="+", default=[*PRESSES, *ZIPS])
    parser.add_argument("--kvzap", type=Path, metavar="TEXT_WINDOWS")
    options = parser.parse_args()
    with safe_open(options.windows, "pt") as file:
        tokens, prefix = file.get_tensor("tokens")[: options.count], int(file.metadata()["prefix"])
    newline = AutoTokenizer.from_pretrained(options.model).encode("\n", return_tensors="pt", add_special_tokens=False)
    options.output.mkdir(parents=True, exist_ok=True)
    for name in options.presses:
        implementation = "eager" if name == "ObservedAttention" else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float32, attn_implementation=implementation
        )
        scores = []
        for window in tokens:
            ids = window[None, :prefix]
            if name in ZIPS:
                scores.append(zip_scores(ZIPS[name](), model.eval(), ids, newline))
            else:
                scores.append(press_scores(PRESSES[name](), model.eval(), ids))
        metadata = {"scorer": f"kvpress {name}", "source": f"kvpress {version('kvpress')}"}
        save_file({"scores": torch.stack(scores).contiguous()}, options.output / f"{name}.safetensors", metadata)
        print(json.dumps({"press": name, "windows": len(scores), "finite": bool(torch.stack(scores).isfinite().all())}))
    if options.kvzap:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        with safe_open(options.kvzap, "pt") as file:
            weights = fit_zap(model, file.get_tensor("tokens"), newline)
        scores = torch.stack(
            [(attention_inputs(model, window[None, :prefix]) @ weights).mT.float() for window in tokens]
        )
        metadata = {"scorer": "KVzap, fitted here", "source": f"kvpress {version('kvpress')}"}
        save_file({"scores": scores.contiguous()}, options.output / "KVzap.safetensors", metadata)


if __name__ == "__main__":
    main()
