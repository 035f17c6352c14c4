"""Tasks of lm-eval in local files, on a model whose answers are worked out by hand as well."""

import functools
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import lm_eval.tasks
import numpy as np
import pytest
import yaml
from lm_eval.tasks import TaskManager

from worldlm_jax import checks, config, continuation, generation, harness, likelihood, model
from worldlm_jax.data import tokenizer as tokenizer_lib

REPOSITORY = Path(__file__).parent.parent
LENGTH, AT_ONCE = 160, 1024
TOKENIZER = tokenizer_lib.ByteTokenizer()
ARCH = model.architecture(
  config.ModelConfig(num_layers=2, d_model=12, num_heads=2, num_kv_heads=1, d_ff=17, key_layer_share=0.5), 257
)


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
  """Task files name their data from the root of the repository; nothing is asked of the network."""
  import datasets

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(REPOSITORY)
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
    patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    # Reading the harness's own tasks, some ten thousand files, takes longer than all of these tests.
    local = functools.cache(lambda folder: TaskManager(include_path=folder, include_defaults=False))
    patch.setattr(harness, "manager", local)
    yield


@pytest.fixture(scope="module")
def params() -> model.Params:
  """Larger than a model begins with, so that tokens differ in likelihood."""
  return jax.tree.map(lambda leaf: 4 * leaf, model.init(ARCH, jax.random.key(5)))


@pytest.fixture(scope="module")
def node(params: model.Params) -> harness.NodeLM:
  return harness.NodeLM(ARCH, params, TOKENIZER, LENGTH, AT_ONCE)


@pytest.fixture(scope="module")
def found(node: harness.NodeLM) -> dict[str, dict[str, Any]]:
  return harness.Tasks(["grain_all", "grain_w*"], "tests/tasks").evaluate(node)


def _questions(name: str = "grain") -> list[dict[str, Any]]:
  return [json.loads(line) for line in (REPOSITORY / "tests" / "tasks" / f"{name}.jsonl").read_text().splitlines()]


def _asked(question: dict[str, Any]) -> str:
  return f"Question: {question['question']}\nAnswer:"


def test_each_task_says_what_was_done(found: dict[str, dict[str, Any]]) -> None:
  assert found.keys() == {"grain_choice", "grain_text", "grain_words"}  # the group has no score of its own
  said = [(found[name]["num_fewshot"], found[name]["documents"], found[name]["version"])
          for name in ("grain_choice", "grain_text", "grain_words")]
  assert said == [(2, 4, 1.0), (0, 4, 1.0), (0, 4, 1.0)]


def test_answers_are_chosen_by_their_likelihood(params: model.Params) -> None:
  scorer = likelihood.Scorer(ARCH, params, LENGTH, AT_ONCE)
  right = []
  for question in _questions():
    sequences = []
    for choice in question["choices"]:
      context = [256, *_asked(question).encode()]
      sequences.append((np.array([*context, *f" {choice}".encode()]), len(context)))
    values = [each.log_probability for each in scorer.score(sequences)]
    right.append(float(np.argmax(values) == question["answer"]))
  tasks = harness.Tasks(["grain_choice"], "tests/tasks", num_fewshot=0)
  accuracy = tasks.evaluate(harness.NodeLM(ARCH, params, TOKENIZER, LENGTH, AT_ONCE))["grain_choice"]["metrics"]["acc"]
  assert accuracy["value"] == np.mean(right)
  assert accuracy["standard_error"] == pytest.approx(np.std(right, ddof=1) / 2)


def test_texts_are_scored_from_the_separator_on(found: dict[str, dict[str, Any]], params: model.Params) -> None:
  texts = [question["question"].encode() for question in _questions()]
  scored = likelihood.Scorer(ARCH, params, LENGTH, AT_ONCE).score([(np.array([256, *text]), 1) for text in texts])
  nats = -sum(each.log_probability for each in scored) / sum(map(len, texts))
  metrics = found["grain_text"]["metrics"]
  assert metrics["bits_per_byte"]["value"] == pytest.approx(nats / math.log(2), abs=1e-5)
  assert metrics["byte_perplexity"]["value"] == pytest.approx(math.exp(nats), rel=1e-5)


class _Request:
  def __init__(self, *args: Any):
    self.args = args


