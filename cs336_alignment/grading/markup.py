"""Text that students wrote, made into HTML that holds nothing but text, colours and formulas. No network, no script.

Markdown is read with HTML switched off and images left out; LaTeX becomes MathML, element by element from a list of
those that are harmless; code is coloured by pygments. What cannot be read is shown as it stands, escaped.
"""

import html
import re
from functools import cache
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock
from markdown_it.rules_inline import StateInline
from markupsafe import Markup, escape
from mdit_py_plugins.dollarmath import dollarmath_plugin
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

LONGEST_TEXT = 20_000  # characters of one answer or cell; longer ones are cut, and the page says so
LONGEST_FORMULA = 1_500
ALIGNED = re.compile(r"\\(begin|end)\{(?:aligned|split|gathered|align)\}")  # the library knows one of them
ROW_HEIGHT = re.compile(r"(?<=\\\\)\[[\d.]+(?:pt|em|ex|mm|cm)\]")  # \\[4pt]: the library would print it
BRACKETS = {r"\(": r"\)", r"\[": r"\]"}  # around formulas as LaTeX itself writes them
MACROS = re.compile(
    r"\\(?:(?:re|provide)?newcommand|providecommand|[egx]?def|let|DeclareMathOperator)\b"
)  # they can grow
# All of MathML that is made here. Nothing in it loads, links or runs anything.
ELEMENTS = frozenset(
    "math mrow mi mn mo mtext mspace mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd "
    "mstyle mpadded mphantom menclose".split()
)
ATTRIBUTES = frozenset(
    "display displaystyle scriptlevel stretchy fence separator form accent accentunder largeop movablelimits "
    "mathvariant columnalign rowspacing columnspacing linethickness notation lspace rspace minsize maxsize".split()
)
SIMPLE = re.compile(r"[A-Za-z0-9 .%-]{1,24}")  # what an attribute's value may look like
# Control characters, and those that turn the direction of text: with them code can look like other code.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
COLOURS = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07]*(?:\x07|\x1b\\)|\x1b.")  # a terminal's


def plain(text: str) -> str:
    """Text without a terminal's colours and without characters that nobody sees."""
    text = text.encode("utf-8", "replace").decode()  # half a surrogate pair can be in JSON, and in no file
    return INVISIBLE.sub("\N{REPLACEMENT CHARACTER}", COLOURS.sub("", text).replace("\r\n", "\n").replace("\r", "\n"))


def cut(text: str, characters: int, lines: int = 10_000) -> str:
    """The beginning of a text, and how much is missing."""
    kept = "\n".join(text.split("\n", lines)[:lines])[:characters].rstrip("\n")
    left = len(text.rstrip("\n")) - len(kept)
    return kept + (f"\n… {left:,} more characters" if left > 0 else "")


# ------------------------------------------------------------------------------------------- formulas


def formula(latex: str, block: bool = False) -> Markup:
    """LaTeX as MathML; as it stands, in a frame for code, where it cannot be read."""
    try:
        if len(latex) > LONGEST_FORMULA or MACROS.search(latex):
            raise ValueError("too long, or could become so")
        latex = ALIGNED.sub(r"\\\1{align*}", ROW_HEIGHT.sub("", plain(latex)))
        element = convert_to_element(latex, display="block" if block else "inline")
        return Markup(serialized(element))
    except Exception:  # latex2mathml raises some twenty kinds, IndexError and RecursionError among them
        return Markup("<code>{}</code>").format(plain(latex))


def serialized(element: Element) -> str:
    """A MathML tree as text: listed elements and attributes alone, all else reduced to what it says."""
    tag = element.tag if element.tag in ELEMENTS else "mrow"
    attributes = "".join(
        f' {name}="{html.escape(value)}"'
        for name, value in element.attrib.items()
        if name in ATTRIBUTES and SIMPLE.fullmatch(value)
    )
    # The library keeps characters as entities (&#x003B2;): read them, then escape all.
    inside = html.escape(html.unescape(element.text or "")) + "".join(serialized(child) for child in element)
    return f"<{tag}{attributes}>{inside}</{tag}>"


# ------------------------------------------------------------------------------------------- Markdown


def image(self, tokens, index, options, env) -> str:
    """An image's words; the image itself stays where it is."""
    return f"<em>[image: {html.escape(tokens[index].content or 'without a description')}]</em>"


