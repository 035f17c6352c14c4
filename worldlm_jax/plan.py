"""What a run would take on a machine, without running it: mesh, memory, bytes between nodes, operations, time.

  python -m worldlm_jax.main --config=configs/mc4_75m.py --plan --machine=h100x64

All of it is arithmetic on abstract shapes (`planning/`); no text is read and nothing is compiled but, for
`--machine=here`, one product of two matrices that shows how fast this computer is. docs/plan.md says how it is worked
out and how far it is from what was measured.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from worldlm_jax import (
  algorithms,
  config as config_lib,
  federation as federation_lib,
  feed,
  model,
  partition,
  progress,
  records,
  schedule,
  state as state_lib,
  trees,
)
from worldlm_jax.algorithms import rules
from worldlm_jax.data import tokenizer as tokenizer_lib
from worldlm_jax.planning import machines, memory, traffic, work
from worldlm_jax.planning.machines import GB, Machine


@dataclasses.dataclass(frozen=True)
class Plan:
  """What a run would take; bytes of memory are per device, bytes of traffic by round, edge and way."""

  algorithm: str
  machine: Machine
  federation: federation_lib.Federation
  arch: model.Architecture
  mesh: Mapping[str, int]  # size by axis
  nodes_at_once: int  # on the devices of one node
  waves: tuple[int, ...]  # of each level
  on_host: bool  # whether nodes that do not train wait on the host
  state: Mapping[str, float]  # of all nodes, by part
  training: memory.Training
  evaluation: float
  exchange: float
  sent: tuple[traffic.Traffic, ...]  # by this algorithm
  fedavg: tuple[traffic.Traffic, ...]  # of FedAvg on the same texts
  data_parallel: tuple[traffic.Traffic, ...]  # of synchronous data-parallel training on the same tokens
  operations: float  # of the run's training
  tokens: int  # trained on in the run
  seconds: tuple[work.Seconds, ...]  # by round
  link_seconds: tuple[float, float]  # of the run, for `fedavg` and `data_parallel`
  assumed: tuple[str, ...]

  @property
  def state_bytes(self) -> float:
    """Of all parts."""
    return sum(self.state.values())

  @property
  def peak(self) -> float:
    """The most that is in a device's memory at once."""
    phases = max(self.training.total, self.evaluation, self.exchange + self.saving)
    return phases + (0.0 if self.on_host else self.state_bytes)

  @property
  def saving(self) -> float:
    """On CPUs, whose memory is the host's, the copy of which a checkpoint is made while the next round begins."""
    return self.state_bytes if self.machine.platform == "cpu" else 0.0

  @property
  def host(self) -> float:
    """The most that a process holds on its host: nodes that wait there, and the copy that a checkpoint is made of."""
    return (2 if self.on_host else 1) * self.state_bytes * self.machine.devices / self.machine.processes

  @property
  def fits(self) -> bool:
    """Whether both leave the runtime some of the memory."""
    room, host_room = self.machine.memory_gb * GB, self.machine.host_memory_gb * GB
    return self.peak <= memory.SAFE * room and self.host <= memory.SAFE * host_room


