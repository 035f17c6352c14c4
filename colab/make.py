"""Makes the notebooks from their sources, runs them, and keeps what they put out.

  python -m colab.make [NAME ...]

A source, `sources/NAME.py`, is a Python file in the percent format that Jupyter and editors know: `# %%` begins a cell,
`# %% [markdown]` one of text. The first cell of text gets the badge that opens the notebook in Colab, and after it
comes the cell that installs the package. Needs the extra `notebooks`. `tests/colab_test.py` holds the notebooks
against their sources, and runs them with tiny settings.
"""

import re
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = "worldlm-jax/worldlm_jax"  # on GitHub; a placeholder until there is one, used for all links and the badges
FOLDER = Path(__file__).parent
NAMES = ("quickstart", "your_own_text", "inside_the_federation", "tpu")

_ADDRESS = f"https://colab.research.google.com/github/{REPOSITORY}/blob/main/colab/{{name}}.ipynb"
_BADGE = f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({_ADDRESS})"
_INSTALL = f'''\
# Installs the package where it is missing, as on Colab.
import importlib.util
import shutil
import subprocess
import sys

if importlib.util.find_spec("worldlm_jax") is None:
  accelerator = ",cuda12" if shutil.which("nvidia-smi") else ""
  package = f"worldlm_jax[report{{accelerator}}] @ git+https://github.com/{REPOSITORY}"
  subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)'''


def cells(name: str) -> list[tuple[str, str]]:
  """The cells of a notebook as its source has them, with badge and installation: (kind, text) each."""
  found = []
  for heading, text in re.findall(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", (FOLDER / "sources" / f"{name}.py").read_text(),
                                  re.MULTILINE):
    text = text.strip("\n")
    if "[markdown]" in heading:
      text = re.sub(r"^# ?", "", text, flags=re.MULTILINE)
      text = re.sub(r"\]\((\w+)\.ipynb\)", lambda match: f"]({_ADDRESS.format(name=match[1])})", text)
    found.append(("markdown" if "[markdown]" in heading else "code", text))
  title = (found[0][0], f"{_BADGE.format(name=name)}\n\n{found[0][1]}")
  return [title, ("code", _INSTALL), *found[1:]]


def notebook(name: str) -> Any:
  """The notebook of a source, not run yet."""
  import nbformat  # of the extra; who only wants to know the cells does without

  made = nbformat.v4.new_notebook(metadata={
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
  })
  for place, (kind, text) in enumerate(cells(name)):
    new_cell = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
    made.cells.append(new_cell(text, id=f"{name}-{place}".replace("_", "-")))
  return made


def _joined(outputs: list[Any]) -> list[Any]:
  """Outputs of which those that follow one another on the same stream are one."""
  found: list[Any] = []
  for output in outputs:
    if found and output.output_type == found[-1].output_type == "stream" and output.name == found[-1].name:
      found[-1].text += output.text
    else:
      found.append(output)
  return found


def main(names: list[str]) -> None:
  """Makes and runs the named notebooks, each in an empty folder."""
  import nbformat
  from nbclient import NotebookClient

  for name in names or NAMES:
    made = notebook(name)
    with tempfile.TemporaryDirectory() as folder:
      NotebookClient(made, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for cell in made.cells:
      cell.metadata.pop("execution", None)  # when it ran
      if "outputs" in cell:
        cell.outputs = _joined(cell.outputs)
    nbformat.write(made, FOLDER / f"{name}.ipynb")
    print(f"colab/{name}.ipynb")


if __name__ == "__main__":
  main(sys.argv[1:])
