"""The rendered book: built from two small notebooks, complete, closed in itself, and strict about its links."""

import base64
import importlib.util
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from cs336_alignment import book

ROOT = Path(__file__).resolve().parent.parent
PIXEL = base64.b64encode(
    bytes.fromhex(
        "89504e470d0a1a0a0000000d49484452000000010000000108060000001f15c4890000000d49444154789c6360606060000000050001"
        "a5f645400000000049454e44ae426082"
    )
).decode()
pytestmark = pytest.mark.filterwarnings("ignore:.*Sphinx API modifications")
needs_sphinx = pytest.mark.skipif(
    importlib.util.find_spec("myst_nb") is None, reason="needs Sphinx; `python3 course.py book` installs it"
)


def picture(alt):
    return new_output("display_data", {"image/png": PIXEL, "text/plain": alt}, metadata={"image/png": {"alt": alt}})


def write(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"language_info": {"name": "python", "pygments_lexer": "ipython3"}}
    nbformat.write(new_notebook(cells=list(cells), metadata=metadata), path)


def small_checkout(root):
    """Two lectures and the book's own pages."""
    (root / "book").symlink_to(ROOT / "book")
    write(
        root / "lectures" / "09_objective.ipynb",
        new_markdown_cell(
            "# 09. The objective\n\nNext: [lecture 12](12_dpo.ipynb#The-loss). Practice: [a4](../assignments/a4_dpo/"
            "a4_dpo.ipynb).\n\n\\begin{align*}\nJ &= \\mathbb{E}[r] - \\beta\\,\\mathrm{KL} \\tag{9.1}\n\\end{align*}"
        ),
        new_code_cell("show(figure)", outputs=[picture('A "curve" that rises.')]),
        new_code_cell(
            "HTML(figure)",
            outputs=[new_output("display_data", {"text/html": "<input id='knob'><script>var turned = 1;</script>"})],
        ),
    )
    write(
        root / "lectures" / "12_dpo.ipynb",
        new_markdown_cell(
            "# 12. DPO\n\n## The loss\n\nFrom (9.1); see lecture 09 and arXiv 2305.18290. $\\frac{1}{2}$"
        ),
        new_code_cell(
            "table(rows)", outputs=[new_output("display_data", {"text/markdown": "| $\\beta$ |\n|---|\n| 1 |"})]
        ),
        new_code_cell("for _ in tqdm(x): ...", outputs=[new_output("stream", name="stderr", text="10%|#\r100%|##\n")]),
    )
    return root


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    root = small_checkout(tmp_path_factory.mktemp("course"))
    return book.build_book(root=root).parent


def text_of(page):
    return page.read_text(encoding="utf-8")


@needs_sphinx
def test_every_page_is_there_and_nothing_is_asked_of_the_network(pages):
    names = ["index", "glossary", "bibliography", "search", "lectures/09_objective", "lectures/12_dpo", "api/dpo"]
    assert all((pages / f"{name}.html").is_file() for name in names)
    assert book.check_pages(pages) == []
    for path in [*pages.rglob("*.html"), *pages.rglob("*.css")]:
        if "_static/vendor" not in path.as_posix():
            assert not re.search(r"""(?:src=|url\(|@import )["']?(?:https?:)?//""", text_of(path)), path
    assert (pages / "_static" / book.MATHJAX).stat().st_size > 1e6


@needs_sphinx
def test_lectures_are_listed_in_reading_order_and_keep_their_outputs(pages):
    index = text_of(pages / "index.html")
    assert 0 < index.index("lectures/09_objective.html") < index.index("lectures/12_dpo.html")
    assert "Assignments" not in index  # there are none in this checkout
    lecture = text_of(pages / "lectures" / "09_objective.html")
    assert 'alt="A &quot;curve&quot; that rises."' in lecture
    assert "<script>var turned = 1;</script>" in lecture
    assert "\\tag{9.1}" in lecture and 'id="equation-9-1"' in lecture
    assert 'href="12_dpo.html#the-loss"' in lecture and "a4_dpo.ipynb" not in lecture
    other = text_of(pages / "lectures" / "12_dpo.html")
    assert "100%|##" in other and "10%|#\n" not in other
    assert re.search(r"<th[^>]*>.{0,40}<span class=\"math", other, re.S)


@needs_sphinx
def test_what_the_text_names_it_also_links(pages):
    lecture = text_of(pages / "lectures" / "12_dpo.html")
    assert 'href="09_objective.html#equation-9-1"' in lecture and 'href="09_objective.html"' in lecture
    assert 'href="../bibliography.html#arxiv-2305-18290"' in lecture
    assert 'href="https://arxiv.org/abs/2305.18290"' in text_of(pages / "bibliography.html")
    assert 'href="../lectures/12_dpo.html"' in text_of(pages / "api" / "dpo.html")


