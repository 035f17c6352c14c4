"""One experiment as typed, mutable dataclasses: what a config file returns and flags override.

`worldlm_jax.federation.resolve` turns a `Config` into a validated `Federation`; the numeric code
only ever sees plain arguments and frozen specs made from these.
"""

import dataclasses
import math
from typing import Any

ALGORITHMS = ("worldlm", "worldlm_paper", "fedavg", "hierfavg", "fedper", "local", "centralized")
PAYLOADS = ("float32", "bfloat16", "int8", "int4")


@dataclasses.dataclass(slots=True)
class NodeSettings:
  """What each node decides for itself. A child inherits its parent's values."""

  local_steps: int = 20  # optimizer steps on the node's own data each time it trains
  batch_size: int = 8  # windows per optimizer step
  learning_rate: float = 3e-3  # peak
  warmup_steps: int = 20  # linear warm-up, over the node's own steps
  lr_schedule: str = "cosine"  # constant | cosine | wsd
  weight_decay: float = 0.1  # AdamW only; norms are exempt
  clip_norm: float = 1.0  # global gradient norm; inf switches clipping off
  rounds_per_parent_round: int = 1  # rounds a federation runs with its children per round of its own
  down_temperature: float = 0.1  # of attend over layers when the parent's arrive; 0 keeps one's own (by cosines)
  up_temperature: float = 0.1  # of attend over layers of one's children; inf is the plain mean
  # A node takes its parent's backbone and key layers over as they are until e^2 / (e^2 + c^2) of the run, and goes its
  # own way from then on (see exchange/relevance.py). e: how often its subtree sees its text in the whole run; c: these
  # numbers, where 0 means never and inf from the start.
  backbone_independence: float = 3.0
  key_layer_independence: float = 3.0
  trust: str = "validated"  # validated | full: how far its model follows its own training (see exchange/trust.py)
  acceptance: str = "always"  # always | validated: keep own key layers where the mixed are worse
  max_train_bytes: int = 0  # train on a sample of the node's documents, at most so large; 0: on all of them
  # Differential privacy (docs/privacy.md). First of updates, so of the node's whole text: where they are protected,
  privacy: str = "none"  # none | local: before they leave the node | central: in its federation's mean
  privacy_clip: float = math.inf  # the largest norm that an update may have; where it adapts, the first one
  privacy_clip_by: str = "model"  # model | layer: what is clipped at a time, layers to equal shares of the norm
  privacy_noise: float = 0.0  # noise multiplier: the noise's standard deviation in each value, in clips
  privacy_quantile: float = 0.0  # the clip moves until so large a share of the updates is under it; 0: it is fixed
  privacy_quantile_noise: float = 4.0  # noise multiplier of that share
  privacy_quantile_rate: float = 0.2  # how far the clip's logarithm moves in a round, times the share that is missing
  privacy_delta: float = 1e-5  # for which epsilon is told
  privacy_budget: float = math.inf  # the largest epsilon; the node trains no further once the next time would exceed it
  # And then of examples (DP-SGD): of windows or, with packing=documents, of documents.
  example_clip: float = math.inf  # the largest norm of an example's gradient
  example_noise: float = 0.0  # noise multiplier of each step
  # Partners that fail, simulated (see attendance.py). Rounds of the root, counted from 0:
  joins_round: int = 0  # the first in which it is a member
  leaves_round: int = 0  # the first in which it is one no longer; 0: it stays
  loses_data_round: int = 0  # the first in which it has nothing to train on any more, and only receives; 0: it keeps it
  # As a member, in each round of its federation:
  loss_before: float = 0.0  # probability that it is lost before it trains
  loss_after: float = 0.0  # probability that it is lost once it has trained: its update never arrives
  step_seconds: float = 0.0  # simulated seconds that an optimizer step takes it
  step_seconds_spread: float = 0.0  # how much they vary from round to round: the deviation of their logarithm
  # As a federation, in each of its own rounds:
  member_share: float = 1.0  # how many members are asked, drawn anew each time; at least one
  member_count: int = 0  # at most so many; 0: no such limit
  deadline_seconds: float = math.inf  # simulated; members who take longer are late
  late_weight: float = 0.5  # factor on the weight of a late update for each round that it is late; 0: it is discarded
  quorum: float = 0.0  # share of those asked who must be in time, lest the federation keep its state
  # Whom what the node has learnt may reach (see sharing.py): anyone | federation, that it is a member of | nobody |
  # paths of nodes, such as "law,code/data", each with all below it.
  share_backbone: str = "anyone"
  share_key_layers: str = "anyone"
  share_residuals: str = "anyone"  # its residual layers; never wider than share_key_layers
  accept_from: str = "anyone"  # whose updates it takes in from outside; the same words
  members: str = "anyone"  # of a federation: which of its members it exchanges anything with; anyone | paths
  member_weight_cap: float = 1.0  # of a federation: the largest weight of a member in its means
  quality_floor: float = 0.0  # of a federation: how many times better than its model a member's must be; 0: no floor


