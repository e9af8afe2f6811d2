"""Laws of the page of results: true, escaped, whole, and without any other computer."""

import base64
import hashlib
import html
import json
import re

import numpy as np
import pytest
from support.page_results import HOSTILE
from support.pages import Reader, data, page, traces
from support.sample import sample

from posterity.axes import STREAMS
from posterity.errors import InputError
from posterity.reporting.bins import doublings
from posterity.reporting.html import escaped_json, plotly_script
from posterity.reporting.report import report
from posterity.reporting.result_group import result_names
from posterity.results import stats
from posterity.results.files import load, save


def test_names_of_every_kind_show_as_text(hostile):
    read, reference = Reader(page(hostile)), Reader(page(sample(texts=["text"] * 5)))
    assert [tag for tag, _ in read.tags] == [tag for tag, _ in reference.tags]
    name = HOSTILE.replace("\u2028", " ")
    assert read.text.count(name) >= 6
    assert any(attrs.get("title") == name for _, attrs in read.tags)
    assert not any(name.startswith("on") for _, attrs in read.tags for name in attrs)


def test_the_data_of_the_page_is_json_that_no_parser_mistakes_for_markup(hostile, plain):
    text = page(hostile, plain)
    assert not re.search("[<>&\u2028\u2029]", Reader(text).json)
    names = [name for name in traces(text, "layers") if not name.endswith((" low", " high"))]
    assert names == ["counting edges alone", HOSTILE.replace("\u2028", " ")[:39] + "…", "tiny/sample"]
    assert set(data(text)) == {"template", "dark", "figures", "inspected_texts"}


def test_the_figures_of_layers_and_lags_hold_the_shares_and_their_errors(plain):
    text, shares, profile = page(plain), stats.shares(plain, ("layer",)).sel(side="self"), stats.profile(plain)
    width = doublings(plain.lag.values, plain.lag_end.values)
    for panel, stream in enumerate(STREAMS):
        layers, lags = traces(text, "layers", panel), traces(text, "lags", panel)
        share, error = (shares[name].sel(stream=stream).values for name in ("share", "error"))
        np.testing.assert_allclose(layers["self share"]["y"], share, rtol=1e-5)
        np.testing.assert_allclose(layers["self share low"]["y"], share - error, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layers["self share high"]["y"], share + error, rtol=1e-5)
        counted = stats.counts(plain, ("layer",)).isel(lag=0)
        np.testing.assert_allclose(layers["counting edges alone"]["y"], counted, rtol=1e-5)
        np.testing.assert_allclose(lags["credit"]["y"], profile.share.sel(stream=stream) / width, rtol=1e-5)
        np.testing.assert_allclose(lags["attention"]["y"], stats.attention_profile(plain) / width, rtol=1e-5)
        np.testing.assert_allclose(lags["counting edges alone"]["y"], profile.counted / width, rtol=1e-5)


def test_the_views_of_the_lags_hold_single_shares_and_sums(plain):
    figure, profile = data(page(plain))["figures"]["lags"], stats.profile(plain)
    credit = [(index, trace) for index, trace in enumerate(figure["data"]) if trace.get("name") == "credit"]
    for (index, _), stream in zip(credit, STREAMS, strict=True):
        share = profile.share.sel(stream=stream).values
        single = figure["views"]["lag"]["data"][str(index)]["y"]
        right = share / (plain.lag_end - plain.lag + 1).values
        np.testing.assert_allclose(np.array(single, dtype=float), np.where(right > 1e-3 / 64, right, np.nan), rtol=1e-5)
        np.testing.assert_allclose(figure["views"]["sum"]["data"][str(index)]["y"], share.cumsum(), rtol=1e-5)
    assert figure["views"]["lag"]["layout"]["yaxis"]["type"] == "log"
    bands = [index for index, trace in enumerate(figure["data"]) if "fill" in trace]
    assert len(bands) == 3
    for view in figure["views"].values():
        assert all(view["data"][str(index)]["visible"] is False for index in bands)


def test_the_map_of_heads_holds_their_shares_and_marks_the_weak_ones(plain):
    text, shares = page(plain), stats.shares(plain, ("layer", "head")).sel(side="self")
    for panel, stream in enumerate(STREAMS):
        grey, coloured = traces(text, "map", panel).values()
        weak = stats.weak_heads(plain).sel(stream=stream).values
        share = shares.share.sel(stream=stream).values
        np.testing.assert_allclose(np.array(coloured["z"], dtype=float), np.where(weak, np.nan, share), rtol=1e-5)
        np.testing.assert_array_equal(np.array(grey["z"], dtype=float) == 1, weak)
        for trace, mask in ((grey, weak), (coloured, ~weak)):
            assert [[cell is not None for cell in row] for row in trace["customdata"]] == mask.tolist()
        words = next(cell for row in coloured["customdata"] for cell in row if cell)
        assert re.fullmatch(r"-?\d+\.\d ± \d+\.\d %", words[0])


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
    read = Reader(page(plain))
    policy = next(attrs["content"] for tag, attrs in read.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-inline" not in policy.split("style-src")[0]
    scripts = [script for script in read.scripts if script != read.json]
    assert len(scripts) == 2
    for script in scripts:
        assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy


def test_the_script_of_plotly_is_in_the_page_once(plain):
    assert page(plain, plain, plain).count(plotly_script()) == 1


def test_numbers_that_are_not_known_do_not_stop_the_page(plain):
    broken = plain.copy(deep=True)
    broken["credit_by_document"][0, 0, 0, 1, 0, 0] = np.nan
    broken["profile_by_document"][:, :, 2] = np.nan
    broken["credit"][:, :, 0] = np.nan
    assert traces(page(broken), "lags", 2)["credit"]["y"] == [None] * broken.sizes["lag"]
    assert traces(page(broken), "layers", 1)["self share"]["y"][0] is None
    smallest = sample(layers=1, heads=1, context=1, documents=1, lags="all", with_weights=False)
    for result in (broken, smallest, sample(lags="self", with_weights=False, missing_heads=2)):
        text = page(result).replace(plotly_script(), "")
        assert not re.search(r"\bnan\b|NaN|Infinity", text.split("<script>")[0])
        assert "undefined" not in text.split("<script>")[0]


def test_every_result_has_a_name_of_its_own(plain):
    assert result_names([plain]) == ["tiny/sample"]
    assert result_names([plain, sample(text_name="other")]) == ["tiny/sample, sample text", "tiny/sample, other"]
    assert len(set(result_names([plain, plain, plain]))) == 3


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
