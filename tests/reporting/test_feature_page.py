"""What `posterity.features` returned as a table and a page: every number is that of the Dataset, names are escaped."""

import io

import numpy as np
import pytest
from rich.console import Console
from support.pages import browser, opened
from support.sample_kinds import sample_features

import posterity
from posterity.axes import FEATURE_PARTS
from posterity.errors import InputError
from posterity.results.feature_parts import direction_pulls, part_shares
from posterity.results.formatting import percent


def printed(features, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    posterity.summary(features, console)
    return console.file.getvalue()


def test_shares_are_those_of_the_gradients_and_sum_to_one():
    features = sample_features(documents=9)
    gram = features.gram.values  # direct, pre-cached, shared, and their three inner products
    with_whole = np.stack([
        gram[..., 0] + gram[..., 3] + gram[..., 4], gram[..., 1] + gram[..., 3] + gram[..., 5],
        gram[..., 2] + gram[..., 4] + gram[..., 5],
    ], -1)  # fmt: skip
    shares = part_shares(features)
    np.testing.assert_allclose(shares.share, with_whole.sum(0) / with_whole.sum((0, 2))[:, None])
    np.testing.assert_allclose(shares.share.sum("part"), 1)
    cosine = gram[..., 3] / np.sqrt(gram[..., 0] * gram[..., 1])
    np.testing.assert_allclose(shares.cosine, cosine.mean(0))
    np.testing.assert_allclose(shares.cosine_error, cosine.std(0, ddof=1) / 3)


def test_pulls_are_means_over_documents():
    features = sample_features(documents=9)
    pulls, pull = direction_pulls(features), features.pull.values
    np.testing.assert_allclose(pulls.later_share, pull[..., 3].sum(0) / (pull[..., 2] + pull[..., 3]).sum(0))
    np.testing.assert_allclose(pulls.own, pull[..., 0].mean(0))
    np.testing.assert_allclose(pulls.later_error, pull[..., 1].std(0, ddof=1) / 3)
    np.testing.assert_allclose(pulls.cosine, (pull[..., 4] / np.sqrt(pull[..., 2] * pull[..., 3])).mean(0))
    np.testing.assert_allclose(pulls.influence, features.influence.mean("document"))


def test_a_direction_without_a_pull_has_no_cosine():
    features = sample_features()
    features["pull"] = features.pull * 0
    assert np.isnan(direction_pulls(features).cosine).all()
    assert "nan" not in printed(features)


def test_the_table_has_every_share():
    features = sample_features(documents=9)
    text, shares = printed(features), part_shares(features)
    assert "tiny/sample: 9 windows of 64 tokens, positions 0 to 62" in text
    for layer in shares.layer.values:
        for part in FEATURE_PARTS:
            at = shares.sel(layer=layer, part=part)
            assert percent(float(at.share), float(at.error), 9) in text
    assert "step along pre-cached" in text
    assert "step along" not in printed(sample_features(influence=False))
    assert "own pull" not in printed(sample_features(influence=False).drop_dims(["direction", "pull_term"]))
    assert "position 7" in printed(features.assign_attrs(positions="7:8"))
    assert max(map(len, printed(features, 80).splitlines())) <= 80


def test_a_long_list_of_directions_ends_early():
    features = sample_features(influence=False)
    many = features.isel(direction=[0] * 40).assign_coords(direction=[f"layers.0[{row}]" for row in range(40)])
    assert "layers.0[29]" in printed(many)
    assert "layers.0[30]" not in printed(many)
    assert "10 more directions in the file" in printed(many)


def test_the_page_has_tables_and_a_chart_and_escapes_names(tmp_path):
    features = sample_features()
    features["direction"] = ["<script>alert(1)</script>", "b", "c"]
    page = posterity.report(features, tmp_path / "page.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert 'data-chart="parts"' in page
    assert "What a step along each part does" in page
    posterity.save(features, tmp_path / "f.nc")
    assert posterity.report(tmp_path / "f.nc", tmp_path / "again.html").read_text() == page
    assert "Pulls on directions" not in posterity.report(features.drop_dims(["direction", "pull_term", "part"])).html


@pytest.mark.slow
def test_the_chart_is_drawn_in_a_browser(tmp_path):
    with browser(viewport={"width": 420, "height": 900}) as (tab, heard):
        opened(tab, posterity.report(sample_features(), tmp_path / "page.html"))
        assert tab.locator("#parts .legendtext").all_text_contents() == [*FEATURE_PARTS]
        assert tab.evaluate("document.documentElement.scrollWidth") <= 420
        assert heard == []


def test_the_tidy_table_has_every_number():
    frame = posterity.table(sample_features(documents=9), "features")
    assert len(frame) == 2 * 3 + 2 + 4 * 3 + 3 * 3
    shares = frame[frame.quantity == "share of the gradient of the parameters"]
    assert shares.groupby("layer").value.sum().tolist() == pytest.approx([1, 1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.drop_vars("loss"), "it has no 'loss'"),
        (lambda x: x.drop_vars("direction_layer"), "it has no 'direction_layer'"),
        (lambda x: x.drop_vars("pull"), "it has an influence without directions"),
        (lambda x: x.assign_coords(part=["direct", "shared", "pre-cached"]), "its 'part' is not direct"),
        (lambda x: x.isel(document=slice(0)), "it holds nothing"),
        (lambda x: x.assign(gram=x.gram * np.nan), "it holds a number that is not finite"),
        (lambda x: x.assign(loss=x.loss.astype(int)), "'loss' is int64 by document"),
        (lambda x: x.drop_attrs().assign_attrs(kind="features"), "it does not say its"),
    ],
)
def test_what_is_nothing_of_features_is_refused(change, message):
    for function in (posterity.summary, lambda x: posterity.table(x, "features"), posterity.report):
        with pytest.raises(InputError, match=message):
            function(change(sample_features()))