def make(config: config_lib.Config, machine: Machine) -> Plan:
  """The plan of a run. Raises `InputError` where the config is wrong."""
  config = algorithms.adapted(config)
  federation, arch, algorithm = _described(config)
  devices = machines.devices(machine)
  tracks = algorithm.tracks
  level = max(range(len(federation.levels)), key=lambda index: len(federation.levels[index]))
  shape = feed.workload_shape(federation, level, config.optimizer.microbatch_size, config.data.sequence_length)

  def training(nodes: int, mesh: Any) -> memory.Training:
    return memory.training(arch, config.optimizer, shape, nodes, mesh, machine.platform, tracks)

  alone = training(1, partition.make_mesh(devices[:1])).total
  mesh = partition.choose_mesh(config.mesh, len(federation.levels[level]), alone, devices)
  topologies = _topologies(federation, mesh, algorithm)
  abstract = _abstract_state(config, federation, topologies, arch, algorithm)
  state = memory.state_parts(abstract, mesh)
  share = partition.padded_size(len(federation.levels[level]), mesh) // mesh.shape[partition.NODE]
  nodes_at_once, on_host = _nodes_at_once(config, machine, training(1, mesh).total, sum(state.values()), share)

  sent = traffic.by_round(config, federation, algorithm, topologies, abstract, _edge_bytes(config, arch, algorithm))
  flat, averaged = _fedavg(config)
  parallel = traffic.data_parallel(config, flat, trees.num_bytes(model.abstract_params(arch)))
  job = work.Work(config, federation, arch, algorithm, machine, mesh, nodes_at_once, on_host=on_host)
  stages = schedule.stages(federation, config.schedule)
  steps = [schedule.steps_per_round(federation, stage) for stage in stages]
  # Where nodes wait on the host, those that exchange come in waves like those that train.
  present = min(1.0, nodes_at_once / share) if on_host else 1.0
  return Plan(
    algorithm=config.algorithm, machine=machine, federation=federation, arch=arch, mesh=dict(mesh.shape),
    nodes_at_once=nodes_at_once, waves=tuple(len(job.waves(index)) for index in range(len(federation.levels))),
    on_host=on_host, state=state,
    training=training(nodes_at_once, mesh),
    evaluation=memory.scoring(arch, job.score_batch, job.length, nodes_at_once, mesh, machine.platform,
                              trusts=algorithm.trusts),
    exchange=present * memory.exchange(arch, topologies, mesh, tracks=bool(tracks), averages=bool(algorithm.shares)),
    sent=tuple(sent), fedavg=tuple(averaged), data_parallel=tuple(parallel),
    operations=config.rounds * sum(job.useful_operations(stage) for stage in stages),
    tokens=config.rounds * sum(count * federation.by_path[path].settings.batch_size * job.length
                               for made in steps for path, count in made.items()),
    seconds=tuple(seconds for i, stage in enumerate(stages)
                  for seconds in job.seconds(stage, sent[i * config.rounds :][: config.rounds])),
    link_seconds=_link_seconds(config, flat, averaged, parallel, machine),
    assumed=tuple(_assumptions(config, machine)),
  )


def show(plan: Plan, console: Console | None = None) -> None:
  """Prints a plan."""
  console = console or Console(highlight=False)
  machine, arch = plan.machine, plan.arch
  levels = ", ".join(str(len(level)) for level in plan.federation.levels)
  mesh = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
  waiting = "on the host" if plan.on_host else "on the devices"
  num_parameters = trees.num_parameters(model.abstract_params(arch))
  print_line = functools.partial(console.print, markup=False, soft_wrap=True)
  print_line(f"{len(plan.federation.members)} nodes in {len(plan.federation.levels)} levels ({levels}), "
             f"{num_parameters:,} parameters each, {arch.num_key_layers} of {arch.num_layers} blocks are key layers")
  print_line(f"{machine.devices} {machine.platform} device(s) of {_size(machine.memory_gb * GB)}, "
             f"{machine.processes} process(es); mesh: {mesh}")
  waves = ", ".join(map(str, plan.waves))
  print_line(f"{plan.nodes_at_once} node(s) at once, waves by level: {waves}; the others wait {waiting}")
  for table in (_memory_table(plan), _traffic_table(plan), _time_table(plan)):
    print_line()
    console.print(table)
  print_line(f"\n{plan.tokens:,} tokens and {plan.operations:.3g} operations of training in all")
  for line in plan.assumed:
    print_line(f"assumed: {line}")
  if not plan.fits:
    print_line("this does not fit: try config.model.remat, a lower config.optimizer.microbatch_size or "
               "config.nodes_at_once, or a larger config.mesh.fsdp")


