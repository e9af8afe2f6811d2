"""A plot shows the numbers of `posterity.stats` and nothing of its own: its artists' data are read back."""

import inspect
import itertools
import re

import matplotlib
import numpy as np
import pytest
from support.sample import sample
from support.sample_kinds import earlier_version, sample_audit, sample_features

matplotlib.use("agg")

import matplotlib.pyplot as plt
from matplotlib.collections import PolyCollection, QuadMesh
from matplotlib.colors import to_hex

from posterity import palette
from posterity.axes import FEATURE_PARTS, STREAMS
from posterity.errors import InputError
from posterity.palette import COUNT, EMPTY, INK, LATE, OTHER, SELF, SERIES, STREAM
from posterity.plotting import plot
from posterity.results import stats
from posterity.results.feature_parts import part_shares
from posterity.results.formatting import percent
from posterity.results.steps import join_steps

LAYERS = ("layer",)
WINDOWS = 5  # of `sample`
TOKENS = ["The", " cost", " is", " $5", " or", "", " \u4e2d", " $6", "."]


@pytest.fixture(autouse=True)
def _no_figure_is_left():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def result():
    return sample(losses=True, horizons=(1, 4, 16), missing_heads=1)


@pytest.fixture(scope="module")
def inspected():
    return sample(losses=True, context=len(TOKENS), tokens=TOKENS, documents=1)


def assert_lines(ax, expected):
    """Compare the lines of a legend, and the bands around them, with x, value and standard error by label."""
    lines = {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}
    assert set(lines) == set(expected)
    bands = {to_hex(band.get_facecolor()[0]): band for band in ax.collections if isinstance(band, PolyCollection)}
    for label, (x, value, error) in expected.items():
        np.testing.assert_array_equal(lines[label].get_xdata(), x)
        np.testing.assert_array_equal(lines[label].get_ydata(), value)
        if error is None:
            continue
        points = bands.pop(to_hex(lines[label].get_color())).get_paths()[0].vertices
        half = stats.uncertainty(error, WINDOWS)
        for bound in (value - half, value + half):
            for point in zip(np.asarray(x, float), bound.values, strict=True):
                assert np.isclose(points, point, rtol=1e-12, atol=1e-15).all(1).any()
    assert not bands


def shown(mesh, shape):
    return mesh.get_array().filled(np.nan).reshape(shape)


READERS = [None, "all", "first"]  # None: the rest
WORDS = {None: "\nwithout the first 4 positions", "first": "\nthe first 4 positions alone", "all": ""}


@pytest.mark.parametrize("reader_of", READERS)
@pytest.mark.parametrize("stream", ["query", "value"])
def test_the_map_shows_every_reported_head_and_marks_the_others(result, stream, reader_of):
    ax = plot.heads(result, stream=stream, reader_of=reader_of)
    weak_cells, cells = [mesh for mesh in ax.collections if isinstance(mesh, QuadMesh)]
    shares = stats.shares(result, ("layer", "head"), reader_of or "rest").sel(side="self", stream=stream)
    weak = stats.weak_heads(result, reader_of or "rest").sel(stream=stream) | (shares.error > stats.MAX_ERROR)
    np.testing.assert_array_equal(shown(cells, weak.shape), shares.share.where(~weak))
    existing = stats.existing_heads(result)
    np.testing.assert_array_equal(np.isfinite(shown(weak_cells, weak.shape)), weak & existing)
    assert to_hex(weak_cells.cmap(0.5)) == EMPTY
    assert ax.get_xlabel() == f"head{WORDS[reader_of]}"


def test_the_colours_of_a_map_have_room_for_small_shares_as_those_of_the_page_have():
    norm = plot.heads(sample()).collections[1].norm
    places = [palette.share_place(share) for share in np.linspace(-0.2, 1.2, 60)]
    np.testing.assert_allclose(norm(np.linspace(-0.2, 1.2, 60)), places, rtol=1e-12)
    assert norm(0.5) == pytest.approx(0.5)
    assert norm(0.15) - norm(0) > 0.15 * 1.5
    np.testing.assert_allclose(norm.inverse(norm(np.linspace(0, 1, 11))), np.linspace(0, 1, 11), atol=1e-12)
    assert [norm(share) for share in (-0.5, 1.5)] == [0, 1]


@pytest.mark.parametrize("reader_of", READERS)
def test_the_share_by_counting_is_marked_on_the_colours_of_a_map(result, reader_of):
    ax = plot.heads(result, reader_of=reader_of)
    counted = float(stats.counts(result, (), reader_of or "rest").isel(lag=0))
    (bar,) = ax.child_axes
    (mark,) = [line for line in bar.lines if line.get_marker() == ">"]
    np.testing.assert_allclose(mark.get_ydata(), counted)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert f"edges, counted: {percent(counted)}" in labels


