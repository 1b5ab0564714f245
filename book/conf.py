"""Sphinx's settings for the rendered book. `cs336_alignment/book.py` copies this folder and runs Sphinx on the copy."""

from cs336_alignment import __version__, book

project = "Post-training, exactly"
author = "the authors of the course"
copyright = "text and figures: CC BY 4.0; code: Apache-2.0"
version = release = __version__
language = "en"

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode", "sphinx.ext.mathjax"]
exclude_patterns = ["_build"]
smartquotes = False  # the same characters as in JupyterLab

# Notebooks: shown as they were committed, never executed.
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in outputs may hold formulas
nb_ipywidgets_js = {}  # otherwise two scripts from a server elsewhere
myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 4
myst_heading_slug_func = "cs336_alignment.book.jupyter_slug"

# Docstrings.
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
add_module_names = False

# Formulas.
mathjax_path = book.MATHJAX
mathjax3_config = {"svg": {"fontCache": "local"}, "options": {"enableMenu": False}}

# Pages.
html_theme = "sphinx_book_theme"
html_title = project
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_js_files = [("book.js", {"priority": 900})]
html_show_sphinx = False
html_use_index = False  # search does it better
html_domain_indices = False
html_theme_options = {
    "show_navbar_depth": 1,
    "home_page_in_toc": False,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_start": [],
    "navbar_center": [],
    "navbar_end": [],
    "navbar_persistent": [],
    "icon_links": [],
    "footer_content_items": ["copyright.html"],
    "show_prev_next": True,
    "pygments_light_style": "a11y-light",
    "pygments_dark_style": "a11y-dark",
}


def setup(app) -> None:
    book.setup(app)