@dataclasses.dataclass(slots=True)
class Files:
  """A local file of documents, or a folder of them: text, JSONL, Parquet or ArrayRecord (see data/files.py)."""

  path: str = ""
  text_field: str = "text"  # of JSONL and Parquet records; "meta.body" leads into a nested record
  node_field: str = ""  # of records: the field that tells to which node a document belongs


@dataclasses.dataclass(slots=True)
class StandardLibrary:
  """One family of texts out of the running Python's own standard library (see data/stdlib.py)."""

  family: str = ""


@dataclasses.dataclass(slots=True)
class Tfds:
  """A data set of tensorflow_datasets, prepared as ArrayRecord files (see data/tfds.py)."""

  name: str = ""  # such as "wiki40b/en:1.3.0", or the folder of a prepared data set
  data_dir: str = ""  # where prepared data sets lie; "": the library's default
  text_field: str = "text"
  node_field: str = ""
  train: str = "train"  # a split of the data set, such as "train[:10%]"
  valid: str = ""  # "" for both: the documents of `train` are split by their hash
  test: str = ""


@dataclasses.dataclass(slots=True)
class HuggingFace:
  """A data set that the Hugging Face `datasets` library streams (extra [data]; see data/hugging_face.py)."""

  name: str = ""  # such as "allenai/c4", or a local folder
  subset: str = ""  # such as "fr"
  revision: str = ""  # a commit, branch or tag; "": the newest
  text_field: str = "text"
  node_field: str = ""
  train: str = "train"
  valid: str = ""  # "" for both: the documents of `train` are split by their hash
  test: str = ""
  max_documents: int = 0  # read at most so many of each split; 0: all


@dataclasses.dataclass(slots=True)
class Synthetic:
  """An artificial language, related to those that share the beginning of its `lineage` (see data/synthetic.py)."""

  lineage: str = ""  # such as "north/coast": what was changed on the way from the common proto-language, "."
  divergence: float = 0.3  # how far each step of the lineage leads away: 0 (not at all) to 1
  train_bytes: int = 200_000  # roughly; valid and test texts have `eval_bytes` each
  eval_bytes: int = 50_000
  seed: int = 0  # of the whole family of languages


@dataclasses.dataclass(slots=True)
class Tagged:
  """The documents of `source` whose `node_field` holds `tag`."""

  source: "Files | Tfds | HuggingFace" = dataclasses.field(default_factory=Files)
  tag: str = ""


@dataclasses.dataclass(slots=True)
class Share:
  """What falls to one leaf when labelled documents are dealt out over a tree (see `Partition`)."""

  sources: dict[str, "Source"] = dataclasses.field(default_factory=dict)  # by label
  leaf: tuple[int, ...] = ()  # the child taken at each level
  branching: tuple[int, ...] = ()
  alphas: tuple[float, ...] = ()
  seed: int = 0