@pytest.mark.parametrize("reader_of", READERS)
def test_lags_are_added_up(result, reader_of):
    profile = stats.cumulative_profile(result, (), reader_of or "rest")
    lag = result.lag_end
    expected = {f"{s} credit": (lag, *(profile[n].sel(stream=s) for n in ("share", "error"))) for s in STREAMS}
    expected |= {"attention": (lag, profile.attention, None), "edges, counted": (lag, profile.counted, None)}
    ax = plot.lags(result, reader_of=reader_of)
    assert_lines(ax, expected)
    assert ax.get_xlabel() == f"lag (tokens){WORDS[reader_of]}"


def test_two_windows_have_no_band():
    assert not plot.lags(sample(documents=2)).collections


@pytest.mark.parametrize(("stream", "level"), [("key", 0.5), ("value", 0.9)])
def test_the_reach_shows_attention_mass_and_credit(result, stream, level):
    reach = stats.reach(result, LAYERS, (level,)).sel(level=level)
    lines = {
        quantity: (result.layer, reach.lag.sel(quantity=quantity), reach.error.sel(quantity=quantity))
        for quantity in ("attention", f"{stream} mass", f"{stream} credit")
    }
    ax = plot.reach(result, stream=stream, level=level)
    for label, (x, lag, error) in lines.items():
        (line,) = (line for line in ax.get_lines() if line.get_label() == label)
        np.testing.assert_array_equal(line.get_xdata(), x)
        np.testing.assert_array_equal(line.get_ydata(), lag)
        points = np.concatenate([band.get_paths()[0].vertices for band in ax.collections])
        half = stats.uncertainty(error, WINDOWS)
        for bound in (lag - half, lag + half):
            assert {*zip(x.values.astype(float), bound.values, strict=True)} <= {*map(tuple, points)}
    assert ax.get_ylabel() == f"lag of {100 * level:g} % (tokens)"


def test_sinks_show_credit_and_attention_at_the_first_positions(result):
    shares = stats.first_share(result, LAYERS)
    expected = {f"{s} credit": (result.layer, shares.share.sel(stream=s), shares.error.sel(stream=s)) for s in STREAMS}
    expected["attention"] = (result.layer, stats.first_attention(result, LAYERS), None)
    ax = plot.sinks(result)
    assert_lines(ax, expected)
    assert ax.get_ylabel() == "share at the first 4 positions"


def test_a_file_of_an_earlier_version_is_drawn_as_a_whole(result):
    earlier = earlier_version(result)
    shares = stats.first_position(earlier, LAYERS)
    expected = {
        f"{s} credit": (result.layer, shares.share.sel(stream=s), shares.error.sel(stream=s)) for s in STREAMS[1:]
    }
    expected["mean attention weight"] = (result.layer, stats.attention_first(earlier, LAYERS), None)
    assert_lines(plot.sinks(earlier), expected)
    for name in ("lags", "heads", "losses", "horizon"):
        assert "first" not in getattr(plot, name)(earlier).get_xlabel()
    with pytest.raises(InputError, match=r"tells first keys apart, for reader_of='rest'.*: measure again"):
        plot.lags(earlier, reader_of="rest")
    with pytest.raises(InputError, match="measure with this version of posterity"):
        plot.reach(earlier)


def test_the_attention_on_the_first_keys_is_theirs_over_all(result):
    for by in ((), LAYERS, ("layer", "head")):
        attention = result.attention.where(stats.existing_heads(result), 0).sum("lag")
        summed = attention.sum([dim for dim in ("layer", "head") if dim not in by])
        right = summed.sel(reader_of="first") / summed.sum("reader_of")
        np.testing.assert_allclose(stats.first_attention(result, by), right, rtol=1e-12)


@pytest.mark.parametrize("reader_of", READERS)
@pytest.mark.parametrize("written", ["key", "value"])
def test_losses_show_the_three_parts(result, written, reader_of):
    shares = stats.loss_shares(result, LAYERS, reader_of or "rest").sel(written=written)
    labels = {"own loss": "own", "later, self edge": "self later", "later, future edges": "future"}
    expected = {
        label: (result.layer, shares.share.sel(part=part), shares.error.sel(part=part))
        for label, part in labels.items()
    }
    assert_lines(plot.losses(result, written=written, reader_of=reader_of), expected)


@pytest.mark.parametrize("reader_of", READERS)
def test_the_horizon_plot_shows_the_curve(result, reader_of):
    curve = stats.horizon_curve(result, (), reader_of or "rest")
    expected = {s: (result.horizon, curve.share.sel(stream=s), curve.error.sel(stream=s)) for s in STREAMS}
    assert_lines(plot.horizon(result, reader_of=reader_of), expected)


