"""The book in a real browser, opened from the file system: formulas are drawn, search works, nothing is fetched."""

import importlib.util
from pathlib import Path

import pytest
from chromium import Browser, find_chromium, wait_for

from cs336_alignment import book

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.browser,
    pytest.mark.filterwarnings("ignore:.*Sphinx API modifications"),
    pytest.mark.skipif(find_chromium() is None, reason="needs Chromium or Chrome; CHROMIUM can name the program"),
    pytest.mark.skipif(
        importlib.util.find_spec("myst_nb") is None, reason="needs Sphinx; `python3 course.py book` installs it"
    ),
]

# What is wrong with the formulas of a page, as a list of texts.
FORMULAS = r"""
(() => {
  const found = [...document.querySelectorAll(".math")].filter(e => !e.querySelector("mjx-container"));
  const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT, {acceptNode: node =>
    node.parentElement.closest("pre, code, script, style, mjx-container") ? NodeFilter.FILTER_REJECT
      : /\\(frac|log|beta|pi|mathbb|sum|begin|tag)\b/.test(node.data) ? NodeFilter.FILTER_ACCEPT
      : NodeFilter.FILTER_SKIP});
  const raw = [];
  while (words.nextNode()) raw.push(words.currentNode.data);
  const errors = [...document.querySelectorAll("[data-mml-node=merror], mjx-container [fill=red]")];
  return [...found.map(e => "not drawn: " + e.textContent), ...raw.map(text => "raw: " + text),
          ...errors.map(e => "error: " + (e.closest(".math") || e).textContent)];
})()
"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    if not any((ROOT / "lectures").glob("[0-9]*.ipynb")):
        pytest.skip("there are no lectures in this checkout yet")
    return book.build_book(out=tmp_path_factory.mktemp("book") / "pages").parent


@pytest.fixture(scope="module")
def browser():
    browser = Browser()
    yield browser
    browser.close()


def paths_of(pages):
    return [path for path in sorted(pages.rglob("*.html")) if not {"_static", "_modules"} & set(path.parts)]


def test_on_every_page_formulas_are_drawn_nothing_is_fetched_and_a_phone_need_not_scroll_sideways(browser, pages):
    problems = []
    drawn = 0
    for path in paths_of(pages):
        name = path.relative_to(pages)
        browser.resize(1280, 900)
        browser.open(path.as_uri())
        problems += [f"{name}: {problem}" for problem in browser.run(FORMULAS)]
        drawn += browser.run("document.querySelectorAll('mjx-container').length")
        browser.resize(390, 844, mobile=True)
        width = browser.run("document.documentElement.scrollWidth")
        if width > 390:
            problems.append(f"{name}: {width} pixels wide on a phone of 390")
    assert not problems
    assert not browser.errors
    assert drawn > 100
    assert {uri.partition(":")[0] for uri in browser.requests} <= {"file", "data", "about"}


def test_numbers_of_equations_are_shown(browser, pages):
    browser.open((pages / "lectures" / "12_dpo.html").as_uri())
    numbers = browser.run("[...document.querySelectorAll('mjx-container [data-mml-node=mlabeledtr]')].length")
    assert numbers >= browser.run("document.querySelectorAll('[id^=equation-12]').length") > 0


@pytest.mark.parametrize("word, page", [("Bradley-Terry", "08_reward_models"), ("买方垄断", "glossary")])
def test_search_finds(browser, pages, word, page):
    browser.resize(1280, 900)
    browser.open((pages / "search.html").as_uri() + f"?q={word}")
    links = "[...document.querySelectorAll('#search-results li a')].map(a => a.getAttribute('href'))"
    wait_for(lambda: any(page in link for link in browser.run(links)), 20)


def test_the_dark_page_is_dark(browser, pages):
    browser.open((pages / "glossary.html").as_uri())
    browser.run("document.querySelector('.theme-switch-button').click()")
    browser.run("document.documentElement.dataset.theme = 'dark'")
    assert browser.run("getComputedStyle(document.body).backgroundColor") in ("rgb(18, 18, 18)", "rgb(20, 24, 30)")


def test_the_figure_in_lecture_09_moves_when_it_is_dragged(browser, pages):
    page = pages / "lectures" / "09_rlhf_objective.html"
    if not page.exists():
        pytest.skip("lecture 09 is not in this checkout yet")
    browser.resize(1280, 900)
    browser.open(page.as_uri())
    picture = "document.querySelector('.cell_output svg:not(mjx-container svg)').outerHTML"
    before = browser.run(picture)
    browser.run("""
        for (const knob of document.querySelectorAll(".cell_output input[type=range]")) {
          knob.value = +knob.value === +knob.max ? knob.min : knob.max;
          knob.dispatchEvent(new Event("input", {bubbles: true}));
          knob.dispatchEvent(new Event("change", {bubbles: true}));
        }
    """)
    assert browser.run(picture) != before
