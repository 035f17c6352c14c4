"""Laws of the artificial languages: exact entropy, a family tree, texts that only grow, a floor that holds."""

import dataclasses
import difflib
import hashlib
import itertools
import math
import string
from typing import Any

import jax
import numpy as np
import pytest

from worldlm_jax import config, local, model
from worldlm_jax.data import documents, synthetic
from worldlm_jax.data.tokenizer import ByteTokenizer

FAMILY = [("", 0.3, 0), ("north", 0.3, 0), ("north/coast", 0.3, 1), ("a/b/c", 0.05, 2), ("south/east/hills", 1.0, 3),
          ("1/2/3/4/5/6/7", 0.4, 4)]

# Two classes, small enough to work out by hand: after "c" (and first) comes mostly a or b, after those mostly "c".
BY_HAND = synthetic.Language(words=(("a", "b"), ("c",)), followers=((1, 0), (0, 1), (0, 1)))


def language(lineage="", divergence=0.3, seed=0):
  return synthetic.language(config.Synthetic(lineage, divergence, seed=seed))


def texts(source):
  """The texts of each split."""
  opened = list(synthetic.open_language(source).documents())
  return {name: [d.text for d in opened if d.split == name] for name in documents.SPLITS}


def vocabulary(one):
  return set(itertools.chain(*one.words))


def common_words(one, other):
  """The share of the words of `one` that `other` has in the same class."""
  pairs = zip(one.words, other.words, strict=True)
  return sum(len(set(a) & set(b)) for a, b in pairs) / sum(map(len, one.words))


def resemblance(one, other):
  """How alike the spelling of each word of `one` and of the most similar word of its class in `other` are: 0 to 1."""
  return np.mean([
    max(difflib.SequenceMatcher(None, word, candidate).ratio() for candidate in candidates)
    for words, candidates in zip(one.words, other.words, strict=True) for word in words
  ])


def common_ranks(one, other):
  """The share of the places in `followers` where both have the same class."""
  return np.mean(np.array(one.followers) == np.array(other.followers))


@pytest.mark.parametrize(("lineage", "divergence", "seed"), FAMILY)
def test_entropy_and_length_are_those_of_the_texts(lineage, divergence, seed):
  own = language(lineage, divergence, seed)
  drawn = list(itertools.islice(own.texts(np.random.default_rng(0)), 4000))
  nats = -np.array([own.log_likelihood(text) for text in drawn])
  sizes = np.array([len(text.encode()) for text in drawn])

  def assert_mean_is_zero(values):
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(len(values))

  assert_mean_is_zero(nats - own.entropy_nats_per_document)
  assert_mean_is_zero(sizes - own.bytes_per_document)
  # Long documents have more of both, so the ratios are known far more exactly: to some 0.5 %.
  assert_mean_is_zero(nats - own.entropy_nats_per_byte_token * (sizes + 1))
  assert_mean_is_zero(nats - own.entropy_bits_per_byte * math.log(2) * sizes)
  # The separator is one token in some 400: too few to tell from the texts.
  tokens = own.bytes_per_document + 1
  assert own.entropy_nats_per_byte_token * tokens == pytest.approx(own.entropy_nats_per_document, rel=1e-9)
  assert 0.8 < own.entropy_bits_per_byte < 1.5


@pytest.mark.parametrize(("lineage", "divergence", "seed"), FAMILY)
def test_texts_and_paths_determine_each_other(lineage, divergence, seed):
  own = language(lineage, divergence, seed)
  assert tuple(map(len, own.words)) == synthetic.CLASS_SIZES
  assert len(vocabulary(own)) == sum(synthetic.CLASS_SIZES)  # no word twice, in one class or in two
  assert set("".join(vocabulary(own))) <= set(string.ascii_lowercase)
  assert min(map(len, vocabulary(own))) >= 2
  classes = list(range(len(own.words)))
  assert len(own.followers) == len(classes) + 1 and all(sorted(row) == classes for row in own.followers)
  for text in itertools.islice(own.texts(np.random.default_rng(1)), 300):
    assert -1e4 < own.log_likelihood(text) < 0


def test_log_likelihood_by_hand():
  first, second = 4 / 5, 1 / 5  # of two classes: 1 to 1/4
  a, b, end, stop = 2 / 3, 1 / 3, synthetic.END, synthetic.STOP
  sentences = [
    first * a * (1 - end) * first * (1 - end) * second * end,  # a c c.
    first * b * end,  # b.
    second * end,  # c.
    first * b * (1 - end) * second * a * end,  # b a.
  ]
  assert BY_HAND.log_likelihood("a c c. b. c. b a.") == pytest.approx(math.log(math.prod(sentences) * stop))
  longer = math.prod(sentences) * (1 - stop) * first * a * end * stop
  assert BY_HAND.log_likelihood("a c c. b. c. b a. a.") == pytest.approx(math.log(longer))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 1, 3, 1), (1, 1, 1, 2, 1)])
