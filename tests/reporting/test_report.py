"""Laws of the page of results: true, escaped, whole, and without any other computer."""

import base64
import gzip
import hashlib
import html
import json
import re

import numpy as np
import pytest
from plotly.offline import get_plotlyjs_version
from support.page_results import HOSTILE
from support.pages import Reader, as_shares, data, page, traces
from support.sample import sample

from posterity.axes import STREAMS
from posterity.errors import InputError
from posterity.palette import share_place
from posterity.reporting.bins import doublings
from posterity.reporting.html import packed_json, packed_plotly, plotly_script
from posterity.reporting.report import report
from posterity.reporting.result_group import result_names
from posterity.results import stats
from posterity.results.files import load, save
from posterity.results.formatting import percent


def test_names_of_every_kind_show_as_text(hostile):
    read, reference = Reader(page(hostile)), Reader(page(sample(texts=["text"] * 5)))
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in reference.tags]
    name = HOSTILE.replace("\u2028", " ")
    assert read.text.count(name) >= 6
    assert any(attrs.get("title") == name for _, attrs in read.tags)
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)


def test_the_data_of_the_page_is_json_that_no_parser_mistakes_for_markup(hostile, plain):
    text = page(hostile, plain)
    assert re.fullmatch("[A-Za-z0-9+/]*=*", re.search('id="data">(.*?)</script>', text, re.DOTALL)[1])
    names = [name for name in traces(text, "layers") if not name.endswith((" low", " high"))]
    assert names == ["counting edges alone", HOSTILE.replace("\u2028", " ")[:39] + "…", "tiny/sample"]
    assert set(data(text)) == {"template", "dark", "figures", "inspected_texts", "heads", "streams"}


def test_the_figures_of_layers_and_lags_hold_the_shares_and_their_errors(plain):
    text, profile = page(plain), stats.profile(plain, (), "rest")
    shares = stats.shares(plain, ("layer",), "rest").sel(side="self")
    shares["error"] = stats.uncertainty(shares.error, 5)
    for panel, stream in enumerate(STREAMS):
        layers, lags = traces(text, "layers", panel), traces(text, "lags", panel)
        share, error = (shares[name].sel(stream=stream).values for name in ("share", "error"))
        np.testing.assert_allclose(layers["self share"]["y"], share, rtol=1e-5)
        np.testing.assert_allclose(layers["self share low"]["y"], share - error, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layers["self share high"]["y"], share + error, rtol=1e-5)
        counted = stats.counts(plain, ("layer",), "rest").isel(lag=0)
        np.testing.assert_allclose(layers["counting edges alone"]["y"], counted, rtol=1e-5)
        np.testing.assert_allclose(lags["credit"]["y"], profile.share.sel(stream=stream).cumsum(), rtol=1e-5)
        np.testing.assert_allclose(
            lags["attention"]["y"], stats.attention_profile(plain, (), "rest").cumsum(), rtol=1e-5
        )
        np.testing.assert_allclose(lags["counting edges alone"]["y"], profile.counted.cumsum(), rtol=1e-5)


def test_the_views_of_the_lags_hold_shares_per_doubling_and_of_single_lags_with_their_errors(plain):
    figure = data(page(plain))["figures"]["lags"]
    for end, reader_of in (("", "rest"), (" all", "all")):
        profile = stats.profile(plain, (), reader_of)
        assert_views(figure, plain, profile.assign(error=stats.uncertainty(profile.error, 5)), end)


def assert_views(figure, plain, profile, end):
    """Hold the views whose names have an end to the shares of a profile."""
    first, last = plain.lag.values, plain.lag_end.values
    credit = [(index, trace) for index, trace in enumerate(figure["data"]) if trace.get("name") == "credit"]
    for (index, _), stream in zip(credit, STREAMS, strict=True):
        share, error = (profile[name].sel(stream=stream).values for name in ("share", "error"))
        doubling = figure["views"]["doubling" + end]["data"]
        np.testing.assert_allclose(as_shares(doubling[str(index)]["y"]), share / doublings(first, last), rtol=1e-5)
        wide = error / doublings(first, last)
        assert doubling[str(index)]["customdata"][3][1] == percent(share[3] / doublings(first, last)[3], wide[3])
        single = as_shares(figure["views"]["lag" + end]["data"][str(index)]["y"])
        right = share / (last - first + 1)
        np.testing.assert_allclose(np.array(single, dtype=float), np.where(right > 1e-3 / 64, right, np.nan), rtol=1e-5)
    assert figure["views"]["lag" + end]["layout"]["yaxis"]["type"] == "log"
    bands = [index for index, trace in enumerate(figure["data"]) if "fill" in trace]
    assert len(bands) == 3
    assert all(figure["views"]["lag" + end]["data"][str(index)]["visible"] is False for index in bands)