def _described(
  config: config_lib.Config,
) -> tuple[federation_lib.Federation, model.Architecture, rules.Algorithm]:
  """The tree as the algorithm arranges it, its model and its rules; no text is read, nor a tokenizer not needed."""
  federation = algorithms.arranged(config, federation_lib.resolve(config))
  vocab_size = config.model.vocab_size or tokenizer_lib.load(config.data.tokenizer).vocab_size
  separator = 0 if config.data.document_mask else None  # which token it is changes no shape
  arch = model.architecture(config.model, vocab_size, separator, algorithms.num_key_layers(config))
  return federation, arch, algorithms.make(config, arch, federation)


def _topologies(
  federation: federation_lib.Federation, mesh: jax.sharding.Mesh, algorithm: rules.Algorithm
) -> list[state_lib.Topology]:
  levels = range(len(federation.levels))
  return [state_lib.topology(federation, level, mesh, mesh, algorithm.governance) for level in levels]


def _abstract_state(
  config: config_lib.Config, federation: federation_lib.Federation, topologies: Sequence[state_lib.Topology],
  arch: model.Architecture, algorithm: rules.Algorithm,
) -> state_lib.State:
  def init(key: jax.Array) -> state_lib.State:
    params = model.init(arch, key)
    return state_lib.init(config, federation, topologies, params, algorithm.tracks, algorithm.governance)

  return jax.eval_shape(init, jax.random.key(0))


def _nodes_at_once(
  config: config_lib.Config, machine: Machine, one: float, state: float, share: int
) -> tuple[int, bool]:
  """How many nodes train at once, and whether the others have to wait on the host."""
  room = memory.SAFE * machine.memory_gb * GB
  if machine.platform == "cpu":
    return config.nodes_at_once or 1, False
  on_host = state + one * max(1, config.nodes_at_once) > room
  free = room - (0.0 if on_host else state)
  return config.nodes_at_once or int(np.clip(free / one, 1, share)), on_host


def _fedavg(config: config_lib.Config) -> tuple[federation_lib.Federation, list[traffic.Traffic]]:
  """The tree of FedAvg on the same texts, and what crosses its edges."""
  config = dataclasses.replace(config, algorithm="fedavg", schedule="parallel")
  federation, arch, algorithm = _described(config)
  mesh = partition.make_mesh([machines.Device(0, "cpu", 0.0)])
  topologies = _topologies(federation, mesh, algorithm)
  abstract = _abstract_state(config, federation, topologies, arch, algorithm)
  config = dataclasses.replace(config, payload="float32")
  return federation, traffic.by_round(
    config, federation, algorithm, topologies, abstract, _edge_bytes(config, arch, algorithm)
  )


def _edge_bytes(config: config_lib.Config, arch: model.Architecture, algorithm: rules.Algorithm) -> records.EdgeBytes:
  params = model.abstract_params(arch)
  return records.edge_bytes({part: params[part] for part in algorithm.shares}, config.key_layers.values, config.payload)


def _link_seconds(
  config: config_lib.Config, flat: federation_lib.Federation, averaged: Sequence[traffic.Traffic],
  parallel: Sequence[traffic.Traffic], machine: Machine,
) -> tuple[float, float]:
  """What FedAvg's server, and the workers of a ring, wait for their links in the whole run."""
  rate = machine.node_link_gbit_per_s * GB / 8
  server = sum(sum(down + up for down, up in row.values()) for row in averaged)  # all of it passes the server's link
  workers = sum(max(sum(edge) for edge in row.values()) for row in parallel)
  steps = max(schedule.steps_per_round(flat, None).values()) * config.rounds
  messages = 2 * machine.node_latency_ms / 1e3
  return server / rate + len(averaged) * messages, workers / rate + steps * messages


