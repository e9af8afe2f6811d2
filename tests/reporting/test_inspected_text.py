"""Laws of an inspected text: what the page says of a token is what the result holds."""

import base64

import numpy as np
import pytest
from support.pages import browser
from support.sample import sample

import posterity
from posterity.reporting.inspected_text import pack_inspected_text, visible_token
from posterity.reporting.report import report
from posterity.reporting.result_page import render_results
from posterity.results import stats

WORDS = ["The", " cat", " sat", " on", " the", " mat", ",", " and", " it", " was", " warm", "."]
HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(2)>", "&lt;b&gt;", "\u202eturned", "\u200b", "a\nb",
    "\u0301", "e" + "\u0301" * 60, "long" * 200, "\u05e9\u05dc\u05d5\u05dd", "\U0001f468\u200d\U0001f469",
    "'\"`${1}%{y}\u2028",
]  # fmt: skip


def inspected(tokens=WORDS, **more):
    """A result of one text whose gradients are, like real ones, for the most part of one direction."""
    return sample(context=len(tokens), tokens=tokens, losses=True, **more)


def unpacked(text, size):
    scale = np.frombuffer(base64.b64decode(text)[: 4 * size], "<f4")
    lower = np.zeros((size, size))
    lower[np.tril_indices(size)] = np.frombuffer(base64.b64decode(text)[4 * size :], "<i2")
    return lower * scale


def values(result, measure, written, layer):
    """The matrix of loss and key that the choosers ask for, without the last position."""
    matrices = result[f"inspect_{measure}"].transpose("layer", "written", "loss_position", "position")
    matrices = matrices.sel(written=["key", "value"] if written == "both" else [written])
    matrices = matrices if layer == "all" else matrices.sel(layer=[int(layer)])
    all_of_them = matrices.values.reshape(-1, *matrices.shape[2:])[:, :-1, :-1]
    return all_of_them.sum(0) if measure == "credit" else np.sqrt((all_of_them**2).sum(0))


# ---- the data


@pytest.mark.parametrize("measure", ["credit", "norm"])
def test_the_packed_matrices_are_those_of_the_result(measure):
    result = inspected()
    data = pack_inspected_text(result)
    assert data is not None
    assert set(data[measure]) == {"key", "value"}
    for written, layers in data[measure].items():
        assert len(layers) == result.sizes["layer"]
        for layer, text in enumerate(layers):
            true = values(result, measure, written, layer)
            step = np.abs(true).max(0) / (2**15 - 1)
            assert (np.abs(unpacked(text, 11) - true) <= 0.51 * step).all()


def test_the_lags_of_readers_are_those_of_the_result_on_the_page_and_in_the_table(capsys):
    result = inspected()
    packed = pack_inspected_text(result)["reader_lags"]
    for lags, by in ((packed["all"], ()), (packed["layers"], ("layer",))):
        np.testing.assert_array_equal(np.array(lags, dtype=float), stats.reader_lags(result, by))
    assert pack_inspected_text(result.drop_vars(["reader_lag", "reader_lag_all"]))["reader_lags"] is None
    posterity.summary(result)
    lines = capsys.readouterr().out.splitlines()
    lags = stats.reader_lags(result)[..., :-1].astype(int).astype(str).values
    for number in (0, 4):
        (line,) = [line for line in lines if line.strip().startswith(f"{number} {WORDS[number].strip()} ")]
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        assert cells[1:] == [" · ".join(quantity[:, number]) for quantity in lags]


def test_a_number_that_is_not_known_stays_so():
    result = inspected()
    result["inspect_credit"].loc[{"layer": 1, "written": "key", "loss_position": 5, "position": 2}] = np.nan
    result["inspect_credit"].loc[{"layer": 1, "written": "key", "position": 4}] = 0
    data = pack_inspected_text(result)
    assert data is not None
    packed = unpacked(data["credit"]["key"][1], 11)
    assert np.isnan(packed[:, 2]).all()
    assert np.isfinite(np.delete(packed, 2, axis=1)).all()
    assert (packed[:, 4] == 0).all()


