"""Laws of the summary and of the page: true, escaped, whole, and without any other computer."""

import html
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console
from support.pages import DRAWN, Reader, browser, data, opened, page, tables
from support.sample import sample

from posterity.errors import InputError
from posterity.reporting.charts import split
from posterity.reporting.html import escaped_json, plotly_script
from posterity.reporting.report import report
from posterity.reporting.result_page import labels
from posterity.reporting.summary import ranked_heads, rows, sentence, summary
from posterity.results import schema as results
from posterity.results import stats as derived
from posterity.results.files import load, save
from posterity.results.formatting import horizon_text as horizon
from posterity.results.formatting import percent

HOSTILE = "<b>&lt;</b><script>alert(1)</script><img src=x onerror=alert(2)>&amp;'\"{{7*7}}%{y}\u2028"
CHARTS = ["map", "lags", "layers", "positions", "first", "weights", "agreement"]
PAYERS = ["payers", "inputs", "paid", "modules", "horizons", "reach"]
KINDS = ["self_attn.q_proj", "mlp.experts.0.up", "mlp.experts.1.up"]
PARAMETERS = ["model.embed", *(f"model.layers.{layer}.{kind}" for layer in range(4) for kind in KINDS), "model.norm"]


@pytest.fixture(scope="module")
def plain():
    return sample()


@pytest.fixture(scope="module")
def hostile():
    return sample(model=HOSTILE, text_name=HOSTILE, texts=[HOSTILE] * 5, modules=[HOSTILE] * 4, revision=HOSTILE)


@pytest.fixture(scope="module")
def paid():
    return sample(losses=True, horizons=(1, 2, 4, 8, 16, 32), parameters=PARAMETERS, missing_heads=1)


def printed(result, width=80) -> str:
    file = io.StringIO()
    summary(result, Console(file=file, width=width, highlight=False))
    return file.getvalue()


def pooled(part, whole) -> tuple[np.ndarray, np.ndarray]:
    """Ratio of the sums over windows, the first axis, and its standard error, in plain numpy."""
    n, share = len(whole), part.sum(0) / whole.sum(0)
    return share, np.sqrt(n / (n - 1) * ((part - share * whole) ** 2).sum(0)) / abs(whole.sum(0))


def two_digits(value) -> str:
    return f"{float(value):.2f}".replace("-0.00", "0.00")


# ---- the summary


def test_the_summary_fits_eighty_columns(plain):
    text = printed(plain)
    assert all(len(line) <= 80 for line in text.splitlines())
    for row in rows(plain):
        line = next(line for line in text.splitlines() if row.label in line)
        assert not line.rstrip().endswith("…")
        assert all(cell in text for cell in row.cells)


def test_the_summary_shows_the_numbers_of_the_result(plain):
    cells = {row.label.strip(): row.cells for row in rows(plain) if "counting" not in row.label}
    found = derived.shares(plain)
    for index, stream in enumerate(results.STREAMS):
        for side in results.SIDES:
            one = found.sel(stream=stream, side=side)
            assert cells[f"{side} share"][index] == f"{100 * one.share:.1f} ± {100 * one.error:.1f} %"
        by_head = derived.shares(plain, ("layer", "head")).share.sel(stream=stream, side="self")
        best = by_head.where(~derived.weak(plain).sel(stream=stream)).stack(one=("layer", "head")).idxmax("one").item()
        assert cells["largest, head"][index].startswith(f"L{best[0]} H{best[1]} ")


def test_the_sentence_follows_the_numbers(plain):
    assert "keys and values mostly for later readers" in sentence(plain)
    own = plain.copy(deep=True)
    own["credit_by_document"].loc[{"side": "self", "stream": "key"}] *= 100
    assert "keys mostly for their own position and its values mostly for later readers" in sentence(own)
    even = plain.copy(deep=True)
    wobble = np.array([0.1, -0.1, 0.1, -0.1, 0.05])[:, None, None, None, None] * np.array([1, -1])
    even["credit_by_document"] = plain.credit_by_document * 0 + 1 + wobble
    assert "keys and values about equally" in sentence(even)