@dataclasses.dataclass(slots=True)
class Swapped:
  """`own` with a share of its documents exchanged for the same share of `other`'s."""

  own: "Source" = dataclasses.field(default_factory=Files)
  other: "Source" = dataclasses.field(default_factory=Files)
  share: float = 0.0
  seed: int = 0


Source = Files | StandardLibrary | Tfds | HuggingFace | Synthetic | Tagged | Share | Swapped


@dataclasses.dataclass(slots=True)
class Node:
  """A node of the tree, as configured: `settings` overrides fields of `NodeSettings` from here on down."""

  name: str = "world"
  data: Source | None = None
  children: list["Node"] = dataclasses.field(default_factory=list)
  settings: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class SyntheticTree:
  """A tree of artificial languages: a node at depth d has branching[d] children, and the leaves have text."""

  branching: tuple[int, ...] = ()  # (2, 3): two families of three languages; () means no synthetic tree
  divergence: float = 0.3  # how far each edge of the tree leads away: 0 (one language) to 1
  train_bytes: int = 200_000  # of the leaf with the most text
  imbalance: float = 0.0  # the i-th leaf has train_bytes / i ** imbalance: 0 (all the same) upwards
  eval_bytes: int = 50_000  # of the valid and of the test text
  seed: int = 0


@dataclasses.dataclass(slots=True)
class Partition:
  """Deals the documents of all nodes out over the leaves of a new tree, by Dirichlet draws over labels.

  A document's label is the path of the node that it comes from. At every node of the new tree, of depth d, each
  label has its own proportions among the branching[d] children, drawn from Dirichlet(alphas[d], ...).
  """

  branching: tuple[int, ...] = ()  # (2, 3): two federations of three leaves; () leaves the tree as it is
  alphas: tuple[float, ...] = ()  # one for each level: small is skewed, large is even
  seed: int = 0


@dataclasses.dataclass(slots=True)
class Swap:
  """Exchanges a share of the documents of two nodes, so that the hierarchy no longer fits the data."""

  nodes: tuple[str, ...] = ()  # two paths, such as ('law/eu', 'code/python'), or () for none
  share: float = 0.0  # 0 to 1
  seed: int = 0


@dataclasses.dataclass(slots=True)
class Move:
  """From a round of the root on, `node` is a member of `to`, with all below it (see moves.py). Both are paths."""

  node: str = ""  # where it is then
  to: str = ""
  round: int = 1  # counted from 0


@dataclasses.dataclass(slots=True)
class FederationConfig:
  """Where the tree comes from: exactly one of the first five. `overrides` maps path -> field -> value."""

  root: Node | None = None
  yaml: str = ""
  folder: str = ""
  documents: Source = dataclasses.field(default_factory=Files)  # whose node_field holds paths, such as "law/eu"
  synthetic: SyntheticTree = dataclasses.field(default_factory=SyntheticTree)
  partition: Partition = dataclasses.field(default_factory=Partition)
  swap: Swap = dataclasses.field(default_factory=Swap)
  moves: list[Move] = dataclasses.field(default_factory=list)
  overrides: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(slots=True)
class ModelConfig:
  """A decoder-only transformer of the Llama family; `model/presets.py` has the sizes."""

  num_layers: int = 4
  d_model: int = 96
  num_heads: int = 4
  num_kv_heads: int = 2  # grouped-query attention; must divide num_heads
  d_ff: int = 256  # hidden width of SwiGLU
  vocab_size: int = 0  # 0: the tokenizer's
  rope_base: float = 10_000.0
  norm_epsilon: float = 1e-5
  tied_head: bool = True
  compute_dtype: str = "float32"  # float32 | bfloat16; parameters are always float32
  attention: str = "auto"  # auto | xla | cudnn | splash: the kernel (see model/attention.py)
  remat: str = "none"  # none | blocks | dots: what the backward pass recomputes (dots: all but matrix products)
  key_layer_share: float = 0.3  # share of the blocks, from the top, that are key layers; 1: all blocks
  init_from: str = ""  # folder of a Llama model of Hugging Face: its sizes, and parameters to start from; "": random


