"""The charts of one run: learning curves, what the edges carried, and where the time went."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from worldlm_jax.reporting import figures, palette, words

PANELS_PER_FIGURE = 12


@dataclasses.dataclass(frozen=True)
class Curve:
  """A node's valid perplexity; NaN where it was not scored."""

  title: str
  rounds: np.ndarray  # from 1
  received: np.ndarray
  personalised: np.ndarray
  references: Mapping[str, float]  # perplexity of what else is known of the text, such as its entropy


def learning(name: str, alt: str, curves: Sequence[Curve]) -> list[figures.Chart]:
  """A panel for each node, all on one scale; a dozen panels in a chart."""
  values = [v for c in curves for part in (c.received, c.personalised, c.references.values()) for v in part]
  pages = [curves[i : i + PANELS_PER_FIGURE] for i in range(0, len(curves), PANELS_PER_FIGURE)]
  return [
    _learning_page(name if len(pages) == 1 else f"{name}-{i + 1}", alt, page, values) for i, page in enumerate(pages)
  ]


def _learning_page(name: str, alt: str, curves: Sequence[Curve], values: Sequence[float]) -> figures.Chart:
  columns = 1 if len(curves) == 1 else 2
  rows = -(-len(curves) // columns)
  references = list(dict.fromkeys(label for curve in curves for label in curve.references))

  def paint(figure: Figure, theme: palette.Theme) -> None:
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax in axes.flat[len(curves):]:
      ax.set_axis_off()
    handles = {}
    for curve, ax in zip(curves, axes.flat, strict=False):
      ax.set_title(figures.fit(curve.title, figures.NARROW / columns - 0.45, 9), pad=4)
      ax.grid(axis="y")
      for label, line, series, face in (("as received", curve.received, 2, "none"),
                                        ("personalised", curve.personalised, 0, None)):
        there = np.isfinite(line)
        colour = theme.series[series]
        marker = {"marker": palette.MARKERS[series], "markersize": 4, "markerfacecolor": face or colour,
                  "markeredgecolor": colour} if there.sum() <= 20 else {}
        handles[label], = ax.plot(curve.rounds[there], line[there], color=colour, label=label,
                                  linestyle=palette.DASHES[0 if series == 0 else 1], **marker)
      for label, value in curve.references.items():
        place = 3 + references.index(label)
        handles[label] = ax.axhline(value, color=theme.muted, linewidth=1.3, linestyle=palette.DASHES[place % 7])
      ax.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    figures.plain_log(axes[0, 0], "y", values)
    for column in range(columns):  # the last panel of each, which need not be in the last row
      last = axes.flat[max(i for i in range(len(curves)) if i % columns == column)]
      last.set_xlabel("round", labelpad=3)
      last.tick_params(labelbottom=True)
    figure.text(0.02, 0.5 + foot / height / 2, "valid perplexity per token", size=9, rotation=90, va="center")
    figures.margins(figure, 0.68, 0.08, foot, 0.25, wspace=0.1, hspace=0.36)
    figures.legend(figure, handles.values(), handles.keys(), ncols=2)

  foot = 0.66 + 0.18 * -(-len(references) // 2)
  height = 0.25 + foot + (2.2 if columns == 1 else 1.3 * rows)
  return figures.render(name, alt, (figures.NARROW, height), paint)


def traffic(name: str, alt: str, edges: Sequence[tuple[str, float, float]]) -> figures.Chart:
  """Bytes over each node's edge to its parent: (title, down, up)."""
  height = 0.75 + 0.4 * len(edges)
  left = figures.gutter([title for title, _, _ in edges], 8.5, 1.5)
  values = [value for _, down, up in edges for value in (down, up) if value > 0]
  log = bool(values) and max(values) / min(values) > 30

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figure.subplots()
    places = np.arange(len(edges))
    ways = (("down, from the parent", 0, ""), ("up, to the parent", 2, "////"))
    for place, (title, series, hatch) in enumerate(ways):
      amounts = [edge[1 + place] for edge in edges]
      ax.barh(places + (place - 0.5) * 0.36, amounts, 0.34, label=title, facecolor=theme.series[series] if not hatch
              else "none", edgecolor=theme.series[series], hatch=hatch, linewidth=0.9)
      for y, value in zip(places + (place - 0.5) * 0.36, amounts, strict=True):
        ax.annotate(words.size(value), (max(value, min(values, default=1) / 2 if log else 0), y), (3, 0),
                    textcoords="offset points", size=7.5, va="center")
    ax.set_yticks(places, [figures.fit(edge[0], left - 0.1, 8.5) for edge in edges])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(edges) - 0.45, -0.55)
    if log:
      figures.plain_log(ax, "x", values)
      ax.set_xlim(min(values) / 2, max(values) * 6)
    else:
      ax.set_xlim(0, max(values, default=1) * 1.28)
      ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    ax.xaxis.set_major_formatter(lambda value, _: words.size(value))
    ax.spines["left"].set_visible(False)
    figures.margins(figure, left, 0.08, 0.6, 0.08)
    figures.legend(figure, *ax.get_legend_handles_labels(), ncols=2)

  return figures.render(name, alt, (figures.NARROW, height), paint)


def time(name: str, alt: str, seconds: Mapping[str, float]) -> figures.Chart:
  """Seconds by activity, the longest first."""
  ordered = sorted(seconds, key=lambda what: -seconds[what])
  total = sum(seconds.values()) or 1.0

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figure.subplots()
    ax.barh(range(len(ordered)), [seconds[what] for what in ordered], 0.62, color=theme.series[0])
    for y, what in enumerate(ordered):
      ax.annotate(f"{words.duration(seconds[what])} ({seconds[what] / total:.0%})", (seconds[what], y), (4, 0),
                  textcoords="offset points", size=8.5, va="center")
    ax.set_yticks(range(len(ordered)), [figures.fit(what.replace("_", " "), 1.25, 8.5) for what in ordered])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(ordered) - 0.4, -0.6)
    ax.set_xlim(0, max(seconds.values(), default=1) * 1.38 or 1)
    ax.xaxis.set_visible(False)
    ax.spines[:].set_visible(False)
    figures.margins(figure, 1.35, 0.02, 0.02, 0.02)

  return figures.render(name, alt, (figures.NARROW, 0.1 + 0.3 * len(ordered)), paint)