def test_the_summary_says_what_is_not_known(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1, 0] = np.nan
    broken["loss"][2] = np.nan
    text = printed(broken, 100)
    assert "–" in text
    assert "nan" not in text
    assert "known for 4 of 5 windows" in text
    assert "its values mostly" in text
    assert "of the keys" not in sentence(broken)
    broken["credit_by_document"][:] = np.nan
    assert "cannot be said" in sentence(broken)
    assert "nan" not in printed(broken)


def test_the_summary_of_one_window_without_lags_or_weights_has_no_made_up_numbers():
    text = printed(sample(documents=1, lags="self", with_weights=False))
    assert "±" not in text
    assert "there are no standard errors" in text
    assert "half of the credit" not in text
    assert "gradient of" not in text
    assert "agreement" not in text
    assert re.search(r"median lag of the credit\s+–\s+–\s+–", text)


def test_accounts_that_disagree_are_told(plain):
    assert "Warning" not in printed(plain)
    wrong = plain.copy(deep=True)
    wrong["credit"][1, 1] *= 1.5
    assert "Warning: the accounts of the credit disagree" in printed(wrong)


def test_rich_markup_in_a_name_is_shown_as_it_is():
    assert printed(sample(model="[red]name[/red]")).count("[red]name[/red]") == 2  # title and sentence


def test_a_summary_of_something_else_is_refused():
    with pytest.raises(InputError, match="but str came"):
        summary("run.nc")  # pyright: ignore[reportArgumentType]


def test_a_head_with_almost_no_credit_is_not_ranked(plain):
    faint = plain.copy(deep=True)
    faint["credit_by_document"][:, 2, 1] *= 0.001
    ranked = {(one.layer, one.head) for one in ranked_heads(faint, "key")}
    assert (2, 1) not in ranked
    assert {(one.layer, one.head) for one in ranked_heads(plain, "key")} - ranked == {(2, 1)}
    shares = [one.share for one in ranked_heads(plain, "key")]
    assert shares == sorted(shares)


def test_percentages_show_small_numbers_and_their_errors():
    assert percent(0.12345, 0.00612) == "12.3 ± 0.6 %"
    assert percent(0.12345, 0.00012) == "12.35 ± 0.01 %"
    assert percent(0.0012) == "0.12 %"
    assert percent(float("nan"), 0.1) == "–"


# ---- the page


def test_names_of_every_kind_show_as_text(hostile):
    read, reference = Reader(page(hostile)), Reader(page(sample(texts=["text"] * 5)))
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in reference.tags]
    shown = HOSTILE.replace("\u2028", " ")
    assert read.text.count(shown) >= 6
    assert any(attrs.get("title") == shown for _, attrs in read.tags)
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)


def test_the_data_of_the_page_is_json_that_no_parser_mistakes_for_markup(hostile, plain):
    read = Reader(page(hostile, plain))
    kinds = [attrs.get("type") for tag, attrs in read.tags if tag == "script"]
    data = read.scripts[kinds.index("application/json")]
    assert not re.search("[<>&\u2028\u2029]", data)
    first, second = json.loads(data)
    assert first["name"] == HOSTILE.replace("\u2028", " ")
    np.testing.assert_allclose(
        second["layer"]["share"]["key"], derived.shares(plain, ("layer",)).share[:, 1, 0], rtol=1e-5
    )
    np.testing.assert_allclose(second["lags"]["share"]["value"], derived.profile(plain).share[2], rtol=1e-5)


def test_a_page_does_not_take_the_place_of_its_result(tmp_path, plain):
    save(plain, tmp_path / "run.nc")
    with pytest.raises(InputError, match="would take the place of the result"):
        report(tmp_path / "run.nc", tmp_path / "." / "run.nc")
    assert load(tmp_path / "run.nc").identical(plain)


