"""Text out of a model: what is drawn, from which tokens, and when it is shown."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from worldlm_jax import checks, config as config_lib, generation, model
from worldlm_jax.data.tokenizer import ByteTokenizer

V, SEPARATOR = 23, 5


@pytest.fixture(scope="module")
def small() -> tuple[model.Architecture, model.Params]:
  config = config_lib.ModelConfig(num_layers=2, d_model=24, num_heads=3, num_kv_heads=1, d_ff=29, key_layer_share=0.5)
  arch = dataclasses.replace(model.architecture(config, V), document_separator=SEPARATOR)
  return arch, jax.tree.map(lambda leaf: 3 * leaf, model.init(arch, jax.random.key(1)))


def test_greedy_is_the_likeliest_token_of_the_whole_text_so_far(small: tuple[model.Architecture, model.Params]) -> None:
  """Also beyond the prompt's padded length, and with the last ids forbidden."""
  arch, params = small
  prompt, num_ids = [5, 1, 2, 3, 4], V - 4
  greedy = generation.Sampling(temperature=0)
  found = [*generation.tokens(arch, params, prompt, num_ids, sampling=greedy, max_tokens=15)]
  whole = jnp.array([[*prompt, *found, 0]])
  logits = np.asarray(model.apply(arch, params, whole))[0, len(prompt) - 1 : -2]
  assert found == [int(np.argmax(row[:num_ids])) for row in logits]
  assert any(np.argmax(row) >= num_ids for row in logits), "forbidden ids have to be wanted"
  also = generation.Sampling(temperature=1.0, top_k=1), generation.Sampling(temperature=1.0, top_p=1e-6)
  for sampling in also:  # the same programs
    assert [*generation.tokens(arch, params, prompt, num_ids, sampling=sampling, max_tokens=15)] == found


def test_draws_depend_on_the_seed_and_nothing_else(small: tuple[model.Architecture, model.Params]) -> None:
  arch, params = small
  hot = generation.Sampling(temperature=3.0)

  def drawn(seed: int) -> list[int]:
    return [*generation.tokens(arch, params, [5, 1, 2], V, sampling=hot, max_tokens=15, seed=seed)]

  assert drawn(0) == drawn(0) != drawn(1) and len(drawn(0)) == 15


def test_frequencies_are_those_of_the_truncated_distribution() -> None:
  logits = np.array([1.0, 3.0, 0.5, 2.5, -1.0, 2.0], np.float32)
  keys = jax.random.split(jax.random.key(0), 20_000)
  draw = jax.jit(lambda sampling: jax.vmap(lambda key: generation.draw(jnp.asarray(logits), sampling, key))(keys))
  for temperature, top_k, top_p in ((1.0, 0, 1.0), (0.7, 3, 1.0), (1.0, 0, 0.75), (2.0, 4, 0.6), (1e-6, 0, 1.0)):
    order = np.argsort(-logits)
    weights = np.exp((logits[order] - logits.max()) / temperature)
    weights[top_k or len(logits) :] = 0
    weights /= weights.sum()
    weights[np.cumsum(weights) - weights >= top_p] = 0
    expected = np.zeros(len(logits))
    expected[order] = weights / weights.sum()
    sampling = generation.Sampling(*map(jnp.asarray, (temperature, top_k, top_p)))
    found = np.bincount(np.asarray(draw(sampling)), minlength=len(logits)) / len(keys)
    np.testing.assert_allclose(found, expected, atol=0.015, err_msg=str((temperature, top_k, top_p)))
    assert not found[expected == 0].any()


def test_characters_are_shown_whole_and_nothing_is_lost() -> None:
  tokenizer = ByteTokenizer()
  content = "\u00e9 \u65e5\u672c \U0001f389!".encode() + b"\xf0\x9f \xff\xff ok \xe2\x82"
  prompt = generation.prompt_ids(tokenizer, "So: ")
  assert prompt == [256, *b"So: "]
  pieces = [*generation.text(tokenizer, prompt, content)]
  assert "".join(pieces) == content.decode(errors="replace")
  assert pieces[:6] == ["\u00e9", " ", "\u65e5", "\u672c", " ", "\U0001f389"]
  assert [*generation.text(tokenizer, prompt, [])] == []
  assert [*generation.until([1, 2, 256, 3], 256)] == [1, 2]


@pytest.mark.parametrize(("field", "value"), [("temperature", -1.0), ("top_k", -1), ("top_p", 0.0), ("top_p", 1.5)])
def test_numbers_that_make_no_sense(field: str, value: float) -> None:
  with pytest.raises(checks.InputError, match=f"--{field}="):
    generation.check(generation.Sampling()._replace(**{field: value}), 3)
  with pytest.raises(checks.InputError, match="--max_tokens=0"):
    generation.check(generation.Sampling(), 0)
