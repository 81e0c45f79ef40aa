"""What Sphinx reads: its extensions, the theme, and formulas as MathML, which browsers show without a script."""

import re
from importlib.resources import files
from pathlib import Path

from docutils.nodes import SkipNode
from math_core import LatexError, LatexToMathML

from minipeft import __version__ as release  # noqa: F401
from minipeft.book import links

project = html_title = "minipeft"
copyright = author = ""
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
html_theme = "furo"
html_static_path = [str(Path(__file__).with_name("book.css")), str(files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf")]
html_css_files = ["book.css"]
html_math_renderer = "mathml"
html_copy_source = html_show_sourcelink = html_show_copyright = html_show_sphinx = False
html_show_search_summary = False  # it would fetch pages, which a browser does not do from disk
html_permalinks_icon = "#"
pygments_style, pygments_dark_style = "a11y-high-contrast-light", "a11y-high-contrast-dark"
highlight_language = "text"
nb_execution_mode, nb_output_stderr, nb_merge_streams = "off", "remove", True
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors, myst_heading_slug_func = 3, "minipeft.book.links.slug"
autodoc_default_options = {"members": True, "ignore-module-all": True, "member-order": "bysource"}
autodoc_typehints_format, maximum_signature_line_length = "short", 80
suppress_warnings = ["docutils", "ref.python", "autodoc.import_object"]
to_mathml = LatexToMathML()


def math(self, node, block=False):
    """Write a formula; one that cannot be converted, as it was typed."""
    text = node.astext()
    try:
        html = to_mathml.convert_with_local_state(text, displaystyle=block)
    except LatexError:
        html = f"<code>{self.encode(text)}</code>"
    self.body.append(f'<div class="math">{html}</div>' if block else html)
    raise SkipNode


def docstring(app, what, name, obj, options, lines):
    """Turn a docstring into reStructuredText, and end it with the lessons."""
    lines[:] = links.restructured(lines)
    if lessons := links.from_lessons(links.lessons_of(name), "", code=True):
        lines += [lessons, ""]


def source_page(app, page, template, context, doctree):
    """Say on a page of source which lessons explain it."""
    module, up = page.removeprefix("_modules/").replace("/", "."), "../" * page.count("/")
    if page.startswith("_modules/") and module in links.modules():
        if lessons := links.from_lessons(links.lessons_of(module), up):
            context["body"] = context["body"].replace("</h1>", f"</h1><p>{lessons}</p>", 1)


def full_size(app, page, template, context, doctree):
    """Make each figure a link to its full size, which a narrow screen does not have room for."""
    figure = r'<img [^>]*src="([^"]*_images/[^"]*)"[^>]*>'
    context["body"] = re.sub(figure, r'<a href="\1" title="full size">\g<0></a>', context.get("body", ""))


def setup(app):
    app.add_html_math_renderer("mathml", (math, None), (lambda self, node: math(self, node, block=True), None))
    app.connect("autodoc-process-docstring", docstring)
    app.connect("html-page-context", source_page)
    app.connect("html-page-context", full_size)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
