"""All benchmarks, one after the other, each in a process of its own; their tables as Markdown, their figures as JSON.

  python -m benchmarks.all [--suite=laptop] [--only=rounds,fedavg] [--out=FOLDER]

What is about other things than speed and memory has its own commands: `faults`, `hostile` and `payload`.
Suites are lists of flags: `laptop` is for a few CPU cores (an hour or two on 2), `accelerator` for one GPU or TPU
chip with some 80 GB (published nowhere yet: it has run on no such machine), and `smallest` for the tests. What fails
does not keep the others from running; the exit code says whether anything did.
"""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import measuring

SHORT = ("--local_steps=2", "--batch_size=2", "--sequence_length=16")
SUITES: dict[str, dict[str, tuple[str, ...]]] = {
  "laptop": {
    "rounds": ("--models=tiny", "--nodes=1,4", "--local_steps=50", "--blocks=4"),
    "rounds_16": ("--models=tiny", "--nodes=16", "--local_steps=25", "--blocks=3", "--algorithms=worldlm"),
    "rounds_10m": ("--models=10m", "--nodes=1,4", "--local_steps=10", "--blocks=3"),
    "rounds_75m": ("--models=75m", "--nodes=1", "--settings=lean", "--local_steps=2", "--batch_size=1", "--blocks=2"),
    "fedavg": ("--models=tiny,10m",),
    "exchange": ("--models=tiny,10m,75m",),
    "growth": (),
    "data": ("speed",),
    "data_memory": ("memory", "--gigabytes=1"),
  },
  "accelerator": {
    "rounds": ("--models=tiny,10m,75m", "--batch_size=32", "--sequence_length=512"),
    "fedavg": ("--models=tiny,10m,75m", "--batch_size=32", "--sequence_length=512"),
    "exchange": ("--models=tiny,75m,125m,400m",),
    "growth": ("--models=tiny,10m,75m", "--model=10m", "--batch_size=32", "--sequence_length=512"),
    "utilisation": (),
  },
  "smallest": {
    "rounds": ("--models=nano", "--nodes=2", "--algorithms=worldlm", "--settings=default", "--blocks=1",
               "--rounds_per_block=1", *SHORT),
    "fedavg": ("--models=nano", "--nodes=2", "--moments=keep", "--repeats=1", *SHORT),
    "exchange": ("--models=nano", "--candidates=everybody", "--nodes=4", "--repeats=1"),
    "growth": ("--axes=depths", "--depths=2", "--leaves=2", "--model=nano", "--repeats=1", *SHORT),
    "utilisation": ("--model=nano", "--nodes=2", "--peak_tflops=1", "--repeats=1", *SHORT),
    "data": ("speed", "--megabytes=0.3", "--repeats=1"),
  },
}


def main(argv: Sequence[str] | None = None) -> int:
  """Runs a suite and gives the number of benchmarks that failed."""
  parser = measuring.parser(__doc__)
  parser.add_argument("--suite", default="laptop", choices=SUITES)
  parser.add_argument("--only", default="", help="names of benchmarks, such as rounds,growth")
  args = parser.parse_args(argv)
  suite = SUITES[args.suite]
  wanted = args.only.split(",") if args.only else list(suite)
  if unknown := set(wanted) - suite.keys():
    parser.error(f"--only: {', '.join(sorted(unknown))}: expected of {', '.join(suite)}")
  failed = []
  for name in wanted:
    module = name.partition("_")[0]
    command = ["-m", f"benchmarks.{module}", *suite[name]]
    print(f"\n## {name}\n\n`python {' '.join(command)}`", flush=True)
    out = [f"--out={Path(args.out).absolute() / name}.json"] if args.out else []
    if subprocess.run([sys.executable, *command, *out], cwd=measuring.ROOT).returncode:
      failed.append(name)
  if failed:
    print(f"\nfailed: {', '.join(failed)}", file=sys.stderr)
  return len(failed)


if __name__ == "__main__":
  sys.exit(main())
