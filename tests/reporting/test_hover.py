"""What a page says of a cell of a map, or of a point of a line, when the pointer is on it."""

import numpy as np
import pytest
from support.pages import browser, opened
from support.sample import sample

from posterity.axes import STREAMS
from posterity.reporting.html import tied
from posterity.reporting.report import report
from posterity.reporting.result_table import credit_portions
from posterity.results import stats
from posterity.results.formatting import horizon_text, percent
from posterity.results.ratios import sum_readers

CELL = """([chart, panel, x, y]) => {
    const place = document.querySelector(`[data-chart="${chart}"]`);
    place.scrollIntoView({behavior: "instant", block: "center"});
    const suffix = panel ? panel + 1 : "";
    const [across, down] = ["xaxis", "yaxis"].map(name => place._fullLayout[name + suffix]);
    const box = place.querySelector(".main-svg").getBoundingClientRect();
    return [box.x + across._offset + across.d2p(x), box.y + down._offset + down.d2p(y)];
}"""


def hovered(tab, chart, panel, x, y):
    """Return the text of the label at a point of a panel; "" if there is none."""
    tab.mouse.move(2, 2)
    tab.wait_for_timeout(30)
    left, top = tab.evaluate(CELL, [chart, panel, x, y])
    tab.mouse.move(left - 2, top - 2)
    tab.mouse.move(left, top)
    tab.wait_for_timeout(150)
    return " ".join(tab.locator(f'[data-chart="{chart}"] .hoverlayer text').all_text_contents())


@pytest.mark.slow
def test_a_cell_of_the_maps_says_its_own_share_and_only_a_weak_one_that_it_is_weak(tmp_path):
    result = sample(layers=3, heads=4, horizons=(1, 4, 16), missing_heads=1)
    result["credit_by_document"][:, 0, 1] *= 1e-3  # weak in every stream
    shares = stats.shares(result, ("layer", "head"), "rest").sel(side="self")
    weak = stats.weak_heads(result, "rest")
    portions = credit_portions(result, "rest")
    reach = stats.effective_horizon(result, ("layer", "head"), "rest")
    assert np.isposinf(reach.values).any()
    with browser() as (tab, heard):
        opened(tab, report(result, tmp_path / "report.html"))
        for panel, stream in ((0, "query"), (2, "value")):
            for layer, head in ((0, 0), (0, 1), (1, 2), (2, 3)):
                cell = {"layer": layer, "head": head, "stream": stream}
                missing = (layer, head) == (2, 3)
                for chart in ("map", "head_horizons"):
                    text = hovered(tab, chart, panel, head, layer)
                    assert f"layer {layer}, head {head}" in text
                    assert ("no such head" in text) == missing
                    assert ("too small or too uncertain" in text) == (not missing and bool(weak.sel(cell)))
                    if missing:
                        continue
                    text = text.replace("\u00a0", " ").replace("−", "-")
                    if chart == "map":
                        share = percent(*(float(shares[name].sel(cell)) for name in ("share", "error")), 5)
                        assert f"self share {share}" in text
                        assert f"credit {float(portions.sel(cell)):.2f} of an equal part" in text
                    else:
                        assert f"effective horizon {horizon_text(float(reach.sel(cell)), 1, 16)}" in text
        tab.get_by_label("counted").check()
        shares = stats.shares(result, ("layer", "head")).sel(side="self", layer=1, head=2, stream="value")
        words = percent(float(shares.share), float(shares.error), 5)
        tab.wait_for_timeout(300)
        assert words in hovered(tab, "map", 2, 2, 1).replace("\u00a0", " ")
        assert heard == []


@pytest.mark.slow
def test_a_cell_of_the_map_that_is_clicked_shows_its_head_and_the_fields_do_so_without_a_pointer(tmp_path):
    result = sample(layers=3, heads=4, losses=True, horizons=(1, 4, 16))
    with browser() as (tab, heard):
        opened(tab, report(result, tmp_path / "report.html"))
        left, top = tab.evaluate(CELL, ["map", 1, 2, 1])
        tab.mouse.click(left, top)
        assert_head(tab, result, 1, 2)
        tab.locator("#head-choice [name=layer]").fill("2")
        assert_head(tab, result, 2, 2)
        tab.locator("#head-choice [name=head]").focus()
        tab.keyboard.press("ArrowUp")
        assert_head(tab, result, 2, 3)
        tab.get_by_label("counted").check()
        assert_head(tab, result, 2, 3, "all")
        assert heard == []


@pytest.mark.slow
def test_one_weak_head_is_marked_and_a_head_that_does_not_exist_is_told(tmp_path):
    result = sample(layers=3, heads=4, missing_heads=1)
    result["credit_by_document"].loc[{"layer": 0, "head": 1, "stream": "key"}] *= 1e-3  # weak in one stream
    weak = stats.weak_heads(result, "rest")
    assert weak.sel(layer=0, head=1).values.tolist() == [False, True, False]
    assert not weak.sel(layer=0, head=2).any()
    with browser() as (tab, heard):
        opened(tab, report(result, tmp_path / "report.html"))
        for layer, head, names in ((0, 1, ["query", "key †", "value"]), (0, 2, [*STREAMS]), (2, 3, [*STREAMS])):
            tab.locator("#head-choice [name=layer]").fill(str(layer))
            tab.locator("#head-choice [name=head]").fill(str(head))
            assert tab.locator("#head-numbers th[scope=col]").all_inner_texts() == names
            assert tab.locator("#head-weak").is_visible() == ("key †" in names)
            assert tab.locator("#head-range").inner_text() == "layers 0 to 2, heads 0 to 3"
        tab.locator("#head-choice [name=layer]").fill("3")
        told = tab.locator("#head-range.warning").inner_text()
        assert told.startswith("no such head: there are layers 0 to 2, heads 0 to 3")
        assert tab.locator("#head-numbers caption").inner_text() == "Layer 2, head 3: no such head"
        tab.locator("#head-choice [name=layer]").fill("1")
        assert tab.locator("#head-range.warning").count() == 0
        curves = tab.evaluate("page.chosen('head').data.map(({y}) => y.at(-1))")
        assert curves == pytest.approx([100] * 4, abs=1e-2)
        assert heard == []


def assert_head(tab, result, layer, head, reader_of="rest"):
    """Hold the numbers and the curves of one head on the page to those of the result."""
    cell = {"layer": layer, "head": head}
    tab.locator("#head-numbers caption", has_text=f"Layer {layer}, head {head}").wait_for()
    rows = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in tab.locator("#head-numbers tr:has(th[scope=row])").all()
    }
    shares = stats.shares(result, ("layer", "head"), reader_of).sel(side="self", **cell)
    assert rows["self share"] == words(shares)
    losses = stats.loss_shares(result, ("layer", "head"), reader_of).sel(part="own", **cell)
    assert rows["own loss"] == ["–", *words(losses)]
    traces = tab.evaluate("page.chosen('head').data.map(({name, y}) => [name, y])")
    assert [name for name, _ in traces] == ["attention", *STREAMS]
    credit = sum_readers(result.credit, reader_of).sel(stream="value", **cell)
    for _, share in traces:
        assert share[-1] == pytest.approx(100, abs=1e-2)
    octave = int((result.lag_end == 6).values.argmax())
    assert traces[3][1][2] == pytest.approx(float(100 * credit[: octave + 1].sum() / credit.sum()), abs=1e-2)


def words(shares):
    """Return shares with their errors as the page writes them."""
    pairs = zip(shares.share.values.tolist(), shares.error.values.tolist(), strict=True)
    return [tied(percent(*pair, 5)) for pair in pairs]