def test_the_probabilities_of_all_texts_of_a_shape_add_up(shape):
  """To the probability of so many sentences of so many words: no text is left out or counted twice."""
  total = 0.0
  for words in itertools.product("abc", repeat=sum(shape)):
    rest = iter(words)
    total += math.exp(BY_HAND.log_likelihood(" ".join(" ".join(itertools.islice(rest, n)) + "." for n in shape)))
  end, stop = synthetic.END, synthetic.STOP
  by_shape = end ** len(shape) * (1 - end) ** (sum(shape) - len(shape))
  assert total == pytest.approx(by_shape * stop * (1 - stop) ** (len(shape) - synthetic.MIN_SENTENCES))


@pytest.mark.parametrize("text", [
  "", ".", "a. b. c", "a. b. c.", "a. b. c. a", "a. b. c. a!", "a. b. c. d.", "a. b. c. ab.", "a. b. c.. a.",
  "a. b. c.  a.", "a. b. c. a. ", " a. b. c. a.", "a. b. c. a b .", "a. b.\nc. a. a.", "a. b. c. A.",
  "a.b. c. a. a. b.",
])
def test_what_a_language_cannot_produce(text):
  assert BY_HAND.log_likelihood(text) == -math.inf


def test_a_relative_does_not_produce_the_text():
  own, sister = language("north/coast"), language("north/hills")
  assert sister.log_likelihood(next(own.texts(np.random.default_rng(0)))) == -math.inf


def test_without_divergence_all_are_the_proto_language():
  for lineage in (".", "north", "north/coast", "a/b/c/d"):
    assert language(lineage, divergence=0.0) == language("")
  assert language("", divergence=0.7) == language("")  # there is no step to make
  assert language("", seed=1) != language("")
  assert language("north") not in (language(""), language("south"), language("north/coast"))


def test_divergence_leads_away_from_the_parent():
  dial = (0.0, 0.02, 0.1, 0.3, 0.6, 1.0)
  words, ranks = (
    [np.mean([share(language("", seed=s), language("step", d, s)) for s in range(8)]) for d in dial]
    for share in (common_words, common_ranks)
  )
  for shares in (words, ranks):
    assert shares[0] == 1.0 and all(a > b for a, b in itertools.pairwise(shares)), shares
  assert words[1] > 0.9 and words[-1] < 0.05
  assert ranks[1] > 0.9 and ranks[-1] < 1 / len(synthetic.CLASS_SIZES)


def test_changed_words_resemble_those_they_come_from_and_new_ones_do_not():
  proto = language("")
  strangers = resemblance(language("", seed=1), proto)
  assert resemblance(language("step", 0.5), proto) > strangers + 0.1
  assert resemblance(language("step", 1.0), proto) < strangers + 0.03


def test_a_larger_divergence_changes_the_same_and_more():
  proto, some, more = language(""), language("step", 0.2), language("step", 0.5)
  kept = [{(row, place) for row, (a, b) in enumerate(zip(proto.followers, other.followers, strict=True))
           for place in range(len(a)) if a[place] == b[place]} for other in (some, more)]
  assert kept[1] < kept[0]


@pytest.mark.parametrize("divergence", [0.1, 0.3, 0.6])
def test_siblings_are_closer_than_cousins(divergence):
  shares: dict[str, list] = {"parent": [], "sibling": [], "cousin": []}
  for seed in range(8):
    own = language("a/a", divergence, seed)
    for name, lineage in (("parent", "a"), ("sibling", "a/b"), ("cousin", "b/a")):
      other = language(lineage, divergence, seed)
      shares[name].append((common_words(own, other), common_ranks(own, other)))
  parent, sibling, cousin = (np.mean(shares[name], axis=0) for name in shares)
  assert (parent > sibling).all() and (sibling > cousin).all(), shares


def test_sounds_change_by_rule(monkeypatch):
  """With words and ranks left alone, a step renames pairs of a consonant and a vowel, the same in every word."""
  original = synthetic._rng

  class NoChange:
    random = staticmethod(np.ones)  # no draw is below any share

  monkeypatch.setattr(synthetic, "_rng", lambda seed, lineage, purpose: NoChange if lineage and purpose != "sounds"
                      else original(seed, lineage, purpose))
  words = [itertools.chain(*language(lineage, 0.3, seed=5).words) for lineage in ("", "step")]
  pairs = set()
  for old, new in zip(*words, strict=True):
    assert len(old) == len(new)
    pairs |= {(old[i : i + 2], new[i : i + 2]) for i in range(len(old) - 1) if old[i + 1] in "aeiou"}
  assert len({old for old, _ in pairs}) == len({new for _, new in pairs}) == len(pairs)
  assert all(old[1] == new[1] for old, new in pairs)
  assert 0.05 < np.mean([old != new for old, new in pairs]) < 0.3


