"""The page in a real browser: quiet, alone, readable without a script, by keyboard, in the dark and on paper."""

import pytest
from report_samples import browser as installed

from geomssl.reports.gate import Rule, Rules, evaluate
from geomssl.reports.html import render

pytestmark = pytest.mark.browser
RULES = Rules(rule=(Rule(name="turns", probe="equivariance", limit=0.01),))


@pytest.fixture(scope="module")
def chromium():
    path = installed()
    assert path, "GEOMSSL_REQUIRE_BROWSER=1, but neither chromium nor google-chrome is installed"
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(artifacts, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(render(artifacts, evaluate(artifacts, RULES), "Three encoders"), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(chromium, address):
    """Opens the page; whatever it said or asked for is checked at the end of the test."""
    contexts, said, asked = [], [], []

    def open_page(width=1280, height=900, **options):
        context = chromium.new_context(viewport={"width": width, "height": height}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda m: said.append(m.text))
        page.on("pageerror", lambda e: said.append(str(e)))
        page.on("request", lambda r: asked.append(r.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    assert [u for u in asked if not u.startswith(("data:", address))] == []


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def test_is_quiet_and_asks_for_nothing(opened):
    page = opened(offline=True)
    assert page.title() == "Three encoders"
    assert page.locator("figure svg").count() >= 7


@pytest.mark.parametrize("width", [390, 800, 1280, 1800])
def test_nothing_sticks_out_sideways(opened, width):
    page = opened(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("document.querySelectorAll('details').forEach(fold => fold.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # a column of words is wide enough for words
    narrow = "cell => cell.offsetParent && cell.clientWidth < 60"
    assert page.evaluate(f"[...document.querySelectorAll('.data td:not(.num)')].filter({narrow}).length") == 0


def test_reads_without_a_script(opened):
    page = opened(java_script_enabled=False)
    assert page.locator("article.fail").first.is_visible()
    assert "0.939 [0.892, 0.986] at 270°" in page.locator("article.fail").first.inner_text()
    assert page.locator("figure svg").first.is_visible()
    assert not page.locator("#theme").is_visible()
    assert not page.locator("#card").is_visible()
    fold = page.locator("figure details.table").first
    fold.locator("summary").click()
    assert fold.locator("table").is_visible()


def test_follows_a_dark_system_and_the_readers_choice(opened):
    light, dark = opened(color_scheme="light"), opened(color_scheme="dark")
    assert background(light) != background(dark)
    axis = "getComputedStyle(document.querySelector('figure svg text')).fill"
    assert light.evaluate(axis) != dark.evaluate(axis)
    status = "getComputedStyle(document.querySelector('.tag.fail')).color"
    assert light.evaluate(status) != dark.evaluate(status)
    before = background(light)
    light.locator("#theme").click()
    assert background(light) == background(dark)
    assert light.evaluate(axis) == dark.evaluate(axis)
    assert light.evaluate(status) == dark.evaluate(status)
    light.locator("#theme").click()
    assert background(light) == before
    dark.locator("#theme").click()
    assert background(dark) == before


def focused(page):
    return page.evaluate(
        "(e => ({tag: e.tagName, id: e.id, href: e.getAttribute('href'), row: e.dataset.row,"
        " nav: !!e.closest('nav')}))(document.activeElement)"
    )


def test_the_keyboard_reaches_contents_and_points(opened):
    page = opened()
    seen = []
    for _ in range(200):
        page.keyboard.press("Tab")
        seen.append(focused(page))
        if seen[-1]["row"] is not None:
            break
    assert seen[0]["href"] == "#main"
    assert any(s["nav"] for s in seen)
    assert seen[-1]["tag"].lower() == "use"
    assert page.locator("#card").is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowUp")
    assert focused(page)["row"] is not None
    assert page.locator("#card").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#card").is_visible()
    # one stop a map, not one a point
    page.keyboard.press("Tab")
    assert focused(page)["row"] is not None
    assert page.evaluate("document.activeElement.closest('.panel').querySelector('.panel-title').textContent") == "hssl-c4-cnn"


def test_an_arrow_moves_in_its_direction(opened):
    page = opened()
    page.locator(".points use[tabindex='0']").first.focus()
    place = "[+document.activeElement.getAttribute('x'), +document.activeElement.getAttribute('y')]"
    for key, axis, sign in (("ArrowRight", 0, 1), ("ArrowLeft", 0, -1), ("ArrowDown", 1, 1), ("ArrowUp", 1, -1)):
        before = page.evaluate(place)
        page.keyboard.press(key)
        after = page.evaluate(place)
        assert (after[axis] - before[axis]) * sign > 0 or after == before


def test_a_point_shows_its_own_tile_and_row(opened):
    page = opened()
    point = page.locator(".points use[data-row='123']").first
    point.scroll_into_view_if_needed()
    point.dispatch_event("mouseover")
    card = page.locator("#card")
    assert card.is_visible()
    assert card.locator("dd").all_inner_texts() == ["3", "123"]
    # tile 123 of 24 in a row: row 5, column 3, drawn 72 units wide
    shown = page.evaluate("(t => [getComputedStyle(t).backgroundImage, t.style.backgroundSize, t.style.backgroundPosition])"
                          "(document.querySelector('#card .tile'))")
    assert shown[0].startswith('url("data:image/png')
    assert shown[1] == "2400% 1500%"
    across, down = (float(part.rstrip("%")) / 100 for part in shown[2].split())
    assert (round(across * 23, 3), round(down * 14, 3)) == (3, 5)
    box = card.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 1280
    point.dispatch_event("mouseout")
    assert not card.is_visible()


def test_a_finger_opens_a_point(opened):
    page = opened(390, 800, has_touch=True)
    point = page.locator(".points use").nth(40)
    point.scroll_into_view_if_needed()
    point.tap(force=True)
    assert page.locator("#card").is_visible()


def test_a_deep_link_leads_to_its_figure(opened, address):
    page = opened()
    page.goto(f"{address}#rank-rank")
    top = "document.getElementById('rank-rank').getBoundingClientRect().top"
    for _ in range(50):
        # the page's policy forbids the evaluation that waiting for a function needs
        if abs(page.evaluate(top)) < 60:
            break
        page.wait_for_timeout(100)
    assert abs(page.evaluate(top)) < 60


def test_prints_on_white(opened):
    page = opened(color_scheme="dark")
    assert page.pdf()[:5] == b"%PDF-"
    page.emulate_media(media="print")
    assert background(page) == "rgb(255, 255, 255)"
    assert not page.locator("nav").is_visible()
    assert page.locator("article.fail ul").first.is_visible()