def test_escaped_json_means_the_same():
    value = {"a": HOSTILE, "b": [1.5, None, "</script><!--"]}
    assert json.loads(escaped_json(value)) == value
    assert not re.search("[<>&\u2028\u2029]", escaped_json(value))
    with pytest.raises(ValueError, match="JSON compliant"):
        escaped_json(float("nan"))


def test_the_page_names_no_other_computer(plain):
    text = page(plain, sample(seed=1)).replace(plotly_script(), "")
    assert len(text) < 300_000
    assert not re.findall(r"(?:https?:)?//\w", re.sub(r"(?m)//\s.*$", "", text))
    assert not re.findall(r"@import|url\(|<link|<base|\bfetch\(|XMLHttp", text)
    assert not any({"src", "href", "action"} & set(attrs) - {"href"} for _, attrs in Reader(text).tags)
    assert {attrs["href"] for _, attrs in Reader(text).tags if "href" in attrs} == {"#charts"}


def test_the_page_runs_only_its_own_scripts(plain):
    import base64
    import hashlib

    read = Reader(page(plain))
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]
    code = [one for one in read.scripts if not one.startswith("[{")]
    assert len(code) == 2
    for one in code:
        assert base64.b64encode(hashlib.sha256(one.encode()).digest()).decode() in policy


def test_the_script_of_plotly_is_in_the_page_once(plain):
    assert page(plain, plain, plain).count(plotly_script()) == 1


def test_numbers_that_are_not_known_do_not_stop_the_page(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1, 0] = np.nan
    broken["profile_by_document"][:, :, 2] = np.nan
    broken["credit"][:, :, 0] = np.nan
    read = Reader(page(broken))
    (data,) = json.loads(next(one for one in read.scripts if one.startswith("[{")))
    assert data["lags"]["share"]["value"] == [None] * broken.sizes["lag"]
    assert data["layer"]["share"]["key"][0] is None
    one = sample(layers=1, heads=1, context=1, documents=1, lags="all", with_weights=False)
    for result in (broken, one, sample(lags="self", with_weights=False, missing_heads=2)):
        text = page(result).replace(plotly_script(), "")
        assert not re.search(r"\bnan\b|NaN|Infinity", text.split("<script>")[0])
        assert "undefined" not in text.split("<script>")[0]


def test_every_result_has_a_name_of_its_own(plain):
    assert labels([plain]) == ["tiny/sample"]
    assert labels([plain, sample(text_name="other")]) == ["tiny/sample, sample text", "tiny/sample, other"]
    assert len(set(labels([plain, plain, plain]))) == 3


def test_the_page_is_written_whole_to_its_path(tmp_path, plain):
    path = tmp_path / "report.html"
    assert report(plain, path) == path
    assert path.read_text(encoding="utf-8") == page(plain)
    assert list(tmp_path.iterdir()) == [path]


def test_a_report_can_be_made_from_files(tmp_path, plain):
    saved = save(plain, tmp_path / "run.nc")
    assert report(saved).html == page(plain)
    assert report([str(saved), plain]).html == page(plain, plain)


def test_bad_input_is_refused_before_anything_is_written(tmp_path, plain):
    with pytest.raises(InputError, match="at least one result"):
        report([], tmp_path / "report.html")
    with pytest.raises(InputError, match="does not exist"):
        report([tmp_path / "no.nc"], tmp_path / "report.html")
    with pytest.raises(InputError, match="but int came"):
        report([3], tmp_path / "report.html")  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"the folder .* does not exist"):
        report(tmp_path / "no.nc", tmp_path / "no" / "report.html")


def test_a_notebook_gets_the_same_page_in_a_frame(hostile):
    frame = report(hostile)._repr_html_()
    read = Reader(frame)
    assert [tag for tag, _ in read.tags] == ["iframe"]
    assert read.tags[0][1]["srcdoc"] == page(hostile)
    assert "allow-same-origin" not in read.tags[0][1]["sandbox"]
    assert html.unescape(frame.split('srcdoc="')[1].split('"')[0]) == page(hostile)