def test_the_error_of_an_added_up_share_is_that_of_the_sum(plain):
    lags = traces(page(plain), "lags", 2)
    credit = plain.profile_by_document.sum("layer").sel(stream="value", reader_of="rest").values.cumsum(-1)
    share, total = credit.sum(0) / credit[:, -1].sum(), credit[:, -1:]
    residual = credit - share * total
    documents = len(credit)
    error = np.sqrt(documents / (documents - 1) * (residual**2).sum(0)) / abs(total.sum())
    error = stats.uncertainty(error, documents)
    np.testing.assert_allclose(np.array(lags["credit high"]["y"]) - share, error, rtol=1e-3, atol=2e-6)
    assert lags["credit"]["customdata"][5] == ["0–5", percent(share[5], error[5])]


@pytest.mark.parametrize("seed", range(3))
def test_the_marked_lags_lie_on_the_line_at_the_first_share_above_their_level(seed):
    result = sample(seed=seed, context=256)
    reach = stats.reach(result, (), (0.5, 0.9), "rest")
    for panel, stream in enumerate(STREAMS):
        lags = traces(page(result), "lags", panel)
        line, marks = lags["credit"], next(trace for trace in lags.values() if trace.get("marker", {}).get("symbol"))
        lag = reach.lag.sel(quantity=f"{stream} credit").values
        np.testing.assert_allclose(marks["x"], np.sqrt((lag + 1) * (lag + 2)), rtol=1e-5)
        drawn = np.interp(np.log(marks["x"]), np.log(line["x"]), line["y"])
        octave = np.log(2) / 4  # the width of a bin: from here an even spread over lags bends away from the line
        largest = np.diff(line["y"]).max()
        np.testing.assert_allclose(marks["y"], drawn, atol=largest * octave / 8 + 1e-5)
        assert (np.array(marks["y"]) >= [0.5, 0.9]).all()


def test_a_page_draws_only_lags_that_were_measured_and_names_the_option_for_others(plain):
    coarse = sample(lags="self", model="coarse")
    text = page(coarse)
    assert {"map", "layers"} <= set(data(text)["figures"])
    assert not {"lags", "head", "reach"} & set(data(text)["figures"])
    assert "Only the self edge was told" in Reader(text).text
    assert "(--lags octaves)" in Reader(text).text
    assert "half within" not in Reader(text).text
    both = page(coarse, plain)
    assert "coarse: Only the self edge was told" in Reader(both).text
    assert {trace.get("name") for trace in traces(both, "lags").values()} >= {"tiny/sample"}
    assert "coarse" not in {trace.get("name") for trace in traces(both, "lags").values()}
    assert [len(head["x"]) for head in data(both)["heads"]] == [1, 6]
    assert "(--lags octaves)" not in Reader(page(plain)).text


def test_the_map_of_heads_holds_their_shares_and_marks_the_weak_ones(plain):
    text, shares = page(plain), stats.shares(plain, ("layer", "head"), "rest").sel(side="self")
    for panel, stream in enumerate(STREAMS):
        grey, coloured = traces(text, "map", panel).values()
        assert (grey["hoverinfo"], coloured["hoverongaps"]) == ("skip", True)
        weak = stats.weak_heads(plain, "rest").sel(stream=stream).values
        share = shares.share.sel(stream=stream).values
        np.testing.assert_allclose(
            np.array(coloured["z"], dtype=float), np.where(weak, np.nan, share_place(share)), rtol=1e-5
        )
        np.testing.assert_array_equal(np.array(grey["z"], dtype=float) == 1, weak)


def test_a_page_of_one_window_speaks_of_no_error_and_of_no_mean():
    text = page(sample(documents=1))
    assert "agreement" not in data(text)["figures"]
    assert {trace["name"] for trace in traces(text, "weights").values()} == {"one window"}
    read = Reader(text).text
    assert not re.search("greement|mean gradient|standard error of|Student|The band", read)
    assert "±" not in read
    assert "<dt>Standard error</dt>" not in text
    assert "In the\ngradient of the one window." in read
    assert "<dt>Standard error</dt>" in page(sample())


def test_the_page_says_that_counting_is_marked_on_the_colours_only_where_results_agree_in_it(plain):
    for results, marked in (([plain], True), ([plain, sample(seed=1)], True), ([plain, sample(context=32)], False)):
        text = page(*results)
        ticks = data(text)["figures"]["map"]["layout"]["coloraxis"]["colorbar"]["ticktext"]
        assert any("counting" in tick for tick in ticks) == marked
        assert ("is marked on it" in Reader(text).text) == marked


def test_the_page_defines_what_its_numbers_are_called(paid):
    text = page(paid)
    definitions = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text[text.index('<section id="how">') :], re.DOTALL))
    for name, words in {
        "Reach": "stay at a level",
        "What a window covers": "lags 0 to <i>w</i> − 1",
        "Group": "read one key and value",
        "Grey heads": f"less than {100 * stats.MIN_CREDIT:.0f} % of an equal part",
        "±": "half the 95 % interval",
    }.items():
        assert words in definitions[name]
    for windows, quantile in ((3, "4.3"), (7, "2.4")):
        assert f"{stats.confidence(1, windows):.1f}" == quantile
        assert quantile in definitions["±"]
    assert "first 4 positions" in definitions["Reach"]


