"""The documentation as a site, which `bash launch/docs.sh` builds with Sphinx and MyST from the pages beside this."""

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import worldlm_jax

project, version = "worldlm_jax", worldlm_jax.__version__
copyright = "the authors of worldlm_jax; Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["conf.py"]

html_theme = "furo"
html_title = "worldlm_jax"
html_static_path = ["images"]
html_css_files = ["site.css"]
html_theme_options = {"footer_icons": [], "sidebar_hide_name": False}
highlight_language = "text"  # of blocks in docstrings: equations, tables, command lines
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
  """Our docstrings are plain text: `code` in single quotes, equations and tables set apart by their indentation."""
  found: list[str] = []
  in_section = in_literal = False
  for line in lines:
    in_section = in_section or bool(re.fullmatch(r"(Args|Returns|Raises|Yields):", line))
    if line.startswith("  ") and not in_section and not in_literal:
      found += ["", "::", ""]
      in_literal = True
    elif line.strip() and not line.startswith("  "):
      found += [""] * in_literal
      in_literal = False
    found.append(line if in_literal else _inline(line))
  lines[:] = found


def _inline(line: str) -> str:
  """Text with its code marked as such, and without what would have a meaning in reStructuredText."""
  line = re.sub(r"(?<=: )([A-Z])\.$", r"\1\\.", line)  # "num_rows: P." begins no numbered list
  parts = re.split(r"(`[^`]+`)", line)
  return "".join(f"`{part}`" if part.startswith("`") and part.endswith("`") and len(part) > 2
                 else re.sub(r"(?<!\*)\*(?!\*)|\||(?<=\w)_(?!\w)", r"\\\g<0>", part) for part in parts)


def setup(app) -> None:
  """Called by Sphinx."""
  app.connect("autodoc-process-docstring", _to_restructured_text, priority=400)  # before napoleon
