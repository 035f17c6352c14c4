"""What is written about a round: one row per node, with who it took from and what its edges carried."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from worldlm_jax import schedule, state as state_lib, trees
from worldlm_jax.config import Config, KeyLayerConfig, Source, Synthetic
from worldlm_jax.data import compression, synthetic
from worldlm_jax.data.batches import NodeText
from worldlm_jax.exchange import guards, payload as payload_lib
from worldlm_jax.federation import Federation
from worldlm_jax.governance import Governance
from worldlm_jax.scoring import Score

Rows = dict[str, dict[str, Any]]  # by path


def blank(federation: Federation, round_index: int) -> Rows:
  """The rows of a round before anything has happened in it."""
  return {
    m.path: {"round": round_index, "node": m.path, "bytes_down": 0, "bytes_up": 0} for m in federation.members
  }


def add_training(row: dict[str, Any], losses_nats: np.ndarray) -> None:
  """Adds the losses of a node's optimizer steps to its row; repeats within a round add up."""
  before = row.get("steps", 0)
  mean = (row.get("loss_nats", 0.0) * before + float(np.sum(losses_nats))) / (before + len(losses_nats))
  row |= {"steps": before + len(losses_nats), "loss_nats": mean, "loss_nats_last": float(losses_nats[-1])}
  row.setdefault("loss_nats_first", float(losses_nats[0]))


def add_turnouts(rows: Rows, step: schedule.Step) -> None:
  """Adds to the members' rows what kept them from taking part in time, and how often; and how late their updates are.

  A late update that is merged shows with what it counts.
  """
  for _, turnout in step.turnouts:
    for path, what in turnout.happened.items():
      counts = rows[path].setdefault("turnout", {})
      counts[what] = counts.get(what, 0) + 1
      if path in turnout.rounds_late:
        rows[path]["rounds_late"] = turnout.rounds_late[path]
        rows[path]["counts"] = turnout.arrived.get(path, 0.0)


def turnout_totals(rounds: Sequence[Sequence[schedule.Step]]) -> dict[str, dict[str, int]]:
  """What kept members from taking part in time, and how often in the whole run, by path."""
  found: dict[str, dict[str, int]] = {}
  for turnout in (turnout for steps in rounds for step in steps for _, turnout in step.turnouts):
    for path, what in turnout.happened.items():
      counts = found.setdefault(path, {})
      counts[what] = counts.get(what, 0) + 1
  return found


def score_record(score: Score, bytes_per_token: float) -> dict[str, float]:
  """A score in the three units that people ask for."""
  return {
    "loss_nats": score.loss_nats, "perplexity": score.perplexity, "bits_per_byte": score.bits_per_byte(bytes_per_token)
  }


def text_record(text: NodeText, source: Source, compressed_bits_per_byte: float | None = None) -> dict[str, Any]:
  """What a node's text holds, by split, and what a compressor makes of it where that is known.

  Of an artificial language also the least loss that is possible (`floor`).
  """
  found: dict[str, Any] = {name: split.counts._asdict() for name, split in text.text.splits.items()}
  bytes_per_token = text.bytes_per_token("test")
  found["bytes_per_token"] = bytes_per_token
  if isinstance(source, Synthetic):
    nats_per_byte = synthetic.language(source).entropy_bits_per_byte * math.log(2)
    found["floor"] = score_record(Score(nats_per_byte * bytes_per_token, 1), bytes_per_token)
  if compressed_bits_per_byte is not None:
    found["compressor"] = {"name": compression.NAME, "bits_per_byte": compressed_bits_per_byte}
  return found


class EdgeBytes(NamedTuple):
  """What crosses the edge between a node and its parent takes, in bytes, each time."""

  backbone: int  # or its update; 0 where it does not cross
  key_layers: int  # or their update, or what a parent adds to them
  residual_layer: int  # one


