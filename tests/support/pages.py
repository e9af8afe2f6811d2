"""Pages in a browser, and their tables and figures as data."""

import base64
import gzip
import html
import json
import re
from contextlib import contextmanager
from html.parser import HTMLParser

from posterity.reporting.report import Page, report

CHROMIUM = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


PAGES = {}


def page(*results) -> str:
    """The page of these results, made once for each."""
    key = tuple(map(id, results))
    if key not in PAGES:
        answer = report(list(results))
        assert isinstance(answer, Page)
        PAGES[key] = results, answer.html
    return PAGES[key][1]


class Reader(HTMLParser):
    """Tags with their attributes, text outside scripts and styles, and the contents of scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.scripts, self.inside = [], "", [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text += data

    @property
    def json(self) -> str:
        """The text of the page's data."""
        names = [attrs.get("id") for tag, attrs in self.tags if tag == "script"]
        return gzip.decompress(base64.b64decode(self.scripts[names.index("data")])).decode()


def tables(text) -> dict[str, list[list[str]]]:
    """Rows of text of each table with a caption, the first row that of the column headers."""
    found = {}
    for table in re.findall(r"<table>(<caption>.*?)</table>", text, re.DOTALL):
        caption = re.search("<caption>(.*?)</caption>", table)
        rows = re.findall("<tr.*?>(.*?)</tr>", table, re.DOTALL)
        found[html.unescape(caption[1])] = [
            [html.unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in rows
        ]
    return found


def data(text) -> dict:
    """What the scripts of the page draw."""
    return json.loads(Reader(text).json)


def traces(text, figure, panel=0) -> dict[str, dict]:
    """The traces of one panel of a figure by their names; the edges of a band as "NAME low" and "NAME high".

    The first of several traces without a name has that of its type, each other one more "+". What is drawn in percent
    is given in shares again.
    """
    axis, named = f"x{panel + 1}" if panel else "x", {}
    drawn = data(text)["figures"][figure]
    for trace in drawn["data"]:
        if trace["xaxis"] == axis:
            if drawn["layout"]["yaxis" + trace["yaxis"][1:]].get("ticksuffix") == " %":
                trace["y"] = as_shares(trace["y"])
            name = html.unescape(trace.get("name") or trace.get("legendgroup") or trace["type"])
            if trace.get("line", {}).get("width") == 0:
                name += " high" if "fill" in trace else " low"
            while name in named:
                name += "+"
            named[name] = trace
    return named


def as_shares(percents):
    """Numbers in percent as shares."""
    return [None if number is None else number / 100 for number in percents]


@contextmanager
def browser(**options):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path="/usr/bin/chromium", args=CHROMIUM)
        context = chromium.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        context.set_default_timeout(60_000)
        tab, heard = context.new_page(), []
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("dialog", lambda dialog: (heard.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request: None if is_own(request.url) else heard.append(request.url[:200]))
        tab.route("**/*", lambda route: route.continue_() if is_own(route.request.url) else route.abort())
        yield tab, heard
        chromium.close()


def is_own(url):
    return url.startswith(("file:", "data:", "blob:", "about:"))


def opened(tab, path):
    """Open a page, and every part of it that is folded away, and wait until all is drawn."""
    tab.goto(f"file://{path}")
    tab.wait_for_selector("html[data-drawn]")
    tab.evaluate("document.querySelectorAll('.fold').forEach(part => part.open = true)")
    for _ in range(600):
        if tab.evaluate("[...document.querySelectorAll('.chart')].every(chart => chart.dataset.drawn)"):
            return tab
        tab.wait_for_timeout(50)
    raise TimeoutError("a figure is not drawn")


DRAWN = """() => [...document.querySelectorAll('.chart')].map(chart => ({
    id: chart.dataset.chart, size: chart.querySelector('.main-svg').getBoundingClientRect().width,
    panels: chart.querySelectorAll('.cartesianlayer > .subplot').length,
    marks: chart.querySelectorAll('.scatterlayer .trace, .heatmaplayer image, .barlayer .trace').length,
    saves: chart.closest('figure').querySelectorAll('.tools button').length,
}))"""
