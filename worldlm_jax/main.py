"""Trains a federation of language models from a config file.

  python -m worldlm_jax.main --config=configs/quickstart.py --workdir=runs/quickstart
  python -m worldlm_jax.main --config=configs/folder.py --config.federation.folder=PATH --workdir=DIR \\
      --config.rounds=20 --node=law/eu.local_steps=40

Several processes, on as many machines, train together: start the same command in each, with --distributed where JAX
finds the cluster by itself (TPU pods, Slurm, ...), or else with --coordinator=HOST:PORT --num_processes=N
--process_id=I. All of them must see --workdir.

With --plan instead of --workdir it says what the run would take (docs/plan.md), on this computer or on another
--machine.

Ctrl-C stops a run where it can be resumed; a second one stops it at once. The same command again resumes, also with
other numbers of processes and devices.
"""

import jax
from absl import flags

from worldlm_jax import checks, command, compiled, distributed, experiment, plan, progress, spending, train
from worldlm_jax.planning import machines

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run; it is made, or resumed from.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Start afresh where the folder holds a run.")
_PLAN = flags.DEFINE_bool("plan", False, "Only say what the run would take: memory, bytes between nodes, time.")
_MACHINE = flags.DEFINE_string("machine", machines.HERE, "For --plan: a name, or a YAML file that describes one.")
_DISTRIBUTED = flags.DEFINE_bool("distributed", False, "Join the other processes of a cluster that JAX finds itself.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, to join the others there.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "With --coordinator: how many processes there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "With --coordinator: which of them this is, from 0.")


def main(_: list[str]) -> int:
  """Runs the experiment of the flags and returns the exit code."""
  reporter = progress.for_stdout()
  try:
    if _PLAN.value:
      plan.show(plan.make(experiment.configured(), machines.load(str(_MACHINE.value))))
      return command.OK
    checks.require(_WORKDIR.value is not None, "--workdir", None, "a folder", "or --plan, which needs none")
    distributed.connect(_DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    compiled.keep()
    summary = train.run(experiment.configured(), str(_WORKDIR.value), overwrite=_OVERWRITE.value, reporter=reporter)
  except train.Interrupted as stop:
    return command.interrupted(stop)
  except KeyboardInterrupt:  # before it listens for signals, or the second one
    return distributed.leave(command.interrupted())
  except (checks.InputError, FloatingPointError) as error:  # all processes meet the same
    return command.failed(error)
  except (OSError, jax.errors.JaxRuntimeError) as error:
    return distributed.leave(command.failed(error, experiment.LESS_MEMORY))
  if distributed.is_lead():
    private = spending.closing_lines(summary.get("privacy", {}))
    print("\n".join([progress.closing_lines(summary, str(_WORKDIR.value)), *private]))
  return command.OK


if __name__ == "__main__":
  command.start(main, experiment.Flags())