def test_generated_text_is_the_greedy_one_up_to_its_end(node: harness.NodeLM, params: model.Params) -> None:
  """Prompts of different lengths in one batch, each as if it were alone; a long one is cut at its beginning."""
  contexts = ["Which grain is it?", "x" * 300, "rye"]
  prompts = [generation.prompt_ids(TOKENIZER, context)[-(LENGTH - 20) :] for context in contexts]
  added = continuation.continue_all(
    ARCH, params, prompts, 257, max_tokens=20, ended=lambda ids: ids[-1] == 256, sampling=generation.Sampling(0.0),
    tokens_at_once=AT_ONCE,
  )
  assert all(len(ids) == 20 or ids[-1] == 256 for ids in added) and any(len(ids) == 20 for ids in added)
  sequences = [(np.array([*prompt, *ids]), len(prompt)) for prompt, ids in zip(prompts, added, strict=True)]
  assert all(each.greedy for each in likelihood.Scorer(ARCH, params, LENGTH, AT_ONCE).score(sequences))
  free = node.generate_until([_Request(context, {"max_gen_toks": 20}) for context in contexts])
  assert free == [TOKENIZER.decode(list(generation.until(ids, 256))) for ids in added]
  stop = max(free, key=len)[2]
  stopped = node.generate_until([_Request(text, {"max_gen_toks": 20, "until": [stop]}) for text in contexts])
  assert stopped == [text.partition(stop)[0] for text in free]


def test_samples_are_drawn_as_asked(node: harness.NodeLM) -> None:
  asked = {"max_gen_toks": 20, "do_sample": True, "temperature": 2.0}
  one, same = (node.generate_until([_Request("a", asked)] * 2) for _ in range(2))
  assert one == same and one[0] != one[1]
  certain = node.generate_until([_Request("a", asked | {"top_k": 1}), _Request("a", {"max_gen_toks": 20})])
  assert certain[0] == certain[1]


def test_what_a_task_asks_of_generation_is_kept_within_what_a_model_sees() -> None:
  assert harness._Wanted.of({}, 1024) == ((), 256, generation.Sampling(0.0, 0, 1.0))
  assert harness._Wanted.of({"until": "x", "max_gen_toks": 500}, 64) == (("x",), 32, generation.Sampling(0.0, 0, 1.0))
  sampled = {"until": ["", "y"], "do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "max_new_tokens": 7}
  assert harness._Wanted.of(sampled, 64) == (("y",), 7, generation.Sampling(0.5, 3, 0.9))


def test_a_separator_ends_a_continuation(params: model.Params) -> None:
  """`ended` sees each token once it is drawn, and what is drawn after the end is dropped."""
  for stop_after in (1, 3, 16, 17):
    added = continuation.continue_all(
      ARCH, params, [[256, 65], [256]], 257, max_tokens=40, ended=lambda ids, n=stop_after: len(ids) >= n,
      sampling=generation.Sampling(0.0), tokens_at_once=AT_ONCE,
    )
    assert [len(ids) for ids in added] == [stop_after, stop_after]


def test_the_gauntlet_is_made_of_tasks_that_the_harness_has() -> None:
  """Its data are on the hub; that their names are right is what can be seen from here."""
  gauntlet = yaml.safe_load((REPOSITORY / "configs" / "tasks" / "gauntlet.yaml").read_text())
  tasks = [task for group in gauntlet["task"] for task in group["task"]]
  assert len({task["task"] for task in tasks}) == len(tasks) == 28
  guide = (REPOSITORY / "docs" / "evaluate.md").read_text()
  files = Path(lm_eval.tasks.__file__).parent.rglob("*.yaml")
  named = re.compile(r"^(?:task|group): *([\w-]+) *$", re.MULTILINE)
  known = {name for file in files for name in named.findall(file.read_text())}
  for task in tasks:
    assert task["task"] in known and f"`{task['task']}`" in guide, task


def test_unknown_tasks_and_missing_data_are_bad_input() -> None:
  with pytest.raises(checks.InputError, match=r"--tasks='grain_chose': .*did you mean 'grain_choice'\?"):
    harness.Tasks(["grain_chose"], "tests/tasks")
  with pytest.raises(checks.InputError, match=r"--tasks='grain_lost': expected a task whose data can be had"):
    harness.Tasks(["grain_lost"], "tests/tasks")
