"""Artificial languages with a family tree, whose entropy is known exactly.

A language is a Markov chain over classes of words. The class of a word depends on the class of the word
before it, and on nothing else; which word of its class it is depends on the class alone. After each word the
sentence ends with probability `END`; from the `MIN_SENTENCES`th on, the document ends after each sentence with
probability `STOP`:

  document = sentence " " sentence " " ... sentence        sentence = word " " word " " ... word "."

No word is in two classes or holds a space or a full stop, so a text and its path through the chain determine
each other, and the entropy of the text is that of the path: the mean number of visits of each state times the
entropy of the choices made there (Shannon, A Mathematical Theory of Communication, 1948, section 7).

The lineage "north/coast" is the common proto-language, changed by the step "north" and then by the step
"north/coast". A step is drawn from (seed, lineage up to there) alone, so languages that share the beginning of
their lineage share these changes. Probabilities belong to ranks: a step exchanges what is at which rank, so that
languages differ while their entropies stay close.

Shape suffixes: K classes, R ranks, D documents, S sentences, N words of a block of text.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import string
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np

from worldlm_jax import checks, config, rngs
from worldlm_jax.data.documents import SPLITS, Corpus, Document

_VERSION = 1  # part of the fingerprint: to be raised whenever the same settings give another text

END = 0.15  # of a sentence, after each of its words
STOP = 0.125  # of a document, after each of its sentences from the last of these on:
MIN_SENTENCES = 4  # so that hardly any document occurs twice, say in the train and in the test text
CLASS_SIZES = (8, 8, 12, 12, 16, 16, 24, 32)  # words
_WORD_EXPONENT = 1.0  # Zipf's: the word of rank r has a probability in proportion to 1 / r
_CLASS_EXPONENT = 2.0  # the same for the classes that follow a class
_SENTENCES = MIN_SENTENCES - 1 + 1 / STOP  # of a document, on average

_CONSONANTS = "bdfghjklmnprstvz"
_VOWELS = "aeiou"
_CODAS = ("", "", "", "n", "l", "r", "s")
_SYLLABLES = (1, 1, 2, 2)
_SHIFTED_SOUNDS = 0.5  # times the divergence: share of the pairs of consonants that change places before a vowel
_BLOCK = 256  # documents drawn at once

_Item = TypeVar("_Item")


@dataclasses.dataclass(frozen=True)
class Language:
  """A source of documents. Equal languages give every text the same probability."""

  words: tuple[tuple[str, ...], ...]  # [K][R]: the words of each class, the most frequent first
  followers: tuple[tuple[int, ...], ...]  # [K + 1][K]: the classes that follow each class, the most frequent first;
  # the last row is for the first word of a sentence

  @property
  def entropy_nats_per_document(self) -> float:
    """Entropy of one document, with its end, in nats."""
    choices_K = np.array([_entropy(_zipf(len(words), _WORD_EXPONENT)) for words in self.words])
    next_class = _entropy(self._follower_probs_R)
    after_word = _entropy(np.array([END, 1 - END])) + (1 - END) * next_class
    after_sentence = _entropy(np.array([STOP, 1 - STOP]))
    per_sentence = next_class + self._words_per_sentence_K @ (choices_K + after_word)
    return float(per_sentence * _SENTENCES + after_sentence / STOP)

  @property
  def bytes_per_document(self) -> float:
    """Mean length of a document in UTF-8 bytes, without any separator."""
    lengths = [np.array([len(word.encode()) for word in words]) for words in self.words]
    lengths_K = np.array([_zipf(len(lengths_R), _WORD_EXPONENT) @ lengths_R for lengths_R in lengths])
    per_sentence = self._words_per_sentence_K @ (lengths_K + 1)  # a space or a full stop after each word
    return float((per_sentence + 1) * _SENTENCES - 1)  # a space after each sentence but the last

  @property
  def entropy_nats_per_byte_token(self) -> float:
    """The least mean loss per token with the byte tokenizer, where each document takes one separator more."""
    return self.entropy_nats_per_document / (self.bytes_per_document + 1)

  @property
  def entropy_bits_per_byte(self) -> float:
    """The least bits per byte of text with any tokenizer; the end of a document costs bits but has no bytes."""
    return self.entropy_nats_per_document / math.log(2) / self.bytes_per_document

  def log_likelihood(self, text: str) -> float:
    """Log-probability in nats of the document `text`, with its end; -inf if the language cannot produce it."""
    if not text.endswith("."):
      return -math.inf
    sentences = text[:-1].split(". ")
    if len(sentences) < MIN_SENTENCES:
      return -math.inf
    total = math.log(STOP) + (len(sentences) - MIN_SENTENCES) * math.log1p(-STOP)
    for sentence in sentences:
      words, state = sentence.split(" "), len(self.words)
      total += math.log(END) + (len(words) - 1) * math.log1p(-END)
      for word in words:
        if word not in self._log_probs:
          return -math.inf
        following, log_prob = self._log_probs[word]
        total += math.log(self._transitions[state, following]) + log_prob
        state = following
    return total

  def texts(self, rng: np.random.Generator) -> Iterator[str]:
    """Endlessly many independent documents. Only uniform numbers are drawn from `rng`."""
    while True:
      sentences_D = MIN_SENTENCES - 1 + _geometric(rng, STOP, _BLOCK)
      lengths_S = _geometric(rng, END, sentences_D.sum())
      classes_N = self._draw_classes(rng, lengths_S)
      ranks_N = np.empty_like(classes_N)
      for k, words in enumerate(self.words):
        places = np.flatnonzero(classes_N == k)
        ranks_N[places] = _draw_ranks(rng, _zipf(len(words), _WORD_EXPONENT), len(places))
      last_words_S = lengths_S.cumsum() - 1
      last_words_D = last_words_S[sentences_D.cumsum() - 1]
      endings_N = np.zeros_like(classes_N)
      endings_N[last_words_S] = 1
      endings_N[last_words_D] = 2
      pieces = self._spellings[endings_N, classes_N, ranks_N].tolist()
      for start, last in itertools.pairwise([-1, *last_words_D.tolist()]):
        yield "".join(pieces[start + 1 : last + 1])

  def _draw_classes(self, rng: np.random.Generator, lengths_S: np.ndarray) -> np.ndarray:
    """The classes of the words of sentences of these lengths, one sentence after the other: int64 [N]."""
    followers = np.array(self.followers)
    starts_S = lengths_S.cumsum() - lengths_S
    classes_N = np.empty(lengths_S.sum(), np.int64)
    states_S = np.full(len(lengths_S), len(self.words))
    going = np.arange(len(lengths_S))
    for i in range(lengths_S.max()):
      going = going[lengths_S[going] > i]
      ranks = _draw_ranks(rng, self._follower_probs_R, len(going))
      states_S[going] = followers[states_S[going], ranks]
      classes_N[starts_S[going] + i] = states_S[going]
    return classes_N

  @property
  def _follower_probs_R(self) -> np.ndarray:
    return _zipf(len(self.words), _CLASS_EXPONENT)

  @functools.cached_property
  def _transitions(self) -> np.ndarray:
    """Probability of each class after each class and, in the last row, at a sentence's beginning: [K + 1, K]."""
    transitions = np.empty((len(self.words) + 1, len(self.words)))
    np.put_along_axis(transitions, np.array(self.followers), self._follower_probs_R[None, :], axis=1)
    return transitions

  @functools.cached_property
  def _words_per_sentence_K(self) -> np.ndarray:
    """Mean number of words of each class: v = start + (1 - END) v T, the visits of an absorbing chain."""
    inner, start = self._transitions[:-1], self._transitions[-1]
    return np.linalg.solve(np.eye(len(inner)) - (1 - END) * inner.T, start)

  @functools.cached_property
  def _log_probs(self) -> dict[str, tuple[int, float]]:
    """By word: its class, and the log-probability of the word given the class."""
    return {
      word: (k, math.log(prob))
      for k, words in enumerate(self.words)
      for word, prob in zip(words, _zipf(len(words), _WORD_EXPONENT), strict=True)
    }

  @functools.cached_property
  def _spellings(self) -> np.ndarray:
    """Words with what follows them: within a sentence, at its end, at the document's end: str [3, K, R]."""
    spellings = np.full((3, len(self.words), max(map(len, self.words))), "", object)
    for ending, mark in enumerate((" ", ". ", ".")):
      for k, words in enumerate(self.words):
        spellings[ending, k, : len(words)] = [word + mark for word in words]
    return spellings


