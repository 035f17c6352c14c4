"""The launch scripts: what they would run, and that they run just that, with stand-ins for gcloud, ssh and Slurm.

The stand-ins are programs on PATH that write their arguments down and answer as the test tells them; the scripts are
the real ones, in a copy of the repository's `launch` folder.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
WORKER = "worldlm_jax/launch/worker.sh"
MAIN = [".venv/bin/python", "-m", "worldlm_jax.main"]
SLICE = {
  "TPU_NAME": "big", "TPU_ZONE": "us-east5-a", "TPU_PROJECT": "mine", "TPU_TYPE": "v5p-128",
  "TPU_VERSION": "v2-alpha-tpuv5", "SHARED": "10.0.0.2:/share", "POLL_SECONDS": "0",
}
TRAINING = ["--config=configs/folder.py", "--workdir=/mnt/shared/a run", "--node=law/eu.name=it's  two"]
CLUSTER = ["--nodes=2", "--gpus-per-node=8", "--time=1:00:00"]

# Writes a line with its own name and arguments. Answers with the next line of NAME.answers that begins with one of
# its arguments, "ARGUMENT CODE OUTPUT", and drops that line; else with nothing and 0.
STAND_IN = """#!{python}
import os, pathlib, shlex, sys
name, place = os.path.basename(sys.argv[0]), pathlib.Path({place!r})
with open(place / "calls", "a") as calls:
  calls.write(shlex.join([name, *sys.argv[1:]]) + chr(10))
answers = place / f"{{name}}.answers"
lines = answers.read_text().splitlines() if answers.exists() else []
for i, line in enumerate(lines):
  argument, code, output = line.split(" ", 2)
  if any(argument in a for a in sys.argv[1:]):
    answers.write_text("".join(l + chr(10) for l in lines[:i] + lines[i + 1:]))
    print(output, file=sys.stderr if "NOT_FOUND" in output else sys.stdout)
    sys.exit(int(code))
"""


class Desk:
  """A copy of the scripts in a repository of their own, and the stand-ins."""

  def __init__(self, folder: Path):
    self.folder, self.repository, self.programs = folder, folder / "a repository", folder / "programs"
    shutil.copytree(LAUNCH, self.repository / "launch")
    self.programs.mkdir()

  def stand_in(self, *names: str) -> None:
    """Makes programs of these names that write their calls down."""
    for name in names:
      program = self.programs / name
      program.write_text(STAND_IN.format(python=sys.executable, place=str(self.folder)))
      program.chmod(0o755)

  def answer(self, name: str, *lines: str) -> None:
    """How a program is to answer: "ARGUMENT CODE OUTPUT", each once."""
    (self.folder / f"{name}.answers").write_text("".join(line + "\n" for line in lines))

  def calls(self) -> list[list[str]]:
    """What the programs were called with, in order."""
    log = self.folder / "calls"
    return [shlex.split(line) for line in log.read_text().splitlines()] if log.exists() else []

  def run(
    self, script: str, *arguments: str, env: Mapping[str, str] | None = None
  ) -> subprocess.CompletedProcess[str]:
    """Runs a script to its end."""
    return subprocess.run(
      ["bash", str(self.repository / "launch" / script), *arguments], env=self.environment(env), cwd=self.folder,
      stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=600, check=False,
    )

  def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
    """The variables of a script: none but PATH and those given."""
    return {"PATH": f"{self.programs}:{os.environ['PATH']}", "HOME": str(self.folder), **(env or {})}

  def planned(self, script: str, *arguments: str, env: Mapping[str, str] | None = None) -> list[list[str]]:
    """The commands that --dry-run prints, as a shell reads them."""
    done = self.run(script, *arguments, "--dry-run", env=env)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def _remote(call: Sequence[str]) -> list[str]:
  """The words of the command that a call gives to a worker's shell."""
  given = [a.removeprefix("--command=") for a in call if a.startswith("--command=")]
  return shlex.split((given or call[-1:])[0])


def _verbs(calls: Sequence[Sequence[str]]) -> list[str]:
  """What each call of gcloud is about: "describe", "ssh run" and so on; other programs by their names."""
  found = []
  for call in calls:
    if call[0] != "gcloud":
      found.append(call[0])
    elif call[4] == "ssh":
      words = _remote(call)
      found.append("ssh " + (words[2] if words[1].endswith("worker.sh") else words[0]))
    else:
      found.append(call[4] if call[3] == "tpu-vm" else "queued " + call[4])
  return found


