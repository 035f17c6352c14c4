"""The charts of a comparison: what each entry does for each node, over time, and for how many bytes."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from worldlm_jax.reporting import figures, palette, words

LEGEND_ROW = 0.19  # inches


@dataclasses.dataclass(frozen=True)
class Look:
  """How an entry looks in every chart of a page."""

  title: str
  place: int  # among the entries

  def line(self, theme: palette.Theme) -> dict[str, Any]:
    """Colour and dashes."""
    return {"color": self._colour(theme), "linestyle": palette.DASHES[self.place % len(palette.DASHES)],
            "linewidth": 2.4 if self.place == 0 else 1.4}

  def marker(self, theme: palette.Theme) -> dict[str, Any]:
    """Colour and shape; the first entry's is the largest."""
    return {"color": self._colour(theme), "marker": self._shape,
            "markersize": 7.5 if self.place == 0 else 6.5 if self._shape in "PX*" else 5,
            "markeredgecolor": theme.surface, "markeredgewidth": 0.5}

  @property
  def _shape(self) -> str:
    return palette.MARKERS[self.place % len(palette.MARKERS)]

  def _colour(self, theme: palette.Theme) -> str:
    return theme.series[self.place % len(theme.series)]


def dots(name: str, alt: str, looks: Sequence[Look], rows: Sequence[tuple[str, Mapping[int, Mapping[str, Any]]]],
         axis: str, *, log: bool) -> figures.Chart:
  """A row for each node with a dot for each entry: rows are (title, stat by place of the entry).

  Args:
    name: of the file.
    alt: what it shows.
    looks: the entries.
    rows: from the top.
    axis: the title of the axis of values.
    log: whether values are perplexities; otherwise they are percents around zero.
  """
  crowded = len(rows) > 16
  row_height = 0.32 if crowded else max(0.34, 0.09 * len(looks) + 0.14)
  foot = 0.6 + LEGEND_ROW * -(-len(looks) // 2)
  height = foot + 0.1 + row_height * len(rows)
  left = 0.05 + figures.gutter([title for title, _ in rows], 8.5, 1.45)

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figure.subplots()
    for y, (_, stats) in enumerate(rows):
      if y % 2:
        ax.axhspan(y - 0.5, y + 0.5, color=theme.rule, alpha=0.35, linewidth=0)
      for i, look in enumerate(looks):
        stat = stats.get(look.place)
        if stat is None or not words.known(stat["mean"]):
          continue
        shift = (i - (len(looks) - 1) / 2) * (0.6 if crowded else 0.76) / max(len(looks), 1)
        error = stat["standard_error"] if words.known(stat["standard_error"]) else None
        ax.errorbar(stat["mean"], y + shift, xerr=error, linestyle="none", elinewidth=1.1, capsize=0,
                    **look.marker(theme) | ({"markersize": 4} if crowded else {}), zorder=5 if look.place == 0 else 4)
    ax.set_yticks(range(len(rows)), [figures.fit(title, left - 0.1, 8.5) for title, _ in rows])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.grid(axis="x")
    if log:
      figures.plain_log(ax, "x", [s["mean"] for _, stats in rows for s in stats.values() if words.known(s["mean"])])
    else:
      ax.axvline(0, color=theme.ink, linewidth=1)
      ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
      ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: words.percent(value, 0 if value == int(value) else 1)
                                                 if value else "0"))
    ax.set_xlabel(axis)
    figures.margins(figure, left, 0.12, foot, 0.1)
    _legend(figure, theme, looks, lines=False)

  return figures.render(name, alt, (figures.NARROW, height), paint)