def language(source: config.Synthetic) -> Language:
  """The language of a lineage. It depends on `seed`, `lineage` and `divergence` alone.

  Raises:
    ValueError: the divergence is out of range, or a step of the lineage has no name.
  """
  checks.require(0 <= source.divergence <= 1, "Synthetic.divergence", source.divergence, "a number from 0 to 1")
  steps = _steps(source)
  current = _proto_language(source.seed)
  for depth in range(1, len(steps) + 1):
    current = _changed(current, source.divergence, source.seed, "/".join(steps[:depth]))
  return current


def open_language(source: config.Synthetic, invalid_utf8: str = "error") -> Corpus:
  """Documents of the language of `source`: for each split, until it has its bytes.

  More bytes extend a split and leave its beginning and the other splits as they are.

  Args:
    source: which language, and how much of it.
    invalid_utf8: has no effect, since the texts are drawn and not read.

  Raises:
    ValueError: as `language` does, or a number of bytes is not positive.
  """
  for name in ("train_bytes", "eval_bytes"):
    checks.require(getattr(source, name) >= 1, f"Synthetic.{name}", getattr(source, name), "at least 1")
  source = dataclasses.replace(source)  # the caller may go on to change it
  opened, lineage = language(source), "/".join(_steps(source))

  def documents() -> Iterator[Document]:
    for split in SPLITS:
      missing = source.train_bytes if split == "train" else source.eval_bytes
      texts = opened.texts(_rng(source.seed, lineage, split))
      while missing > 0:
        text = next(texts)
        missing -= len(text.encode())
        yield Document(text, split)

  content = json.dumps([_VERSION, dataclasses.asdict(source)], sort_keys=True)
  return Corpus(f"synthetic language {lineage or '.'}", hashlib.sha256(content.encode()).hexdigest()[:16], documents)


