"""A node's model in the harness of the field, EleutherAI's `lm-eval`: the tasks, their prompts and metrics are its own.

Needs the extra `eval`. The harness itself needs PyTorch no more since its version 0.4.10.

A prompt begins where a document does: behind the separator, as every document does in training. A model sees at most
as many tokens as the windows had that it was trained on; of what is longer, see `likelihood.Scorer.score`.
"""

import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from worldlm_jax import checks, likelihood
from worldlm_jax.data import tokenizer as tokenizer_lib


class NodeLM(LM):
  """What `lm-eval` asks of a model."""

  def __init__(self, scorer: likelihood.Scorer, tokenizer: tokenizer_lib.Tokenizer):
    super().__init__()
    self._scorer, self._tokenizer = scorer, tokenizer

  @property
  def tokenizer_name(self) -> str:
    """What tells the cached requests of tokenizers apart."""
    return self._tokenizer.name

  def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
    """The log-probability in nats of each continuation after its context, and whether it is the greedy one."""
    found = self._scorer.score([self._sequence(*request.args) for request in requests])
    return [self._told("loglikelihood", request, tuple(each)) for request, each in zip(requests, found, strict=True)]

  def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
    """The log-probability in nats of each whole text."""
    found = self._scorer.score([self._sequence("", request.args[0]) for request in requests])
    return [
      self._told("loglikelihood_rolling", request, each.log_probability)
      for request, each in zip(requests, found, strict=True)
    ]

  def _sequence(self, context: str, continuation: str) -> tuple[np.ndarray, int]:
    """Tokens from the separator on, and the place of the continuation's first.

    White space at the end of the context belongs to the continuation, as in the harness's own models: tokenizers join
    it with the word that follows.
    """
    whole = self._tokenizer.encode(context + continuation)
    first = min(len(self._tokenizer.encode(context.rstrip())), len(whole))
    return np.concatenate([[self._tokenizer.separator_id], whole]), 1 + first

  def _told(self, kind: str, request: Instance, result: Any) -> Any:
    self.cache_hook.add_partial(kind, request.args, result)
    return result


class Tasks:
  """Tasks of the harness, found and loaded.

  Args:
    names: of tasks, groups or tags; `*` stands for anything.
    folder: with more tasks in YAML files, which may take the names of others; "" for none.
    num_fewshot: examples before each question, where a task does not insist on none; None for each task's own number.
    limit: documents of each task; 0 for all.

  Raises:
    checks.InputError: there is no such task, or its data cannot be had.
  """

  def __init__(self, names: Sequence[str], folder: str = "", num_fewshot: int | None = None, limit: int = 0):
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    # It would fork to estimate standard errors, which a process with the threads of JAX must not.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    self._manager = TaskManager(include_path=folder or None)
    self._num_fewshot, self._limit = num_fewshot, limit
    self.names = list(dict.fromkeys(match for name in names for match in self._matching(name)))
    for name in self.names:
      try:
        self._manager.load_task_or_group(name)
      except Exception as error:  # each kind of data set raises its own
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        checks.fail("--tasks", name, f"a task whose data can be had ({reason})",
                    "tasks load theirs from the Hugging Face hub, or from where their YAML file says")

  def evaluate(self, model: NodeLM) -> dict[str, dict[str, Any]]:
    """By task or group: its version, examples, documents, and metrics with their standard errors (None: has none)."""
    found = evaluator.simple_evaluate(
      model, tasks=self.names, num_fewshot=self._num_fewshot, limit=self._limit or None, task_manager=self._manager,
      log_samples=False,
    )
    assert found is not None
    return {
      name: {
        "version": found["versions"].get(name),
        "num_fewshot": found["n-shot"].get(name),
        "documents": found["n-samples"].get(name, {}).get("effective"),
        "metrics": _metrics(values),
      } for name, values in found["results"].items()
    }

  def _matching(self, name: str) -> list[str]:
    found = self._manager.match_tasks([name])
    if not found:
      hint = checks.did_you_mean(name, self._manager.all_tasks)
      checks.fail("--tasks", name, "a task of lm-eval or of --task_folder", hint or "lm-eval ls tasks lists them")
    return found


def version() -> str:
  """Of the harness."""
  return importlib.metadata.version("lm_eval")


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
  """From keys such as "acc,none" and "acc_stderr,none"; a filter other than "none" goes into the name."""
  found = {}
  for key, value in values.items():
    name, comma, used = key.partition(",")
    if comma and not name.endswith("_stderr"):
      error = values.get(f"{name}_stderr,{used}")
      label = name if used == "none" else f"{name} ({used})"
      found[label] = {"value": value, "standard_error": error if isinstance(error, float) else None}
  return found