def _assumptions(config: config_lib.Config, machine: Machine) -> list[str]:
  peak = machine.peak_flops(config.model.compute_dtype) / 1e12
  found = [f"training reaches {machine.utilisation:.0%} of {peak:,.4g} TFLOP/s per device"]
  windows = config.evaluation.valid_windows
  found.append(f"every node has the {windows} windows that are scored" if windows else
               "scoring all valid windows takes no time, since the texts were not read to count them")
  found.append(f"links of {machine.node_link_gbit_per_s:g} Gbit/s and {machine.node_latency_ms:g} ms between nodes, "
               f"were each at a place of its own; models cross them as {config.payload}")
  return found


def _table(*headings: str) -> Table:
  table = Table(box=SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
  table.add_column(headings[0], no_wrap=True)
  for heading in headings[1:]:
    table.add_column(heading, justify="right", no_wrap=True)
  return table


def _memory_table(plan: Plan) -> Table:
  table = _table("memory per device", "")
  names = {"wave": "training: the nodes at hand", "copies": "  copies of parameters", "optimizer": "  optimizer's step",
           "workspace": "  logits, or one block's backward pass"}
  for part, size in plan.state.items():
    table.add_row(f"state: {part}", _size(size))
  table.add_row("state of all nodes" + (", on the host" if plan.on_host else ""), _size(plan.state_bytes))
  for part, size in plan.training._asdict().items():
    if size:
      table.add_row(names.get(part, f"  {part}"), _size(size))
  table.add_row("training", _size(plan.training.total))
  table.add_row("scoring, instead", _size(plan.evaluation))
  table.add_row("exchange, instead", _size(plan.exchange))
  if plan.saving:
    table.add_row("  the state that is being saved", _size(plan.saving))
  room, host_room = plan.machine.memory_gb * GB, plan.machine.host_memory_gb * GB
  table.add_row(f"most at once, {plan.peak / room:.0%} of {_size(room)}", _size(plan.peak))
  if plan.machine.platform != "cpu":
    table.add_row(f"a host's, when saving, {plan.host / host_room:.0%} of {_size(host_room)}", _size(plan.host))
  return table


def _traffic_table(plan: Plan) -> Table:
  table = _table("sent between nodes", "down,\nper round", "up,\nper round", "busiest\nedge", "whole\nrun",
                 "time on\nlinks")
  rows = ((plan.algorithm, plan.sent, sum(round_.links for round_ in plan.seconds)),
          ("FedAvg, one server", plan.fedavg, plan.link_seconds[0]),
          ("data-parallel, a ring", plan.data_parallel, plan.link_seconds[1]))
  for name, rounds, seconds in rows:
    down, up = traffic.total(rounds)
    busiest = max((sum(edge) for row in rounds for edge in row.values()), default=0)
    table.add_row(name, _size(down / len(rounds)), _size(up / len(rounds)), _size(busiest), _size(down + up),
                  progress.duration(seconds))
  return table


def _time_table(plan: Plan) -> Table:
  table = _table("time", "per round", "whole run", "")
  names = {"compute": "training", "exchange": "exchange inside the machine", "host": "to and from the host",
           "evaluation": "scoring", "links": "links between nodes"}
  count = len(plan.seconds)
  everything = sum(round_.machine for round_ in plan.seconds)
  for field, name in names.items():
    total = sum(getattr(round_, field) for round_ in plan.seconds)
    if field == "links":
      table.add_row("inside the machine", progress.duration(everything / count), progress.duration(everything), "100%")
      name = "links, were nodes apart"
      table.add_row(name, progress.duration(total / count), progress.duration(total), "")
    elif total:
      table.add_row(f"  {name}", progress.duration(total / count), progress.duration(total),
                    f"{total / everything:.0%}")
  return table


def _size(count: float) -> str:
  for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
    if count >= size:
      return f"{count / size:.3g} {unit}" if count < 1e3 * size else f"{count / size:,.0f} {unit}"
  return f"{count:.0f} B"