def tree(spec: config.SyntheticTree) -> config.Node:
  """The tree of languages of `spec`: the root "synthetic", and below it nodes named by letters.

  Only the leaves have text, in the language whose lineage is their path. The i-th leaf has
  `train_bytes / i ** imbalance` bytes, where the leaves are counted across the families: the first leaf of each
  family comes before the second of any, so that every family has large and small ones.

  Raises:
    ValueError: a field is out of range.
  """
  whole = all(isinstance(count, int) and count >= 1 for count in spec.branching)
  checks.require(bool(spec.branching) and whole, "SyntheticTree.branching", spec.branching,
                 "the number of children at each depth, such as (2, 3)")
  checks.require(0 <= spec.divergence <= 1, "SyntheticTree.divergence", spec.divergence, "a number from 0 to 1")
  checks.require(0 <= spec.imbalance <= 10, "SyntheticTree.imbalance", spec.imbalance, "a number from 0 to 10")
  leaves = sorted(itertools.product(*map(range, spec.branching)), key=lambda leaf: leaf[::-1])
  train_bytes = {leaf: round(spec.train_bytes / i**spec.imbalance) for i, leaf in enumerate(leaves, 1)}
  for name, least in (("train_bytes", min(train_bytes.values())), ("eval_bytes", spec.eval_bytes)):
    checks.require(least >= 1, f"SyntheticTree.{name}", getattr(spec, name), "at least one byte for every leaf")

  def build(name: str, place: tuple[int, ...], lineage: str) -> config.Node:
    if len(place) == len(spec.branching):
      source = config.Synthetic(lineage, spec.divergence, train_bytes[place], spec.eval_bytes, spec.seed)
      return config.Node(name, source)
    names = [_letters(i) for i in range(spec.branching[len(place)])]
    children = [build(n, (*place, i), f"{lineage}/{n}" if lineage else n) for i, n in enumerate(names)]
    return config.Node(name, None, children)

  return build("synthetic", (), "")


def _letters(index: int) -> str:
  """a, b, ..., z, aa, ab, ..."""
  higher, last = divmod(index, len(string.ascii_lowercase))
  return (_letters(higher - 1) if higher else "") + string.ascii_lowercase[last]


def _steps(source: config.Synthetic) -> list[str]:
  if source.lineage in ("", "."):
    return []
  steps = source.lineage.split("/")
  checks.require(all(steps), "Synthetic.lineage", source.lineage, "names separated by single slashes, such as "
                 "'north/coast', or '.' for the proto-language")
  return steps


def _rng(seed: int, lineage: str, purpose: str) -> np.random.Generator:
  # By name, and used for uniform numbers alone: the rest of NumPy's generators may change from version to version.
  return np.random.Generator(np.random.PCG64(rngs.stable_int(seed, "synthetic", lineage, purpose)))


