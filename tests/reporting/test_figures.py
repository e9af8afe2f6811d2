"""Laws of the figures: valid plotly figures, one palette, layouts that follow the width and differ in nothing else."""

import re
from importlib.resources import files

import numpy as np
import plotly.graph_objects as go
import pytest
from support.page_results import CHARTS, LOSS_CHARTS
from support.pages import Reader, data, page
from support.sample import sample

from posterity import palette
from posterity.reporting.charts import CHARTS as DRAWERS
from posterity.reporting.charts import READER_CHARTS, TRAINING_CHARTS, draw_charts
from posterity.reporting.page_figures import WIDTHS, find_changes
from posterity.reporting.panel_grid import FULL_WIDTH
from posterity.reporting.result_group import ResultGroup
from posterity.results.steps import join_steps


@pytest.fixture(scope="module")
def stepped():
    return join_steps({step: sample(seed=step, losses=True, parameters=("model.a",)) for step in (0, 5)})


@pytest.fixture(scope="module")
def figures(paid, stepped):
    """Every figure, of one result and of three."""
    priced = sample(prices="text")
    results = [paid], [stepped], [priced], [paid, stepped, sample(layers=2), priced]
    return [grid for group in map(ResultGroup.of, results) for grid in draw_charts(group).values()]


def test_every_chart_is_drawn_and_named(paid, stepped):
    prices = {name for name in DRAWERS if "price" in name}
    assert set(draw_charts(ResultGroup.of([paid]))) == {*CHARTS, *LOSS_CHARTS} == {*DRAWERS, *READER_CHARTS} - prices
    assert set(draw_charts(ResultGroup.of([sample(prices="text")]))) == {*CHARTS} | prices
    assert set(TRAINING_CHARTS) < set(draw_charts(ResultGroup.of([stepped])))
    assert set(draw_charts(ResultGroup.of([sample()]))) == set(CHARTS)


def test_every_figure_is_a_valid_one_of_plotly_at_every_width(figures):
    for grid in figures:
        for view in (grid, *grid.views.values()):
            for width in (FULL_WIDTH, *WIDTHS):
                figure = view.figure(width)  # plotly refuses an attribute that it does not know
                assert figure.layout.width == width
                assert figure.layout.title.text
                assert len({trace.xaxis for trace in figure.data}) == len(view.panels)


def test_panels_stand_in_columns_that_follow_the_width(figures):
    for grid in figures:
        heights = []
        for width in (FULL_WIDTH, *WIDTHS):
            layout = grid.layout(width)
            lefts = {layout[f"xaxis{number or ''}"]["domain"][0] for number in [None, *range(2, len(grid.panels) + 1)]}
            assert len(lefts) <= grid.columns
            assert width >= 540 or len(lefts) == 1
            heights.append(layout["height"])
        assert heights == sorted(heights)


def test_panels_that_share_an_axis_have_its_title_and_labels_once_a_row(paid):
    grid = draw_charts(ResultGroup.of([paid]))["layers"]
    wide, narrow = grid.layout(1040), grid.layout(340)
    assert [wide[axis]["title"]["text"] for axis in ("yaxis", "yaxis2", "yaxis3")] == ["self share", "", ""]
    assert [wide[axis].get("showticklabels", True) for axis in ("yaxis", "yaxis2", "yaxis3")] == [True, False, False]
    assert {narrow[axis]["title"]["text"] for axis in ("yaxis", "yaxis2", "yaxis3")} == {"self share"}
    assert len({wide[axis].get("matches") for axis in ("yaxis", "yaxis2", "yaxis3")} - {None}) == 1


def test_a_name_is_in_the_legend_once(figures):
    for grid in figures:
        names = [trace["name"] for trace in grid.traces if trace["showlegend"]]
        assert len(names) == len(set(names))


def test_a_percent_sign_stands_behind_a_space(figures, paid, stepped):
    percents = set()

    def collect(value):
        for entry in value.values() if isinstance(value, dict) else value:
            if isinstance(entry, dict | list | tuple):
                collect(entry)
            elif isinstance(entry, str) and "%" in entry.replace("%{", "{"):
                percents.add(entry)

    for grid in figures:
        for view in (grid, *grid.views.values()):
            collect(view.figure().to_plotly_json()["data"])
            collect(view.layout(FULL_WIDTH))
    assert {" %", "50 %", "%{y:.1f} %", "<b>50 % within</b>"} <= percents
    assert not [text for text in percents if re.search(r"[^ ]%(?!{)", text) or "%}" in text]
    for result in (paid, stepped):
        text = Reader(page(result)).text
        assert not re.findall(r".{20}\d%", text)