# ---- who pays on the page


def test_the_data_of_who_pays_are_those_of_plain_numpy(paid):
    (one,) = data(page(paid))
    credit = np.nan_to_num(paid.loss_credit_by_document.values).sum(2)  # document, layer, written, part
    share, error = pooled(credit, credit.sum(-1, keepdims=True))
    for index, written in enumerate(results.WRITTEN):
        for number, part in enumerate(results.PARTS):
            np.testing.assert_allclose(one["payers"]["share"][written][part], share[:, index, number], rtol=1e-5)
            np.testing.assert_allclose(one["payers"]["error"][written][part], error[:, index, number], rtol=1e-5)
    by_position = np.nan_to_num(paid.loss_credit.values).sum((0, 1))  # written, part, position
    start = one["position"]["start"]
    binned = np.stack([by_position[..., a:b].sum(-1) for a, b in zip(start, [*start[1:], 64], strict=True)], -1)
    found = [[one["payers"]["position"][written][part] for part in results.PARTS] for written in results.WRITTEN]
    np.testing.assert_allclose(found, binned / by_position.sum((1, 2), keepdims=True), rtol=1e-5)
    own, later, inner = np.moveaxis(paid.hidden_by_document.values, -1, 0)
    share, error = pooled(own + inner, own + later + 2 * inner)
    hidden = one["payers"]["hidden"]
    np.testing.assert_allclose(hidden["share"], share, rtol=1e-5)
    np.testing.assert_allclose(hidden["error"], error, rtol=1e-5)
    np.testing.assert_allclose(hidden["cosine"], inner.sum(0) / np.sqrt(own.sum(0) * later.sum(0)), rtol=1e-5)


def test_the_data_of_the_parameters_add_up_experts_and_leave_out_what_is_in_no_layer(paid):
    (one,) = data(page(paid))
    terms = paid.parameter_by_document.values
    of = [[at for at, name in enumerate(PARAMETERS) if f".{layer}.mlp.experts." in name] for layer in range(4)]
    own, later, inner = np.moveaxis(np.stack([terms[:, at].sum(1) for at in of], 1), -1, 0)
    share, error = pooled(own + inner, own + later + 2 * inner)
    assert set(one["modules_paid"]) == {"self_attn.q_proj", "mlp.experts.*.up"}
    found = one["modules_paid"]["mlp.experts.*.up"]
    assert found["layer"] == [0, 1, 2, 3]
    np.testing.assert_allclose(found["share"], share, rtol=1e-5)
    np.testing.assert_allclose(found["error"], error, rtol=1e-5)
    rest = tables(page(paid))["Parameters of modules in no layer"]
    assert [row[0] for row in rest[1:]] == ["model.embed", "model.norm"]
    own, later, inner = terms[:, -1].T
    assert rest[2][1] == percent(*pooled(own + inner, own + later + 2 * inner))


def test_the_data_of_the_horizons_are_those_of_plain_numpy(paid):
    (one,) = data(page(paid))
    left, whole = (np.nan_to_num(x.values) for x in (paid.horizon_by_document, paid.credit_by_document.sum("side")))
    model, error = pooled(left.sum((1, 2)), whole.sum((1, 2))[..., None])
    layers, _ = pooled(left.sum(2), whole.sum(2)[..., None])
    found = one["horizons"]
    assert found["horizon"] == [1, 2, 4, 8, 16, 32]
    for index, stream in enumerate(results.STREAMS):
        np.testing.assert_allclose(found["share"][stream], model[index], rtol=1e-5)
        np.testing.assert_allclose(found["error"][stream], error[index], rtol=1e-3, atol=1e-12)
        np.testing.assert_allclose(found["layers"][stream], layers[:, index], rtol=1e-5)
        for layer, head in np.ndindex(4, 3):
            cell = {name: found[name][stream][layer][head] for name in ("reach", "beyond", "weak")}
            if (layer, head) == (3, 2):  # the layer has not that head
                assert set(cell.values()) == {None}
                continue
            curve = left[:, layer, head, index].sum(0) / whole[:, layer, head, index].sum(0)
            assert cell["beyond"] == (curve[-1] < 0.5)
            if curve[-1] < 0.5:
                assert cell["reach"] is None
            else:
                crossing = np.exp(np.interp(0.5, curve, np.log(found["horizon"])))
                assert cell["reach"] == pytest.approx(crossing, rel=1e-5)
    assert sum(map(sum, found["beyond"]["key"][:3])) > 0