@pytest.fixture
def desk(tmp_path: Path) -> Desk:
  return Desk(tmp_path)


@pytest.mark.parametrize("script", sorted(path.name for path in LAUNCH.glob("*.sh")))
def test_every_script_is_bash_and_opens_with_what_it_is_for(script: str) -> None:
  subprocess.run(["bash", "-n", str(LAUNCH / script)], check=True)
  first = [line for line in (LAUNCH / script).read_text().splitlines() if "shellcheck" not in line][:2]
  assert first[0].startswith("#!/usr/bin/env bash") or first[0].startswith("# Sourced by")
  assert first[1].startswith("#")


def test_a_preempted_slice_is_made_again_installed_and_trained_on(desk: Desk) -> None:
  plan = desk.planned("tpu_vm.sh", "resume", "--spot", *TRAINING, env=SLICE)
  assert _verbs(plan) == [
    "describe", "delete", "create", "describe", "mkdir", "tar", "scp", "ssh mkdir", "ssh mount", "ssh run",
  ]
  for call in plan:
    if call[0] == "gcloud":
      assert "--zone=us-east5-a" in call and "--project=mine" in call
  create = plan[2]
  assert {"big", "--spot", "--accelerator-type=v5p-128", "--version=v2-alpha-tpuv5"} <= set(create)
  assert all("--worker=all" in call for call in plan[6:])
  assert _remote(plan[8])[-2:] == ["10.0.0.2:/share", "/mnt/shared"]
  assert _remote(plan[9]) == ["bash", WORKER, "run", *MAIN, "--distributed", *TRAINING]


def test_gcloud_splits_and_joins_a_command_at_single_spaces_and_loses_nothing(desk: Desk) -> None:
  for call in desk.planned("tpu_vm.sh", "resume", *TRAINING, env=SLICE):
    assert "\n" not in "".join(call) and "\t" not in "".join(call)


@pytest.mark.parametrize("action", ["create", "delete"])
def test_queued_resources_have_commands_of_their_own(desk: Desk, action: str) -> None:
  queued, = desk.planned("tpu_vm.sh", action, "--queued", env=SLICE)
  direct, = desk.planned("tpu_vm.sh", action, env=SLICE)
  assert queued[3] == "queued-resources" and direct[3] == "tpu-vm" and queued[4] == direct[4] == action
  if action == "create":
    assert "--node-id=big" in queued and "--runtime-version=v2-alpha-tpuv5" in queued
    assert "--spot" not in queued + direct
  else:
    assert "--force" in queued and "--quiet" in queued and "--quiet" in direct


def test_flags_win_over_variables(desk: Desk) -> None:
  call, = desk.planned("tpu_vm.sh", "delete", "--name=other", env=SLICE)
  assert "other" in call and "big" not in call


@pytest.mark.parametrize(("script", "arguments", "env", "named"), [
  ("tpu_vm.sh", ["create"], {}, ["--name (TPU_NAME)", "--zone", "--project", "--type", "--version (TPU_VERSION)"]),
  ("tpu_vm.sh", ["run", "--keep", *TRAINING], SLICE | {"TPU_TYPE": ""}, ["--type (TPU_TYPE)"]),
  ("tpu_vm.sh", ["run", "--workdir=/x"], SLICE, ["--config"]),
  ("tpu_vm.sh", ["run", "--config=x"], SLICE, ["--workdir"]),
  ("tpu_vm.sh", ["fetch", "--to=x"], SLICE, ["--workdir"]),
  ("tpu_vm.sh", ["delete", "--sopt"], SLICE, ["--sopt"]),
  ("tpu_vm.sh", ["delete", "--name"], SLICE, ["--name", "no value"]),
  ("tpu_vm.sh", [], SLICE, ["create, install, run, resume"]),
  ("gpu.sh", ["--hosts=a,b", "--workdir=x"], {}, ["--config"]),
  ("gpu.sh", ["--cuda=cuda11", *TRAINING], {}, ["cuda11", "cuda12", "cuda13"]),
  ("gpu.sh", ["stop"], {}, ["--hosts"]),
  ("slurm.sh", ["--nodes=2", *TRAINING], {}, ["--gpus-per-node", "--time"]),
  ("slurm.sh", [*CLUSTER, "--workdir=x"], {}, ["--config"]),
])
def test_what_is_missing_is_named_before_anything_is_run(
  desk: Desk, script: str, arguments: list[str], env: dict[str, str], named: list[str]
) -> None:
  desk.stand_in("gcloud", "ssh", "scp", "sbatch")
  done = desk.run(script, *arguments, env=env)
  assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: ")
  for word in named:
    assert word in done.stderr
  assert desk.calls() == []