def test_a_result_of_no_single_text_has_no_inspected_text():
    assert pack_inspected_text(sample(losses=True)) is None
    assert "inspected-template" not in render_results([sample(losses=True)])
    assert "inspected-template" in render_results([sample(losses=True), inspected()])


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" cat", "·cat"),
        ("a\nb\r\t", "a⏎b␍⇥"),
        ("\u202ea\u200b", "⟨U+202E⟩a⟨U+200B⟩"),
        ("\u0301", "◌\u0301"),
        ("e\u0301", "e\u0301"),
        ("", "∅"),
        ("\x00\x1b", "␀␛"),
        ("\u2028\u00a0", "⟨U+2028⟩⟨U+00A0⟩"),
        ("<script>", "<script>"),
        ("שלום", "שלום"),
    ],
)
def test_a_token_shows_all_that_it_holds(token, shown):
    assert visible_token(token) == shown


# ---- in a browser


def opened(tab, path):
    tab.goto(f"file://{path}")
    tab.wait_for_selector("html[data-drawn]")
    return tab.locator("article.inspected").first


def sentence(text):
    return text.locator(".sentence").inner_text().replace("\u2068", "").replace("\u2069", "")


def pair(text):
    return text.locator("[role=status]").inner_text().replace("\u2068", "").replace("\u2069", "")


def token(text, number):
    return text.locator(".inspected-strip button").nth(number)


def box(locator):
    """Left, top, width, height on the page, however far it is scrolled."""
    return locator.evaluate("e => [e.offsetLeft, e.offsetTop, e.offsetWidth, e.offsetHeight]")