def link_open(self, tokens, index, options, env) -> str:
    """Links that a person may click: to the web and to mail. Others are words."""
    address = str(tokens[index].attrGet("href") or "")
    if not re.match(r"(https?://|mailto:)", address, re.IGNORECASE):
        return "<a>"
    return f'<a href="{html.escape(address)}" rel="noopener noreferrer nofollow">'


def bracketed(source: str, position: int) -> str:
    r"""The formula that begins here with `\(` or `\[`; "" for none. `\[1\]` is text whose brackets are escaped."""
    opening = source[position : position + 2]
    if opening not in BRACKETS:
        return ""
    inside = source[position + 2 : position + 2 + LONGEST_FORMULA]
    end = inside.replace(r"\\", "  ").find(BRACKETS[opening])  # a new line, and then a bracket, closes nothing
    latex = inside[: max(end, 0)]
    words = opening == r"\[" and re.fullmatch(r"(?!\s)[\w\s.,:;]*(?<!\s)", latex)
    return "" if words or not latex.strip() else latex


def bracket_formula(state: StateInline, silent: bool) -> bool:
    """A rule of the reader: such a formula in a line of text."""
    latex = bracketed(state.src, state.pos)
    if latex and not silent:
        kind = "math_inline" if state.src[state.pos + 1] == "(" else "math_inline_double"
        state.push(kind, "math", 0).content = latex
    state.pos += len(latex) + 4 if latex else 0
    return bool(latex)


def bracket_block(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    r"""Such a formula, with `\[`, on lines of its own; a line of it may begin with + and is no list."""
    begin = state.bMarks[start] + state.tShift[start]
    if state.is_code_block(start) or not state.src.startswith(r"\[", begin):
        return False
    latex = bracketed(state.src, begin)
    after = begin + len(latex) + 4
    last = next((line for line in range(start, end) if state.eMarks[line] >= after), None)
    if not latex or last is None or re.search(r"\n\s*\n", latex) or state.src[after : state.eMarks[last]].strip():
        return False
    if not silent:
        token = state.push("math_block", "math", 0)
        token.block, token.content, token.map = True, latex, [start, last + 1]
    state.line = last + 1
    return True


@cache
def reader() -> MarkdownIt:
    markdown = MarkdownIt("commonmark", {"html": False, "maxNesting": 30}).enable(["table", "strikethrough"])
    markdown.use(
        dollarmath_plugin,
        allow_labels=False,
        double_inline=True,
        renderer=lambda latex, options: formula(latex, options["display_mode"]),
    )
    markdown.inline.ruler.before("escape", "math_brackets", bracket_formula)
    markdown.block.ruler.before("fence", "math_brackets_block", bracket_block, {"alt": ["paragraph"]})
    markdown.add_render_rule("image", image)
    markdown.add_render_rule("link_open", link_open)
    return markdown


def rich_text(markdown: str) -> Markup:
    """Markdown with formulas as HTML; as plain text where it cannot be read."""
    text = cut(plain(markdown), LONGEST_TEXT)
    try:
        return Markup(reader().render(text))
    except Exception:  # nothing that a student writes may stop the page
        return Markup("<pre>{}</pre>").format(text)


def sentence(text: str) -> Markup:
    """A sentence of ours, with `code`, $formulas$ and *stress* in it."""

    def made(part: str) -> Markup:
        inside = part[1:-1]
        if part.startswith("`") and inside:
            return Markup("<code>{}</code>").format(inside)
        if part.startswith("$") and inside:
            return formula(inside)
        return Markup("<em>{}</em>").format(inside) if re.fullmatch(r"\*\w+\*", part) else escape(part)

    return Markup("").join(map(made, re.split(r"(`[^`]+`|\$[^$]+\$|(?<!\w)\*\w+\*(?!\w))", plain(text))))


# ----------------------------------------------------------------------------------------------- code


def code(source: str) -> Markup:
    """Python in colours; the classes are styled by `code_style`."""
    text = cut(plain(source), LONGEST_TEXT)
    return Markup(highlight(text, PythonLexer(stripnl=False, ensurenl=False), HtmlFormatter(nowrap=True)))


@cache
def code_style(dark: bool) -> str:
    """CSS for `code` inside an element of class code."""
    style = HtmlFormatter(style="github-dark" if dark else "default").get_style_defs(".code")
    lines = [line for line in style.splitlines() if re.match(r"\.code \.[a-z0-9]+ \{", line)]
    return "\n".join(re.sub(r" /\*.*?\*/", "", line) for line in lines)
