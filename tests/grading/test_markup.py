"""What students wrote, as HTML: formulas and colours stay, scripts, images, links and tricks do not."""

import re
from html.parser import HTMLParser

import pytest

from cs336_alignment.grading.markup import ATTRIBUTES, ELEMENTS, code, cut, formula, plain, rich_text, sentence

ATTACKS = (
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</pre></code></math><svg onload=alert(1)>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html,<script>alert(1)</script>)",
    "[x](vbscript:a)",
    "[x](//evil.example/a)",
    "[x](file:///etc/passwd)",
    '[x](http://a.example/" onmouseover="alert(1))',
    "![x](http://evil.example/x.png)",
    "![x](data:image/svg+xml;base64,PHN2Zz4=)",
    "[x]\n\n[x]: javascript:alert(1)",
    "<javascript:alert(1)>",
    "<http://evil.example/' onclick='alert(1)>",
    r"$\text{<script>alert(1)</script>}$",
    r"$\text{&lt;script&gt;alert(1)&lt;/script&gt;}$",
    r"$$</math><script>alert(1)</script>$$",
    r"$\href{javascript:alert(1)}{x}$",
    r"$\color{red;background:url(http://evil.example)}{x}$",
    r"$\class{x}{y} \style{position:fixed}{z} \unicode{x3c}script$",
    "$\\text{\\unicode{60}}$",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "`<script>`\n\n    <script>\n\n```html\n<script>alert(1)</script>\n```",
    "```<script>\nx\n```",
    "| <script> |\n|---|\n| <img src=x> |",
    "\x00<script>\x1b[31m",
    "\ud800<script>",
)
ALLOWED = ELEMENTS | set(
    "p em strong a code pre ul ol li blockquote table thead tbody tr th td h1 h2 h3 h4 h5 h6".split()
)
ALLOWED |= {"hr", "br", "div", "span", "s"}
HARMLESS = ATTRIBUTES | {"class", "href", "rel", "style", "start"}


class Reader(HTMLParser):
    """Every element and attribute that a browser would see."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("make", [rich_text, formula, code, sentence, lambda text: formula(text.strip("$"))])
def test_nothing_that_a_student_writes_becomes_more_than_text(attack, make):
    for tag, attributes in Reader(str(make(attack))).tags:
        assert tag in ALLOWED and set(attributes) <= HARMLESS, (tag, attributes)
        assert re.match(r"https?://|mailto:", attributes.get("href", "http://"))
        assert re.fullmatch(r"(text-align:\w+)?", attributes.get("style", ""))


def test_links_to_the_web_stay_links_and_images_become_words():
    page = rich_text("[site](https://example.org/a) ![a *plot*](https://example.org/b.png)")
    assert '<a href="https://example.org/a" rel="noopener noreferrer nofollow">site</a>' in page
    assert "<img" not in page and "b.png" not in page and "[image: a *plot*]" in page


def test_formulas_become_mathml_and_their_letters_stay():
    page = rich_text(r"Loss $-\log\sigma(h)$ and" + "\n\n$$\n\\frac{a_1}{b^2} < \\infty\n$$\n")
    assert page.count("<math") == 2 and "σ" in page and "<mfrac>" in page and "&lt;" in page and "$" not in page


def test_formulas_in_latex_own_brackets():
    page = rich_text(r"Where \(\beta > 0\) and" + "\n\\[\na\n+ b_1 \\\\[4pt]\n\\]\n" + r"so \[x^2\] and \[ e \] hold")
    assert page.count("<math") == 4 and page.count('display="block"') == 3 and "<li>" not in page
    assert "β" in page and "<msup>" in page and "4pt" not in page and "\\" not in page
    assert rich_text("- one \\[x^2\\] more\n- two").count("<li>") == 2
    assert rich_text("> \\[\n> a + b\n> \\]\n\nafter").count("<math") == 1


@pytest.mark.parametrize(
    "text, shown",
    [
        (r'Use `re.sub(r"\(x\)", "")` here', r"re.sub(r&quot;\(x\)&quot;, &quot;&quot;)"),
        ("```\nre.compile(r'\\[a-z\\]')\n```", r"re.compile(r'\[a-z\]')"),
        ("    re.compile(r'\\[a-z+1\\]')", r"re.compile(r'\[a-z+1\]')"),
        ("    \\[a + b\\]", r"\[a + b\]"),  # a block of code
        (r"As in \[1\] and \[2\]", "As in [1] and [2]"),
        (r"- one \[x\] more", "one [x] more"),
        (r"\[see below\]", "[see below]"),
        (r"\[see below", "[see below"),
        (r"It cost \( \) and the rest stays \(", "It cost ( ) and the rest stays ("),
        (r"a \\(b\\) c", r"a \(b\) c"),
        ("\\[ a\n\nb \\] c", "b ] c"),
    ],
)
def test_brackets_that_are_no_formula_stay_what_they_are(text, shown):
    page = rich_text(text)
    assert shown in page and "<math" not in page and "$" not in page


def test_the_height_of_a_row_ends_no_formula():
    page = rich_text(r"$$\begin{aligned} a &= b \\[4pt] c &= d \end{aligned}$$ and then \[ e \]")
    assert page.count("<math") == 2 and page.count("<mtr>") == 2 and "4pt" not in page and " and then " in page


@pytest.mark.parametrize(
    "latex",
    [r"\frac{a}", r"\left( x", "{" * 3000, r"\newcommand{\a}{\a\a}\a", r"\def\a{xx}\a", r"\begin{aligned}", "^"],
)
def test_a_formula_that_cannot_be_read_is_shown_as_it_stands(latex):
    page = str(formula(latex))
    assert page.startswith(("<code>", "<math")) and len(page) < 20_000


@pytest.mark.parametrize(
    "piece",
    [
        "[",
        "*a **b ",
        "$",
        "`a",
        ">",
        "- ",
        "![a](",
        "$x^{",
        "| a ",
        "<a ",
        "\\",
        "($x$) ",
        "\\(",
        "\\[",
        "\\[\n",
        "\\( \\[",
    ],
)
def test_long_answers_are_cut_and_end_in_seconds(piece):
    page = rich_text(piece * (40_000 // len(piece)))
    assert 0 < len(page) < 3_000_000


def test_characters_that_nobody_sees_are_shown():
    assert plain("a\u202eb\x1b[31mc\x00\u200bd") == "a\N{REPLACEMENT CHARACTER}bc\N{REPLACEMENT CHARACTER}\ufffdd"


def test_what_is_cut_is_counted():
    assert cut("abcdef", 4) == "abcd\n… 2 more characters" and cut("a\nb\nc", 10, 2) == "a\nb\n… 2 more characters"
    assert cut("abc\n", 4) == "abc"


def test_sentences_of_ours_have_code_formulas_and_stress():
    assert str(sentence("use `a<b` and *this*, 2 * 3 * 4")) == "use <code>a&lt;b</code> and <em>this</em>, 2 * 3 * 4"
    assert "<math" in sentence("$x_1$")


def test_code_keeps_every_character():
    source = "def f(x):\n    return '<b>' + x  # & so on\n"
    assert (
        re.sub(r"<[^>]+>", "", str(code(source)))
        .replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
        .replace("&#39;", "'")
        == source
    )