def test_a_page_does_not_take_the_place_of_its_result(tmp_path, plain):
    result = save(plain, tmp_path / "run.nc").rename(tmp_path / "run.html")
    with pytest.raises(InputError, match="would take the place of the result"):
        report(result, tmp_path / "." / "run.html")
    assert load(result).identical(plain)


def test_packed_json_means_the_same():
    value = {"a": HOSTILE, "b": [1.5, None, "</script><!--"]}
    assert json.loads(gzip.decompress(base64.b64decode(packed_json(value)))) == value
    assert packed_json(value) == packed_json(value)
    with pytest.raises(ValueError, match="JSON compliant"):
        packed_json(float("nan"))


def test_the_page_names_no_other_computer(plain):
    text = page(plain, sample(seed=1)).replace(packed_plotly(), "")
    assert len(text) < 400_000
    text = re.sub(r'(?<=id="data">)[^<]*', lambda _: html.escape(Reader(text).json), text)  # as it is unpacked
    assert not re.findall(r"(?:https?:)?//\w", re.sub(r"(?m)//\s.*$", "", text))
    assert not re.findall(r"@import|url\(|<link|<base|\bfetch\(|XMLHttp", text)
    assert not any({"src", "href", "action"} & set(attrs) - {"href"} for _, attrs in Reader(text).tags)
    links = {attrs["href"] for _, attrs in Reader(text).tags if "href" in attrs}
    anchors = {f"#{attrs['id']}" for _, attrs in Reader(text).tags if "id" in attrs}
    assert {"#charts", "#lags", "#map", "#how"} <= links <= anchors


def test_the_page_runs_only_its_own_scripts(plain):
    read = Reader(page(plain))
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]
    kinds = [attrs.get("type") for tag, attrs in read.tags if tag == "script"]
    assert kinds == ["application/gzip", "application/gzip", None, None, None]
    for script in (plotly_script(), *read.scripts[2:]):
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_the_script_of_plotly_is_its_cartesian_bundle_of_the_version_that_draws_the_figures():
    """As in npm's plotly.js-cartesian-dist-min; with another version of plotly in constraints.txt, take its bundle."""
    code = plotly_script()
    assert f"plotly.js (cartesian - minified) v{get_plotlyjs_version()}" in code[:100]
    digest = "79542150855a52c567260e3137095dbe2b744e6d702a5cabe67da246942fba7a"
    assert hashlib.sha256(code.encode()).hexdigest() == digest


def test_a_page_is_below_two_megabytes(paid):
    assert len(page(paid).encode()) < 2e6


def test_the_script_of_plotly_is_in_the_page_once(plain):
    assert page(plain, plain, plain).count(packed_plotly()) == 1


def test_numbers_that_are_not_known_do_not_stop_the_page(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1] = np.nan
    broken["profile_by_document"][:, :, 2] = np.nan
    broken["credit"][:, :, 0] = np.nan
    assert traces(page(broken), "lags", 2)["credit"]["y"] == [None] * broken.sizes["lag"]
    assert traces(page(broken), "layers", 1)["self share"]["y"][0] is None
    smallest = sample(layers=1, heads=1, context=1, documents=1, lags="all", with_weights=False)
    for result in (broken, smallest, sample(lags="self", with_weights=False, missing_heads=2)):
        text = page(result).replace(packed_plotly(), "")
        assert not re.search(r"\bnan\b|NaN|Infinity", text.split("<script>")[0])
        assert "undefined" not in text.split("<script>")[0]


def test_every_result_has_a_name_of_its_own(plain):
    assert result_names([plain]) == ["tiny/sample"]
    assert result_names([plain, sample(text_name="other")]) == ["tiny/sample, sample text", "tiny/sample, other"]
    assert len(set(result_names([plain, plain, plain]))) == 3
    assert result_names([plain, plain], ["before", "after"]) == ["before · tiny/sample", "after · tiny/sample"]
    assert result_names([plain, plain], ["before", ""]) == [
        "tiny/sample, sample text (1)",
        "tiny/sample, sample text (2)",
    ]


def headings(frame):
    return [html.unescape(name) for name in re.findall("<h2>(.*?)</h2>", frame.html)]


def test_results_of_one_model_are_named_by_their_files_or_by_labels(tmp_path, plain):
    paths = [tmp_path / "before" / "run.nc", tmp_path / "after" / "run.nc", tmp_path / "after" / "other.nc"]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        save(plain, path)
    assert headings(report(paths[1:]))[:2] == ["run · tiny/sample", "other · tiny/sample"]
    assert headings(report(paths[:2]))[:2] == ["before/run · tiny/sample", "after/run · tiny/sample"]
    assert headings(report(paths[:2], labels=["plain", HOSTILE]))[:2] == ["plain", HOSTILE.replace("\u2028", " ")]
    assert headings(report({"first": plain, "second": paths[0]}))[:2] == ["first", "second"]
    assert "<h1>one run</h1>" in report({"one run": plain}).html
    for labels in (["a"], ["a", "a"], ["a", ""], ["a", "b", "c"]):
        with pytest.raises(InputError, match="expected 2 different labels"):
            report(paths[:2], labels=labels)
    with pytest.raises(InputError, match="at least one result"):
        report({})


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
