"""What a page says of a cell of a map, or of a point of a line, when the pointer is on it."""

import numpy as np
import pytest
from support.pages import browser, opened
from support.sample import sample

from posterity.axes import STREAMS
from posterity.reporting.report import report
from posterity.results import stats
from posterity.results.formatting import percent

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
    shares, weak = stats.shares(result, ("layer", "head")).sel(side="self"), stats.weak_heads(result)
    reach = stats.effective_horizon(result, ("layer", "head"))
    assert np.isposinf(reach.values).any()
    with browser() as (tab, heard):
        opened(tab, report(result, tmp_path / "report.html"))
        for panel, stream in ((0, "query"), (2, "value")):
            for layer, head in ((0, 0), (0, 1), (1, 2), (2, 0), (2, 3)):
                cell = {"layer": layer, "head": head, "stream": stream}
                for chart in ("map", "head_horizons"):
                    text = hovered(tab, chart, panel, head, layer)
                    if (layer, head) == (2, 3):
                        assert f"layer {layer}, head {head}" not in text or "no such head" in text
                        continue
                    assert f"layer {layer}, head {head}" in text
                    assert ("too small or too uncertain" in text) == bool(weak.sel(cell)), (chart, cell, text)
                share = [float(shares[name].sel(cell)) for name in ("share", "error")]
                if (layer, head) != (2, 3):
                    assert percent(*share) in hovered(tab, "map", panel, head, layer)
        assert STREAMS == ("query", "key", "value")
        assert heard == []