@needs_sphinx
def test_docstrings_arrive_readable(pages):
    page = text_of(pages / "api" / "dpo.html")
    assert "<strong>Raises</strong>: ValueError if shapes differ" in page
    assert "units of reward that a nat of KL costs" in page  # a comment behind a field
    assert "problematic" not in page


@needs_sphinx
def test_the_glossary_has_both_languages(pages):
    page = text_of(pages / "glossary.html")
    assert all(word in page for word in ("monopsony", "买方垄断", "直接偏好优化", "KL 散度"))
    assert page.count("<tr") > 80


@needs_sphinx
def test_a_broken_link_between_notebooks_is_an_error_and_the_old_book_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(book, "write_reference", lambda folder: (folder / "intro.md").rename(folder / "index.md"))
    root = small_checkout(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    (out / book.MARKER).write_text("")
    (out / "old.html").write_text("")
    write(root / "lectures" / "10_next.ipynb", new_markdown_cell("# 10. Next\n\n[back](09_objectives.ipynb)"))
    with pytest.raises(ValueError, match=r"10_next\.ipynb, cell 1: .*09_objectives\.ipynb"):
        book.build_book(out=out, root=root)
    assert (out / "old.html").exists()


# What needs no Sphinx


def test_pictures_without_words_and_doubled_numbers_are_named(tmp_path):
    equations = [new_markdown_cell(source) for source in ("\\tag{10.1} and \\tag{9.1}", "\\tag{10.1}")]
    notebook = new_notebook(cells=[*equations, new_code_cell("", outputs=[picture(" ")])])
    facts = {"alt": {}, "equations": {"9.1": "lectures/09_objective"}, "lectures": {}}
    problems = book.read_facts(notebook, Path("lectures/10_next.ipynb"), facts)
    assert problems == ["cell 2: a second equation (10.1)", "cell 3: a picture without alternative text"]
    assert facts["equations"] == {"9.1": "lectures/09_objective", "10.1": "lectures/10_next"}


def test_pages_that_load_or_link_what_is_not_there_are_named(tmp_path):
    (tmp_path / "index.html").write_text(
        "<script src='https://cdn.example/x.js'></script><img src='a.png'><a href='other.html#here'></a>"
        "<a href='12_dpo.ipynb'></a><a href='https://arxiv.org'></a><a href='#there'></a><p id='there'>"
    )
    (tmp_path / "other.html").write_text("<p id='elsewhere'>")
    assert book.check_pages(tmp_path) == [
        "index.html loads https://cdn.example/x.js",
        "index.html loads a.png, which is not there",
        "index.html has a link to other.html#here; that page has no such place",
        "index.html has a link to 12_dpo.ipynb, which is not there",
        "index.html: a picture without alternative text",
    ]


def test_a_folder_that_is_no_book_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(ValueError, match="is not a book|the book needs"):
        book.build_book(out=tmp_path, root=ROOT)
    assert (tmp_path / "thesis.txt").exists()


def test_plain_docstrings_keep_their_words_whatever_restructured_text_would_make_of_them():
    lines = [
        "Mean of |x|*w over `mask`, pi_ref_ too.",
        "x, y: (B,)",
        "    more",
        "Raises: ValueError",
        "",
        "    drawn   block",
    ]
    assert book.restructured(lines, {"x", "y"}) == [
        "",
        r"Mean of \|x\|\*w over \ ``mask``\ , pi\_ref\_ too.",
        "",
        "- ``x``, ``y``: \\(B,) more",
        "",
        "- **Raises**: ValueError",
        "",
        "::",
        "",
        "    drawn   block",
        "",
    ]


def test_numbers_that_only_look_like_equations_are_left_alone():
    facts = {"equations": {"12.3": "lectures/12_dpo"}, "lectures": {"12": "lectures/12_dpo"}}
    text = "By (12.3), 12.3 s later (12.4); lectures 10 and 12; arXiv 2305.18290."
    found = [(text[a:b], target) for a, b, target in book.named_targets(text, "lectures/10_x", facts)]
    assert found == [
        ("12.3", "lectures/12_dpo#equation-12-3"),
        ("12", "lectures/12_dpo"),
        ("arXiv 2305.18290", "bibliography#arxiv-2305-18290"),
    ]


def test_every_paper_that_is_cited_by_number_is_in_the_bibliography():
    number = re.compile(r"arXiv[:\s]\s*(\d{4}\.\d{4,5})")
    listed = set(number.findall((ROOT / "book" / "bibliography.md").read_text(encoding="utf-8")))
    files = [*(ROOT / "cs336_alignment").rglob("*.py"), *(ROOT / "lectures").glob("*.ipynb")]
    cited = {n for path in files for n in number.findall(path.read_text(encoding="utf-8"))}
    assert len(cited) > 10 and not cited - listed