def test_the_tables_of_who_pays_show_the_derived_numbers(paid):
    shown, share = tables(page(paid)), derived.who_pays(paid, ("layer",))
    cosine = derived.parts(paid, ("layer",)).cosine
    for written in results.WRITTEN:
        head, everything, *layers = shown[f"Who pays for the {written}s"]
        assert head[1:4] == ["own loss", "self edge, later losses", "future edges"]
        assert everything[1] == percent(*(float(derived.who_pays(paid)[name].sel(written=written, part="own"))
                                          for name in ("share", "error")))  # fmt: skip
        for layer, row in enumerate(layers):
            one = share.sel(layer=layer, written=written)
            assert row[0] == str(layer)
            assert row[1:4] == [percent(*map(float, pair)) for pair in zip(one.share, one.error, strict=True)]
            assert row[4:] == [two_digits(value) for value in cosine.sel(layer=layer, written=written).values]
    hidden = derived.hidden(paid)
    for layer, row in enumerate(shown["The residual stream at the layers' inputs"][1:]):
        one = hidden.sel(layer=layer)
        assert row[1:] == [percent(float(one.share), float(one.error)), two_digits(one.cosine)]
    by_position = derived.who_pays_by_position(paid).sel(written="value", position=slice(16, 18)).sum("position")
    row = next(row for row in shown["Share of the whole credit by position"] if row[0] == "16–18")
    later = float(by_position.sel(part=["self later", "future"]).sum())
    assert row[3:] == [percent(float(by_position.sel(part="own"))), percent(later)]
    curve, reach = derived.horizon_curve(paid, ("layer",)), derived.effective_horizon(paid, ("layer",))
    for stream in results.STREAMS:
        for layer, row in enumerate(shown[f"Credit that remains, {stream}"][2:]):
            one = curve.sel(layer=layer, stream=stream)
            length = float(reach.sel(layer=layer, stream=stream))
            assert row[1] == horizon(length, 1, 32)
            assert row[2:] == [percent(*map(float, pair)) for pair in zip(one.share, one.error, strict=True)]
        heads = [row[1:] for row in shown[f"Effective horizon, {stream}"][1:]]
        assert [cell == "> 32 tokens" for cell in heads[0]] == [
            bool(far)
            for far in np.isinf(derived.effective_horizon(paid, ("layer", "head")).sel(layer=0, stream=stream))
        ]
        assert heads[3][2] == "–"
    kinds = shown["Own share"]
    assert kinds[0] == ["layer", "self_attn.q_proj", "mlp.experts.*.up"]
    one = derived.parameters(paid).sel(parameter="model.layers.2.self_attn.q_proj")
    assert kinds[3][1] == percent(float(one.share), float(one.error))
    assert shown["Cosine between own and later"][3][1] == two_digits(one.cosine)


def test_the_cosine_of_a_part_that_is_rounding_is_not_shown(paid):
    last = paid.copy(deep=True)
    last.loss_gram.loc[{"layer": 3, "pair": "self later"}] *= 1e-14
    last.loss_gram.loc[{"layer": 3, "pair": ["own . self later", "self later . future"]}] *= 1e-7
    assert np.isfinite(derived.parts(last, ("layer",)).cosine).all()
    row = tables(page(last))["Who pays for the keys"][-1]
    assert [cell == "–" for cell in row[4:]] == [True, False, True]
    assert "–" not in tables(page(last))["Who pays for the keys"][-2]