@pytest.mark.parametrize(("script", "arguments", "programs", "answers"), [
  ("tpu_vm.sh", ["create", "--spot"], ["gcloud"], []),
  ("tpu_vm.sh", ["install", "--prepare=sudo true  # first"], ["gcloud", "tar", "mkdir"], []),
  ("tpu_vm.sh", ["run", *TRAINING], ["gcloud"], []),
  ("tpu_vm.sh", ["resume", "--spot", "--keep", *TRAINING], ["gcloud", "tar", "mkdir"],
   ["describe 0 PREEMPTED", "describe 0 READY"]),
  ("tpu_vm.sh", ["resume", "--queued", *TRAINING], ["gcloud", "tar", "mkdir"],
   ["describe 0 SUSPENDED", "describe 0 ACTIVE"]),
  ("tpu_vm.sh", ["fetch", "--workdir=/mnt/a run", "--to=runs/big"], ["gcloud", "tar", "mkdir", "rm"], []),
  ("tpu_vm.sh", ["stop"], ["gcloud"], []),
  ("tpu_vm.sh", ["status", "--queued"], ["gcloud"], []),
  ("tpu_vm.sh", ["delete"], ["gcloud"], []),
  ("gpu.sh", ["install", "--hosts=me@a,b", "--dir=/opt/a copy", "--cuda=cuda13"], ["ssh", "scp", "tar", "mkdir"], []),
  ("gpu.sh", ["--hosts=me@a,b,c", "--port=99", *TRAINING], ["ssh"], []),
  ("gpu.sh", ["stop", "--hosts=me@a,b"], ["ssh"], []),
])
def test_what_a_dry_run_prints_is_what_is_run(
  desk: Desk, script: str, arguments: list[str], programs: list[str], answers: list[str]
) -> None:
  plan = desk.planned(script, *arguments, env=SLICE)
  assert desk.calls() == [] and not (desk.repository / "build").exists()
  desk.stand_in(*programs)
  desk.answer("gcloud", *answers)
  done = desk.run(script, *arguments, env=SLICE)
  assert done.returncode == 0, done.stderr
  calls = desk.calls()
  if script == "gpu.sh" and TRAINING[0] in arguments:  # started side by side
    plan, calls = sorted(plan), sorted(calls)
  assert calls == plan and plan


@pytest.mark.parametrize(("script", "flags"), [("gpu.sh", ["--cuda=cuda13"]), ("slurm.sh", CLUSTER)])
def test_where_it_trains_here_it_installs_first_and_then_runs_what_a_dry_run_prints(
  desk: Desk, script: str, flags: list[str]
) -> None:
  plan = desk.planned(script, *flags, *TRAINING)
  desk.stand_in("worker.sh", "sbatch", "python")
  (desk.repository / "launch/worker.sh").write_text('exec worker.sh "$@"\n')
  (desk.repository / ".venv/bin").mkdir(parents=True)
  (desk.programs / "python").rename(desk.repository / ".venv/bin/python")
  assert desk.run(script, *flags, *TRAINING).returncode == 0
  install, start = desk.calls()
  assert [["bash", "launch/worker.sh", *install[1:]], start[1:]] == [plan[0], plan[1][1:]]
  desk.answer("worker.sh", "install 1 pip failed")
  assert desk.run(script, *flags, *TRAINING).returncode == 1 and len(desk.calls()) == 3


def test_a_slice_that_is_ready_is_trained_on_as_it_is(desk: Desk) -> None:
  desk.stand_in("gcloud")
  desk.answer("gcloud", "describe 0 READY")
  assert desk.run("tpu_vm.sh", "resume", *TRAINING, env=SLICE).returncode == 0
  assert _verbs(desk.calls()) == ["describe", "ssh run"]


def test_a_queued_slice_is_waited_for_and_not_asked_for_twice(desk: Desk) -> None:
  desk.stand_in("gcloud", "tar", "mkdir")
  desk.answer("gcloud", "describe 1 ERROR: NOT_FOUND", "describe 0 WAITING_FOR_RESOURCES", "describe 0 PROVISIONING",
              "describe 0 ACTIVE")
  assert desk.run("tpu_vm.sh", "resume", "--queued", *TRAINING, env=SLICE).returncode == 0
  look = "queued describe"
  assert _verbs(desk.calls())[:5] == [look, "queued create", look, look, look]
  assert _verbs(desk.calls())[-1] == "ssh run"


