"""The words in which nodes say whom what they have learnt may reach, and whose they take in.

  anyone         everybody
  federation     the federation that the node is a member of, and everybody in it
  nobody         nobody outside the node's own subtree
  law,code/data  the named nodes, each with all below it

Paths are those of the configured tree: they mean the same nodes however an algorithm arranges the tree.
"""

from collections.abc import Collection

from worldlm_jax import checks
from worldlm_jax.config import NodeSettings
from worldlm_jax.tree_sources import ROOT

ANYONE, FEDERATION, NOBODY = "anyone", "federation", "nobody"
FIELDS = ("share_backbone", "share_key_layers", "share_residuals", "accept_from", "members")


def configured(path: str) -> str:
  """The path that the config knows a node by: where text stands beside its federation's members, "law" for "law/"."""
  return path if path == ROOT else path.rstrip("/")


def named(words: str, federation: str) -> tuple[str, ...]:
  """The paths whose subtrees the words mean; `federation` is the one that the node who says them is a member of."""
  meanings: dict[str, tuple[str, ...]] = {ANYONE: (ROOT,), FEDERATION: (federation,), NOBODY: ()}
  return meanings.get(words.strip(), tuple(_split(words)))


def contains(paths: tuple[str, ...], path: str) -> bool:
  """Whether a node, by its own path, is one of the named or lies below one of them."""
  own = configured(path)
  return any(name in (ROOT, own) or own.startswith(f"{name}/") for name in paths)


def validate(settings: NodeSettings, where: str, paths: Collection[str]) -> None:
  """Checks the words of one node. `paths` are those of the configured tree. Raises `InputError`."""
  for field in FIELDS:
    words = getattr(settings, field)
    if words.strip() in (ANYONE, NOBODY) or (words.strip() == FEDERATION and field != "members"):
      continue
    for path in _split(words):
      if path not in paths:
        alone = path in (ANYONE, FEDERATION, NOBODY)
        close = checks.did_you_mean(path, [*paths, ANYONE, FEDERATION, NOBODY])
        checks.fail(f"{where}: {field}", words,
                    f"{ANYONE}, {NOBODY}{f', {FEDERATION}' if field != 'members' else ''} or paths of nodes of the "
                    "tree, separated by commas",
                    f"{path!r} stands alone or not at all" if alone else close or f"there is no node {path!r}")


def _split(words: str) -> list[str]:
  return [word.strip() for word in words.split(",")]
