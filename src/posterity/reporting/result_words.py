"""A result in words: model, text and loss, which losses and edges its keys and values learn from, and warnings."""

import math
from dataclasses import dataclass

import xarray as xr

from posterity.axes import STREAMS, WRITTEN
from posterity.results import stats
from posterity.results.formatting import error_words, first_positions_text, left_out_text, percent, value_with_error
from posterity.results.head_stats import MAX_ERROR, MIN_CREDIT
from posterity.results.netcdf import portable_value

EVEN = 0.1  # distance from one half below which a share whose interval covers it is called equal
UNSETTLED = " (its 95 % interval covers one half)"
WEAK_WORDS = (
    f"less than {100 * MIN_CREDIT:.0f} % of an equal part of its layer's credit, or a self share with a standard error "
    f"above {100 * MAX_ERROR:.0f} %"
)
NAMES = 3  # of windows with a large gradient
TRUSTED = 1e-3  # accounts that disagree by more than this are reported as broken (float32 gives about 1e-6)


@dataclass(frozen=True)
class ShareWords:
    """The words of a sentence on shares: what the part is, and where most of the credit is if the part is its size."""

    verb: str
    part: str
    large: str
    even: str
    small: str

    def verdict(self, share: float, error: float, windows: int) -> str:
        """Return where most of the credit is, and whether one half lies in the 95 % interval all the same."""
        margin = float(stats.confidence(error, windows))
        is_open = abs(share - 0.5) <= (0.0 if math.isnan(margin) else margin)
        if is_open and abs(share - 0.5) <= EVEN:
            return self.even
        return (self.large if share > 0.5 else self.small) + (UNSETTLED if is_open else "")


EDGES = ShareWords(
    verb="arrives",
    part="over edges from later queries",
    large="mostly over edges from later queries",
    even="about equally over the self edge and over edges from later queries",
    small="mostly over the self edge",
)
LOSSES = ShareWords(
    verb="is paid",
    part="by later losses",
    large="mostly by later losses",
    even="about equally by the own loss and by later losses",
    small="mostly by the own loss",
)


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


def sink_number(result: xr.Dataset) -> int:
    """Return how many first positions of a document a result tells apart from all others; 0 for an older file."""
    number = portable_value(result.attrs.get("sinks"))
    return number if isinstance(number, int) and stats.has_reader_axis(result) else 0


def lead_reader(result: xr.Dataset) -> str:
    """Return which edges the numbers that lead are of: "rest", without those into the first keys, if they are apart.

    "all" for an older file, for sinks=0 and where a window has no other keys.
    """
    return "rest" if sink_number(result) and int(result.edges.sel(reader_of="rest").sum()) else "all"


def edges_words(result: xr.Dataset, reader_of: str) -> str:
    """Say which edges numbers are of: "beyond the first 4 positions", "all edges"; "" where the result knows no others.

    Args:
        result: A result of `posterity.measure`.
        reader_of: "rest" or "all".
    """
    if lead_reader(result) == "all":
        return ""
    return f"beyond {first_positions_text(sink_number(result))}" if reader_of == "rest" else "all edges"


def edges_title(name: str, result: xr.Dataset, reader_of: str) -> str:
    """Return the title of numbers with what `edges_words` says of them."""
    words = edges_words(result, reader_of)
    return f"{name}, {words}" if words else name


def verdict_sentence(result: xr.Dataset, reader_of: str = "") -> str:
    """Return in words which losses pay for the keys and values, if that was measured, and over which edges it comes.

    Args:
        result: A result of `posterity.measure`.
        reader_of: Of which edges, by their key; "" for those that lead (`lead_reader`).
    """
    reader = reader_of or lead_reader(result)
    edges = stats.shares(result, reader_of=reader).sel(side="other")
    words = edges_words(result, reader)
    start = f"{_capital(words if reader == 'rest' else f'over {words}')}, the" if words else "The"
    sentences = []
    if "loss_credit" in result:
        own = stats.loss_shares(result, reader_of=reader).sel(part="own").rename(written="stream")
        paid = _share_sentence(result, own.assign(share=1 - own.share), LOSSES, start)
        sentences += [f"{paid}, the rest by the own loss."] if paid else []
    arrives = _share_sentence(result, edges, EDGES, "" if sentences else start)
    if arrives:
        counted = percent(1 - float(stats.counts(result, reader_of=reader).isel(lag=0)))
        sentences.append(
            f"{arrives}, where counting the edges alone would give {counted}{_median_words(result, edges, reader)}."
        )
    unknown = (
        f"Where the credit of the keys and values of {model_name(result)} comes from cannot be said: it is not known."
    )
    return " ".join(sentences) or unknown


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _share_sentence(result: xr.Dataset, shares: xr.Dataset, kind: ShareWords, start: str) -> str:
    """Return what the shares of keys and values say, without the full stop; "" if none is known.

    Args:
        result: What the shares were taken from.
        shares: `share` and `error` with the dimension `stream`.
        kind: The words.
        start: How the sentence begins that names the model; "" for one that does not.
    """
    windows = result.sizes["document"]
    share, error = (
        {stream: float(shares[name].sel(stream=stream)) for stream in WRITTEN} for name in ("share", "error")
    )
    streams = [stream for stream in WRITTEN if not math.isnan(share[stream])]
    if not streams:
        return ""
    verdicts = {stream: kind.verdict(share[stream], error[stream], windows) for stream in streams}
    of_model = f" of {model_name(result)}" if start else ""
    start = start or "The"
    if len(set(verdicts.values())) == 1:
        claim = f"{start} credit of the {'s and '.join(streams)}s{of_model} {kind.verb} {verdicts[streams[0]]}"
    else:
        key, value = verdicts.values()
        claim = f"{start} credit of the keys{of_model} {kind.verb} {key}, that of the values {value}"
    numbers = [f"{percent(share[stream], error[stream], windows)} ({stream}s)" for stream in streams]
    part = (
        "" if {verdict.removesuffix(UNSETTLED) for verdict in verdicts.values()} == {kind.large} else f" {kind.part}"
    )  # which the verdict names already
    return f"{claim}: {' and '.join(numbers)}{part}"


