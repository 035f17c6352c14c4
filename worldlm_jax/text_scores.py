"""How well one model predicts given files of text: perplexity and bits per byte, on windows as in training."""

import functools
import math
from typing import NamedTuple

import numpy as np

from worldlm_jax import checks, config as config_lib, likelihood, scoring
from worldlm_jax.data import files, tokenizer as tokenizer_lib, windows as windows_lib, writing

DOCUMENTS_AT_ONCE = 1000  # that are encoded
WINDOWS_AT_ONCE = 4096  # that are scored
TRIED = 16  # documents, whether the tokenizer gives them back


class TokenisedText(NamedTuple):
  """A file of documents as windows."""

  windows: windows_lib.Windows
  bytes_per_token: float  # as `batches.NodeText.bytes_per_token` has it: nan where the tokenizer loses some of the text


def read(path: str, tokenizer: tokenizer_lib.Tokenizer, data: config_lib.DataConfig) -> TokenisedText:
  """The documents of a file, or of a folder's files, whatever split they are for.

  Args:
    path: text, JSONL, Parquet or ArrayRecord, as `data/files.py` reads them.
    tokenizer: the model's.
    data: says how documents become windows.

  Raises:
    checks.InputError: nothing readable is there, or less than a window.
  """
  try:
    corpus = files.open_files(config_lib.Files(path), data.invalid_utf8)
  except checks.InputError as error:
    raise checks.InputError(f"--texts: {error}") from error
  tokens: list[np.ndarray] = []
  starts: list[np.ndarray] = []
  waiting: list[str] = []
  size, num_tokens, lossless = 0, 0, True

  def pack() -> None:
    nonlocal num_tokens
    packed, places = tokenizer.pack(waiting)
    tokens.append(packed)
    starts.append(num_tokens + places)
    num_tokens += len(packed)
    waiting.clear()

  for i, document in enumerate(corpus.documents()):
    if i < TRIED:
      lossless &= writing.gives_back(tokenizer, document.text[:10_000])
    size += len(document.text.encode())
    waiting.append(document.text)
    if len(waiting) == DOCUMENTS_AT_ONCE:
      pack()
  if waiting:
    pack()
  starts_D = np.concatenate([np.zeros(0, np.int64), *starts]) if data.packing == "documents" else None
  checks.require(num_tokens > (1 if starts_D is not None else data.sequence_length), "--texts", path,
                 f"text of more than {data.sequence_length} tokens, as many as a window predicts, not {num_tokens}",
                 "give it more text")
  return TokenisedText(windows_lib.Windows(np.concatenate(tokens), data.sequence_length, starts_D),
                       size / num_tokens if lossless else math.nan)


def score(scorer: likelihood.Scorer, text: TokenisedText, limit: int = 0) -> dict[str, float | int | None]:
  """The scores of a text, on `limit` of its windows, spread over it; 0 means all.

  Returns:
    `loss_nats` per token, its `standard_error_nats` over windows (None of one alone), `perplexity`, `bits_per_byte`,
    and how many `windows` and `tokens` were predicted.
  """
  chosen = windows_lib.evenly_spaced(text.windows, limit)
  targets = np.array([text.windows.num_targets(int(i)) for i in chosen])
  losses = np.concatenate([
    [-found.log_probability for found in scorer.score([(text.windows[int(i)], 1) for i in part])]
    for part in np.split(chosen, range(WINDOWS_AT_ONCE, len(chosen), WINDOWS_AT_ONCE))
  ])
  merged = functools.reduce(scoring.Score.merge, map(scoring.Score, losses.tolist(), targets.tolist()))
  return {
    "loss_nats": merged.loss_nats, "standard_error_nats": _standard_error(losses, targets),
    "perplexity": merged.perplexity, "bits_per_byte": merged.bits_per_byte(text.bytes_per_token),
    "windows": len(chosen), "tokens": merged.tokens,
  }


def _standard_error(losses: np.ndarray, targets: np.ndarray) -> float | None:
  """Of the mean loss per token as a ratio of sums over windows, which need not be of one length."""
  count = len(losses)
  if count < 2:
    return None
  residuals = losses - losses.sum() / targets.sum() * targets
  return float(math.sqrt(np.sum(residuals**2) * count / (count - 1)) / targets.sum())
