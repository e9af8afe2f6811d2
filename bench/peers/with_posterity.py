"""Posterity, through its public functions: the reference for the peers."""

import numpy as np
from cell import main, timed

import posterity
from posterity.models.chunked_loss import LMHead


def measure_quantity(folder, model, ids, budget, quantity):
    arrays, seconds = timed(lambda: QUANTITIES[quantity](model, ids))
    _, probe_seconds = timed(lambda: (posterity.check(model), LMHead.probe(model)))  # once a call, before its windows
    return arrays, seconds, False, {"once": probe_seconds}


def lags(model, ids):
    result = posterity.measure(model, None, ids, context=ids.shape[1], lags="all", weights=False, progress=False)
    return {"credit": result.credit.sum("head").transpose("layer", "stream", "lag").values}


def losses(model, ids):
    result = posterity.measure(
        model, None, ids, context=ids.shape[1], lags="self", weights=False, losses=True, progress=False
    )
    credit = result.loss_credit.sum("head").transpose("part", "layer", "written", "position")
    return {"own": credit.sel(part="own").values, "whole": credit.sum("part").values}


def inspect(model, ids):
    result = posterity.inspect(model, None, ids[0], progress=False)
    rows = result.inspect_credit.transpose("loss_position", "layer", "written", "position").values[:-1]
    positions = np.arange(len(rows))
    own = np.stack([rows[t, ..., t] for t in positions], -1)
    return {"rows": rows, "positions": positions, "own": own, "whole": rows.sum(0)[..., positions]}


QUANTITIES = {"lags": lags, "losses": losses, "inspect": inspect}

if __name__ == "__main__":
    main(measure_quantity)
