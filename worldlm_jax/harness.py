"""A node's model in the harness of the field, EleutherAI's `lm-eval`: the tasks, their prompts and metrics are its own.

Needs the extra `eval`. The harness itself needs PyTorch no more since its version 0.4.10.

A prompt begins where a document does: behind the separator, as every document does in training. A model sees at most
as many tokens as the windows had that it was trained on; of what is longer, see `likelihood.Scorer.score`.
"""

import functools
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager

from worldlm_jax import checks, continuation, generation, likelihood, model
from worldlm_jax.data import tokenizer as tokenizer_lib

USUAL_TOKENS = 256  # that a continuation has at most, where its task does not say
MOST_TOKENS = ("max_gen_toks", "max_new_tokens", "max_tokens")  # what tasks call it


class NodeLM(LM):
  """What `lm-eval` asks of a model.

  Args:
    arch: the architecture.
    params: of one node.
    tokenizer: the model's.
    length: how many tokens it sees at most: as many as the windows predict that it was trained on.
    tokens_at_once: roughly, how many tokens a device predicts at a time.
    say: as for `likelihood.Scorer`.
  """

  def __init__(
    self, arch: model.Architecture, params: model.Params, tokenizer: tokenizer_lib.Tokenizer, length: int,
    tokens_at_once: int, say: Callable[[int, int], None] = lambda done, of: None,
  ):
    super().__init__()
    self._scorer = likelihood.Scorer(arch, params, length, tokens_at_once, say)
    self._arch, self._params, self._tokenizer = arch, params, tokenizer
    self._length, self._tokens_at_once, self._say = length, tokens_at_once, say

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

  def generate_until(self, requests: list[Instance]) -> list[str]:
    """What the model adds to each context, before the first of its stop strings or the end of the document."""
    groups: dict[str, list[int]] = {}  # those that are drawn alike, by how
    for i, request in enumerate(requests):
      groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
    params = jax.device_put(self._params, jax.local_devices()[0])
    found, done = [""] * len(requests), 0
    for alike in groups.values():
      wanted = _Wanted.of(requests[alike[0]].args[1], self._length)
      prompts = [self._prompt(requests[i].args[0], self._length - wanted.max_tokens) for i in alike]

      def ended(ids: Sequence[int], stops: Any = wanted.stops) -> bool:
        return self._cut(ids, stops)[1]

      added = continuation.continue_all(
        self._arch, params, prompts, self._tokenizer.vocab_size, max_tokens=wanted.max_tokens,
        ended=ended, sampling=wanted.sampling, tokens_at_once=self._tokens_at_once,
      )
      for i, ids in zip(alike, added, strict=True):
        found[i] = self._cut(ids, wanted.stops)[0]
      done += len(alike)
      self._say(done, len(requests))
    return [self._told("generate_until", request, text) for request, text in zip(requests, found, strict=True)]

  def _prompt(self, context: str, most: int) -> list[int]:
    """A context as the beginning of a document; what does not fit is left out at its beginning."""
    return generation.prompt_ids(self._tokenizer, context)[-most:]

  def _cut(self, ids: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
    """The text of added tokens up to its end, and whether they have reached it."""
    text = self._tokenizer.decode(list(generation.until(ids, self._tokenizer.separator_id)))
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text, bool(places) or self._tokenizer.separator_id in ids

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


class _Wanted(NamedTuple):
  """How a task wants continuations to be drawn."""

  stops: tuple[str, ...]
  max_tokens: int
  sampling: generation.Sampling

  @classmethod
  def of(cls, given: Mapping[str, Any], length: int) -> "_Wanted":
    """From the harness's `gen_kwargs`. At most half of what the model sees is left to what it adds."""
    until = given.get("until") or ()
    stops = (until,) if isinstance(until, str) else tuple(until)
    most = next((given[name] for name in MOST_TOKENS if given.get(name)), USUAL_TOKENS)
    # As in the transformers library, a temperature is for those who ask to sample.
    temperature = float(given.get("temperature") or 1.0) if given.get("do_sample") else 0.0
    sampling = generation.Sampling(temperature, int(given.get("top_k") or 0), float(given.get("top_p") or 1.0))
    return cls(tuple(stop for stop in stops if stop), max(1, min(int(most), length // 2)), sampling)


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
    self._manager = manager(folder)
    self._num_fewshot, self._limit = num_fewshot, limit
    self.names = list(dict.fromkeys(match for name in names for match in self._matching(name)))
    for name in self.names:
      try:
        self._manager.load([name])
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
        "metrics": metrics,
      } for name, values in found["results"].items() if (metrics := _metrics(values))  # some groups have none
    }

  def _matching(self, name: str) -> list[str]:
    found = self._manager.match_tasks([name])
    if not found:
      hint = checks.did_you_mean(name, self._manager.all_tasks)
      checks.fail("--tasks", name, "a task of lm-eval or of --task_folder", hint or "lm-eval ls tasks lists them")
    return found


@functools.cache  # it reads thousands of files
def manager(folder: str) -> TaskManager:
  """All tasks by name: the harness's, and those of the YAML files in `folder`; "" for none."""
  return TaskManager(include_path=folder or None)


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
      found[label] = {"value": float(value), "standard_error": float(error) if isinstance(error, float) else None}
  return found