def test_more_bytes_extend_a_split_and_change_no_other():
  short, long = (texts(config.Synthetic("a/b", train_bytes=size, eval_bytes=9_000)) for size in (30_000, 400_000))
  assert long["train"][: len(short["train"])] == short["train"]
  assert (long["valid"], long["test"]) == (short["valid"], short["test"])
  assert sum(map(len, long["train"])) - len(long["train"][-1]) < 400_000 <= sum(map(len, long["train"]))
  more = texts(config.Synthetic("a/b", train_bytes=30_000, eval_bytes=20_000))
  assert more["train"] == short["train"] and more["test"][: len(short["test"])] == short["test"]
  for name in ("valid", "test"):
    assert sum(map(len, short[name])) - len(short[name][-1]) < 9_000 <= sum(map(len, short[name]))


def test_no_document_occurs_twice():
  for divergence in (0.0, 0.3):  # without divergence the two speak the same language, but say other things
    both = [texts(config.Synthetic(lineage, divergence, 300_000, 100_000)) for lineage in ("a", "b")]
    every = [text for one in both for part in one.values() for text in part]
    assert len(set(every)) == len(every) > 2000


def test_opening_twice_or_reading_twice_gives_the_same():
  source = config.Synthetic("north", train_bytes=5000, eval_bytes=2000)
  opened = synthetic.open_language(source)
  found = list(opened.documents())
  assert list(opened.documents()) == found == list(synthetic.open_language(source, "replace").documents())
  assert [split for split, _ in itertools.groupby(d.split for d in found)] == ["train", "valid", "test"]
  source.lineage, source.train_bytes = "south", 1
  assert list(opened.documents()) == found
  assert list(synthetic.open_language(config.Synthetic(".", eval_bytes=1)).documents()) == list(
    synthetic.open_language(config.Synthetic("", eval_bytes=1)).documents())


def test_the_fingerprint_changes_with_every_field():
  source = config.Synthetic("a")
  changes: dict[str, Any] = {"lineage": "b", "divergence": 0.31, "train_bytes": 7, "eval_bytes": 7, "seed": 1}
  assert changes.keys() == {field.name for field in dataclasses.fields(source)}
  others = [dataclasses.replace(source, **{name: value}) for name, value in changes.items()]
  assert len({synthetic.open_language(s).fingerprint for s in [source, *others]}) == 1 + len(changes)


def test_texts_stay_the_same_or_the_version_is_raised():
  """Tokenised texts are cached by fingerprint, in which the version is: put new values here for a new version."""
  opened = synthetic.open_language(config.Synthetic("north/coast", train_bytes=20_000))
  drawn = "\n".join(document.text for document in opened.documents())
  assert (synthetic._VERSION, hashlib.sha256(drawn.encode()).hexdigest()[:8]) == (1, "5cc2e7bb")


@pytest.mark.parametrize(("fields", "message"), [
  ({"divergence": 1.01}, r"Synthetic\.divergence=1\.01: expected a number from 0 to 1"),
  ({"divergence": math.nan}, r"Synthetic\.divergence=nan: expected"),
  ({"train_bytes": 0}, r"Synthetic\.train_bytes=0: expected at least 1"),
  ({"eval_bytes": -1}, r"Synthetic\.eval_bytes=-1: expected at least 1"),
  ({"lineage": "north//coast"}, r"Synthetic\.lineage='north//coast': expected names separated by single slashes"),
  ({"lineage": "/north"}, r"Synthetic\.lineage='/north': expected"),
])
def test_errors(fields, message):
  with pytest.raises(ValueError, match=message):
    synthetic.open_language(config.Synthetic(**fields))


def leaves(node, path=""):
  """(path, source) of every leaf of a tree; no other node has text."""
  assert (node.data is None) == bool(node.children)
  if not node.children:
    return [(path, node.data)]
  return [leaf for child in node.children for leaf in leaves(child, f"{path}/{child.name}" if path else child.name)]


def test_a_tree_of_languages():
  spec = config.SyntheticTree((2, 3), divergence=0.2, train_bytes=60_000, imbalance=1.0, eval_bytes=7000, seed=5)
  root = synthetic.tree(spec)
  assert root.name == "synthetic"
  expected = {"a/a": 60_000, "b/a": 30_000, "a/b": 20_000, "b/b": 15_000, "a/c": 12_000, "b/c": 10_000}
  assert dict(leaves(root)) == {path: config.Synthetic(path, 0.2, size, 7000, 5) for path, size in expected.items()}
  assert [path for path, _ in leaves(root)] == sorted(expected)


