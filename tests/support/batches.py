"""Batches of token ids: plain, padded on either side, packed."""

import torch


def padded(ids, side):
    """(attention mask, labels): the second row has four padding tokens."""
    mask = torch.ones_like(ids)
    rows = slice(0, 4) if side == "left" else slice(-4, None)
    mask[1, rows] = 0
    return mask, ids.masked_fill(mask == 0, -100)


def packed(ids):
    """Position ids of two documents in each row."""
    return torch.cat((torch.arange(5), torch.arange(ids.shape[1] - 5))).expand(len(ids), -1)


INPUTS = {
    "plain": lambda ids: {"labels": ids},
    "left padding": lambda ids: dict(zip(("attention_mask", "labels"), padded(ids, "left"), strict=True)),
    "right padding": lambda ids: dict(zip(("attention_mask", "labels"), padded(ids, "right"), strict=True)),
    "packed": lambda ids: {"labels": ids, "position_ids": packed(ids)},
}