@pytest.mark.parametrize("layer", [None, 2])
def test_the_matrix_shows_each_loss_against_each_position(inspected, layer):
    ax = plot.matrix(inspected, written="key", layer=layer)
    matrix = stats.loss_matrix(inspected, () if layer is None else LAYERS).sel(written="key")
    matrix = matrix if layer is None else matrix.sel(layer=layer)
    np.testing.assert_array_equal(shown(ax.collections[0], matrix.shape), matrix)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert labels == ["The", "·cost", "·is", r"·\$5", "·or", "5", "6", r"·\$6"]  # the last token has no loss
    ax.figure.canvas.draw()  # a missing glyph would be a warning, and mathematics an error


def test_the_shares_of_all_losses_sum_to_one(inspected):
    for by in ((), LAYERS):
        matrix = stats.loss_matrix(inspected, by)
        known = matrix.notnull().any("loss_position")
        np.testing.assert_allclose(matrix.sum("loss_position").where(known, 1), 1, rtol=1e-12)
        assert known.mean() > 0.8
        assert (matrix.isnull() | (matrix.loss_position >= matrix.position)).all()
    total = inspected.inspect_credit.sum("layer").isel(loss_position=slice(-1), position=slice(-1))
    right = total / total.sum("loss_position")
    matrix = stats.loss_matrix(inspected)
    np.testing.assert_allclose(matrix.values[matrix.notnull()], right.values[matrix.notnull()], rtol=1e-12)


def test_the_cumulative_profile_is_the_profile_added_up(result):
    for by, reader_of in itertools.product(((), LAYERS), ("all", "first", "rest")):
        cumulative, profile = (
            function(result, by, reader_of) for function in (stats.cumulative_profile, stats.profile)
        )
        np.testing.assert_allclose(cumulative.share, profile.share.cumsum("lag"), rtol=1e-9)
        np.testing.assert_allclose(cumulative.counted, profile.counted.cumsum("lag"))
        np.testing.assert_allclose(cumulative.error.isel(lag=0), profile.error.isel(lag=0), rtol=1e-9)
        np.testing.assert_allclose(cumulative.share.isel(lag=-1), 1)
        np.testing.assert_allclose(cumulative.error.isel(lag=-1), 0, atol=1e-9)


@pytest.mark.parametrize(("clause", "units"), [(None, "1"), (3, "queries"), (6, "nats per token")])
def test_an_audit_shows_figures_errors_and_baselines(clause, units):
    audit = sample_audit()
    ax = plot.audit(audit, clause=clause, units=units)
    chosen = audit.units_of == units
    measures = audit.isel(measure=(chosen if clause is None else chosen & (audit.of_clause == clause)).values)
    bars = {container.get_label(): container for container in ax.containers}
    assert set(bars) == set(audit.model.values)
    baselines = [line for line in ax.get_lines() if line.get_marker() == "|" and to_hex(line.get_color()) == COUNT]
    for model, baseline in zip(audit.model.values, baselines, strict=True):
        figures = measures.sel(model=model)
        points, _, (errors,) = bars[model].lines
        np.testing.assert_array_equal(np.asarray(points.get_xdata(), float), figures.figure)
        np.testing.assert_array_equal(baseline.get_xdata(), figures.baseline)
        known = figures.isel(measure=(figures.figure + figures.error).notnull().values)
        segments = [segment[:, 0] for segment in errors.get_segments() if segment.ndim == 2 and len(segment)]
        right = np.stack([known.figure - known.error, known.figure + known.error], -1)
        np.testing.assert_allclose(np.reshape(segments, (-1, 2)), right)
    assert [label.get_text().replace("\n", " ") for label in ax.get_yticklabels()] == measures.measure.values.tolist()


def test_features_show_the_three_parts():
    features = sample_features(documents=WINDOWS)
    shares = part_shares(features)
    expected = {
        part: (features.layer, shares.share.sel(part=part), shares.error.sel(part=part)) for part in FEATURE_PARTS
    }
    assert_lines(plot.features(features), expected)
    with pytest.raises(InputError, match=r"expected what posterity\.features returns"):
        plot.features(sample())


def test_one_window_has_no_bands(inspected):
    for ax in (plot.lags(inspected), plot.sinks(inspected), plot.losses(inspected)):
        assert not [band for band in ax.collections if isinstance(band, PolyCollection)]


def test_of_several_steps_the_last_is_drawn(result):
    both = join_steps({1: sample(seed=1), 5: sample(seed=2)})
    line, right = plot.lags(both).get_lines(), plot.lags(sample(seed=2)).get_lines()
    for drawn, alone in zip(line, right, strict=True):
        np.testing.assert_array_equal(drawn.get_ydata(), alone.get_ydata())


def every_plot(result, inspected):
    for name in plot.__all__:
        yield name, {"matrix": inspected, "audit": sample_audit(), "features": sample_features()}.get(name, result)


