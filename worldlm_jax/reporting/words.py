"""Numbers and names as people read them. None and NaN are a dash: what is not known, or did not converge."""

import html
import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "\u2013"


def known(value: Any) -> bool:
  """Whether it is a finite number."""
  return isinstance(value, (int, float)) and math.isfinite(value)


def numbers(values: Sequence[Any]) -> list[float]:
  """As floats, with NaN for what is not known."""
  return [float(value) if known(value) else math.nan for value in values]


def perplexity(value: Any) -> str:
  """To about three digits."""
  if not known(value):
    return UNKNOWN
  if abs(value) >= 1e6:
    return f"{value:.1e}"
  return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.{2 if abs(value) < 100 else 1}f}"


def bits(value: Any) -> str:
  """Bits per byte."""
  return f"{value:.3f}" if known(value) else UNKNOWN


def percent(value: Any, digits: int = 1) -> str:
  """With its sign: +4.2 %."""
  return f"{value:+.{digits}f} %".replace("-", "\u2212") if known(value) else UNKNOWN


def count(value: Any) -> str:
  """Tokens and the like: 1.23 M."""
  if not known(value):
    return UNKNOWN
  for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)):
    if abs(value) >= size:
      return f"{value / size:.3g} {unit}"
  return f"{value:.3g}"


def size(value: Any) -> str:
  """Bytes: 103 MB."""
  if not known(value):
    return UNKNOWN
  for unit, one in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
    if abs(value) >= one:
      return f"{value / one:.3g} {unit}" if value / one < 1000 else f"{value / one:.0f} {unit}"
  return f"{value:.0f} B"


def duration(seconds: Any) -> str:
  """Of seconds: 73 s, 12 min, 3.4 h."""
  if not known(seconds):
    return UNKNOWN
  if seconds < 120:
    return f"{seconds:.{1 if seconds < 10 else 0}f} s"
  return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"


def with_error(stat: Mapping[str, Any] | None, form: Any = perplexity) -> str:
  """A mean and its standard error, where there are several seeds: `8.98 ± 0.02`."""
  if stat is None or not known(stat["mean"]):
    return UNKNOWN
  error = stat["standard_error"]
  return form(stat["mean"]) + (f" ± {form(error).lstrip('+')}" if known(error) else "")


def percent_with_error(stat: Mapping[str, Any] | None) -> str:
  """`+4.2 ± 0.8 %`."""
  mean, _, error = with_error(stat, percent).partition(" ± ")
  return f"{mean.removesuffix(' %')} ± {error}" if error else mean


def clean(name: str) -> str:
  """A name without what no page or chart can show: control characters, halves of surrogate pairs."""
  bad = {"Cc", "Cs", "Co", "Cn"}
  return "".join("\ufffd" if unicodedata.category(letter) in bad else letter for letter in str(name))


def shorten(name: str, length: int) -> str:
  """At most `length` characters, the middle left out: both ends tell nodes apart."""
  name = clean(name)
  if len(name) <= length:
    return name
  front = (length - 1) // 2
  return f"{name[:front]}…{name[len(name) - (length - 1 - front):]}"


def counted(number: int, what: str) -> str:
  """`1 node`, `2 nodes`."""
  return f"{number} {what}{'' if number == 1 else 's'}"


def sentence_list(names: Sequence[str]) -> str:
  """`a, b and c`."""
  return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def gain_in_words(stat: Mapping[str, Any] | None, exceeds_noise: bool | None) -> str:
  """What a node gets out of joining, as a board would say it."""
  if stat is None or not known(stat["mean"]):
    return "not known"
  mean = stat["mean"]
  if mean == 0:
    return "makes no difference"
  what = "joining helps" if mean > 0 else "joining hurts"
  if exceeds_noise is None:
    return f"{what}, by this one seed"
  return f"{what}, {'beyond' if exceeds_noise else 'but within'} the noise"


def attribute(text: str) -> str:
  """For the value of an attribute, or anywhere else in a page."""
  return html.escape(clean(text), quote=True)
