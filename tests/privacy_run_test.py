"""Whole runs under privacy: the ledger, budgets, resuming, Poisson batches; and a canary audit."""

import copy
import json
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from worldlm_jax import config as config_lib, progress, spending, train
from worldlm_jax.data import poisson
from worldlm_jax.data.windows import PADDING, Windows
from worldlm_jax.privacy import accounting, examples as examples_lib, release
from worldlm_jax.reporting import files, privacy_section

pytestmark = pytest.mark.usefixtures("on_one_device")
ROUNDS = 4


class Said(progress.Silent):
  def __init__(self):
    self.lines = []

  def start(self, title_lines, total_rounds, first_round):
    self.lines += title_lines


@pytest.fixture(scope="module")
def config(tmp_path_factory):
  """Three nodes: one with a budget for two of four trainings, one with DP-SGD alone, one open."""
  folder = tmp_path_factory.mktemp("texts")
  for path in "abc":
    (folder / path).mkdir()
    draw = random.Random(path)
    for split, size in (("train", 700), ("valid", 60), ("test", 60)):
      (folder / path / f"{split}.txt").write_text(" ".join(draw.choice(["lo", "re", "psu"]) for _ in range(size)))
  config = config_lib.Config(
    algorithm="fedavg", rounds=ROUNDS, federation=config_lib.FederationConfig(folder=str(folder)),
    node=config_lib.NodeSettings(local_steps=1, batch_size=2, warmup_steps=1),
    model=config_lib.ModelConfig(num_layers=1, d_model=8, num_heads=2, num_kv_heads=1, d_ff=8, key_layer_share=0.0),
    data=config_lib.DataConfig(sequence_length=13),
    evaluation=config_lib.EvaluationConfig(valid_windows=2, test_windows=2, matrix_windows=0),
    mesh=config_lib.MeshConfig(fsdp=1), logging=config_lib.LoggingConfig(tensorboard=False),
  )
  noise = {"privacy": "local", "privacy_clip": 1.0, "privacy_noise": 4.0}
  budget = accounting.update_epsilon(config_lib.NodeSettings(**noise), 2) + 1e-6
  config.federation.overrides = {
    "a": noise | {"privacy_budget": budget}, "b": {"example_clip": 1.0, "example_noise": 2.0},
  }
  return config


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
  said, workdir = Said(), tmp_path_factory.mktemp("run") / "run"
  return train.run(copy.deepcopy(config), workdir, reporter=said), workdir, said.lines


def test_a_node_trains_until_its_budget_is_spent_and_the_others_go_on(finished):
  summary, workdir, lines = finished
  assert any("a trains 2 of 4 times" in line and "privacy_noise=5.6" in line for line in lines)
  rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
  trained = {path: [row["round"] for row in rows if row["node"] == path and "steps" in row] for path in "abc"}
  assert trained == {"a": [0, 1], "b": [0, 1, 2, 3], "c": [0, 1, 2, 3]}
  assert summary["nodes"]["a"]["personalised"] != summary["nodes"]["a"]["received"]  # of its last training


def test_the_ledger_has_what_happened(finished, config):
  summary, _, _ = finished
  found = summary["privacy"]
  assert set(found["nodes"]) == {"a", "b"} and found["not_protected"] == ["c"]
  claim = found["nodes"]["a"]["organisation"]
  settings = config_lib.NodeSettings(privacy="local", privacy_clip=1.0, privacy_noise=4.0)
  assert claim["releases"] == 2 and claim["epsilon"] == accounting.update_epsilon(settings, 2)
  assert claim["epsilon"] <= claim["budget"] < accounting.update_epsilon(settings, 3)
  claim = found["nodes"]["b"]["example"]
  assert claim["releases"] == ROUNDS and 0 < claim["epsilon"] < 2 and claim["unit"].startswith("window")
  lines = spending.closing_lines(found)
  assert "organisation" in lines[0] and "zero-out" in lines[0] and lines[-1] == "not protected: c"