def edge_bytes(shared: trees.PyTree, values: str, payload: str = "float32") -> EdgeBytes:
  """The bytes of each message, known from shapes alone.

  Args:
    shared: the parts of one node's parameters that cross an edge ("backbone", "key_layers"); leaves may be abstract.
    values: `KeyLayerConfig.values`. Residual layers are updates with "updates", and else whole layers, which travel
      in float32: whoever gets them has nothing that they could be a difference to.
    payload: one of `config.PAYLOADS`.
  """
  key_layers = shared.get("key_layers", {})
  layer = jax.eval_shape(lambda tree: jax.tree.map(lambda leaf: leaf[0], tree), key_layers)
  return EdgeBytes(
    payload_lib.num_bytes(shared.get("backbone", {}), payload), payload_lib.num_bytes(key_layers, payload),
    payload_lib.num_bytes(layer, payload if values == "updates" else "float32"),
  )


def baseline_bytes(config: Config, federation: Federation, params: trees.PyTree) -> dict[str, int]:
  """What two other ways to train a whole run on the same batches would send, down and up together, in float32.

  `fedavg`: every node with text exchanges its model with one server in each round of the root. `data_parallel`:
  synchronous training of one model, every node with text exchanging its gradients at each of its optimizer steps.

  Args:
    config: the experiment.
    federation: the tree, as any algorithm arranges it; no text is exchanged where all of it is pooled, so for that {}.
    params: of one node, all parts; leaves may be abstract.
  """
  if federation.is_pooled:
    return {}
  both_ways = 2 * payload_lib.num_bytes(params, "float32")
  steps = sum(
    sum(schedule.steps_per_round(federation, stage).values()) for stage in schedule.stages(federation, config.schedule)
  )
  clients = sum(member.data is not None for member in federation.members)
  return {"fedavg": config.rounds * clients * both_ways, "data_parallel": config.rounds * steps * both_ways}


