"""Every node's model on every node's test text: who speaks whose language."""

from typing import Any

import numpy as np

from worldlm_jax import distributed, engine as engine_lib, state as state_lib
from worldlm_jax.data.evaluation import Evaluation
from worldlm_jax.data.windows import Given
from worldlm_jax.scoring import Score
from worldlm_jax.texts import Texts


def score(engine: engine_lib.Engine, state: state_lib.State, texts: Texts, windows: int) -> dict[str, Any]:
  """The node x corpus matrix of a state. Collective: each process gets the windows, of texts that others have.

  Args:
    engine: scores with the programs that it has compiled already, where a level's nodes have been scored before.
    state: whose parameters are the models.
    texts: of all nodes.
    windows: how many of each test text are scored, spread over it; at least 1.

  Returns:
    "models" (the paths of all nodes) and "corpora" (of those with text), parents before their children, and
    "perplexity", per token: a row for each model with a column for each corpus.
  """
  federation = engine.federation
  paths = [member.path for member in federation.subtree(federation.levels[0][0].path)]
  corpora = [path for path in paths if path in texts.held and not federation.by_path[path].moved_from]
  width = engine.config.data.sequence_length + 1
  given = distributed.gather_arrays({
    path: Evaluation([text.test], windows, width).arrays()[0][0] for path, text in texts.here.items()
  })
  rows: dict[str, list[float]] = {path: [] for path in paths}
  for level, members in enumerate(federation.levels):
    everybody = np.ones(len(members), bool)
    for corpus in corpora:
      evaluation = Evaluation([Given(given[corpus])] * len(members), 0, width)
      found = [(places, distributed.snapshot(losses, engine.mesh))
               for places, losses in engine.score(state, level, evaluation, everybody)]
      sums = engine_lib.scores_by_row(found, len(members))
      for i, member in enumerate(members):
        rows[member.path].append(Score(float(sums[i]), evaluation.num_targets(i)).perplexity)
  return {"models": paths, "corpora": corpora, "perplexity": [rows[path] for path in paths]}
