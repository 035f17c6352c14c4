"""The documentation site: `bash launch/docs.sh` builds it with Sphinx and MyST out of the Markdown pages beside this."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import worldlm_jax

project, version = "worldlm_jax", worldlm_jax.__version__
copyright = "the authors of worldlm_jax; Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py"]
suppress_warnings = ["toc.empty_glob"]  # pages that may not be there yet

html_theme = "furo"
html_title = "worldlm_jax"
html_static_path = ["images"]
html_css_files = ["site.css"]
html_theme_options = {"footer_icons": [], "sidebar_hide_name": False}
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "undoc-members": False}
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False


def _to_restructured_text(app, kind, name, obj, options, lines: list[str]) -> None:
  """Our docstrings are plain text: `code` in single quotes, equations and tables indented, **bold** in leads."""
  found: list[str] = []
  for line in lines:
    indented, before = line.startswith("  "), next((text for text in reversed(found) if text.strip()), "")
    section = re.match(r"(Args|Returns|Raises|Yields|Attributes):$|:\w+", before.strip())
    if indented and not section and found and not found[-1].strip() and not before.startswith((" ", ":", ".. ")):
      found += ["::", ""]  # what is set apart and indented, and no list of arguments, is shown as it is
    found.append(line if indented and "::" in found else re.sub(r"(?<![`:\w])`([^`]+)`(?!`)", r"``\1``", line))
  lines[:] = found


def setup(app) -> None:
  """Called by Sphinx."""
  app.connect("autodoc-process-docstring", _to_restructured_text, priority=900)
