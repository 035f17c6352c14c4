"""Grids of numbers with colours: every model on every text, and whom nodes attended to over the rounds."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from worldlm_jax.reporting import figures, palette, words

MOST_NUMBERS = 1200  # cells with a number in them: more are too small to be read, and slow
MOST_SOURCES = 10  # rows of an attention map; what is left is one more row
ROWS_PER_FIGURE = 60
ROUNDS_WITH_NUMBERS = 8


@dataclasses.dataclass(frozen=True)
class AttentionMap:
  """The weights that one node gave in one direction."""

  title: str
  sources: list[str]
  weights: np.ndarray  # [sources, rounds]; NaN where the node did not attend

  def most(self, count: int) -> "AttentionMap":
    """The first `count` sources, the rest added up."""
    if len(self.sources) <= count + 1:  # a row for the rest would save nothing
      return self
    rest = self.weights[count:]
    summed = np.where(np.isnan(rest).all(0), np.nan, np.nansum(rest, axis=0))
    return AttentionMap(self.title, [*self.sources[:count], f"{len(rest)} others"],
                        np.vstack([self.weights[:count], summed]))


def matrix(name: str, alt: str, models: Sequence[tuple[str, str]], corpora: Sequence[tuple[str, str]],
           perplexity: Sequence[Sequence[float | None]]) -> figures.Chart:
  """Rows are models, columns are texts, both as (path, title); the colour is by how much a text's best is missed."""
  values = np.array([words.numbers(row) for row in perplexity], float).reshape(len(models), len(corpora))
  positive = np.where(values > 0, values, np.nan)
  best = np.array([np.nanmin(c) if np.isfinite(c).any() else math.nan for c in positive.T])
  excess = np.log(positive / best)
  top = max(float(np.nanmax(excess)) if np.isfinite(excess).any() else 0.0, 1e-3)
  numbered = values.size <= MOST_NUMBERS
  points, tall = (8.0, 0.27) if numbered else (7.0, 0.15)
  left = 0.05 + figures.gutter([title for _, title in models], points, 1.8)
  head = 0.05 + figures.gutter([title for _, title in corpora], points, 1.6)
  cell = max(0.5 if numbered else 0.15, min(0.75, (figures.NARROW - left - 0.1) / len(corpora)))
  width, foot = max(left + cell * len(corpora) + 0.1, figures.NARROW), 0.55
  height = head + tall * len(models) + foot

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figures.canvas(figure)
    colours = [[_shade(theme, excess[i, j] / top) for j in range(len(corpora))] for i in range(len(models))]
    figures.pixels(ax, colours, (left, foot), (cell * len(corpora), tall * len(models)))
    for j, (_, title) in enumerate(corpora):
      ax.text(left + (j + 0.5) * cell, height - head + 0.02, figures.fit(title, head - 0.1, points), size=points,
              rotation=90, ha="center", va="bottom")
    for i, (model, title) in enumerate(models):
      y = height - head - (i + 1) * tall
      ax.text(left - 0.06, y + tall / 2, figures.fit(title, left - 0.1, points), size=points, ha="right", va="center")
      for j, (corpus, _) in enumerate(corpora):
        if model == corpus:
          ax.add_patch(Rectangle((left + j * cell, y), cell, tall, fill=False, edgecolor=theme.ink, linewidth=1.6,
                                 zorder=3))
        if numbered:
          ax.text(left + (j + 0.5) * cell, y + tall / 2, words.perplexity(values[i, j]), size=7.5, ha="center",
                  va="center", color=palette.ink_on(colours[i][j]),
                  weight="bold" if values[i, j] == best[j] else "normal")
    _legend(ax, theme, f"best on its text{' (bold)' if numbered else ''}", f"+{100 * math.expm1(top):.3g} %",
            "outlined: its own text")

  return figures.render(name, alt, (width, height), paint)


def attention(name: str, alt: str, maps: Sequence[AttentionMap]) -> list[figures.Chart]:
  """One map under the other, on one scale of colours; several charts where one would be too tall."""
  maps = [found.most(MOST_SOURCES if len(maps) <= 24 else MOST_SOURCES // 2) for found in maps]
  top = max(max((float(np.nanmax(m.weights)) for m in maps if np.isfinite(m.weights).any()), default=0.0), 1e-6)
  pages: list[list[AttentionMap]] = []
  for found in maps:
    if not pages or sum(len(m.sources) + 3 for m in [*pages[-1], found]) > ROWS_PER_FIGURE:
      pages.append([])
    pages[-1].append(found)
  return [
    _attention_page(name if len(pages) == 1 else f"{name}-{i + 1}", alt, page, top) for i, page in enumerate(pages)
  ]


def _attention_page(name: str, alt: str, maps: Sequence[AttentionMap], top: float) -> figures.Chart:
  row, head, foot, width = 0.23, 0.3, 0.28, figures.NARROW
  left = 0.05 + figures.gutter([source for found in maps for source in found.sources], 8, 1.6)
  blank = any(np.isnan(found.weights).any() for found in maps)
  heights = [head + row * len(m.sources) + foot for m in maps]
  height = sum(heights) + 0.6

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figures.canvas(figure)
    bottom = height
    for found, tall in zip(maps, heights, strict=True):
      bottom -= tall
      num_rounds = found.weights.shape[1]
      cell = (width - left - 0.08) / num_rounds
      colours = [[_shade(theme, value / top) for value in line] for line in found.weights]
      figures.pixels(ax, colours, (left, bottom + foot), (cell * num_rounds, row * len(found.sources)))
      ax.text(0.05, bottom + tall - head / 2 + 0.02, figures.fit(found.title, width - 0.15, 8.5), size=8.5,
              va="center", weight="bold")
      for i, (source, line) in enumerate(zip(found.sources, found.weights, strict=True)):
        y = bottom + tall - head - (i + 0.5) * row
        ax.text(left - 0.06, y, figures.fit(source, left - 0.12, 8), size=8, ha="right", va="center")
        for j in range(num_rounds if num_rounds <= ROUNDS_WITH_NUMBERS else 0):
          if words.known(line[j]):
            ax.text(left + (j + 0.5) * cell, y, f"{line[j]:.2f}" if line[j] else "0", size=7.5, ha="center",
                    va="center", color=palette.ink_on(colours[i][j]))
      step = max(1, -(-num_rounds // 8))
      for j in range(0, num_rounds, step):
        ax.text(left + (j + 0.5) * cell, bottom + foot - 0.04, str(j + 1), size=7.5, ha="center", va="top",
                color=theme.muted)
    _legend(ax, theme, "weight 0", f"{top:.2g}", f"across: rounds{'; blank: no attention' if blank else ''}")

  return figures.render(name, alt, (width, height), paint)


def _shade(theme: palette.Theme, share: float) -> str:
  return palette.between(theme.scale, share) if words.known(share) else theme.surface


def _legend(ax: Axes, theme: palette.Theme, low: str, high: str, note: str) -> None:
  """At the bottom of a canvas."""
  figures.pixels(ax, [[palette.between(theme.scale, i / 39) for i in range(40)]], (0.05, 0.24), (1.75, 0.12))
  ax.text(0.05, 0.2, low, size=7.5, va="top")
  ax.text(1.8, 0.2, high, size=7.5, va="top", ha="right")
  ax.text(1.95, 0.3, figures.fit(note, figures.NARROW - 2, 8), size=8, va="center", color=theme.muted)