def numbers(text):
    """Rows of the table of all numbers, as numbers: token, lag, share, value."""
    if text.locator("details").get_attribute("open") is None:
        text.locator("summary").click()
        text.locator(".inspected-all tbody tr").first.wait_for()
    rows = text.locator(".inspected-all tbody tr").evaluate_all(
        "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    )
    plain = [[cell.replace("−", "-").removesuffix(" %") for cell in row] for row in rows]
    return np.array([[float(row[0].split()[0]), *map(float, row[-3:])] for row in plain])


CHOICES = [("both", "credit", "all"), ("key", "credit", "2"), ("value", "norm", "0"), ("both", "norm", "all")]


@pytest.mark.slow
@pytest.mark.parametrize("toward", ["losses", "keys"])
def test_the_numbers_of_a_token_are_those_of_the_result(tmp_path, toward):
    result = inspected()
    with browser() as (tab, heard):
        text = opened(tab, report(result, tmp_path / "report.html"))
        text.locator(f"input[value={toward}]").check()
        token(text, 4).click()
        for written, measure, layer in CHOICES:
            text.locator(f"input[name=written][value={written}]").check()
            text.locator(f"input[name=measure][value={measure}]").check()
            text.locator("select").select_option(layer)
            true = values(result, measure, written, layer)
            share = true / true.sum(0)
            rows = numbers(text)
            tokens = np.arange(4, 11) if toward == "losses" else np.arange(4, -1, -1)
            row, column = (tokens, 4) if toward == "losses" else (4, tokens)
            np.testing.assert_array_equal(rows[:, 0], tokens)
            np.testing.assert_array_equal(rows[:, 1], np.abs(tokens - 4))
            np.testing.assert_allclose(rows[:, 2], 100 * share[row, column], atol=0.02)
            np.testing.assert_allclose(rows[:, 3], true[row, column], rtol=0.01, atol=1e-4 * true.max())
            said = float(sentence(text).replace("−", "-").split(" %")[0].split()[-1])
            assert said == pytest.approx(100 * share[4, 4], abs=0.06)
            bars = text.locator(".inspected-curve rect").evaluate_all(
                "bars => bars.map(b => +b.getAttribute('height'))"
            )
            drawn = np.array(bars) / max(bars)
            np.testing.assert_allclose(drawn, np.abs(rows[:, 2]) / np.abs(rows[:, 2]).max(), atol=0.01)
        assert heard == []


@pytest.mark.slow
def test_the_readers_of_the_chosen_token_are_those_of_the_chosen_layer(tmp_path):
    result = inspected()
    with browser() as (tab, heard):
        text = opened(tab, report(result, tmp_path / "report.html"))
        for layer, by in (("all", ()), ("2", ("layer",))):
            text.locator("select").select_option(layer)
            lags = stats.reader_lags(result, by)
            for number in (4, 7):
                token(text, number).hover()
                here = lags.sel(position=number) if layer == "all" else lags.sel(position=number, layer=2)
                attention, key, value = ([int(lag) for lag in here.sel(reader_quantity=name).values]
                                         for name in ("attention", "key credit", "value credit"))  # fmt: skip
                shown = text.locator("[data-part=readers]").inner_text()
                assert shown == (
                    f"Its readers: 50 % and 90 % of its key credit within lag {key[0]} and {key[1]}, of its value "
                    f"credit within {value[0]} and {value[1]}, of the attention on it within {attention[0]} and "
                    f"{attention[1]}."
                )
        token(text, 11).hover()
        assert "key credit within lag not known" in text.locator("[data-part=readers]").inner_text()
        assert heard == []


@pytest.mark.slow
def test_the_strip_of_tokens_works_by_key(tmp_path):
    with browser(viewport={"width": 500, "height": 900}) as (tab, heard):
        text = opened(tab, report(inspected(), tmp_path / "report.html"))
        assert text.locator(".inspected-strip button[tabindex='0']").count() == 1
        text.locator("select").focus()
        tab.keyboard.press("Tab")
        press, focus = tab.keyboard.press, lambda: tab.evaluate("document.activeElement.dataset.token")
        for key, number in (("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
            press(key)
            assert focus() == str(number)
            assert sentence(text).startswith(f"Token {number} “{visible_token(WORDS[number])}”: own loss")
        press("ArrowDown")
        below = int(focus())
        (left, top, *_), (left_below, top_below, *_) = box(token(text, 1)), box(token(text, below))
        assert top_below > top
        assert abs(left_below - left) < 60
        press("ArrowUp")
        assert focus() == "1"
        press("Enter")
        assert token(text, 1).get_attribute("aria-pressed") == "true"
        press("ArrowRight")
        press("ArrowRight")
        assert sentence(text).startswith("Token 1 “·cat”: own loss")  # held
        assert pair(text).startswith("The loss at token 3 “·on”, in predicting “·the”, pays")
        press("Escape")
        assert token(text, 1).get_attribute("aria-pressed") == "false"
        press("End")
        assert sentence(text) == "Token 11 “.” is the last: no loss depends on its key and value."
        assert heard == []


@pytest.mark.slow
def test_pointing_at_a_token_shows_who_pays_and_a_click_holds_it(tmp_path):
    result = inspected()
    true = values(result, "credit", "both", "all")
    share = 100 * true / true.sum(0)
    with browser() as (tab, heard):
        text = opened(tab, report(result, tmp_path / "report.html"))
        assert text.locator(".sentence").get_attribute("aria-live") == "polite"
        token(text, 5).hover()
        assert sentence(text).startswith("Token 5 “·mat”: own loss")
        assert f"later losses {share[6:, 5].sum():.1f} %" in sentence(text).replace("−", "-")
        top = 6 + int(share[6:, 5].argmax())
        name, following = visible_token(WORDS[top]), visible_token(WORDS[top + 1])
        most = f"most by token {top} “{name}” ({share[top, 5]:.1f} %), in predicting “{following}”."
        assert sentence(text).endswith(most)
        painted = text.locator(".inspected-strip button").evaluate_all("all => all.map(b => b.style.backgroundColor)")
        assert [bool(colour) for colour in painted] == [False] * 5 + [True] * 6 + [False]
        token(text, 2).click()
        token(text, 7).hover()
        assert sentence(text).startswith("Token 2 “·sat”")
        assert f"pays {share[7, 2]:.2f} % of the key and value of token 2" in pair(text).replace("−", "-")
        token(text, 2).click()
        token(text, 7).hover()
        assert sentence(text).startswith("Token 7 “·and”")
        *_, width, height = box(text.locator("canvas"))
        text.locator("canvas").click(position={"x": width * 3.5 / 11, "y": height * 8.5 / 11})
        assert sentence(text).startswith("Token 3 “·on”")
        assert pair(text).startswith("Token 3 “·on” is held")
        pixel = text.locator("canvas").evaluate(
            "c => [...c.getContext('2d').getImageData(3, 8, 1, 1).data].slice(0, 3)"
        )
        assert token(text, 8).evaluate("b => b.style.backgroundColor") == "rgb({}, {}, {})".format(*pixel)
        assert heard == []


@pytest.mark.slow
def test_the_other_direction_shows_what_a_loss_pays_for(tmp_path):
    result = inspected()
    true = values(result, "credit", "both", "all")
    share = 100 * true / true.sum(0)
    with browser() as (tab, heard):
        text = opened(tab, report(result, tmp_path / "report.html"))
        text.get_by_label("what a token's loss pays for").check()
        token(text, 6).click()
        assert sentence(text).startswith(
            f"Token 6 “,”: its loss, in predicting “·and”, pays {share[6, 6]:.1f} % of its own"
        )
        assert sentence(text).endswith(f"brings {100 * true[6].sum() / true.sum():.1f} % of all credit in the text.")
        painted = text.locator(".inspected-strip button").evaluate_all("all => all.map(b => b.style.backgroundColor)")
        assert [bool(colour) for colour in painted] == [True] * 7 + [False] * 5
        assert text.locator("table thead").first.inner_text().split() == ["of", "token", "lag", "share"]
        token(text, 11).click()
        assert "it has no loss" in sentence(text)
        assert heard == []


@pytest.mark.slow
def test_tokens_of_every_kind_show_as_text(tmp_path):
    with browser(viewport={"width": 400, "height": 900}) as (tab, heard):
        result = inspected(HOSTILE)
        text = opened(tab, report(result, tmp_path / "report.html"))
        names = [visible_token(str(word)) for word in result.token.values]
        assert text.locator(".inspected-strip .word").all_text_contents() == names
        assert names[0] == HOSTILE[0]
        for number, name in enumerate(names):
            token(text, number).focus()
            if number < len(names) - 1:
                assert len(numbers(text)) == len(names) - 1 - number
            assert name.replace("\u0301", "")[:20] in sentence(text).replace("\u0301", "")
        assert text.locator("img, script").count() == 0
        assert tab.evaluate("document.documentElement.scrollWidth") <= 400
        (left, top, *_), (left_next, top_next, *_) = box(token(text, 9)), box(token(text, 10))
        assert (top, left) < (top_next, left_next)  # right-to-left letters keep their place
        assert heard == []


@pytest.mark.slow
def test_several_inspected_texts_stand_side_by_side(tmp_path):
    other = inspected(["x", "y", "z"], layers=2, model="<b>other</b>")
    with browser(color_scheme="dark") as (tab, heard):
        opened(tab, report([sample(losses=True), inspected(model="first"), other], tmp_path / "report.html"))
        texts = tab.locator("article.inspected")
        assert [words.split(",")[0] for words in texts.locator("h3").all_text_contents()] == ["first", "<b>other</b>"]
        before = sentence(texts.nth(0))
        token(texts.nth(1), 0).click()
        texts.nth(1).locator("input[value=norm]").check()
        assert sentence(texts.nth(1)).startswith("Token 0 “x”: own loss")
        assert sentence(texts.nth(0)) == before
        notes = [texts.nth(number).locator("[data-part=note]").inner_text() for number in (0, 1)]
        assert [words.split()[0] for words in notes] == ["Credit", "Norm"]
        assert texts.nth(1).locator("option").all_text_contents() == ["all layers", "layer 0", "layer 1"]
        assert heard == []


@pytest.mark.slow
def test_parts_that_cancel_have_no_share(tmp_path):
    result = inspected()
    result["inspect_credit"].loc[{"position": 2}] = 0
    result["inspect_credit"].loc[{"position": 2, "loss_position": 4}] = 1
    result["inspect_credit"].loc[{"position": 2, "loss_position": 5}] = -0.9999
    with browser() as (tab, heard):
        text = opened(tab, report(result, tmp_path / "report.html"))
        token(text, 2).click()
        assert sentence(text) == "Token 2 “·sat”: no share is known, the parts of its gradient add up to about nothing."
        token(text, 4).hover()
        assert "pays an unknown share of the key and value of token 2 “·sat”: credit 8.00 nats²" in pair(text)
        assert "NaN" not in text.inner_text()
        assert heard == []
