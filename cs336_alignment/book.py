"""The rendered book: lectures, assignments, glossary, bibliography and this reference as pages that need no network.

`python3 course.py book` runs this file. It copies the notebooks and the pages of `book/` into a temporary folder,
lets Sphinx make HTML of them, looks at what came out, and only then replaces the last book. Nothing is executed:
the pages show the outputs that the notebooks were committed with.
"""

import ast
import base64
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import inspect
import io
import json
import re
import shutil
import tempfile
import webbrowser
from concurrent.futures import ProcessPoolExecutor
from dataclasses import is_dataclass
from html.parser import HTMLParser
from multiprocessing import get_context
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat

from cs336_alignment.lectures import tidy
from cs336_alignment.paths import PACKAGE, course_root

MATHJAX = "tex-svg-full.js"  # MathJax 3.2.2 in one file, fonts included; version 4 would fetch its fonts
MARKER = ".buildinfo"  # Sphinx writes it: a folder with it is a book of ours, which the next one may replace

# The modules in the order in which they are worth reading; those that are not named here follow at the end.
REFERENCE = {
    "Losses and training loops": ["tokens", "sft", "reward", "ppo", "dpo"],
    "What can be computed exactly": ["exact", "corner"],
    "Models, sampling, measuring": ["models", "generate", "optimize", "speed", "decode", "distributed", "evaluate"],
    "The town": ["world", "world_training", "ablation"],
    "Your own data": ["data", "real_data", "bpe"],
    "What runs the course": ["pipeline", "report", "notebook", "lectures", "book"],
}
NOT_IN_THE_REFERENCE = ("__init__", "__main__", "cli", "paths", "words")


def build_book(out: Path | None = None, root: Path | None = None, show: bool = False) -> Path:
    """Builds the book and returns its first page.

    out: where the pages go, by default runs/book in the checkout.
    root: the checkout.
    show: open the first page in a browser.
    Raises: ValueError if Sphinx is not installed, if `out` holds something that is not a book, or with every
        problem of the pages: a broken link, a picture without words, a formula or heading that does not parse.
    """
    missing = [name for name in ("sphinx", "myst_nb", "sphinx_book_theme") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"the book needs {', '.join(missing)}: `python3 course.py book` installs what it needs")
    root = root or course_root()
    out = (out or root / "runs" / "book").absolute()
    if out.exists() and not (out / MARKER).exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not a book: give another --out, or remove it")
    with tempfile.TemporaryDirectory(prefix="book-") as folder:
        source, pages = Path(folder, "source"), Path(folder, "pages")
        problems = prepare(root, source) or run_sphinx(source, pages) or check_pages(pages)
        if problems:
            raise ValueError(f"the book has {len(problems)} problems:\n" + "\n".join(problems))
        shutil.rmtree(out, ignore_errors=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(pages, out)
    first = out / "index.html"
    if show:
        webbrowser.open(first.as_uri())
    return first


# ------------------------------------------------------------------------------------------------ sources


def prepare(root: Path, source: Path) -> list[str]:
    """Makes Sphinx's folder of sources from the checkout; returns the problems found in the notebooks.

    Notebooks keep their places beside each other, so links between them need no change. `book.json` holds what
    `book/conf.py` must know of them: the pictures' alternative texts and where each equation stands.
    """
    shutil.copytree(root / "book", source)
    for page in sorted((root / "benchmarks" / "results").glob("*.md")):
        (source / "results").mkdir(exist_ok=True)
        shutil.copy(page, source / "results")
    shutil.copy(mathjax_file(), source / "_static" / MATHJAX)
    facts: dict = {"alt": {}, "equations": {}, "lectures": {}}
    problems = []
    notebooks = sorted((root / "lectures").glob("[0-9][0-9]_*.ipynb"))
    notebooks += sorted((root / "assignments").glob("a[0-9]*_*/a[0-9]*_*.ipynb"))
    for path in notebooks:
        page = path.relative_to(root)
        notebook = nbformat.read(path, as_version=4)
        problems += [f"{page}, {problem}" for problem in read_facts(notebook, page, facts)]
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = tidy(cell.outputs)
            else:
                cell.source = without_missing_assignments(cell.source, path.parent)
        (source / page).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, source / page)
    (source / "book.json").write_text(json.dumps(facts), encoding="utf-8")
    write_reference(source / "api")
    index = source / "index.md"
    index.write_text(without_empty_lists(index.read_text(encoding="utf-8"), source), encoding="utf-8")
    return problems