def test_receipts_say_what_each_release_cost(finished):
  summary, workdir, _ = finished
  receipts = [json.loads(line) for line in (workdir / "receipts.jsonl").read_text().splitlines()]
  costs = {(r["from"], r["round"]): r["privacy_cost"] for r in receipts if r["phase"] == "up"}
  paid = {place: cost for place, cost in costs.items() if cost is not None}
  assert set(paid) == {("a", 0), ("a", 1)} and paid["a", 0] > paid["a", 1] > 0
  assert sum(paid.values()) == pytest.approx(summary["privacy"]["nodes"]["a"]["organisation"]["epsilon"], rel=1e-5)


def test_a_resumed_run_goes_on_with_its_ledger(finished, config, tmp_path, monkeypatch):
  summary, _, _ = finished
  real = train._Run._save

  def stop(self, loss):
    real(self, loss)
    if self.ledger.now.round == 1:
      self.checkpoints.wait()
      raise KeyboardInterrupt

  monkeypatch.setattr(train._Run, "_save", stop)
  with pytest.raises(KeyboardInterrupt):
    train.run(copy.deepcopy(config), tmp_path / "run")
  monkeypatch.undo()
  resumed = train.run(copy.deepcopy(config), tmp_path / "run")
  assert resumed["privacy"] == summary["privacy"]
  assert {path: node.get("personalised") for path, node in resumed["nodes"].items()} == {
    path: node.get("personalised") for path, node in summary["nodes"].items()}


def test_the_report_says_what_is_claimed(finished):
  _, workdir, _ = finished
  html = str(privacy_section.make(files.load_run(workdir)))
  for words in ("organisation", "window", "zero-out", "Not protected", "1e-05"):
    assert words in html


