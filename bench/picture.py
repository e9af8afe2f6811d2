"""`make picture`: the README's picture, taken of demo/report.html in headless Chromium."""

from pathlib import Path

from playwright.sync_api import sync_playwright

ROOT = Path(__file__).parent.parent


def main():
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1180, "height": 900})
        page.goto((ROOT / "demo" / "report.html").as_uri())
        page.wait_for_selector("html[data-drawn]")
        cards = page.locator("#charts > *")
        top, bottom = cards.nth(0).bounding_box(), cards.nth(1).bounding_box()
        clip = {"x": 0, "y": top["y"] - 20, "width": 1180, "height": bottom["y"] + bottom["height"] - top["y"] + 40}
        page.screenshot(path=ROOT / "docs" / "report.png", clip=clip, full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