def without_empty_lists(text: str, folder: Path) -> str:
    """The start page without the headings under which no page would be listed (Sphinx warns of those)."""
    for block in re.findall(r"^## .+\n\n```\{toctree\}\n(?:.*\n)*?```\n", text, re.M):
        patterns = re.findall(r"^\S*\*\S*$", block, re.M)
        if patterns and not any(list(folder.glob(f"{pattern}.*")) for pattern in patterns):
            text = text.replace(block, "")
    return text


def without_missing_assignments(text: str, folder: Path) -> str:
    """Links to assignments that this checkout does not have become plain words: lectures come before them."""

    def word(match: re.Match) -> str:
        return match[0] if (folder / match[2]).exists() else match[1]

    return re.sub(r"\[([^][]*)\]\(([^()#]*assignments/[^()#]*\.ipynb)[^()]*\)", word, text)


def mathjax_file() -> Path:
    """The copy of MathJax that the package sphinx-mathjax-offline brings. (Its folder cannot be imported.)"""
    for file in importlib.metadata.files("sphinx-mathjax-offline") or []:
        if file.name == MATHJAX:
            return Path(file.locate())
    raise FileNotFoundError(f"sphinx-mathjax-offline has no {MATHJAX}: another version than the pinned one?")


def read_facts(notebook, page: Path, facts: dict) -> list[str]:
    """Adds a notebook's alternative texts and equation numbers to `facts`; returns what is wrong with them."""
    problems = []
    name = page.with_suffix("").as_posix()
    if page.parts[0] == "lectures":
        facts["lectures"][page.name[:2]] = name
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type == "markdown":
            for tag in re.findall(r"\\tag\{([^}]+)\}", cell.source):
                if facts["equations"].get(tag) == name:
                    problems.append(f"cell {number}: a second equation ({tag})")
                if tag not in facts["equations"] or tag.startswith(page.name[:2].lstrip("0") + "."):
                    facts["equations"][tag] = name  # a lecture may quote another's equation
        for output in cell.get("outputs", []):
            for kind in ("image/png", "image/jpeg"):
                if kind in output.get("data", {}):
                    alt = output.get("metadata", {}).get(kind, {}).get("alt", "").strip()
                    if not alt:
                        problems.append(f"cell {number}: a picture without alternative text")
                    # myst-nb names a picture's file by this hash, and does not hand the text on.
                    facts["alt"][hashlib.sha256(base64.b64decode(output["data"][kind])).hexdigest()] = alt
    return problems


