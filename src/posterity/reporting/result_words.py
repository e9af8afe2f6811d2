"""A result in words: model, text and loss, one sentence on whom keys and values are written for, and warnings."""

import math

import xarray as xr

from posterity.axes import STREAMS, WRITTEN
from posterity.results import stats
from posterity.results.formatting import left_out_text, percent
from posterity.results.netcdf import portable_value

TRUSTED = 1e-3  # accounts that disagree by more than this are reported as broken (float32 gives about 1e-6)


def heading(result: xr.Dataset) -> tuple[str, ...]:
    """Return model, text and amounts in three short lines, and what was left out of the text."""
    attrs = {name: str(portable_value(value)) for name, value in result.attrs.items()}
    parameters = f"{int(attrs['parameters']):,} parameters" if attrs.get("parameters", "").isdecimal() else ""
    windows, context = result.sizes["document"], int(result.position_end[-1]) + 1
    step = f"after {int(attrs['step']):,} steps" if attrs.get("step", "").isdecimal() else ""
    model = (attrs.get("architecture"), parameters, attrs.get("dtype"), step)
    most = "at most " if attrs.get("packed") else ""
    amount = f"{windows} window{'s' * (windows != 1)} of {most}{attrs.get('context') or context} tokens"
    losses = int(result.tokens.sum())
    answers = f"loss on {attrs['loss_on']} ({losses:,} losses)" if attrs.get("loss_on") else ""
    packed = f"packed: {attrs['packed']}" if attrs.get("packed") else ""
    text = (text_name(result), amount, f"loss {mean_loss(result)}", answers, packed)
    left_out = (left_out_text({str(name): portable_value(value) for name, value in result.attrs.items()}),)
    lines = (model, text, left_out)
    return model_name(result), *(" · ".join(part for part in line if part) for line in lines if any(line))


def model_name(result: xr.Dataset) -> str:
    """Return the name of the model, or words that stand for it."""
    return str(portable_value(result.attrs.get("model"))) or "the model"


def text_name(result: xr.Dataset) -> str:
    """Return the name of the text: the attribute, or the names of the windows' texts; their number if that is long."""
    names = sorted(set(map(str, result.text.values)))
    read, left_out = (portable_value(result.attrs.get(f"documents_{part}")) for part in ("read", "left_out"))
    number = len(names)
    if result.attrs.get("packed") and isinstance(read, int) and isinstance(left_out, int):
        number = read - left_out  # a window is named after the first of its texts
    name = str(portable_value(result.attrs.get("text_name"))) or "; ".join(names)
    return name if len(names) == 1 or len(name) <= 80 else f"{number} texts"


def mean_loss(result: xr.Dataset) -> str:
    """Return the mean loss over all tokens whose loss is known, with units."""
    counted = result.loss.notnull() & (result.tokens > 0)
    number, windows = int(counted.sum()), result.sizes["document"]
    if not number:
        return "unknown"
    loss = float((result.loss * result.tokens).where(counted).sum() / result.tokens.where(counted).sum())
    return f"{loss:.3f} nats per token" + (f" (known for {number} of {windows} windows)" if number < windows else "")


def verdict_sentence(result: xr.Dataset) -> str:
    """Return one sentence on whom the keys and values are written for, with the numbers that say so."""
    shares = stats.shares(result).sel(side="other")
    share, error = (
        {stream: float(shares[name].sel(stream=stream)) for stream in WRITTEN} for name in ("share", "error")
    )
    streams = [stream for stream in WRITTEN if not math.isnan(share[stream])]
    if not streams:
        return f"For whom {model_name(result)} writes its keys and values cannot be said: the credit is not known."
    verdicts = {stream: _verdict(share[stream], error[stream]) for stream in streams}
    if len(set(verdicts.values())) == 1:
        claim = f"its {'s and '.join(streams)}s {verdicts[streams[0]]}"
    else:
        claim = " and ".join(f"its {stream}s {verdict}" for stream, verdict in verdicts.items())
    parts = [f"{percent(share[stream], error[stream])} of the credit of the {stream}s" for stream in streams]
    return (
        f"{model_name(result)} writes {claim}: {' and '.join(parts)} comes from queries at later positions, "
        f"where counting the edges alone would give {percent(1 - float(stats.counts(result).isel(lag=0)))}"
        f"{_median_words(result, streams)}."
    )