def test_examples_are_drawn_each_by_itself():
  windows = Windows(np.arange(1, 402), 4)  # 100 windows
  source = poisson.PoissonBatches(windows, 10, seed=0, path="a")
  batches = source.batches(0, 400)
  assert batches.shape == (400, poisson.places(10), 5)
  taken = batches[:, :, 0] != PADDING
  sizes = taken.sum(axis=1)
  assert sizes.mean() == pytest.approx(10, abs=4 * 3 / 20)
  assert sizes.var() == pytest.approx(9, rel=0.25)  # not of a fixed size
  often = np.bincount((batches[:, :, 0][taken] - 1) // 4, minlength=100)
  assert often.mean() == pytest.approx(40, rel=0.05) and often.std() == pytest.approx(6, rel=0.3)
  assert all(len(set(batch[row, 0])) == row.sum() for batch, row in zip(batches, taken, strict=True))
  np.testing.assert_array_equal(source.batch(7), batches[7])


def test_documents_are_drawn_as_often_as_each_other_whatever_their_length():
  tokens = np.concatenate([[0], np.full(40, 1), [0], np.full(3, 2), [0]])
  windows = Windows(tokens, 4, np.array([0, 41]))
  assert poisson.num_examples(windows) == 2 and len(windows) == 12
  batches = poisson.PoissonBatches(windows, 1, seed=0, path="a").batches(0, 300)
  of_second = np.any(batches == 2, axis=(1, 2)).mean()
  assert of_second == pytest.approx(0.5, abs=0.12)
  assert len({window.tobytes() for window in batches.reshape(-1, 5)}) > 4  # all windows of the long one


# Canary audits: does what a node gives away tell whether it had a certain text? (zero-out: or none in its place)

TRIALS = 2000


def lower_bound(with_it: np.ndarray, without: np.ndarray) -> float:
  """The epsilon, at delta 1e-5, that has been spent at least if an attacker is that often right (bool `[TRIALS]`).

  By Clopper and Pearson's bounds of both rates, 97.5 % sure together.
  """
  power = stats.beta.ppf(0.0125, with_it.sum(), TRIALS - with_it.sum() + 1) if with_it.any() else 0.0
  errors = 1.0 if without.all() else stats.beta.ppf(0.9875, without.sum() + 1, TRIALS - without.sum())
  return float(np.log(max(power - 1e-5, 1e-12) / errors))


def releases_tell(noise: float, releases: int) -> float:
  """A canary is an update far over the clip; the attacker knows its direction, and adds up the releases along it."""
  canary = {"backbone": {"embedding": np.full((3, 7), 5.0, np.float32)}}
  zero = np.float32(0)
  guard = release.Guard(
    key=np.asarray(jax.random.key_data(jax.random.key(1))), clips=True, by_layer=False, noise=np.float32(noise),
    mean_noise=zero, adapts=False, adapts_mean=False, quantile=zero, quantile_noise=zero, quantile_rate=zero,
    hands_down=False, example_clip=np.float32(math.inf), example_noise=zero, example_batch=zero,
  )

  @jax.jit
  @jax.vmap
  def one(there, count):
    private = release.Private({}, np.float32(1), zero, count)
    update = jax.tree.map(lambda leaf: there * leaf, canary)
    return jnp.sum(release.release(update, private, jax.tree.map(jnp.asarray, guard))[0]["backbone"]["embedding"])

  def says(there, first):
    counts = first + np.arange(TRIALS * releases, dtype=np.int32)
    seen = np.asarray(one(np.full(len(counts), there, np.float32), counts)).reshape(TRIALS, releases) / math.sqrt(21)
    return seen.sum(axis=1) > releases / 2

  return lower_bound(says(1, 0), says(0, 10**6))


def training_tells(noise: float, steps: int) -> float:
  """Trains a linear model by DP-SGD on eight windows, with and without a ninth; the attacker sees the parameters.

  The canary alone has a last token other than 0, so that parameter tells of it.
  """
  windows = np.random.default_rng(0).integers(1, 9, (9, 6)).astype(np.int32)
  windows[:, -1], windows[0] = 0, [0, 0, 0, 0, 0, 99]
  protection = examples_lib.Examples(np.float32(1), np.float32(noise), np.float32(3), None)

  @jax.jit
  @jax.vmap
  def train_once(there, number):
    def step(i, w):
      key = jax.random.fold_in(jax.random.fold_in(jax.random.key(2), number), i)
      rows = jax.random.bernoulli(jax.random.fold_in(key, 0), 3 / 9, (9,)) & (there | (jnp.arange(9) > 0))
      loss = lambda p, window, row: jnp.sum(jnp.where(row[:, None], window[:, 1:] * p["w"][None], 0.0))
      own = protection._replace(key=jax.random.fold_in(key, 1))
      _, sums = examples_lib.clipped_gradients(loss, {"w": w}, windows, rows, own)
      return w + examples_lib.noised_mean(sums, jnp.int32(15), own, i)["w"]

    return jax.lax.fori_loop(0, steps, step, jnp.zeros(5))[-1]

  numbers = np.arange(TRIALS)
  expected = steps / 9  # of the parameter, with the canary
  return lower_bound(*(np.asarray(train_once(np.full(TRIALS, there), numbers + 10**6 * there)) > expected / 2
                       for there in (True, False)))


@pytest.mark.parametrize(("noise", "releases"), [(1.0, 1), (2.0, 9)])
def test_what_a_canary_shows_of_releases_stays_under_the_epsilon_stated(noise, releases):
  settings = config_lib.NodeSettings(privacy="local", privacy_clip=1.0, privacy_noise=noise)
  assert 0.3 < releases_tell(noise, releases) < accounting.update_epsilon(settings, releases)


def test_what_a_canary_shows_of_training_stays_under_the_epsilon_stated():
  settings = config_lib.NodeSettings(example_clip=1.0, example_noise=0.7)
  stated = accounting.example_epsilon(settings, accounting.Examples(9, 3, 9), 12)
  assert 0.2 < training_tells(0.7, 12) < stated


def test_without_noise_a_canary_shows_all_that_so_many_trials_can():
  assert releases_tell(0.0, 1) > 6  # log(2000 / 4)
  assert training_tells(0.0, 12) > 4