def write_reference(folder: Path) -> None:
    """A page for each module of the package, and the page that lists them."""
    folder.mkdir(parents=True, exist_ok=True)
    modules = {path.stem: path for path in sorted(PACKAGE.glob("*.py")) if path.stem not in NOT_IN_THE_REFERENCE}
    named = {name for names in REFERENCE.values() for name in names}
    groups = REFERENCE | {"Others": [name for name in modules if name not in named]}
    lines = [(folder / "intro.md").read_text(encoding="utf-8")] if (folder / "intro.md").exists() else ["# Package\n"]
    (folder / "intro.md").unlink(missing_ok=True)
    for title, names in groups.items():
        names = [name for name in names if name in modules]
        if not names:
            continue
        lines.append(f"\n## {title}\n")
        lines += [f"- [`{name}`]({name}.rst): {first_sentence(modules[name])}" for name in names]
        lines += ["", "```{toctree}", ":hidden:", "", *names, "```"]
        for name in names:
            text = f"{name}\n{'=' * len(name)}\n\n.. automodule:: {PACKAGE.name}.{name}\n   :members:\n"
            (folder / f"{name}.rst").write_text(text, encoding="utf-8")
    (folder / "index.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def first_sentence(path: Path) -> str:
    """The first line of a module's docstring."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]


# ------------------------------------------------------------------------------------------------- Sphinx


def run_sphinx(source: Path, pages: Path) -> list[str]:
    """Writes the pages; returns Sphinx's warnings, one a line.

    In a process of its own, because autodoc replaces the defaults of the functions that it documents by placeholders.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(run_sphinx_here, source, pages).result()


def run_sphinx_here(source: Path, pages: Path) -> list[str]:
    """Makes the pages; returns Sphinx's warnings, each of which is a problem."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    warnings = io.StringIO()
    with patch_docutils(source), docutils_namespace():
        app = Sphinx(
            source, source, pages, pages.parent / "doctrees", "html", status=None, warning=warnings, freshenv=True
        )
        app.build(force_all=True)
    found = re.sub(r"\x1b\[[0-9;]*m", "", warnings.getvalue()).replace(f"{source}/", "")
    # myst-nb's line numbers of notebooks are 10,000 * cell + line.
    found = re.sub(r"\.ipynb:(\d+)\d{4}:", r".ipynb, cell \1:", found)
    return [line for line in found.splitlines() if line.strip()]


def setup(app) -> None:
    """What `book/conf.py` hands to Sphinx: the hooks of this file."""
    app.connect("autodoc-process-docstring", process_docstring)
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("doctree-read", describe_pictures)
    app.connect("doctree-resolved", add_links)


def book_facts(app) -> dict:
    if not hasattr(app, "book_facts"):
        app.book_facts = json.loads(Path(app.srcdir, "book.json").read_text(encoding="utf-8"))
    return app.book_facts


def describe_pictures(app, doctree) -> None:
    """Gives every picture of a notebook its alternative text, and every numbered equation a name to link to."""
    from docutils import nodes

    for image in doctree.findall(nodes.image):
        alt = book_facts(app)["alt"].get(Path(image["uri"]).stem)
        if alt:
            image["alt"] = alt
    for block in doctree.findall(nodes.math_block):
        block["ids"] += [equation_id(tag) for tag in re.findall(r"\\tag\{([^}]+)\}", block.astext())]


def jupyter_slug(title: str) -> str:
    """A heading's name as JupyterLab makes it, so that a link to a heading works there and here."""
    return title.replace(" ", "-")


def equation_id(tag: str) -> str:
    return "equation-" + re.sub(r"\W", "-", tag)


def add_links(app, doctree, page: str) -> None:
    """Links what the text only names: "lecture 12", "(12.3)", "arXiv 2305.18290"."""
    from docutils import nodes
    from sphinx import addnodes

    closed = (nodes.reference, nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.title)
    closed += (nodes.raw, addnodes.desc_signature, addnodes.toctree, addnodes.compact_paragraph)
    for text in list(doctree.findall(nodes.Text)):
        parents = []
        parent = text.parent
        while parent is not None:
            parents.append(parent)
            parent = parent.parent
        found = named_targets(str(text), page, book_facts(app))
        if not found or any(isinstance(parent, closed) for parent in parents):
            continue
        pieces, position = [], 0
        for start, end, target in found:
            pieces.append(nodes.Text(text[position:start]))
            if target.startswith("https:"):
                name = target.rpartition("/")[2]
                pieces.append(nodes.reference("", text[start:end], refuri=target, ids=[arxiv_id(name)]))
            else:
                place, _, fragment = target.partition("#")
                uri = app.builder.get_relative_uri(page, place) + (f"#{fragment}" if fragment else "")
                pieces.append(nodes.reference("", text[start:end], refuri=uri, internal=True))
            position = end
        pieces.append(nodes.Text(text[position:]))
        text.parent.replace(text, [piece for piece in pieces if len(piece)])


def arxiv_id(number: str) -> str:
    return "arxiv-" + number.replace(".", "-")


def named_targets(text: str, page: str, facts: dict) -> list[tuple[int, int, str]]:
    """(start, end, target) of what a text of `page` names; a target is a page, perhaps with #place, or an address.

    An arXiv number leads to its entry in the bibliography, and from there to arXiv.
    """
    found = []
    for match in re.finditer(r"arXiv[:\s]\s?(\d{4}\.\d{4,5})\b", text):
        number = match[1]
        place = f"bibliography#{arxiv_id(number)}" if page != "bibliography" else f"https://arxiv.org/abs/{number}"
        found.append((*match.span(), place))
    for match in re.finditer(r"[Ll]ectures? \d\d\b|(?<=[Ll]ectures \d\d and )\d\d\b", text):
        lecture = facts["lectures"].get(match[0][-2:])
        if lecture and lecture != page:
            found.append((*match.span(), lecture))
    for match in re.finditer(
        r"(?<=\()\d\d?\.\d\d?\w?(?=[);,])|(?<=equation )\d\d?\.\d\d?\w?|(?<=, )\d\d?\.\d\d?(?=\))", text
    ):
        if match[0] in facts["equations"]:
            found.append((*match.span(), f"{facts['equations'][match[0]]}#{equation_id(match[0])}"))
    return sorted(found)


# --------------------------------------------------------------------------------------------- docstrings


def process_docstring(app, what, name, thing, options, lines: list[str]) -> None:
    """autodoc's hook: the package's docstrings are plain text, Sphinx wants reStructuredText."""
    parameters = set()
    with contextlib.suppress(TypeError, ValueError):
        parameters = set(inspect.signature(thing).parameters)
    if is_dataclass(thing) and isinstance(thing, type):
        generated = lines and lines[0].startswith(f"{thing.__name__}(")  # what `dataclass` says where nobody did
        lines[:] = ([] if generated else restructured(lines, parameters)) + fields_as_list(thing)
    else:
        lines[:] = restructured(lines, parameters)


def shorten_signature(app, what, name, thing, options, signature, returned):
    """autodoc's hook: a dataclass needs no signature, its fields are listed below it."""
    return ("", None) if isinstance(thing, type) and is_dataclass(thing) else (signature, returned)


def restructured(lines: list[str], parameters: set[str] = frozenset()) -> list[str]:
    """A plain docstring as reStructuredText.

    Paragraphs stay; indented blocks are shown as they are; `name` becomes code; a line that starts with "Raises:",
    or with the names of parameters and a colon, starts an item of a list. Nothing else has a meaning.
    """
    result: list[str] = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        rows = block.split("\n")
        if all(row.startswith("    ") for row in rows):
            result += ["::", "", *rows, ""]
            continue
        for label, text in items_of(rows, parameters):
            names = ", ".join(f"``{word}``" if word in parameters else f"**{word}**" for word in label.split(", "))
            result += ["", f"- {names}: {escaped(text)}" if label else escaped(text)]
        result.append("")
    return result


def items_of(rows: list[str], parameters: set[str]) -> list[tuple[str, str]]:
    """A paragraph's lines as (label, text): new items start at a label or a dash, other lines go on."""
    items: list[tuple[str, str]] = []
    for row in rows:
        label, colon, rest = row.strip().partition(": ")
        if colon and (label in ("Raises", "Returns") or set(label.split(", ")) <= parameters):
            items.append((label, rest))
        elif items and not row.startswith("- "):
            items[-1] = (items[-1][0], f"{items[-1][1]} {row.strip()}")
        else:
            items.append(("", row.strip()))
    return items


def escaped(text: str) -> str:
    """Plain text in which reStructuredText finds no markup but `code`."""
    parts = re.split(r"`+([^`]+)`+", text)
    for i, part in enumerate(parts):
        parts[i] = f"``{part}``" if i % 2 else re.sub(r"([\\*_|<>])", r"\\\1", part)
    # Code must stand apart from the letters around it.
    joined = "".join(part if i % 2 == 0 else f"\\ {part}\\ " for i, part in enumerate(parts))
    return re.sub(r"^([-+.:#=~^(\[])", r"\\\1", joined)


def fields_as_list(thing: type) -> list[str]:
    """The fields of a dataclass with the comments that stand behind them in the source."""
    lines = ["", ""]
    try:
        source = inspect.getsource(thing)
    except (OSError, TypeError):
        return lines
    for match in re.finditer(r"^    (\w+): ([^=#\n]+?)(?: = ([^#\n]+?))?(?:  # (.*))?$", source, re.M):
        name, kind, default, comment = match.groups()
        value = f" = {default}" if default and "field(" not in default else ""
        lines.append(f"- ``{name}: {kind}{value}``" + (f": {escaped(comment)}" if comment else ""))
    return lines


# --------------------------------------------------------------------------------------------- the result


class Page(HTMLParser):
    """What matters of a page: its names (ids), its links, and what it loads."""

    def __init__(self, path: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.images: list[dict] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list) -> None:
        values = dict(attributes)
        self.ids.update(value for name in ("id", "name") if (value := values.get(name)))
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag == "img":
            self.images.append(values)
        loads = {"link": "href", "script": "src", "img": "src", "iframe": "src", "video": "src", "source": "src"}
        if values.get(loads.get(tag, "")):
            self.loads.append(values[loads[tag]])


def check_pages(pages: Path) -> list[str]:
    """Problems of a built book: what it would load from elsewhere, links that lead nowhere, pictures without words."""
    known = {path: Page(path) for path in sorted(pages.rglob("*.html")) if "_static" not in path.parts}
    problems = []
    for path, page in known.items():
        name = path.relative_to(pages)
        for uri in page.loads:
            if urlsplit(uri).scheme not in ("", "data") or uri.startswith("//"):
                problems.append(f"{name} loads {uri}")
            elif not uri.startswith("data:") and not (path.parent / unquote(urlsplit(uri).path)).exists():
                problems.append(f"{name} loads {uri}, which is not there")
        for uri in page.links:
            parts = urlsplit(uri)
            if parts.scheme or uri.startswith("//"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.exists():
                problems.append(f"{name} has a link to {uri}, which is not there")
            elif parts.fragment and target in known and unquote(parts.fragment) not in known[target].ids:
                problems.append(f"{name} has a link to {uri}; that page has no such place")
        problems += [f"{name}: a picture without alternative text" for image in page.images if not image.get("alt")]
    return problems