def test_a_state_that_cannot_be_had_is_not_taken_for_an_absent_slice(desk: Desk) -> None:
  desk.stand_in("gcloud")
  desk.answer("gcloud", "describe 1 you are not logged in")
  done = desk.run("tpu_vm.sh", "resume", *TRAINING, env=SLICE)
  assert done.returncode == 1 and "cannot be had" in done.stderr
  assert _verbs(desk.calls()) == ["describe"]


@pytest.mark.parametrize(("answers", "code", "expected"), [
  # Interrupted with everything saved, on a slice that is still there; then finished.
  (["worker.sh 75 stopped", "describe 0 READY", "describe 0 READY"], 0,
   ["ssh run", "describe", "describe", "ssh run"]),
  # Preempted: gcloud has an exit code of its own, and the slice tells.
  (["worker.sh 1 lost", "describe 0 PREEMPTED", "describe 0 PREEMPTED", "describe 0 READY"], 0,
   ["ssh run", "describe", "describe", "delete", "create", "describe", "mkdir", "tar", "scp", "ssh mkdir",
    "ssh mount", "ssh run"]),
  # The connection is lost, the slice is not.
  (["worker.sh 255 lost", "describe 0 READY", "describe 0 READY"], 0, ["ssh run", "describe", "describe", "ssh run"]),
  # Errors of the run itself are not tried again.
  (["worker.sh 1 failed", "describe 0 READY"], 1, ["ssh run", "describe"]),
  (["worker.sh 2 bad input", "describe 0 READY"], 2, ["ssh run", "describe"]),
])
def test_a_kept_run_is_resumed_until_it_is_finished(
  desk: Desk, answers: list[str], code: int, expected: list[str]
) -> None:
  desk.stand_in("gcloud", "tar", "mkdir")
  desk.answer("gcloud", *answers)
  assert desk.run("tpu_vm.sh", "run", "--keep", *TRAINING, env=SLICE).returncode == code
  assert _verbs(desk.calls()) == expected
  runs = [call for call in desk.calls() if call[0] == "gcloud" and _verbs([call]) == ["ssh run"]]
  assert all(call == runs[0] for call in runs)


def test_a_run_that_is_not_kept_ends_with_its_exit_code(desk: Desk) -> None:
  desk.stand_in("gcloud")
  desk.answer("gcloud", "worker.sh 75 stopped")
  assert desk.run("tpu_vm.sh", "run", *TRAINING, env=SLICE).returncode == 75
  assert len(desk.calls()) == 1


def test_machines_are_numbered_and_meet_at_the_first(desk: Desk) -> None:
  plan = desk.planned("gpu.sh", "--hosts=me@a,b,c", *TRAINING)
  assert [call[-2] for call in plan] == ["me@a", "b", "c"]
  for i, call in enumerate(plan):
    assert _remote(call) == [
      "bash", WORKER, "run", *MAIN, "--coordinator=a:8476", "--num_processes=3", f"--process_id={i}", *TRAINING,
    ]


@pytest.mark.parametrize(("codes", "expected"), [
  ((0, 0), 0), ((75, 75), 75), ((134, 75), 75), ((75, 2), 2), ((255, 0), 255),
])
def test_the_exit_code_of_several_machines_is_the_one_that_says_most(
  desk: Desk, codes: tuple[int, int], expected: int
) -> None:
  desk.stand_in("ssh")
  desk.answer("ssh", *[f"--process_id={i} {code} done" for i, code in enumerate(codes)])
  assert desk.run("gpu.sh", "--hosts=a,b", *TRAINING).returncode == expected


def test_one_machine_is_installed_and_then_trains_in_one_process(desk: Desk) -> None:
  assert desk.planned("gpu.sh", *TRAINING, "--cuda=cuda13") == [
    ["bash", "launch/worker.sh", "install", "cuda13"], [*MAIN, *TRAINING],
  ]


