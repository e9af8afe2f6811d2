"""The table of docs/features.md: a feature that no next token needs, with and without the gradient of later losses.

python bench/feature_origins.py            5 minutes on two cores
python bench/feature_origins.py --steps 50 a try

The conditioned majority of Rofin, Naghiyev and Hahn (arXiv 2603.14087), smaller: ten random tokens of three, then ten
times the token that followed the key token most often. The next of the ten random tokens cannot be predicted, so that
no own loss needs to know there whether the key token came before. A ridge regression reads that from the input of the
last layer, where its query and key are made; the table has Pearson's correlation on held-out sequences, and what
`posterity.features` says of the regression's direction.
"""

import argparse

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import posterity
from posterity.results.feature_parts import direction_pulls, part_shares
from posterity.results.ratios import mean_and_error

VOCABULARY, INPUTS, OUTPUTS = 3, 10, 10
KEY, START = 0, VOCABULARY
LENGTH = 1 + INPUTS + OUTPUTS
LAYER = 1
BATCH = 128
ARMS = {"plain": None, "myopic": posterity.Myopic()}


def sequences(number, random):
    """Return token ids, and whether the key token came before each position."""
    inputs = random.integers(VOCABULARY, size=(number, INPUTS))
    before = np.concatenate([np.zeros((number, 1), bool), inputs[:, :-1] == KEY], 1)
    counts = np.stack([((inputs == token) & before).sum(1) for token in range(VOCABULARY)], 1)
    ties = counts == counts.max(1, keepdims=True)
    outputs = (random.random((number, OUTPUTS, VOCABULARY)) * ties[:, None]).argmax(-1)
    ids = np.concatenate([np.full((number, 1), START), inputs, outputs], 1)
    return torch.tensor(ids), torch.tensor(before)


def train(rule, steps, seed, random):
    """Return a model that was trained under a horizon, and the accuracy at the outputs."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=VOCABULARY + 1, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0,
        attn_pdrop=0, bos_token_id=START, eos_token_id=START,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    with posterity.horizon(model, rule or posterity.Full(), cut="hidden"):
        for _ in range(steps):
            ids, _ = sequences(BATCH, random)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def probe(model, random):
    """Fit a ridge regression for each input position; return the mean held-out correlation and direction."""
    ids, before = sequences(4096, random)
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER]
    train_rows, correlations, directions = slice(0, 3072), [], []
    for position in range(2, INPUTS):
        x, y = hidden[:, position], before[:, position - 1].float()
        mean = x[train_rows].mean(0)
        gram = (x[train_rows] - mean).T @ (x[train_rows] - mean) + torch.eye(x.shape[1])
        weights = torch.linalg.solve(gram, (x[train_rows] - mean).T @ (y[train_rows] - y[train_rows].mean()))
        guess = (x[3072:] - mean) @ weights
        correlations.append(float(torch.corrcoef(torch.stack((guess, y[3072:])))[0, 1]))
        directions.append(weights / weights.norm())
    return float(np.mean(correlations)), torch.stack(directions).mean(0)


def accuracy(model, random):
    """Return the share of first outputs that are a most frequent token, of which `sequences` draws one."""
    ids, _ = sequences(2048, random)
    with torch.no_grad():
        guess = model(input_ids=ids).logits[:, INPUTS : INPUTS + 1].argmax(-1)
    inputs = ids[:, 1 : INPUTS + 1].numpy()
    before = np.concatenate([np.zeros((len(ids), 1), bool), inputs[:, :-1] == KEY], 1)
    counts = np.stack([((inputs == token) & before).sum(1) for token in range(VOCABULARY)], 1)
    legal = torch.tensor(counts == counts.max(1, keepdims=True))
    return float(legal.gather(1, guess).float().mean())


def origins(model, direction, random):
    """Return the shares of the parts and of later losses at the inputs, from 64 sequences."""
    ids, _ = sequences(64, random)
    result = posterity.features(
        model, None, ids, directions={LAYER: direction}, positions=(2, INPUTS), context=LENGTH, limit=64,
        progress=False,
    )  # fmt: skip
    return part_shares(result).isel(layer=0), direction_pulls(result).isel(direction=0)


def main():
    """Print the table, means and standard errors over seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    print("| training | first outputs correct | correlation of the probe | later losses in the squared pull | "
          "direct · pre-cached · shared |\n|---|---|---|---|---|")  # fmt: skip
    for name, rule in ARMS.items():
        rows = []
        for seed in range(options.seeds):
            random = np.random.default_rng(seed)
            model = train(rule, options.steps, seed, random)
            correlation, direction = probe(model, random)
            parts, pulls = origins(model, direction, random)
            rows.append([accuracy(model, random), correlation, float(pulls.later_share), *parts.share.values])
        mean, error = mean_and_error(rows)
        cells = [f"{x:.3f} ± {y:.3f}" for x, y in zip(mean, error, strict=True)]
        print(f"| {name} | {cells[0]} | {cells[1]} | {cells[2]} | {' · '.join(cells[3:])} |", flush=True)


if __name__ == "__main__":
    main()