class Exchanges:
  """Turns the logs of the exchange into rows: names instead of places, bytes instead of masks.

  Bytes count what crosses the edge between a node and its parent: the backbone, the key layers (or their update) and
  residual layers, each time they travel and a node has a use for them. A node that goes its own way still needs its
  parent's model to trust it; and, with attention over updates, what the parent adds to its key layers: there the
  parent does the mixing, so that no residual update is sent on to a leaf. Where phases repeat within a round, bytes
  add up and attention is the last repeat's.

  Args:
    federation: the tree.
    config: of the key layers.
    shared: the parts of one node's parameters that cross an edge; leaves may be abstract.
    payload: in what they do, one of `config.PAYLOADS`.
    governance: the rules of the tree; None where there are none.
  """

  def __init__(
    self, federation: Federation, config: KeyLayerConfig, shared: trees.PyTree, payload: str = "float32",
    governance: Governance | None = None,
  ):
    self._federation, self._over_updates = federation, config.values == "updates"
    self._paths = [m.path for m in federation.members]
    self._bytes = edge_bytes(shared, config.values, payload)
    sizes = self._bytes
    of_part = {"backbone": sizes.backbone, "key_layers": sizes.key_layers}
    self._update_bytes = {
      path: sum(size for part, size in of_part.items() if part in shared and (
        governance is None or governance.sends(part, path)))
      for path in self._paths[1:]
    }
    self._handed = {f"hands_{what}{part}": size for part, size in of_part.items() for what in ("", "addition_")}

  def down(
    self, rows: Rows, level: int, active: np.ndarray, topology: state_lib.Topology, log: Mapping[str, Any]
  ) -> None:
    """Adds a down-phase to the rows of the nodes that took part."""
    for i, member in enumerate(self._federation.levels[level]):
      if not active[i] or member.parent is None:
        continue
      row = rows[member.path]
      if "refused" in log and np.asarray(log["refused"])[i]:
        row["refused"] = f"the model of {member.parent} is not finite"
      origins = np.asarray(log["routed_origin"])[i] if "routed_origin" in log else np.zeros((0, 0), int)
      forwards = not self._over_updates or self._federation.is_federation(level)[i]
      row["bytes_down"] += int((origins >= 0).sum()) * self._bytes.residual_layer * bool(forwards)
      row["bytes_down"] += sum(size for name, size in self._handed.items() if name in log and np.asarray(log[name])[i])
      if "weights" not in log:
        continue
      num_residuals = origins.shape[0]
      residual_names = [[f"residual of {self._paths[o]}" if o >= 0 else "" for o in layers] for layers in origins]
      num_layers = np.asarray(log["weights"]).shape[-1]

      def every(name: str, count: int = num_layers) -> list[str]:
        return [name] * count

      names = [] if self._over_updates else [every("self")]
      names += [every(member.parent), *residual_names]
      if self._over_updates:
        siblings = zip(topology.siblings[i], topology.siblings_mask[i], strict=True)
        names += [every(self._federation.levels[level][s].path if there else "") for s, there in siblings]
      weights = np.asarray(log["weights"])[i]
      row["attention_down"] = _by_source(names, weights)
      row["accepted_down"] = bool(np.asarray(log["accepted"])[i])
      if num_residuals:
        made = np.asarray(log["routed_round"])[i]
        row["residuals_received"] = [
          {"layer": k, "from": self._paths[origins[r, k]], "made_in_round": int(made[r, k])}
          for r in range(num_residuals) for k in range(num_layers) if origins[r, k] >= 0
        ]

  def up(
    self, rows: Rows, level: int, active: np.ndarray, members_active: np.ndarray, topology: state_lib.Topology,
    log: Mapping[str, Any], present: Mapping[int, np.ndarray],
  ) -> None:
    """Adds an up-phase; `present[j]` says which residual layers level j's federations hold, `[N, R, M]`."""
    federation = self._federation
    for i, member in enumerate(federation.levels[level]):
      if not active[i]:
        continue
      for c, child in enumerate(federation.levels[level + 1]):
        if federation.parents[level + 1][c] == i and members_active[c]:
          residual_bytes = residuals_below(federation, child.path, present) * self._bytes.residual_layer
          rows[child.path]["bytes_up"] += self._update_bytes[child.path] + residual_bytes
          if verdict := int(np.asarray(log["verdict"])[c]) if "verdict" in log else 0:
            rows[child.path].setdefault("rejected", []).append(guards.VERDICTS[verdict])
      if "weights" in log:
        own = [] if self._over_updates else [["self"]]
        names = own + [
          [federation.levels[level + 1][c].path if there and members_active[c] else ""]
          for c, there in zip(topology.children[i], topology.children_mask[i], strict=True)
        ]
        weights = np.asarray(log["weights"])[i]
        rows[member.path]["attention_up"] = _by_source([name * weights.shape[-1] for name in names], weights)
        rows[member.path]["accepted_up"] = bool(np.asarray(log["accepted"])[i])


def residuals_below(federation: Federation, path: str, present: Mapping[int, np.ndarray]) -> int:
  """How many residual layers a node sends up, its own and those from below; `present` as in `Exchanges.up`."""
  inside = {m.path for m in federation.subtree(path)}
  return sum(
    int(np.sum(flags[i]))
    for j, flags in present.items() for i, m in enumerate(federation.levels[j]) if m.path in inside
  )


def present_residuals(state: state_lib.State) -> dict[int, jax.Array]:
  """Which residual layers the federations of each level hold: bool `[N, R, M]` by level, ghosts included."""
  return {level: own.residuals.present for level, own in enumerate(state) if own.residuals is not None}