def test_pages_show_only_what_was_measured(plain, paid):
    ids = {attrs["id"] for _, attrs in Reader(page(plain)).tags if "id" in attrs}
    assert ids == {"charts", "heads", "how", "data", *CHARTS, *(f"{one}-title" for one in CHARTS)}
    assert "2404.00859" not in page(plain)
    only = {
        "payers": (sample(losses=True), ["payers", "inputs", "paid"]),
        "horizons": (sample(horizons=(2, 8)), ["horizons", "reach"]),
        "parameters": (sample(parameters=["model.layers.0.a"]), ["modules"]),
        "rest": (sample(parameters=["a"]), []),
    }
    for result, charts in only.values():
        shown = [attrs["data-chart"] for tag, attrs in Reader(page(result)).tags if "data-chart" in attrs]
        assert shown == CHARTS + charts
        assert tables(page(result)).keys() > tables(page(plain)).keys()
    assert "Effective horizon" not in Reader(page(only["payers"][0])).text
    assert "Parameters of modules in no layer" in tables(page(only["rest"][0]))
    assert all(
        name in Reader(page(paid)).text for name in ("The three parts", "Residual stream", "Horizon curve".lower())
    )


def test_one_window_has_who_pays_without_errors():
    one = page(sample(documents=1, losses=True, horizons=(1, 8), parameters=PARAMETERS))
    shown = tables(one)
    for caption in ("Who pays for the keys", "Credit that remains, value", "Own share"):
        assert all("±" not in cell and cell != "–" for row in shown[caption][1:] for cell in row[1:])
    (found,) = data(one)
    assert found["horizons"]["error"]["key"] == [None, None]
    assert found["payers"]["error"]["key"]["own"] == [None] * 4


def test_who_pays_of_numbers_that_are_not_known_is_not_known(paid):
    broken = paid.copy(deep=True)
    for name in ("loss_credit", "loss_gram", "loss_credit_by_document", "hidden_by_document", "horizon_by_document",
                 "parameter_by_document"):  # fmt: skip
        broken[name][:] = np.nan
    text = page(broken)
    assert {cell for row in tables(text)["Who pays for the keys"][1:] for cell in row[1:]} == {"–"}
    assert not re.search(r"\bnan\b|NaN|Infinity", text.replace(plotly_script(), "").split("<script>")[0])


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
    assert split(name) == kind


# ---- in a browser


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 420])
def test_every_chart_is_drawn_without_an_error_or_a_request(tmp_path, plain, width):
    with browser(viewport={"width": width, "height": 900}) as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        drawn = tab.evaluate(DRAWN)
        assert [one["id"] for one in drawn] == CHARTS
        for one in drawn:
            assert one["panels"] == 3
            assert one["marks"] >= 3
            assert one["saves"] == 2
            assert 0.7 * width < one["size"] <= width
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for view, title in (("share per lag", "share per lag"), ("added up", "share up to this lag")):
            tab.get_by_label(view).check()
            tab.locator("#lags .ytitle", has_text=title).first.wait_for()
        assert heard == []


@pytest.mark.slow
def test_hostile_names_show_as_text_in_the_browser(tmp_path, hostile, plain):
    with browser() as (tab, heard):
        opened(tab, report([hostile, plain], tmp_path / "report.html"))
        shown = HOSTILE.replace("\u2028", " ").strip()
        assert tab.locator("h1").inner_text().startswith(shown)
        legend = tab.locator("#layers .legendtext").first.text_content()
        assert legend is not None
        assert shown.startswith(legend.removesuffix("…"))
        assert len(legend) == 40
        titles = tab.locator("#map .annotation-text").all_text_contents()
        assert any(title.startswith("query · " + HOSTILE[:20]) for title in titles)
        assert tab.evaluate("document.querySelectorAll('img, .chart a[href]').length") == 0
        assert heard == []


