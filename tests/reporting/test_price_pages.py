"""The charts of prices on a page: their numbers are those of `posterity.stats`, and they are there only if measured."""

import numpy as np
import pytest
from support.tiny import tiny, tokens

import posterity
from posterity.reporting.price_charts import draw_pair_prices, draw_price_positions, draw_window_prices
from posterity.reporting.result_group import ResultGroup
from posterity.reporting.tables import chart_tables
from posterity.results import stats
from posterity.results.formatting import UNKNOWN, value_with_error


@pytest.fixture(scope="module")
def priced():
    options = {"context": 12, "prices": "text", "progress": False}
    return posterity.measure(tiny("mistral"), None, tokens(8), **options)  # a window of 5


def test_maps_show_the_prices_of_stats(priced):
    group = ResultGroup.of([priced])
    windows = stats.window_prices(priced).price
    (panel,) = draw_window_prices(group).panels
    (heatmap,) = panel.traces
    z = np.array(heatmap.z, dtype=float)
    known = ~np.isnan(z)
    np.testing.assert_allclose(10 ** z[known], windows.values[known])
    assert known[:, :3].all()  # windows of 1, 2, 4
    assert not known[:, 3].any()  # 8: the layers look back no further than 5
    (panel,) = draw_pair_prices(group).panels
    pairs = stats.prices(priced, ("layer", "kv_head"))
    np.testing.assert_allclose(10 ** np.array(panel.traces[0].z, dtype=float), pairs.price.values)
    text = value_with_error(float(pairs.price[1, 0]), float(pairs.error[1, 0]), windows=8)
    assert panel.traces[0].customdata[1][0] == text
    (panel,) = draw_price_positions(group).panels
    by_position = priced.price.sum(("layer", "group")).values
    share = np.where(by_position > 0, by_position / by_position.sum(), np.nan)  # no place on a log scale
    np.testing.assert_allclose(np.array(panel.traces[0].y, dtype=float), share)


def test_tables_have_the_same_numbers(priced):
    tables = chart_tables(priced, ("all",))
    prices = stats.window_prices(priced)
    (table,) = tables["window_prices"]
    assert table.head == ("layer", "1", "2", "4", "8")
    assert table.rows[2][2][1] == value_with_error(float(prices.price[2, 1]), float(prices.error[2, 1]), windows=8)
    assert all(row[2][3] == UNKNOWN for row in table.rows)  # no layer looks back further than 5
    (table,) = tables["pair_prices"]
    whole = stats.prices(priced, ("layer",))
    assert table.rows[0][2][0] == value_with_error(float(whole.price[0]), float(whole.error[0]), windows=8)
    assert "pair_prices" not in chart_tables(priced.drop_vars(["price", "price_by_document"]), ("all",))


def test_the_page_has_the_section_only_where_prices_were_measured(priced):
    page = posterity.report(priced).html
    assert 'id="prices"' in page
    assert 'href="#prices"' in page
    without = [name for name in priced.variables if "price" in str(name) or name == "window"]
    assert 'id="prices"' not in posterity.report(priced.drop_vars(without)).html
    both = posterity.report({"one": priced, "two": priced}).html
    assert both.count('data-chart="window_prices"') == 1