def summary(
  federation: Federation, tokens: Mapping[str, int], sent: Mapping[str, list[int]],
  received: Mapping[str, dict[str, float]], personalised: Mapping[str, dict[str, float]], seconds: Mapping[str, float],
  data: Mapping[str, dict[str, Any]], baselines: Mapping[str, int] | None = None,
  turnouts: Mapping[str, dict[str, int]] | None = None, rejected: Mapping[str, dict[str, int]] | None = None,
) -> dict[str, Any]:
  """The content of summary.json, from what is known of each node by path.

  Args:
    federation: the tree.
    tokens: trained on.
    sent: [down, up] bytes over the edge to the parent.
    received: test scores of the model as received, for nodes with text.
    personalised: test scores after training; a node that never trained has only what it received.
    seconds: by activity.
    data: what the nodes' texts hold.
    baselines: what other ways to train would send; see `baseline_bytes`.
    turnouts: see `turnout_totals`.
    rejected: why a node's updates were rejected, and how often.
  """
  own = dict(received) | dict(personalised)
  # What the nodes below a pool train on is the same text once more, to personalise its model.
  trained = tokens.get(federation.root.path, 0) if federation.is_pooled else sum(tokens.values())
  nodes: dict[str, Any] = {}
  for member in federation.subtree(federation.root.path):
    down, up = sent.get(member.path, [0, 0])
    entry: dict[str, Any] = {"tokens": tokens.get(member.path, 0), "bytes_down": down, "bytes_up": up}
    if member.path in received:
      entry |= {"received": received[member.path], "personalised": own[member.path], "data": data[member.path]}
    for name, found in (("turnout", turnouts), ("rejected", rejected)):
      if found and member.path in found:
        entry[name] = found[member.path]
    below = [m.path for m in federation.subtree(member.path) if m.path in received]
    if below:  # not so where all have moved away
      entry["subtree"] = {"received": _mean_and_worst(below, received), "personalised": _mean_and_worst(below, own)}
    nodes[member.path] = entry
  down, up = (sum(entry[way] for entry in nodes.values()) for way in ("bytes_down", "bytes_up"))
  against = {
    name: {"bytes": amount, "times_ours": amount / (down + up) if down + up else None}
    for name, amount in (baselines or {}).items()
  }
  return {
    "nodes": nodes, "tree": nodes[federation.root.path]["subtree"], "tokens": trained, "bytes_down": down,
    "bytes_up": up, **({"bytes_of_others": against} if against else {}),
    "seconds": {name: round(value, 3) for name, value in seconds.items()},
    "waiting_for_data_share": round(seconds.get("waiting_for_data", 0.0) / max(sum(seconds.values()), 1e-9), 5),
  }


def _mean_and_worst(paths: list[str], scores: Mapping[str, dict[str, float]]) -> dict[str, Any]:
  """Over nodes with text: the mean of each unit, and the node with the most bits per byte."""
  mean = {unit: float(np.mean([scores[path][unit] for path in paths])) for unit in scores[paths[0]]}
  unit = "loss_nats" if math.isnan(mean["bits_per_byte"]) else "bits_per_byte"  # unknown where a tokenizer loses text
  worst = max(paths, key=lambda path: scores[path][unit])
  return {"mean": mean, "worst": {"node": worst} | scores[worst]}


def top_source(row: Mapping[str, Any]) -> str:
  """Whom a node's key layers took most from, itself excluded: federations from members, leaves from the rest."""
  total: dict[str, float] = {}
  for layer in row.get("attention_up") or row.get("attention_down") or ():
    for name, weight in layer.items():
      if name != "self":
        name = name.removeprefix("residual of ")
        total[name] = total.get(name, 0.0) + weight
  best = max(total, key=lambda name: total[name], default="")
  return best if total.get(best, 0.0) > 0 else ""


def _by_source(names: list[list[str]], weights_SxM: np.ndarray) -> list[dict[str, float]]:
  """Per layer, the weight of each named source that has any; the same source twice adds up."""
  layers: list[dict[str, float]] = [{} for _ in range(weights_SxM.shape[1])]
  for name, weights in zip(names, weights_SxM, strict=True):
    for k, layer in enumerate(layers):
      if name[k] and weights[k]:
        layer[name[k]] = round(layer.get(name[k], 0.0) + float(weights[k]), 6)
  return layers
