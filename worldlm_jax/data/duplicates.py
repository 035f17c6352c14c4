"""Documents that nodes are scored on and that lie elsewhere too, found by their digests."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from worldlm_jax.data import cache


class Duplicates(NamedTuple):
  """So many documents of one split are also in another, of the same node or of a different one."""

  node: str
  split: str  # valid or test
  also_in_node: str
  also_in_split: str
  documents: int


def find(
  texts: Mapping[str, cache.Text], scored: Mapping[tuple[str, str], np.ndarray] | None = None
) -> list[Duplicates]:
  """All exact duplicates of valid and test documents, by the nodes' paths; each pair of splits once.

  Args:
    texts: where to look for them.
    scored: the documents to look for, as sorted digests by path and split; those of `texts` if None.
  """
  if scored is None:
    scored = {(path, split): texts[path].splits[split].hashes for path in texts for split in ("valid", "test")}
  places = list(scored)
  if not places:
    return []
  every = np.concatenate([scored[place] for place in places])
  owner = np.repeat(np.arange(len(places)), [len(scored[place]) for place in places])
  found = []
  for path, text in texts.items():
    for name, split in text.splits.items():
      where = np.minimum(np.searchsorted(split.hashes, every), len(split.hashes) - 1)
      counts = np.bincount(owner[split.hashes[where] == every], minlength=len(places))
      # Two scored splits find each other; the first of them reports it, and none finds itself.
      last = places.index((path, name)) if name != "train" else len(places)
      found += [Duplicates(*places[i], path, name, int(counts[i])) for i in np.flatnonzero(counts[:last])]
  return found


def warnings(found: list[Duplicates], most: int = 3) -> list[str]:
  """In words, what was trained on and is tested on as well: the worst `most`, and how many more there are."""
  leaks = sorted((d for d in found if d.also_in_split == "train"), key=lambda d: -d.documents)
  lines = [
    f"warning: {d.documents} {d.split} document(s) of {d.node} are also in the training text of "
    f"{'the same node' if d.node == d.also_in_node else d.also_in_node}" for d in leaks[:most]
  ]
  more = [f"warning: {len(leaks) - most} more such pairs; see duplicates in summary.json"] if len(leaks) > most else []
  return lines + more
