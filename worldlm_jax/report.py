"""Makes a page for reading and showing out of a run, finished or not, or out of a comparison.

  python -m worldlm_jax.report --workdir=runs/quickstart
  python -m worldlm_jax.report --workdir=runs/comparison --all

Writes report.html, which needs nothing but itself, and its charts as PNGs in report/, into the same folder. Of a
comparison's runs, those of its own entry's first seed get a report too, and all of them with --all. Needs the extra
`report`.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from worldlm_jax import checks, command, metrics
from worldlm_jax.reporting import files

if TYPE_CHECKING:
  from worldlm_jax.reporting import figures


def report(workdir: str | Path, every_run: bool = False) -> Path:
  """Does what the command does.

  Args:
    workdir: the folder of a run or a comparison.
    every_run: of a comparison, makes reports of all its runs, not of its own entry's first seed alone.

  Returns:
    The page's path.

  Raises:
    InputError: the folder holds neither, a file in it is not what it should be, or matplotlib is not installed.
    OSError: the page could not be written.
  """
  found = files.load(workdir)
  try:
    from worldlm_jax.reporting import comparison_page, run_page  # they draw
  except ModuleNotFoundError as error:
    if (error.name or "").partition(".")[0] != "matplotlib":
      raise
    raise checks.InputError("matplotlib is not installed, with which the charts are drawn: "
                            "pip install 'worldlm_jax[report]'") from error
  metrics.check_no_links_out("--workdir", found.folder)
  with files.as_written(found.folder):
    if isinstance(found, files.Run):
      return _write(found.folder, *run_page.make(found, run_page.name_of(found)))
    linked = []
    for run in found.content["runs"]:
      folder = found.run_folder(run)
      if not (folder / "config.json").exists():
        continue  # folders of runs may have been removed to make room
      if every_run or _is_first(run, found):
        title = f"{run['entry']}, seed {run['seed']}"
        back = Path(os.path.relpath(found.folder, folder)).as_posix() + "/report.html"
        _write(folder, *run_page.make(files.load_run(folder), title, back))
      if (folder / "report.html").exists():
        linked.append(run)
    return _write(found.folder, *comparison_page.make(found, linked))


def _is_first(run: Mapping[str, Any], comparison: files.Comparison) -> bool:
  return run["entry"] == comparison.own and run["seed"] == comparison.content["seeds"][0]


def _write(folder: Path, html: str, charts: "list[figures.Chart]") -> Path:
  """The charts first and the page in one step, so that no page is ever half there."""
  (folder / "report").mkdir(exist_ok=True)
  for chart in charts:
    (folder / "report" / f"{chart.name}.png").write_bytes(chart.png)
  page, unfinished = folder / "report.html", folder / "report.html.new"
  unfinished.write_text(html, encoding="utf-8")
  unfinished.replace(page)
  return page.absolute()


def define_flags() -> None:
  """Defines the flags. Not on import: other commands, which tests import too, have a --workdir of their own."""
  flags.DEFINE_string("workdir", None, "Folder of a run or of a comparison.")
  flags.DEFINE_bool("all", False, "Of a comparison: also make the reports of all its runs.")


def main(_: list[str]) -> int:
  """Runs the command of the flags and returns the exit code."""
  try:
    print(f"report: {report(flags.FLAGS.workdir, flags.FLAGS.all)}")
  except (checks.InputError, OSError) as error:
    return command.failed(error)
  return command.OK


if __name__ == "__main__":
  define_flags()
  command.start(main, command.Flags("workdir"))