def test_a_slurm_job_is_submitted_with_its_resources_and_put_back_when_its_time_is_up(desk: Desk) -> None:
  install, submit = desk.planned("slurm.sh", *CLUSTER, "--account=us", "--partition=gpu", "--cpus-per-task=64",
                                 "--grace=600", *TRAINING)
  assert install == ["bash", "launch/worker.sh", "install", "cuda12"]
  assert submit[0] == "sbatch"
  script = submit.index("launch/slurm_job.sh")
  assert submit[script + 1 :] == TRAINING
  assert {
    *CLUSTER, "--ntasks-per-node=1", "--account=us", "--partition=gpu", "--cpus-per-task=64", "--signal=TERM@600",
    "--requeue", "--open-mode=append", f"--chdir={desk.repository}",
  } <= set(submit[1:script])


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (2, False), (75, True)])
def test_a_slurm_job_is_put_back_where_it_was_interrupted_alone(desk: Desk, code: int, requeued: bool) -> None:
  desk.stand_in("srun", "scontrol")
  desk.answer("srun", f"--distributed {code} done")
  job = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4"}
  assert desk.run("slurm_job.sh", *TRAINING, env=job).returncode == code
  first, *rest = desk.calls()
  assert first[0] == "srun" and "--ntasks-per-node=1" in first
  assert first[-len(TRAINING) - 4 :] == [*MAIN, "--distributed", *TRAINING]
  assert rest == ([["scontrol", "requeue", "7"]] if requeued else [])


def test_a_slurm_process_sees_all_gpus_and_all_cores_of_its_node(desk: Desk) -> None:
  program = desk.programs / "srun"
  program.write_text('#!/usr/bin/env bash\necho "$JAX_LOCAL_DEVICE_IDS $SRUN_CPUS_PER_TASK"\n')
  program.chmod(0o755)
  job = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "SLURM_CPUS_PER_TASK": "64"}
  assert desk.run("slurm_job.sh", *TRAINING, env=job).stdout == "0,1,2,3 64\n"


def test_the_archive_has_the_code_and_what_is_not_committed_but_no_texts_and_no_runs(desk: Desk) -> None:
  desk.stand_in("ssh", "scp")
  for name in ("configs/mine.py", ".git/HEAD", "data/big", "runs/a/checkpoint", ".venv/bin/x", ".mypy_cache/x",
               "worldlm_jax/data/files.py", "worldlm_jax/__pycache__/x.pyc"):
    (desk.repository / name).parent.mkdir(parents=True, exist_ok=True)
    (desk.repository / name).write_text("x")
  assert desk.run("gpu.sh", "install", "--hosts=a").returncode == 0
  *_, archive, target = desk.calls()[0]
  assert target == "a:"
  found = subprocess.run(["tar", "-tzf", str(desk.repository / archive)], capture_output=True, text=True, check=True)
  files = {name for name in found.stdout.splitlines() if not name.endswith("/") and not name.startswith("./launch/")}
  assert files == {"./configs/mine.py", "./.git/HEAD", "./worldlm_jax/data/files.py"}


def test_a_machine_unpacks_what_it_was_sent_and_installs_it(desk: Desk) -> None:
  """The commands for the machine are run here, in a folder that stands for its home."""
  home = desk.folder / "home"
  home.mkdir()
  desk.stand_in("installed")
  (desk.repository / "launch/worker.sh").write_text('installed "$PWD" "$0" "$@"\n')
  for name, action in (("ssh", f"cd {home} && bash -c \"${{@: -1}}\""), ("scp", f"cp \"${{@: -2:1}}\" {home}")):
    (desk.programs / name).write_text(f"#!/usr/bin/env bash\n{action}\n")
    (desk.programs / name).chmod(0o755)
  done = desk.run("gpu.sh", "install", "--hosts=a", "--dir=a copy", "--cuda=cuda13")
  assert done.returncode == 0, done.stderr
  assert desk.calls() == [["installed", str(home), "a copy/launch/worker.sh", "install", "cuda13"]]
  assert (home / "a copy/launch/gpu.sh").read_bytes() == (LAUNCH / "gpu.sh").read_bytes()


def test_a_worker_that_is_not_installed_says_so(desk: Desk) -> None:
  done = desk.run("worker.sh", "run", "true")
  assert done.returncode == 1 and "install" in done.stderr and not (desk.repository / ".venv").exists()


def test_a_shared_folder_is_mounted_once(desk: Desk) -> None:
  desk.stand_in("sudo", "mountpoint", "mount.nfs")
  desk.answer("mountpoint", "/mnt 1 no")
  for _ in range(2):
    assert desk.run("worker.sh", "mount", "10.0.0.2:/share", "/mnt/a b").returncode == 0
  assert [call[:2] for call in desk.calls()] == [
    ["mountpoint", "-q"], ["sudo", "mkdir"], ["sudo", "mount"], ["sudo", "chmod"], ["mountpoint", "-q"],
  ]
  assert desk.calls()[2][-2:] == ["10.0.0.2:/share", "/mnt/a b"]
