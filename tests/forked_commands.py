"""Runs commands of the package one after another, each in a fork of this process, which has imported everything.

Reads requests from standard input, a line of JSON each, and answers with a line: the exit code. Importing JAX takes
seconds, a fork none. Nothing here computes before it forks, so that JAX has no threads yet.
"""

import json
import os
import runpy
import sys
import warnings
from pathlib import Path

from absl import app, flags

from worldlm_jax import algorithms, comparison, config, entries, federation, plan, train  # noqa: F401


def read_and_resolve(main, argv=None, flags_parser=None) -> None:
  """Stands in for `app.run`: reads the flags as the command does, and resolves the experiment that they describe."""
  (flags_parser or flags.FLAGS)(sys.argv)
  if "config" not in flags.FLAGS or (given := flags.FLAGS["config"].value) is None:
    return
  base = given.base if isinstance(given, config.Comparison) else given
  for text in flags.FLAGS["node"].value:
    path, field, value = federation.parse_override(text)
    base.federation.overrides.setdefault(path, {})[field] = value
  if isinstance(given, config.Comparison):
    entries.plan(given)
  else:
    algorithms.arranged(given, federation.resolve(algorithms.adapted(given)))


def run(request: dict) -> None:
  """Becomes the command; does not come back."""
  code = 1
  try:
    output = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv = [request["module"], *request["arguments"]]
    if not request["run"]:
      app.run = read_and_resolve
    for name in [name for name in flags.FLAGS if flags.FLAGS.find_module_defining_flag(name).startswith("worldlm")]:
      delattr(flags.FLAGS, name)  # those of commands that were imported; the command defines its own
    sys.modules.pop(request["module"], None)
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    code = 0
  except SystemExit as stop:
    code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
  except BaseException:
    import traceback

    traceback.print_exc()
  finally:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
  warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
  sys.path.insert(0, str(Path(__file__).parent.parent))
  for line in sys.stdin:
    if not (child := os.fork()):
      run(json.loads(line))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