def test_every_colour_is_of_the_palette(figures):
    seen = set()

    def collect(value, key=""):
        if isinstance(value, dict):
            for name, entry in value.items():
                collect(entry, name)
        elif isinstance(value, list | tuple):
            for entry in value:
                collect(entry, key)
        elif isinstance(value, str) and "color" in key and value not in ("coloraxis", "rgba(0,0,0,0)"):
            seen.add(value[:7])

    for grid in figures:
        collect(grid.figure().to_plotly_json())
    assert len(seen) > 30
    assert seen <= set(palette.DARK)


def test_the_page_has_the_colours_of_the_palette():
    """The style of the page and the figures in it agree on paper, ink, self and others."""
    style = (files("posterity.reporting") / "assets" / "style.css").read_text()
    light, dark = (dict(re.findall(r"--(\w+): (#\w+);", style.split(":root {")[number])) for number in (1, 2))
    for name, colour in {
        "card": palette.PAPER,
        "ink": palette.INK,
        "soft": palette.SOFT,
        "accent": palette.OTHER,
    }.items():
        assert light[name] == colour
        assert dark[name] == palette.DARK[colour]
    assert dark["self"] == palette.DARK[palette.SELF]


def test_the_colour_of_a_layer_goes_from_the_first_to_the_last():
    colours = [palette.depth_colour(layer / 12) for layer in range(13)]
    assert len(set(colours)) == 13
    assert (colours[0], colours[-1]) == ("#e0b23c", "#2b3f9c")


@pytest.mark.parametrize(
    ("base", "other", "changes"),
    [
        ({"a": 1, "b": 2}, {"a": 1, "c": 3}, {"b": None, "c": 3}),
        ({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 5}}, {"a": {"c": 5}}),
        ({"a": [1, 2]}, {"a": [1, 3]}, {"a": [1, 3]}),
        ([{"a": 1}, {"a": 2}], [{"a": 1}, {"a": 3}], {"1": {"a": 3}}),
        ([{"a": 1}], [{"a": 1}, {"a": 3}], [{"a": 1}, {"a": 3}]),
        ({"a": 1}, {"a": 1}, {}),
    ],
)
def test_changes_turn_one_value_into_another(base, other, changes):
    assert find_changes(base, other) == changes
    assert changed(base, changes) == other


def changed(value, changes):
    """As theme.js reads changes."""
    if not isinstance(changes, dict):
        return changes
    items = dict(enumerate(value)) if isinstance(value, list) else dict(value or {})
    for key, change in changes.items():
        key = int(key) if isinstance(value, list) else key
        if change is None:
            del items[key]
        else:
            items[key] = changed(items.get(key), change)
    return list(items.values()) if isinstance(value, list) else items


def test_the_layouts_of_the_page_are_those_of_each_width(paid):
    grids = draw_charts(ResultGroup.of([paid]))
    for name, figure in data(page(paid))["figures"].items():
        for width, changes in zip(WIDTHS, figure["layouts"], strict=True):
            layout = changed(figure["layout"], changes)
            assert "title" not in layout
            right = grids[name].layout(width)
            assert go.Layout(layout).to_plotly_json().keys() == right.keys()
            assert (layout["width"], layout["height"]) == (width, right["height"])
            domains = [layout[axis]["domain"] for axis in right if axis.startswith("xaxis")]
            np.testing.assert_allclose(
                domains, [right[axis]["domain"] for axis in right if axis.startswith("xaxis")], atol=1e-5
            )


@pytest.mark.parametrize("asset", [*(files("posterity.reporting") / "assets").iterdir()], ids=lambda asset: asset.name)
def test_scripts_and_styles_have_short_lines_and_a_script_one_statement_on_each(asset):
    if asset.name.endswith((".js", ".css")):
        for line in asset.read_text().splitlines():
            assert len(line) <= 120
            code = re.sub(r'"[^"]*"|`[^`]*`|//.*', "", line)
            assert asset.name.endswith(".css") or code.count(";") <= 1 or "for (" in code, line