@pytest.mark.slow
def test_several_results_stand_side_by_side(tmp_path, plain):
    uneven = sample(layers=2, heads=2, context=32, missing_heads=1, with_weights=False, model="other")
    with browser() as (tab, heard):
        opened(tab, report([plain, uneven], tmp_path / "report.html"))
        panels = {one["id"]: one["panels"] for one in tab.evaluate(DRAWN)}
        assert panels == {"map": 6, "lags": 3, "layers": 3, "positions": 6, "first": 3, "weights": 3, "agreement": 3}
        left, right = (tab.locator("article").nth(index).bounding_box() for index in (0, 1))
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"]
        assert heard == []


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_who_pays_is_drawn_without_an_error_or_a_request(tmp_path, paid, width):
    with browser(viewport={"width": width, "height": 900}, color_scheme="dark") as (tab, heard):
        opened(tab, report(paid, tmp_path / "report.html"))
        drawn = {one["id"]: one for one in tab.evaluate(DRAWN)}
        assert list(drawn) == CHARTS + PAYERS
        panels = {"payers": 2, "inputs": 2, "paid": 2, "modules": 2, "horizons": 3, "reach": 3}
        assert {chart: drawn[chart]["panels"] for chart in PAYERS} == panels
        assert drawn["payers"]["marks"] == 6
        assert drawn["horizons"]["marks"] >= 3 * (4 + 1)
        assert all(drawn[chart]["saves"] == 2 and 0.7 * width < drawn[chart]["size"] <= width for chart in PAYERS)
        beyond = tab.locator("#reach .heatmap-label text, #reach text.heatmap-label").all_text_contents()
        assert len(beyond) == sum(map(sum_known, data(page(paid))[0]["horizons"]["beyond"].values()))
        assert set(beyond) == {">"}
        for one in tab.locator("details").all():
            one.evaluate("details => details.open = true")
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert heard == []


def sum_known(rows):
    return sum(value or 0 for row in rows for value in row)


@pytest.mark.slow
def test_a_part_that_points_against_the_sum_hangs_below_zero(tmp_path, paid):
    against = paid.copy(deep=True)
    credit = against.loss_credit_by_document
    credit.loc[{"layer": 1, "written": "key", "part": "own"}] = -0.5 * credit.sel(layer=1, written="key", part="future")
    with browser() as (tab, heard):
        opened(tab, report(against, tmp_path / "report.html"))
        boxes = [
            tab.locator("#payers .subplot.xy .barlayer .trace").nth(part).locator("path").all() for part in range(3)
        ]
        own, later, future = ([path.bounding_box() for path in paths] for paths in boxes)
        zero = own[0]["y"] + own[0]["height"]
        assert own[1]["y"] == pytest.approx(zero, abs=1.5)
        assert later[1]["y"] + later[1]["height"] == pytest.approx(zero, abs=1.5)
        assert future[1]["y"] < future[0]["y"] - 20
        above, below = zero - future[1]["y"], own[1]["y"] + own[1]["height"] - zero
        assert above - below == pytest.approx(zero - future[0]["y"], abs=3)
        assert heard == []


@pytest.mark.slow
def test_results_with_and_without_who_pays_stand_side_by_side(tmp_path, plain, paid):
    other = sample(layers=2, heads=2, losses=True, horizons=(3, 9), parameters=["model.layers.1.b"], model="other")
    some = sample(horizons=(4,), model="some")
    with browser() as (tab, heard):
        opened(tab, report([plain, paid, other, some], tmp_path / "report.html"))
        panels = {one["id"]: one["panels"] for one in tab.evaluate(DRAWN)}
        expected = {"payers": 4, "inputs": 2, "paid": 4, "modules": 3, "horizons": 3, "reach": 9}
        assert {chart: panels[chart] for chart in PAYERS} == expected
        assert heard == []


@pytest.mark.slow
def test_results_whose_names_begin_alike_have_lines_of_their_own(tmp_path, plain):
    long = "the same and very long name of a model, in all of its first forty letters, "
    with browser() as (tab, heard):
        one, two = sample(model=long + "one", losses=True), sample(model=long + "two", losses=True)
        opened(tab, report([one, plain, two], tmp_path / "report.html"))
        for chart in ("layers", "inputs"):
            names = tab.locator(f"#{chart} .legendtext").all_text_contents()
            assert [name[:6] for name in names if "very long" in name] == ["1: the", "3: the"]
        assert heard == []