def test_more_nodes_change_nothing_for_those_that_were_there():
  small, large = (dict(leaves(synthetic.tree(config.SyntheticTree(branching)))) for branching in ((2, 3), (3, 30)))
  assert small.items() < large.items() and len(large) == 90
  assert {"a/z", "a/aa", "c/ad"} < large.keys()
  assert dict(leaves(synthetic.tree(config.SyntheticTree((2,))))).keys() == {"a", "b"}


@pytest.mark.parametrize(("fields", "message"), [
  ({"branching": ()}, r"SyntheticTree\.branching=\(\): expected the number of children at each depth"),
  ({"branching": (2, 0)}, r"SyntheticTree\.branching=\(2, 0\): expected"),
  ({"branching": (2.5,)}, r"SyntheticTree\.branching=\(2\.5,\): expected"),
  ({"divergence": -0.1}, r"SyntheticTree\.divergence=-0\.1: expected a number from 0 to 1"),
  ({"imbalance": -1.0}, r"SyntheticTree\.imbalance=-1\.0: expected a number from 0 to 10"),
  ({"imbalance": 9.0}, r"SyntheticTree\.train_bytes=200000: expected at least one byte for every leaf"),
  ({"eval_bytes": 0}, r"SyntheticTree\.eval_bytes=0: expected at least one byte"),
])
def test_errors_of_a_tree(fields, message):
  with pytest.raises(ValueError, match=message):
    synthetic.tree(config.SyntheticTree(**{"branching": (2, 3)} | fields))


@pytest.mark.exhaustive
def test_a_trained_model_comes_close_to_the_floor_and_stays_above(monkeypatch):
  """On a language of 28 words, so that half a minute of training is enough.

  The floor is that of the very test text. A model's loss on a text that it has not seen is `nats` or more
  below the text's log-likelihood with a probability of exp(-nats) at most (Markov's inequality for the ratio of
  the two probabilities, whose mean under the language is at most 1).
  """
  monkeypatch.setattr(synthetic, "CLASS_SIZES", (2, 2, 4, 4, 8, 8))
  length, batch, steps = 96, 4, 720
  source = config.Synthetic("a/b", train_bytes=length * batch * steps, eval_bytes=40_000)
  own, split = synthetic.language(source), texts(source)
  train_WxL, test_WxL = (_windows(split[name], length) for name in ("train", "test"))
  train_WxL = np.random.default_rng(0).permutation(train_WxL)[: batch * steps]
  num_tokens = int((test_WxL[:, 1:] >= 0).sum())
  floor_nats = -sum(map(own.log_likelihood, split["test"]))
  assert floor_nats / num_tokens == pytest.approx(own.entropy_nats_per_byte_token, rel=0.02)

  arch = model.architecture(config.ModelConfig(2, 64, 4, 4, 128), vocab_size=257)
  optimizer, settings = config.OptimizerConfig(), config.NodeSettings(learning_rate=7e-3, warmup_steps=50)
  params = model.init(arch, jax.random.key(0))
  opt_state = local.optimizer(optimizer).init(params)
  train = jax.jit(lambda params, opt_state, work: local.train_node(arch, optimizer, params, opt_state, work))
  test = jax.jit(lambda params, windows: model.loss_sum(arch, params, windows, windows[:, 0] >= 0))
  stages = 4
  works = zip(np.split(train_WxL.reshape(steps, batch, length + 1), stages),
              np.split(local.learning_rates(settings, steps), stages), strict=True)
  excess = []
  for windows_SxBxW, rates_S in works:
    counts = np.int32(len(rates_S)), np.int32(batch)
    done = train(params, opt_state, local.Workload(windows_SxBxW, rates_S, *counts, *np.float32([0, 1, 1])))
    params, opt_state = done.params, done.opt_state
    loss_nats = sum(float(test(params, part)) for part in np.array_split(test_WxL, 4))
    assert loss_nats > floor_nats - 20
    excess.append(loss_nats / floor_nats - 1)
  assert excess == sorted(excess, reverse=True) and excess[0] > 0.1 and excess[-1] < 0.08, excess


def _windows(documents, length):
  """A separator before each document and after the last; windows as in `model.loss_sum`, the last one padded."""
  tokenizer = ByteTokenizer()
  stream = np.concatenate([[256, *tokenizer.encode(text)] for text in documents] + [[256]])
  count = -(-(len(stream) - 1) // length)
  padded = np.full(count * length + 1, -1, np.int32)
  padded[: len(stream)] = stream
  return padded[np.arange(count)[:, None] * length + np.arange(length + 1)]
