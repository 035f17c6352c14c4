"""Opens the sources of the config, and says which documents of an opened source are whose.

A *base* is a source that documents are read from. `Tagged`, `Share` and `Swapped` are *views*: they choose
among the documents of bases, one document at a time, so that each base is read once for all nodes that
have a share in it. What a view chooses depends on the document and the view alone, not on other nodes.
"""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from worldlm_jax import checks, config, rngs
from worldlm_jax.data import documents, files, hugging_face, stdlib, synthetic, tfds

Base = config.Files | config.StandardLibrary | config.Tfds | config.HuggingFace | config.Synthetic

_OPENERS: dict[type, Callable[[Any, str], documents.Corpus]] = {
  config.Files: files.open_files,
  config.StandardLibrary: stdlib.open_family,
  config.Tfds: tfds.open_tfds,
  config.HuggingFace: hugging_face.open_hugging_face,
  config.Synthetic: synthetic.open_language,
}


def open_base(source: Base, invalid_utf8: str) -> documents.Corpus:
  """Opens a source that is no view. Raises `InputError` where it is missing or unreadable."""
  checks.require(type(source) in _OPENERS, "data", source, " or ".join(kind.__name__ for kind in _OPENERS))
  return _OPENERS[type(source)](source, invalid_utf8)


class Choice(NamedTuple):
  """Some of the documents of a base."""

  base: Base
  accepts: Callable[[documents.Document, int], bool]  # of a document and its digest


def choices(source: config.Source) -> list[Choice]:
  """Which documents of which bases make up a source, in the order in which they are taken."""
  if isinstance(source, config.Tagged):
    return [Choice(source.source, lambda document, digest: document.tag == source.tag)]
  if isinstance(source, config.Share):
    return [
      Choice(c.base, _both(c.accepts, functools.partial(_falls_to, source, label)))
      for label, inner in sorted(source.sources.items()) for c in choices(inner)
    ]
  if isinstance(source, config.Swapped):
    swapped = functools.partial(_is_swapped, source.share, source.seed)
    stays = lambda document, digest: not swapped(document, digest)
    kept = [Choice(c.base, _both(c.accepts, stays)) for c in choices(source.own)]
    return kept + [Choice(c.base, _both(c.accepts, swapped)) for c in choices(source.other)]
  return [Choice(source, lambda document, digest: True)]


def remedy(source: config.Source) -> str:
  """What to do where a source has no document for a split."""
  if isinstance(source, config.Share):
    return "too little of the text falls to this leaf: set larger partition.alphas, another seed, or fewer leaves"
  return ("give it more text: documents of a .txt file are separated by blank lines, and files named train, valid and "
          "test must each hold some")


def name(base: Base) -> str:
  """Tells bases apart: the same for equal ones."""
  return json.dumps(config.to_dict(base), sort_keys=True)


def identity(source: Any, fingerprints: Mapping[str, str]) -> Any:
  """What a source gives, in plain JSON values: the same exactly where the same documents come out.

  `fingerprints` has those of the opened bases, by `name`.
  """
  if isinstance(source, config.Tagged | config.Share | config.Swapped):
    fields = {field.name: getattr(source, field.name) for field in dataclasses.fields(source)}
    return {"view": type(source).__name__} | {key: identity(value, fingerprints) for key, value in fields.items()}
  if isinstance(source, dict):
    return {label: identity(inner, fingerprints) for label, inner in source.items()}
  return fingerprints[name(source)] if isinstance(source, Base) else source


def _both(
  first: Callable[[documents.Document, int], bool], second: Callable[[documents.Document, int], bool]
) -> Callable[[documents.Document, int], bool]:
  return lambda document, digest: first(document, digest) and second(document, digest)


def _falls_to(share: config.Share, label: str, document: documents.Document, digest: int) -> bool:
  """Whether a document goes down the tree to the share's leaf: at each node to the child that its hash points to.

  The proportions of a label among a node's children are those of `Partition`; the hash decides within them,
  so that the deal needs no count of the documents and does not depend on their order.
  """
  for depth, child in enumerate(share.leaf):
    ends = _proportion_ends(share.seed, share.leaf[:depth], label, share.branching[depth], share.alphas[depth])
    where = _uniform(digest, share.seed, "share", *share.leaf[:depth])
    if np.searchsorted(ends, where, side="right") != child:
      return False
  return True


@functools.cache
def _proportion_ends(seed: int, place: tuple[int, ...], label: str, children: int, alpha: float) -> np.ndarray:
  """Where each child's part of [0, 1) ends, but for the last, which takes the rest: float `[children - 1]`."""
  generator = np.random.default_rng(rngs.stable_int(seed, "proportions", *place, label))
  return np.cumsum(generator.dirichlet(np.full(children, alpha)))[:-1]


def _is_swapped(share: float, seed: int, document: documents.Document, digest: int) -> bool:
  return _uniform(digest, seed, "swap") < share


def _uniform(digest: int, *purpose: str | int) -> float:
  """A number in [0, 1) that depends on the document and the purpose alone."""
  return rngs.stable_int(*purpose, digest) / 2**31
