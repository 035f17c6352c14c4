"""Trains a list of algorithms and variants on one tree, with several seeds each, and compares them.

  python -m worldlm_jax.compare --config=configs/compare.py --workdir=runs/compare
  python -m worldlm_jax.compare --config=configs/compare.py --workdir=DIR --config.seeds=0,1 \\
      --config.base.rounds=20 --node=code.local_steps=40 --only=worldlm,local

Ends with comparison.md, comparison.json and, with the extra `report`, a page with charts, report.html.

The same command again resumes; a second process with the same command shares the work. Exit codes: 0 finished
(runs that diverged are in the tables), 1 stopped by an error, 2 bad input, 75 interrupted with everything saved.
"""

import functools
import shlex
import sys

import jax
from absl import app, flags

from worldlm_jax import checks, command, comparison, comparison_tables, config, progress, report, train

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the comparison; it is made, or resumed from.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh the runs that are there.")
_ONLY = flags.DEFINE_list("only", [], "Names of the entries to run; empty: all of them.")


def main(_: list[str]) -> int:
  """Runs the comparison of the flags and returns the exit code."""
  called = shlex.join(["python", "-m", "worldlm_jax.compare", *sys.argv[1:]])
  command.keep_compiled()
  try:
    content = comparison.run(command.compared(), str(_WORKDIR.value), only=_ONLY.value, overwrite=_OVERWRITE.value,
                             command=called, reporters=progress.for_stdout)
  except train.Interrupted as stop:
    print(stop, file=sys.stderr)
    return command.INTERRUPTED
  except (checks.InputError, FloatingPointError, OSError, jax.errors.JaxRuntimeError) as error:
    return command.failed(error)
  if content is not None:
    print(f"{comparison_tables.entries_table(content)}\n"
          f"perplexity on the test split; ± is the standard error over seeds; see {_WORKDIR.value}/comparison.md")
    try:
      print(f"report: {report.report(str(_WORKDIR.value))}")
    except checks.InputError as error:  # the extra is not installed; everything else is there
      print(f"no report: {error}")
  return command.OK


if __name__ == "__main__":
  flags.mark_flags_as_required(["config", "workdir"])
  app.run(main, flags_parser=functools.partial(command.parse_flags, config_type=config.Comparison))