def test_a_plot_is_a_column_wide_and_names_its_units(result, inspected):
    for name, dataset in every_plot(result, inspected):
        ax = getattr(plot, name)(dataset)
        assert ax.figure.get_size_inches()[0] == 3.3
        assert re.search(r"token|layer|head|position|units of 1", ax.get_xlabel()), name


def test_files_keep_text_as_text_whatever_the_settings_are(tmp_path, result):
    figure = plot.lags(result).figure
    figure.savefig(tmp_path / "lags.pdf")
    content = (tmp_path / "lags.pdf").read_bytes()
    assert b"/Subtype /Type3" not in content
    assert b"/FontFile2" in content  # TrueType
    figure.savefig(tmp_path / "lags.svg")
    assert "within this lag</text>" in (tmp_path / "lags.svg").read_text()
    assert matplotlib.rcParams["pdf.fonttype"] == matplotlib.rcParamsDefault["pdf.fonttype"]


def test_nothing_drawn_leaves_the_figure(result, inspected):
    """Every text lies inside the figure."""
    for name, dataset in every_plot(result, inspected):
        ax = getattr(plot, name)(dataset)
        ax.figure.canvas.draw()
        box = ax.get_tightbbox()
        width, height = ax.figure.bbox.width, ax.figure.bbox.height
        assert box.x0 >= -1, name
        assert box.y0 >= -1, name
        assert box.x1 <= width + 1, name
        assert box.y1 <= height + 1, name


def test_axes_of_the_user_are_drawn_on_and_returned(result, inspected):
    for name, dataset in every_plot(result, inspected):
        figure, axes = plt.subplots(1, 2)
        assert getattr(plot, name)(dataset, axes[1]) is axes[1]
        assert axes[1].has_data()
        assert not axes[0].has_data()
        assert plt.get_fignums() == [figure.number]
        plt.close(figure)


def test_a_mistake_is_one_line_and_leaves_no_figure(result, inspected):
    bare = sample()
    for match, draw in {
        r"'loss_credit_by_document'.*was not measured: measure with losses=True": lambda: plot.losses(bare),
        r"'horizon_by_document'.*was not measured: measure with horizons=": lambda: plot.horizon(bare),
        r"'inspect_credit'.*was not measured: measure with posterity.inspect": lambda: plot.matrix(bare),
        r"expected a result as posterity.measure returns it": lambda: plot.lags(sample_audit()),
        r"expected an audit as posterity.audit returns it": lambda: plot.audit(bare),
        r"which was not measured: measure with lags=": lambda: plot.reach(sample(lags="self")),
        r"levels expects shares between 0 and 1": lambda: plot.reach(bare, level=90),
        r"reader_of expects 'all', 'first' or 'rest'; got 'last'": lambda: plot.lags(bare, reader_of="last"),
        r"stream expects 'query' or 'key' or 'value'; got 'keys'": lambda: plot.heads(bare, stream="keys"),
        r"written expects 'key' or 'value'; got 'query'": lambda: plot.losses(result, written="query"),
        r"layer expects a number from 0 to 3; got 4": lambda: plot.matrix(inspected, layer=4),
        r"ax expects axes of matplotlib, such as plt.gca\(\); got ndarray": lambda: plot.lags(bare, np.array([])),
        r"clause expects one of those that were measured, 1, 3, 6; got 2": lambda: plot.audit(sample_audit(), clause=2),
        r"units expects those of a figure: 'queries'; got '1'": lambda: plot.audit(sample_audit(), clause=3),
    }.items():
        with pytest.raises(InputError, match=match):
            draw()
    assert not plt.get_fignums()


def test_every_plot_takes_a_result_and_axes():
    for name in plot.__all__:
        _, second, *options = inspect.signature(getattr(plot, name)).parameters.values()
        assert second.name == "ax", name
        assert second.default is None
        assert all(option.kind is option.KEYWORD_ONLY for option in options)


# Machado, Oliveira and Fernandes (2009), severity 1: linear RGB as it is seen without cones of one kind.
SIGHT = {
    "all cones": np.eye(3),
    "no long": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "no middle": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "no short": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(colour, sight):
    """CIE L*a*b* of a colour in the eyes of one kind of sight."""
    rgb = np.array([int(colour[index : index + 2], 16) for index in (1, 3, 5)]) / 255
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(SIGHT[sight] @ linear, 0, 1)
    to_xyz = [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    relative = to_xyz @ seen / [0.95047, 1, 1.08883]
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("sight", SIGHT)
def test_the_colours_of_one_plot_differ_for_every_eye(sight):
    for colours in ([*STREAM.values(), INK], [SELF, LATE, OTHER], SERIES[:2]):
        for first, second in itertools.combinations(colours, 2):
            assert np.linalg.norm(lab(first, sight) - lab(second, sight)) > 20, (first, second)