def _median_words(result: xr.Dataset, edges: xr.Dataset, reader: str) -> str:
    """Return the rest of the sentence on the median lag; nothing where it or the share of the edges is not known."""
    median = stats.median_lag(stats.profile(result, reader_of=reader).share).where(edges.share.notnull())
    lags = [(stream, float(median.sel(stream=stream))) for stream in WRITTEN]
    medians = [f"lag {lag:.0f} ({stream}s)" for stream, lag in lags if not math.isnan(lag)]
    if not medians:
        return ""
    counted = float(stats.median_lag(stats.counts(result, reader_of=reader)))
    words = f"; half of the credit is reached at {' and '.join(medians)}"
    return words if math.isnan(counted) else f"{words}, by counting alone at lag {counted:.0f}"


def _adapter_words(result: xr.Dataset) -> str:
    """Return one sentence on the gradients of the adapters' parameters, all together."""
    shares, number = stats.adapter_shares(result), result.sizes["adapter"]
    share = percent(float(shares.share), float(shares.error), result.sizes["document"])
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


def _price_words(result: xr.Dataset) -> str:
    """Say what cached keys and values are worth to later tokens, in which layers most, and where the prices are."""
    windows, total, layers = result.sizes["document"], stats.prices(result), stats.prices(result, ("layer",)).price
    dearest = layers.layer.values[layers.fillna(0).argsort().values[::-1][:3]]
    price = value_with_error(float(total.price), float(total.error), windows=windows)
    losses = "labels that the model draws" if result.attrs.get("prices") == "samples" else "the text"
    return (
        f"Prices, by the losses of {losses}: cached keys and values are worth {price} nats per token to later tokens, "
        f"most in layers {', '.join(map(str, dearest))} (posterity table RUN --kind prices; what windows cost: "
        "posterity windows RUN)."
    )


def _heavy_words(result: xr.Dataset) -> str:
    """Name the windows that carry more than ten times the median gradient; "" for none."""
    norms, heavy = stats.window_norms(result), stats.heavy_windows(result).values
    times = (norms / norms.median("document")).max("stream").values
    order = sorted(heavy.nonzero()[0].tolist(), key=lambda window: -times[window])
    if not order:
        return ""
    names = [f"{times[window]:.0f} times by window {window} ({result.text.values[window]})" for window in order[:NAMES]]
    more = [f"by {len(order) - NAMES} more above {stats.HEAVY:.0f} times"] if len(order) > NAMES else []
    return (
        f"Warning: the median window's gradient (squared norm) is exceeded {', '.join([*names, *more])}. Windows count "
        "by it: most of every share is theirs."
    )


def reading_notes(result: xr.Dataset, reader_of: str = "") -> list[str]:
    """Return what a reader must know to judge the table of these edges (as in `verdict_sentence`), and warnings."""
    windows = result.sizes["document"]
    notes = [error_words(windows)]
    if limit := portable_value(result.attrs.get("context_of_config")):
        notes.append(f"The context is beyond the {limit} tokens of the model's config: the model may read it badly.")
    left_out = str(portable_value(result.attrs.get("left_out_passes")))
    if left_out.isdecimal() and int(left_out):
        notes.append(f"Left out: {left_out} backward passes with gradients that are not finite.")
    if not stats.has_reader_axis(result):
        notes.append("An older file: edges into the first positions, often sinks, are in every number. Measure again.")
    present, reader = stats.existing_heads(result), reader_of or lead_reader(result)
    weak = int((stats.weak_heads(result, reader) & present).sum())
    if weak:
        heads = int(present.sum()) * len(STREAMS)
        notes.append(
            f"Not ranked: {weak} of {heads} rows (a row is one head's queries, keys or values), of small, negative or "
            "uncertain credit."
        )
    unknown = int(stats.shares(result, ("layer",), reader).share.isel(side=0).isnull().sum())
    if unknown:
        layers = result.sizes["layer"] * len(STREAMS)
        notes.append(f"{unknown} of {layers} layers × streams have no share: credit zero or not known.")
    if left_out := portable_value(result.attrs.get("weights_left_out")):
        notes.append(f"Gradients of weights that are not split: {left_out}.")
    elif borrowing := _borrowing_layers(result):
        notes.append(borrowing)
    if "adapter_mean" in result:
        notes.append(_adapter_words(result))
    if "price_by_document" in result:
        notes.append(_price_words(result))
    if heavy := _heavy_words(result):
        notes.append(heavy)
    imbalance = float(stats.balance(result).max())
    if imbalance > TRUSTED:
        notes.append(f"Warning: the accounts of the credit disagree by up to {imbalance:.1g} of a layer's credit.")
    if wrong := portable_value(result.attrs.get("wrong_gradients")):
        notes.append(
            f"Warning: the backward pass is not the derivative of the forward pass in {wrong}: every gradient behind "
            "it is affected."
        )
    return notes