@pytest.mark.slow
def test_hostile_names_of_modules_show_as_text_in_the_browser(tmp_path):
    names = [f"{HOSTILE.replace('.', '')}.0.{HOSTILE}", HOSTILE, f"model.layers.1.<i>{'long' * 20}</i>"]
    hostile = sample(losses=True, parameters=names, horizons=(1, 2), modules=[HOSTILE] * 4)
    shown = HOSTILE.replace("\u2028", " ")
    assert shown in [row[0] for row in tables(page(hostile))["Parameters of modules in no layer"]]
    with browser() as (tab, heard):
        opened(tab, report(hostile, tmp_path / "report.html"))
        titles = tab.locator("#modules .annotation-text").all_text_contents()
        assert len(titles) == 2
        assert any(title.startswith(HOSTILE[:20]) for title in titles)
        assert any(title.startswith("<i>longlong") and title.endswith("…") for title in titles)
        assert tab.evaluate("document.querySelectorAll('img, .chart a[href], .chart i, main script').length") == 0
        assert heard == []


@pytest.mark.slow
def test_a_chart_can_be_saved_as_a_picture(tmp_path, plain):
    with browser() as (tab, heard):
        opened(tab, report(plain, tmp_path / "report.html"))
        for kind, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
            with tab.expect_download() as download:
                tab.locator(f'#lags .modebar-btn[data-title="Save as {kind}"]').click()
            path = tmp_path / kind
            download.value.save_as(path)
            assert path.read_bytes().startswith(start)
            assert download.value.suggested_filename == f"posterity-lags.{kind.lower()}"
        assert heard == []


@pytest.mark.slow
def test_the_page_in_a_notebooks_frame_works(tmp_path, hostile):
    outer = tmp_path / "notebook.html"
    outer.write_text("<!doctype html><meta charset=utf-8>" + report(hostile)._repr_html_(), encoding="utf-8")
    with browser(color_scheme="dark") as (tab, heard):
        tab.goto(f"file://{outer}")
        frame = tab.frame_locator("iframe")
        frame.locator("html[data-drawn]").wait_for(state="attached")
        assert frame.locator(".chart .main-svg").count() >= len(CHARTS)
        assert frame.locator("h1").inner_text().startswith(HOSTILE[:20])
        with tab.expect_download() as download:
            frame.locator('#map .modebar-btn[data-title="Save as PNG"]').click()
        assert download.value.suggested_filename == "posterity-map.png"
        assert heard == []


@pytest.mark.slow
def test_numbers_that_are_not_known_leave_the_charts_standing(tmp_path):
    more = {"losses": True, "horizons": (1, 4), "parameters": PARAMETERS}
    one = sample(layers=1, heads=1, context=1, documents=1, lags="all", with_weights=False, **more)
    broken = sample(**more)
    for name in ("credit_by_document", "profile_by_document", "loss_credit_by_document", "horizon_by_document"):
        broken[name][:] = np.nan
    with browser() as (tab, heard):
        for result in (one, broken, sample(lags="self", missing_heads=1)):
            opened(tab, report(result, tmp_path / "report.html"))
            assert all(drawn["size"] > 800 for drawn in tab.evaluate(DRAWN))
        assert heard == []


@pytest.mark.slow
def test_every_control_can_be_reached_by_key(tmp_path, plain):
    with browser() as (tab, _):
        opened(tab, report(plain, tmp_path / "report.html"))
        reached = set()
        for _ in range(60):
            tab.keyboard.press("Tab")
            focus = "(({dataset, name, localName}) => dataset.title || name || localName)(document.activeElement)"
            reached.add(tab.evaluate(focus))
        assert {"a", "summary", "view", "Save as SVG", "Save as PNG"} <= reached