@dataclasses.dataclass(slots=True)
class DataConfig:
  """How documents become windows of tokens."""

  tokenizer: str = "bytes"  # "bytes", a Hugging Face tokenizers JSON file, or a folder with a tokenizer.json
  sequence_length: int = 128  # predicted tokens per window
  packing: str = "stream"  # stream: windows run on across documents | documents: each window is of one document
  document_mask: bool = False  # attention stays within the document (matters for packing=stream)
  invalid_utf8: str = "error"  # error | replace: what happens to bytes that are no UTF-8
  cache: str = ""  # folder of the tokenised texts; "": worldlm_jax in the user's cache folder


@dataclasses.dataclass(slots=True)
class OptimizerConfig:
  """The local optimizer, the same at every node; its rates are in `NodeSettings`."""

  name: str = "adamw"  # adamw | sgd
  b1: float = 0.9
  b2: float = 0.95
  epsilon: float = 1e-8
  moments: str = "keep"  # keep | reset: what happens to the moments at each round
  microbatch_size: int = 0  # windows per gradient computation; 0: the whole batch at once
  proximal: float = 0.0  # FedProx: pull towards the parameters from which the round's training began


@dataclasses.dataclass(slots=True)
class BackboneConfig:
  """How a federation averages its members' backbones."""

  weights: str = "text"  # text (by how much of it the members have) | tokens (that they trained on) | uniform
  aggregate: str = "mean"  # mean | trimmed_mean | median | norm_bounded, of key layers' updates too: exchange/robust.py
  trim: float = 0.2  # of trimmed_mean: the share of the weight that is cut off at each end
  norm_bound: float = 1.0  # of norm_bounded: the largest norm of an update, in median norms of those of all members
  server_optimizer: str = "sgd"  # sgd | nesterov | adam
  server_learning_rate: float = 1.0
  server_momentum: float = 0.9  # nesterov's momentum and adam's b1


@dataclasses.dataclass(slots=True)
class GuardConfig:
  """Whose updates are rejected (see exchange/guards.py); those that are not finite always are."""

  norm_ratio: float = math.inf  # so many times longer than the median of the siblings'; inf: never
  opposition: float = 1.0  # mean cosine with the siblings' under minus this, theirs among each other over it; 1: never
  failing: str = "stop"  # stop | leave_out: what a loss that is not finite at one node does: ends the run, or its round


@dataclasses.dataclass(slots=True)
class KeyLayerConfig:
  """How key layers are aggregated (ALGORITHM: attend) and residual layers routed."""

  values: str = "updates"  # layers | updates
  similarity: str = "update_cosine"  # see validation.SIMILARITIES; attend over updates is always their cosine
  granularity: str = "model"  # layer | tensor | all | model: what attends as one; a node's own backbone only by model
  candidates: str = "everybody"  # everybody | siblings | both: whose updates a node looks at; everybody's as one mean
  prior: str = "uniform"  # uniform | weights (the backbone's, in the up-phase; the down-phase has none)
  update_strength: float = 1.0  # lambda: weight of a fully aligned update of another node
  update_threshold: float = 0.0  # cosine under which another node's update is ignored
  update_norm_cap: float = 1.0  # largest norm of the step, in norms of the node's own update
  residuals_per_layer: int = 1  # residual layers a federation sends up, per layer index; 0: off
  residuals_received: int = 1  # pooled layers of other federations routed to a child, per layer index