def mean_curves(name: str, alt: str, looks: Sequence[Look], curves: Mapping[int, Sequence[float]]) -> figures.Chart:
  """The tree's mean valid perplexity by entry. Entries with fewer, longer rounds are drawn by share of training."""
  same = len({len(curve) for curve in curves.values()}) <= 1
  values = [value for curve in curves.values() for value in curve if words.known(value)]

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figure.subplots()
    ax.grid(axis="y")
    for look in reversed(looks):
      line = np.array(words.numbers(curves.get(look.place, ())))
      rounds = np.arange(1, len(line) + 1) * (1 if same else 100 / max(len(line), 1))
      there = np.isfinite(line)
      marker = look.marker(theme) | {"markersize": 4.5} if there.sum() <= 20 else {}
      ax.plot(rounds[there], line[there], **look.line(theme) | marker, zorder=4 if look.place == 0 else 3)
    figures.plain_log(ax, "y", values)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    ax.set_xlabel("round" if same else "share of the training, %")
    ax.set_ylabel("mean valid perplexity, personalised")
    figures.margins(figure, 0.72, 0.12, foot, 0.1)
    _legend(figure, theme, looks, lines=True)

  foot = 0.6 + LEGEND_ROW * -(-len(looks) // 2)
  return figures.render(name, alt, (figures.NARROW, 2.7 + foot), paint)


def cost(name: str, alt: str, looks: Sequence[Look], points: Mapping[int, tuple[float, Mapping[str, Any]]],
         ) -> figures.Chart:
  """Bytes sent against perplexity: points are (bytes, stat of perplexity) by place of the entry."""
  sent = [size for size, _ in points.values() if size > 0]
  least = min(sent, default=1.0)
  log = bool(sent) and max(sent) / least > 20

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figure.subplots()
    ax.grid()
    nothing = least / 4  # where entries that send nothing stand on a logarithmic axis
    for look in reversed(looks):
      if look.place not in points or not words.known(points[look.place][1]["mean"]):
        continue
      size, stat = points[look.place]
      error = stat["standard_error"] if words.known(stat["standard_error"]) else None
      ax.errorbar(size if size > 0 or not log else nothing, stat["mean"], yerr=error, linestyle="none", elinewidth=1.1,
                  **look.marker(theme), zorder=5 if look.place == 0 else 4)
    figures.plain_log(ax, "y", [stat["mean"] for _, stat in points.values() if words.known(stat["mean"])])
    if log:
      _bytes_axis(ax, nothing, least, max(sent), any(size == 0 for size, _ in points.values()))
    else:
      ax.set_xlim(-0.06 * max(sent, default=1), 1.08 * max(sent, default=1))
      ax.xaxis.set_major_locator(MaxNLocator(nbins=5))
      ax.xaxis.set_major_formatter(lambda value, _: words.size(value) if value else "0")
    ax.set_xlabel("sent up and down in all")
    ax.set_ylabel("mean test perplexity, personalised")
    figures.margins(figure, 0.72, 0.2, foot, 0.1)
    _legend(figure, theme, looks, lines=False)

  foot = 0.6 + LEGEND_ROW * -(-len(looks) // 2)
  return figures.render(name, alt, (figures.NARROW, 2.7 + foot), paint)


def _bytes_axis(ax: Axes, nothing: float, least: float, most: float, with_zero: bool) -> None:
  ax.set_xscale("log")
  ax.set_xlim((nothing if with_zero else least) / 1.6, most * 1.8)
  ticks = [10.0**k for k in range(math.ceil(math.log10(least / 1.6)), math.floor(math.log10(most * 1.8)) + 1)] or [most]
  ax.set_xticks([nothing, *ticks] if with_zero else ticks, ["0"] * with_zero + [words.size(tick) for tick in ticks])
  ax.minorticks_off()


def _legend(figure: Figure, theme: palette.Theme, looks: Sequence[Look], *, lines: bool) -> None:
  ax = figure.axes[0]
  handles = [ax.plot([], [], **look.line(theme) | look.marker(theme) | ({} if lines else {"linestyle": "none"}))[0]
             for look in looks]
  labels = [figures.fit(look.title, 1.9, 8.5) for look in looks]
  figures.legend(figure, handles, labels, ncols=2, handlelength=3.2 if lines else 1.2)