def _median_words(result: xr.Dataset, streams: list[str]) -> str:
    """Return the rest of the sentence on the median lag; nothing where it is not known."""
    median = stats.median_lag(stats.profile(result).share)
    lags = [(stream, float(median.sel(stream=stream))) for stream in streams]
    medians = [f"lag {lag:.0f} for the {stream}s" for stream, lag in lags if not math.isnan(lag)]
    if not medians:
        return ""
    counted = float(stats.median_lag(stats.counts(result)))
    words = f"; half of the credit is reached at {' and at '.join(medians)}"
    return words if math.isnan(counted) else f"{words} (counting alone: lag {counted:.0f})"


def _verdict(share: float, error: float) -> str:
    """Return for whom most of the credit is; undecided within two standard errors of one half."""
    if abs(share - 0.5) <= (0.0 if math.isnan(error) else 2 * error):
        return "about equally for later readers and for their own position"
    return "mostly for later readers" if share > 0.5 else "mostly for their own position"


def _adapter_words(result: xr.Dataset) -> str:
    """Return one sentence on the gradients of the adapters' parameters, all together."""
    shares, number = stats.adapter_shares(result), result.sizes["adapter"]
    share = percent(float(shares.share), float(shares.error))
    return (
        f"Gradient of the adapters at queries, keys and values ({number} parameters; weights above are those of the "
        f"merged model): self share {share} in one window, {percent(float(shares.share_mean))} in the mean."
    )


def _borrowing_layers(result: xr.Dataset) -> str:
    """Return one sentence on layers without weights of their own for a stream; "" if there are none."""
    if "weight_mean" not in result:
        return ""
    missing = result.weight_mean.isnull().all("term")
    counts = {stream: int(missing.sel(stream=stream).sum()) for stream in STREAMS}
    weights = [f"W_{stream[0].upper()} in {count}" for stream, count in counts.items() if count]
    if not weights:
        return ""
    return (
        f"No weights of their own: {', '.join(weights)} of {result.sizes['layer']} layers, which borrow from an "
        "earlier one. Its row has what they send; their credit can be negative, as a part of a shared gradient."
    )


def reading_notes(result: xr.Dataset) -> list[str]:
    """Return what a reader must know to judge the table, and warnings."""
    windows = result.sizes["document"]
    several, single = f"± is one standard error over {windows} windows.", "One window: there are no standard errors."
    notes = [several if windows > 1 else single]
    if limit := portable_value(result.attrs.get("context_of_config")):
        notes.append(f"The context is beyond the {limit} tokens of the model's config: the model may read it badly.")
    left_out = str(portable_value(result.attrs.get("left_out_passes")))
    if left_out.isdecimal() and int(left_out):
        notes.append(f"Left out: {left_out} backward passes with gradients that are not finite.")
    present = stats.existing_heads(result)
    weak = int((stats.weak_heads(result) & present).sum())
    if weak:
        heads = int(present.sum()) * len(STREAMS)
        notes.append(f"Not ranked: {weak} of {heads} heads x streams, of small, negative or uncertain credit.")
    unknown = int(stats.shares(result, ("layer",)).share.isel(side=0).isnull().sum())
    if unknown:
        layers = result.sizes["layer"] * len(STREAMS)
        notes.append(f"{unknown} of {layers} layers x streams have no share: credit zero or not known.")
    if left_out := portable_value(result.attrs.get("weights_left_out")):
        notes.append(f"Gradients of weights that are not split: {left_out}.")
    elif borrowing := _borrowing_layers(result):
        notes.append(borrowing)
    if "adapter_mean" in result:
        notes.append(_adapter_words(result))
    imbalance = float(stats.balance(result).max())
    if imbalance > TRUSTED:
        notes.append(f"Warning: the accounts of the credit disagree by up to {imbalance:.1g} of a layer's credit.")
    if wrong := portable_value(result.attrs.get("wrong_gradients")):
        notes.append(
            f"Warning: the backward pass is not the derivative of the forward pass in {wrong}: every gradient behind "
            "it is affected."
        )
    return notes