@dataclasses.dataclass(slots=True)
class EvaluationConfig:
  """How much of each split is scored. 0 windows means all of them, but for the matrix."""

  valid_windows: int = 32  # of every round's valid score
  test_windows: int = 0  # of the summary's test score
  personalised: str = "last"  # last | best: the round whose personalised model is tested, by the node's valid loss
  acceptance_windows: int = 8  # of validated trust and acceptance and of the validation_loss similarity
  matrix_windows: int = 16  # of every node's test text that every node's model is scored on at the end; 0: none


@dataclasses.dataclass(slots=True)
class CheckpointConfig:
  """What is kept in `workdir/checkpoints`."""

  every_rounds: int = 1
  keep_last: int = 2
  keep_best: int = 1  # by the tree's mean personalised valid loss


@dataclasses.dataclass(slots=True)
class LoggingConfig:
  """What shows a run while it goes, besides the screen and metrics.jsonl (see watching.py)."""

  tensorboard: bool = True  # event files in workdir/tensorboard
  wandb_project: str = ""  # a project of Weights & Biases (extra [wandb]); "": none


@dataclasses.dataclass(slots=True)
class MeshConfig:
  """How many devices each axis of the mesh has; 0 is chosen for you. Their product is the number of devices."""

  node: int = 0  # nodes of a level that are spread over devices
  fsdp: int = 0  # devices that share one node's parameters, moments and batches
  tensor: int = 0  # devices that share one node's matrix products


@dataclasses.dataclass(slots=True)
class Config:
  """One experiment."""

  algorithm: str = "worldlm"  # one of ALGORITHMS; each is a file in algorithms/
  seed: int = 0
  rounds: int = 10  # rounds of the root; in the sequential schedule, of each level in its turn
  schedule: str = "parallel"  # parallel | sequential
  inner_text: str = "beside"  # a federation's own text: one member more, "beside" its members, or "before" they train
  payload: str = "float32"  # one of PAYLOADS: in what updates and models cross an edge (see exchange/payload.py)
  nodes_at_once: int = 0  # nodes of a level that train side by side on a device; 0: chosen for you
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  waiting: str = "auto"  # device | host | auto: where the state of nodes lies that wait for others to train
  federation: FederationConfig = dataclasses.field(default_factory=FederationConfig)
  node: NodeSettings = dataclasses.field(default_factory=NodeSettings)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  backbone: BackboneConfig = dataclasses.field(default_factory=BackboneConfig)
  guards: GuardConfig = dataclasses.field(default_factory=GuardConfig)
  key_layers: KeyLayerConfig = dataclasses.field(default_factory=KeyLayerConfig)
  evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
  checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
  logging: LoggingConfig = dataclasses.field(default_factory=LoggingConfig)


@dataclasses.dataclass(slots=True)
class Entry:
  """One line of a comparison: an algorithm, or a variant of one."""

  name: str  # of its folder, and in the tables
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)  # dotted name of a field of `Config` -> value


@dataclasses.dataclass(slots=True)
class Comparison:
  """Entries that are trained on the same tree, with the same tokens, from the same seeds (see docs/compare.md)."""

  base: Config
  entries: list[Entry]
  seeds: tuple[int, ...] = (0, 1, 2)
  own: str = "worldlm"  # name of the entry that the others are held against
  alone: str = "local"  # name of the entry that stands for training alone; "" for none


def num_key_layers(model: ModelConfig) -> int:
  """`m = round(share * L)`: how many of the last blocks are key layers."""
  return round(model.key_layer_share * model.num_layers)


def to_dict(config: Any) -> Any:
  """Plain JSON values of a config; infinities become strings, sources carry their kind."""
  if dataclasses.is_dataclass(config) and not isinstance(config, type):
    kind = {"kind": type(config).__name__} if isinstance(config, Source) else {}
    return kind | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
  if isinstance(config, dict):
    return {key: to_dict(value) for key, value in config.items()}
  if isinstance(config, (list, tuple)):
    return [to_dict(value) for value in config]
  if isinstance(config, float) and not math.isfinite(config):
    return str(config)
  return config
