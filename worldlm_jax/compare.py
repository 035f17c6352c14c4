"""Trains a list of algorithms and variants on one tree, with several seeds each, and compares them.

  python -m worldlm_jax.compare --config=configs/compare.py --workdir=runs/compare
  python -m worldlm_jax.compare --config=configs/compare.py --workdir=DIR --config.seeds=0,1 \\
      --config.base.rounds=20 --node=code.local_steps=40 --only=worldlm,local

Ends with comparison.md, comparison.json and, with the extra `report`, a page with charts, report.html.

The same command again resumes; a second process with the same command shares the work. Runs that diverge are in the
tables; they are no error.
"""

import shlex
import sys

import jax
from absl import flags

from worldlm_jax import (
  checks,
  command,
  comparison,
  comparison_tables,
  compiled,
  config,
  experiment,
  progress,
  report,
  train,
)

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the comparison; it is made, or resumed from.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh the runs that are there.")
_ONLY = flags.DEFINE_list("only", [], "Names of the entries to run; empty: all of them.")


def main(_: list[str]) -> int:
  """Runs the comparison of the flags and returns the exit code."""
  called = shlex.join(["python", "-m", "worldlm_jax.compare", *sys.argv[1:]])
  compiled.keep()
  try:
    content = comparison.run(experiment.compared(), str(_WORKDIR.value), only=_ONLY.value, overwrite=_OVERWRITE.value,
                             command=called, reporters=progress.for_stdout)
  except train.Interrupted as stop:
    return command.interrupted(stop)
  except (checks.InputError, FloatingPointError, OSError, jax.errors.JaxRuntimeError) as error:
    return command.failed(error, experiment.LESS_MEMORY)
  if content is not None:
    print(f"{comparison_tables.entries_table(content)}\n"
          f"perplexity on the test split; ± is the standard error over seeds; see {_WORKDIR.value}/comparison.md")
    try:
      print(f"report: {report.report(str(_WORKDIR.value))}")
    except checks.InputError as error:  # the extra is not installed; everything else is there
      print(f"no report: {error}")
  return command.OK


if __name__ == "__main__":
  command.start(main, experiment.Flags("workdir", config_type=config.Comparison))