def _proto_language(seed: int) -> Language:
  rng = _rng(seed, "", "words")
  taken: set[str] = set()
  words = tuple(tuple(_coin(rng, taken) for _ in range(size)) for size in CLASS_SIZES)
  order = _rng(seed, "", "followers").random((len(words) + 1, len(words))).argsort(axis=1)
  return Language(words, tuple(map(tuple, order.tolist())))


def _changed(parent: Language, divergence: float, seed: int, lineage: str) -> Language:
  """The language that the last step of `lineage` makes of its parent.

  With a divergence of d, a share d / 2 of the pairs of consonants change places before a vowel, in all words. Then
  a share d ** 2 of the words gives way to new ones and a share d - d ** 2 is spelled differently. Last, a share d of
  the pairs of words of a class, and of the classes that follow a class, change ranks. A larger d
  changes the same places and more.
  """
  shift: dict[str, str] = {}
  sounds = _rng(seed, lineage, "sounds")
  for vowel in _VOWELS:
    shifted = _swap_pairs(_CONSONANTS, _SHIFTED_SOUNDS * divergence, sounds)
    shift |= {old + vowel: new + vowel for old, new in zip(_CONSONANTS, shifted, strict=True)}
  # Consonants change places and vowels stay, so that no two words become the same.
  syllable = re.compile(f"[{_CONSONANTS}][{_VOWELS}]")
  words = [[syllable.sub(lambda found: shift[found[0]], word) for word in ws] for ws in parent.words]
  taken = set(itertools.chain(*words))
  fate, spelling = _rng(seed, lineage, "fates"), _rng(seed, lineage, "spellings")
  for ws in words:
    for i, draw in enumerate(fate.random(len(ws))):
      if draw < divergence**2:
        ws[i] = _coin(spelling, taken)
      elif draw < divergence:
        ws[i] = _respell(spelling, ws[i], taken)
  ranks, followers = _rng(seed, lineage, "ranks"), _rng(seed, lineage, "followers")
  return Language(
    tuple(tuple(_swap_pairs(ws, divergence, ranks)) for ws in words),
    tuple(tuple(_swap_pairs(row, divergence, followers)) for row in parent.followers),
  )


def _swap_pairs(items: Sequence[_Item], share: float, rng: np.random.Generator) -> list[_Item]:
  """`items` in pairs drawn at random, of which a share changes places."""
  swapped = list(items)
  order = rng.random(len(items)).argsort().tolist()
  for i, j, draw in zip(order[::2], order[1::2], rng.random(len(items) // 2), strict=False):
    if draw < share:
      swapped[i], swapped[j] = swapped[j], swapped[i]
  return swapped


def _coin(rng: np.random.Generator, taken: set[str]) -> str:
  """A new word of a few syllables, which becomes one of the `taken`."""
  while True:
    count = _pick(rng, _SYLLABLES)
    word = "".join(_pick(rng, _CONSONANTS) + _pick(rng, _VOWELS) + _pick(rng, _CODAS) for _ in range(count))
    if word not in taken:
      taken.add(word)
      return word


def _respell(rng: np.random.Generator, word: str, taken: set[str]) -> str:
  """`word` with one letter replaced, inserted or dropped, which becomes one of the `taken`."""
  while True:
    kind, place = _pick(rng, ("replace", "replace", "insert", "drop")), int(rng.random() * len(word))
    letter = _pick(rng, _VOWELS if word[place] in _VOWELS else _CONSONANTS)
    if kind == "drop" and len(word) > 2:
      letter = ""
    changed = word[:place] + letter + word[place + (kind != "insert") :]
    if changed not in taken:
      taken.add(changed)
      return changed


def _pick(rng: np.random.Generator, choices: Sequence[_Item]) -> _Item:
  return choices[int(rng.random() * len(choices))]


def _zipf(count: int, exponent: float) -> np.ndarray:
  """The probabilities of ranks 1 to `count`."""
  weights_R = np.arange(1, count + 1) ** -exponent
  return weights_R / weights_R.sum()


def _entropy(probs_R: np.ndarray) -> float:
  """In nats, of positive probabilities."""
  return float(-probs_R @ np.log(probs_R))


def _draw_ranks(rng: np.random.Generator, probs_R: np.ndarray, count: int) -> np.ndarray:
  return np.searchsorted(probs_R.cumsum()[:-1], rng.random(count), side="right")


def _geometric(rng: np.random.Generator, probability: float, count: int) -> np.ndarray:
  """How many trials until the first success: int64 [count], 1 or more."""
  return 1 + np.floor(np.log1p(-rng.random(count)) / math.log1p(-probability)).astype(np.int64)
