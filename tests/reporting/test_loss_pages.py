"""Laws of own and later losses on the page: its figures and tables hold what plain numpy makes of the result."""

import re

import numpy as np
import pytest
from support.page_results import CHARTS, PARAMETERS
from support.pages import Reader, data, page, tables, traces
from support.sample import sample

from posterity.axes import STREAMS, WRITTEN
from posterity.reporting.html import packed_plotly
from posterity.reporting.module_kinds import split_name
from posterity.reporting.result_table import LOSS_PARTS
from posterity.results import stats
from posterity.results.formatting import horizon_text, percent

ANCHORS = {"answer", "charts", "more", "heads", "how", "data", "plotly", "waiting"}
ANCHORS |= {"head-choice", "head-numbers", "head-range", "head-weak"}


BEYOND = ", beyond the first 4 positions"
COSINES = f"{BEYOND}; cosines over all positions"


def pooled(part, whole) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of the sums over windows, the first axis, and its standard error, in plain numpy."""
    n, share = len(whole), part.sum(0) / whole.sum(0)
    return share, np.sqrt(n / (n - 1) * ((part - share * whole) ** 2).sum(0)) / abs(whole.sum(0))


def two_digits(value) -> str:
    return f"{float(value):.2f}".replace("-0.00", "0.00").replace("-", "−")


def test_the_figures_of_who_pays_hold_the_numbers_of_plain_numpy(paid):
    text = page(paid)
    credit = np.nan_to_num(paid.loss_credit_by_document.sel(reader_of="rest").values).sum(
        2
    )  # document, layer, written, part
    share, error = pooled(credit, credit.sum(-1, keepdims=True))
    for panel in range(len(WRITTEN)):
        bars = traces(text, "loss_parts", panel)
        assert list(bars) == list(LOSS_PARTS.values())
        for number, name in enumerate(LOSS_PARTS.values()):
            np.testing.assert_allclose(bars[name]["y"], share[:, panel, number], rtol=1e-5)
            pairs = zip(share[:, panel, number], error[:, panel, number], strict=True)
            assert bars[name]["customdata"] == [percent(*pair, 5) for pair in pairs]
    own, later, inner = np.moveaxis(paid.hidden_by_document.values, -1, 0)
    share, error = pooled(own + inner, own + later + 2 * inner)
    error = stats.uncertainty(error, 5)
    hidden = traces(text, "inputs", 0)
    np.testing.assert_allclose(hidden["own share"]["y"], share, rtol=1e-5)
    np.testing.assert_allclose(hidden["own share low"]["y"], share - error, rtol=1e-5)
    np.testing.assert_allclose(hidden["own share high"]["y"], share + error, rtol=1e-5)
    cosine = inner.sum(0) / np.sqrt(own.sum(0) * later.sum(0))
    np.testing.assert_allclose(traces(text, "inputs", 1)["cosine of own and later"]["y"], cosine, rtol=1e-5)


def test_the_figure_of_who_pays_by_position_holds_the_numbers_of_plain_numpy(paid):
    by_position = np.nan_to_num(paid.loss_credit.values).sum((0, 1))  # written, part, position
    share = by_position / by_position.sum((1, 2), keepdims=True)
    for panel in range(len(WRITTEN)):
        lines = traces(page(paid), "loss_positions", panel)
        start = [int(name.split("–")[0]) for name, _ in lines["own loss"]["customdata"]]
        assert start[:18] == [*range(17), 19]
        ends = [*start[1:], 64]
        for name, values in (("own loss", share[panel, 0]), ("later losses", share[panel, 1:].sum(0))):
            single = np.array([values[low:high].mean() for low, high in zip(start, ends, strict=True)])
            right = np.where(single > 1e-3 / 64, single, np.nan)
            np.testing.assert_allclose(np.array(lines[name]["y"], dtype=float), right, rtol=1e-5)


def test_the_figure_of_the_parameters_adds_up_experts_and_leaves_out_what_is_in_no_layer(paid):
    text, terms = page(paid), paid.parameter_by_document.values
    experts = [[i for i, name in enumerate(PARAMETERS) if f".{layer}.mlp.experts." in name] for layer in range(4)]
    own, later, inner = np.moveaxis(np.stack([terms[:, indices].sum(1) for indices in experts], 1), -1, 0)
    share, error = pooled(own + inner, own + later + 2 * inner)
    titles = [note["text"] for note in data(text)["figures"]["modules"]["layout"]["annotations"]]
    assert titles == ["<b>self_attn.q_proj</b>", "<b>mlp.experts.*.up</b>"]
    lines = traces(text, "modules", 1)
    assert lines["own share"]["x"] == [0, 1, 2, 3]
    np.testing.assert_allclose(lines["own share"]["y"], share, rtol=1e-5)
    np.testing.assert_allclose(lines["own share high"]["y"], share + stats.uncertainty(error, 5), rtol=1e-5)
    rest = tables(text)["Parameters of modules in no layer"]
    assert [row[0] for row in rest[1:]] == ["model.embed", "model.norm"]
    own, later, inner = terms[:, -1].T
    assert rest[2][1] == percent(*pooled(own + inner, own + later + 2 * inner), windows=5)


def test_the_figures_of_the_horizons_hold_the_numbers_of_plain_numpy(paid):
    text = page(paid)
    left, total = (
        np.nan_to_num(x.sel(reader_of="rest").values)
        for x in (paid.horizon_by_document, paid.credit_by_document.sum("side"))
    )
    model, error = pooled(left.sum((1, 2)), total.sum((1, 2))[..., None])
    layers, _ = pooled(left.sum(2), total.sum(2)[..., None])
    horizons, beyond = [1, 2, 4, 8, 16, 32], 0
    for panel in range(len(STREAMS)):
        lines = traces(text, "horizons", panel)
        assert lines["all layers"]["x"] == horizons
        np.testing.assert_allclose(lines["all layers"]["y"], model[panel], rtol=1e-5)
        np.testing.assert_allclose(
            lines["all layers high"]["y"], model[panel] + stats.uncertainty(error, 5)[panel], rtol=1e-5
        )
        by_layer = [lines["first layer"], lines["scatter"], lines["scatter+"], lines["last layer"]]
        np.testing.assert_allclose([line["y"] for line in by_layer], layers[:, panel], rtol=1e-5)
        grey, coloured, *covers = traces(text, "head_horizons", panel).values()
        for layer, head in np.ndindex(4, 3):
            cells = [trace["z"][layer][head] for trace in (grey, coloured, *covers)]
            if (layer, head) == (3, 2):  # the layer has not that head
                assert set(cells) == {None}
                continue
            curve = left[:, layer, head, panel].sum(0) / total[:, layer, head, panel].sum(0)
            if cells[0] == 1:
                assert set(cells[1:]) == {None}
            elif curve[-1] < 0.5:
                assert cells == [None, None, 1]
                assert covers[0]["text"][layer][head] == "&gt;"
                beyond += 1
            else:
                crossing = np.interp(0.5, curve, np.log2(horizons))
                assert cells[1] == pytest.approx(crossing, rel=1e-5)
    assert beyond > 0


def test_the_tables_of_who_pays_show_the_derived_numbers(paid):
    captions, share = tables(page(paid)), stats.loss_shares(paid, ("layer",), "rest")
    cosine = stats.loss_parts(paid, ("layer",)).cosine
    for written in WRITTEN:
        head, everything, *layers = captions[f"Who pays for the {written}s{COSINES}"]
        assert head[1:4] == ["own loss", "self edge, later losses", "future edges"]
        own = stats.loss_shares(paid, (), "rest").sel(written=written, part="own")
        assert everything[1] == percent(float(own.share), float(own.error), windows=5)
        for layer, row in enumerate(layers):
            numbers = share.sel(layer=layer, written=written)
            assert row[0] == str(layer)
            assert row[1:4] == [
                percent(*map(float, pair), 5) for pair in zip(numbers.share, numbers.error, strict=True)
            ]
            assert row[4:] == [two_digits(value) for value in cosine.sel(layer=layer, written=written).values]
    hidden = stats.hidden_shares(paid)
    for layer, row in enumerate(captions["The residual stream at the layers' inputs"][1:]):
        numbers = hidden.sel(layer=layer)
        assert row[1:] == [percent(float(numbers.share), float(numbers.error), 5), two_digits(numbers.cosine)]
    by_position = stats.loss_shares_by_position(paid).sel(written="value", position=slice(16, 18)).sum("position")
    row = next(row for row in captions["Share of the whole credit by position"] if row[0] == "16–18")
    later = float(by_position.sel(part=["self later", "future"]).sum())
    assert row[3:] == [percent(float(by_position.sel(part="own"))), percent(later)]
    curve, reach = (f(paid, ("layer",), "rest") for f in (stats.horizon_curve, stats.effective_horizon))
    for stream in STREAMS:
        for layer, row in enumerate(captions[f"Credit that remains, {stream}{BEYOND}"][2:]):
            numbers = curve.sel(layer=layer, stream=stream)
            length = float(reach.sel(layer=layer, stream=stream))
            assert row[1] == horizon_text(length, 1, 32)
            assert row[2:] == [percent(*map(float, pair), 5) for pair in zip(numbers.share, numbers.error, strict=True)]
    kinds = captions["Own share"]
    assert kinds[0] == ["layer", "self_attn.q_proj", "mlp.experts.*.up"]
    numbers = stats.parameter_shares(paid).sel(parameter="model.layers.2.self_attn.q_proj")
    assert kinds[3][1] == percent(float(numbers.share), float(numbers.error), 5)
    assert captions["Cosine between own and later"][3][1] == two_digits(numbers.cosine)


def test_the_cosine_of_a_part_that_is_rounding_is_not_shown(paid):
    last = paid.copy(deep=True)
    last.loss_gram.loc[{"layer": 3, "pair": "self later"}] *= 1e-14
    last.loss_gram.loc[{"layer": 3, "pair": ["own . self later", "self later . future"]}] *= 1e-7
    assert np.isfinite(stats.loss_parts(last, ("layer",)).cosine).all()
    row = tables(page(last))[f"Who pays for the keys{COSINES}"][-1]
    assert [cell == "–" for cell in row[4:]] == [True, False, True]
    assert "–" not in tables(page(last))[f"Who pays for the keys{COSINES}"][-2]


def test_pages_show_only_what_was_measured(plain, paid):
    ids = {attrs["id"] for _, attrs in Reader(page(plain)).tags if "id" in attrs}
    assert ids == {*ANCHORS, *CHARTS, *(f"{name}-title" for name in CHARTS)}
    assert "2404.00859" not in page(plain)
    only = {
        "losses": (sample(losses=True), ["loss_parts", "inputs", "loss_positions"]),
        "horizons": (sample(horizons=(2, 8)), ["horizons", "head_horizons"]),
        "parameters": (sample(parameters=["model.layers.0.a"]), ["modules"]),
        "rest": (sample(parameters=["a"]), []),
    }
    for result, charts in only.values():
        figures = [attrs["data-chart"] for tag, attrs in Reader(page(result)).tags if "data-chart" in attrs]
        assert set(figures) == {*CHARTS, *charts}
        assert tables(page(result)).keys() > tables(page(plain)).keys()
    assert "Effective horizon" not in Reader(page(only["losses"][0])).text
    assert "Parameters of modules in no layer" in tables(page(only["rest"][0]))
    assert all(
        name in Reader(page(paid)).text for name in ("The three parts", "Residual stream", "Horizon curve".lower())
    )


def test_one_window_has_who_pays_without_errors():
    text = page(sample(documents=1, losses=True, horizons=(1, 8), parameters=PARAMETERS))
    captions = tables(text)
    for caption in (f"Who pays for the keys{COSINES}", f"Credit that remains, value{BEYOND}", "Own share"):
        assert all("±" not in cell and cell != "–" for row in captions[caption][1:] for cell in row[1:])
    assert not [name for name in traces(text, "horizons", 1) if name.endswith((" low", " high"))]
    assert all("±" not in cell for bar in traces(text, "loss_parts").values() for cell in bar["customdata"])


def test_who_pays_of_numbers_that_are_not_known_is_not_known(paid):
    broken = paid.copy(deep=True)
    for name in ("loss_credit", "loss_gram", "loss_credit_by_document", "hidden_by_document", "horizon_by_document",
                 "parameter_by_document"):  # fmt: skip
        broken[name][:] = np.nan
    text = page(broken)
    assert {cell for row in tables(text)[f"Who pays for the keys{COSINES}"][1:] for cell in row[1:]} == {"–"}
    assert not re.search(r"\bnan\b|NaN|Infinity", text.replace(packed_plotly(), "").split("<script>")[0])


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.12.mlp.experts.3.up_proj", ("model.layers.*.mlp.experts.*.up_proj", 12)),
        ("lm_head", ("lm_head", None)),
        ("layers.٣.a", ("layers.٣.a", None)),
        ("layers." + "9" * 5000, ("layers." + "9" * 5000, None)),
    ],
)
def test_the_layer_is_the_first_number_in_a_modules_name(name, kind):
    assert split_name(name) == kind
