"""One attention call of a short window and its gradients, N x N in float64: what clause 7 measures on it.

Scores s_ij are those that enter the softmax: scaled, and soft-capped where the model does so. The best other match of a
query is max s_ij over 0 < j < i: the first position is the other candidate for a default. A learned sink takes weight
too and is a place of its own.
"""

import torch
from jaxtyping import Float64
from torch import Tensor

from posterity.models.patching import dense_edges
from posterity.ops.attention import Backward
from posterity.ops.precision import dot
from posterity.ops.scores import single_edge

PLACES = ("self", "first", "rest", "learned sink")


class DenseAttention:
    """Scores, weights and gradients of one attention call, all heads side by side.

    Attributes:
        edges: Pairs that the mask allows, (head, query, key).
        score: (head, query, key); -inf where there is no edge.
        weight: (head, query, key).
        self_weight: a_ii, (head, query).
        sink, sink_weight: Score (head, query, 1) and weight (head, query) of the learned sink; -inf and 0 without one.
        best_match: The largest other score of a query, (head, query).
        query_mask: Queries with a self edge and another match, (head, query).
    """

    def __init__(self, back: Backward, sinks: Tensor | None):
        """Compute the dense arrays from a recorded call of one window; `sinks`: learned scores, (head,)."""
        query, self.grad_output = back.query[0].double(), back.grad_output[0].double()
        key, self.value = (back.repeat(x)[0].double() for x in (back.key, back.value))
        score = back.scale * query @ key.mT
        if back.softcap is not None:
            score = back.softcap * torch.tanh(score / back.softcap)
        self.edges = dense_edges(back.mask, back.query)[0]
        self.score = score.masked_fill(~self.edges, -torch.inf)
        heads, length = score.shape[:2]
        sink = score.new_full((heads,), -torch.inf) if sinks is None else sinks.detach().to(score)
        self.sink = sink[:, None, None].expand(-1, length, 1)
        weight = torch.softmax(torch.cat((self.score, self.sink), -1), -1)
        self.weight, self.sink_weight = weight[..., :-1], weight[..., -1]
        self.self_weight = self.weight.diagonal(0, 1, 2)
        self.back = back
        matches = self.edges.tril(-1)
        matches[..., 0] = False
        self.best_match = self.score.masked_fill(~matches, -torch.inf).amax(-1)
        self.query_mask = matches.any(-1) & self.edges.diagonal(0, 1, 2)

    def correlation(self, self_weight: Float64[Tensor, "head query"]) -> Float64[Tensor, " head"]:
        """Return the rank correlation of self weights with the best other match, over the queries that have both."""
        return torch.stack(
            [spearman(self_weight[h, mask], self.best_match[h, mask]) for h, mask in enumerate(self.query_mask)]
        )

    def permuted_self_weight(self, generator: torch.Generator) -> Float64[Tensor, "head query"]:
        """Return the self weights if self scores were those of other queries, all other scores as they are."""
        self_score = self.score.diagonal(0, 1, 2).clone()
        for h, mask in enumerate(self.query_mask):
            queries = mask.nonzero().squeeze(1)
            order = torch.randperm(len(queries), generator=generator).to(queries.device)
            self_score[h, queries] = self_score[h, queries[order]]
        others = self.edges.tril(-1)
        rest = torch.cat((self.score.masked_fill(~others, -torch.inf), self.sink), -1).logsumexp(-1)
        return torch.sigmoid(self_score - rest)

    def place_weights(self) -> Float64[Tensor, "place head"]:
        """Return the mean weight on each of `PLACES`, over the quarter of queries with the weakest best other match."""
        first = self.weight[..., 0]
        rest = 1 - self.self_weight - first - self.sink_weight
        by_query = torch.stack((self.self_weight, first, rest.clamp(min=0), self.sink_weight))
        columns = []
        for h, mask in enumerate(self.query_mask):
            queries = mask.nonzero().squeeze(1)
            weakest = queries[self.best_match[h, queries].argsort(stable=True)[: -(-len(queries) // 4)]]
            columns.append(by_query[:, h, weakest].mean(1))
        return torch.stack(columns, 1)

    def cosine(self) -> Float64[Tensor, " head"]:
        """Return the cosine of the output with the own value, mean over the queries after the first."""
        output = self.back.output[0].double()
        return torch.cosine_similarity(output[:, 1:], self.value[:, 1:], -1).mean(1)

    def identity_error(self) -> Float64[Tensor, " head"]:
        """Return the largest difference between ds_ii and minus the sum of all other ds, relative to the largest |ds|.

        The learned sink's ds is included. The left side is the operator's, in its precision, from its log-sum-exp and
        output; the right side is dense.
        """
        back = self.back
        weight, _ = single_edge(back.query, back.repeat(back.key), back.lse, back, None)
        slope = dot(back.grad_output, back.repeat(back.value)) - dot(back.grad_output, back.output)
        left = (weight * slope)[0].double() * self.edges.diagonal(0, 1, 2)
        product = self.grad_output @ self.value.mT
        delta = (self.weight * product).sum(-1)  # do.o, without the operator's output
        terms = self.weight * (product - delta[..., None])
        right = self.sink_weight * delta - terms.tril(-1).sum(-1)
        largest = terms.abs().amax((1, 2))
        return (left - right).abs().amax(1) / torch.where(largest > 0, largest, 1)


def spearman(x: Float64[Tensor, " query"], y: Float64[Tensor, " query"]) -> Float64[Tensor, ""]:
    """Return the rank correlation, ties with their mean rank; NaN if x or y is constant or has one entry only."""
    x, y = (rank - rank.mean() for rank in (_ranks(x), _ranks(y)))
    return (x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()


def _ranks(x: Float64[Tensor, " query"]) -> Float64[Tensor, " query"]:
    _, index, counts = torch.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2).double()[index]
