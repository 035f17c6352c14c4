"""The federation as a picture: its nodes with their numbers, and the routes of residual layers between them."""

import dataclasses
from collections.abc import Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from worldlm_jax.reporting import figures, palette
from worldlm_jax.reporting.files import Tree

GAP = 0.3  # inches between the columns of a tree
MOST_ROUTES = 60  # more arcs cannot be told apart


@dataclasses.dataclass(frozen=True)
class Cell:
  """What stands in a node's box: a line of numbers and, where there is a colour, its place (0 to 1) on the scale."""

  line: str
  short: str  # where there is no room for `line`
  share: float | None


@dataclasses.dataclass(frozen=True)
class Scale:
  """The legend under a tree."""

  diverging: bool
  low: str  # what the first and the last colour stand for
  high: str
  what: str

  def colour(self, theme: palette.Theme, share: float) -> str:
    return palette.between(theme.diverging if self.diverging else theme.scale, share)


def nodes(name: str, alt: str, tree: Tree, cells: Mapping[str, Cell], scale: Scale) -> figures.Chart:
  """The tree from left to right, a box for each node. Nodes without a colour have no text of their own."""
  rows = _rows(tree)
  num_rows = 1 + max(rows.values())
  compact = num_rows > 20
  row_height = 0.52 if not compact else 0.34 if num_rows <= 40 else 0.28
  width = figures.NARROW if tree.num_levels <= 3 else tree.num_levels * 1.5
  column = width / tree.num_levels
  box_width, box_height, foot = min(column - GAP, 2.2), row_height * 0.8, 0.62
  height = num_rows * row_height + foot + 0.1

  def corner(path: str) -> tuple[float, float]:
    return 0.03 + tree.depth(path) * column, height - 0.05 - (rows[path] + 0.5) * row_height - box_height / 2

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figures.canvas(figure)
    for path in tree.paths:
      x, y = corner(path)
      if (parent := tree.parents[path]) is not None:
        above_x, above_y = corner(parent)
        middle = x - GAP / 2
        ax.plot([above_x + box_width, middle, middle, x],
                [above_y + box_height / 2, above_y + box_height / 2, y + box_height / 2, y + box_height / 2],
                color=theme.muted, linewidth=0.9, solid_joinstyle="round", zorder=1)
    for path in tree.paths:
      _box(ax, theme, corner(path), (box_width, box_height), tree.name(path), cells[path], scale, compact)
    _legend(ax, theme, scale, min(width, figures.NARROW))

  return figures.render(name, alt, (width, height), paint)


def _box(ax: Axes, theme: palette.Theme, corner: tuple[float, float], size: tuple[float, float], name: str, cell: Cell,
         scale: Scale, compact: bool) -> None:
  (x, y), (width, height) = corner, size
  colour = theme.surface if cell.share is None else scale.colour(theme, cell.share)
  ink = theme.ink if cell.share is None else palette.ink_on(colour)
  ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.05", facecolor=colour,
                              edgecolor=theme.muted, linewidth=0.8, linestyle="--" if cell.share is None else "-"))
  middle, inside = y + height / 2, width - 0.14
  if compact:
    taken = figures.text_width(cell.short, 8) + 0.1 if cell.short else 0
    ax.text(x + 0.07, middle, figures.fit(name, inside - taken, 8), size=8, color=ink, va="center")
    ax.text(x + width - 0.07, middle, cell.short, size=8, color=ink, va="center", ha="right")
    return
  line = cell.line if figures.text_width(cell.line, 8) <= inside else cell.short
  bold = cell.share is not None
  ax.text(x + 0.07, middle + (height * 0.23 if line else 0), figures.fit(name, inside * (0.86 if bold else 1), 8.5),
          size=8.5, color=ink, va="center", weight="bold" if bold else "normal")  # bold letters are wider
  ax.text(x + 0.07, middle - height * 0.24, line, size=8, color=ink, va="center")


def _legend(ax: Axes, theme: palette.Theme, scale: Scale, width: float) -> None:
  left, bar, y = 0.03, min(1.9, width * 0.4), 0.34
  figures.pixels(ax, [[scale.colour(theme, i / 39) for i in range(40)]], (left, y), (bar, 0.13))
  ax.text(left, y - 0.06, scale.low, size=8, va="top")
  ax.text(left + bar, y - 0.06, scale.high, size=8, va="top", ha="right")
  ax.text(left + bar + 0.15, y + 0.065, figures.fit(scale.what, width - bar - 0.3, 8), size=8, va="center")
  ax.text(left + bar + 0.15, y - 0.12, figures.fit("dashed: no text of its own", width - bar - 0.3, 8), size=8,
          va="center", color=theme.muted)


def routes(name: str, alt: str, tree: Tree, counts: Mapping[tuple[str, str], int]) -> figures.Chart:
  """Arcs from the node that a residual layer came from to the one that got it; `counts` says how often."""
  shown = sorted(counts, key=lambda pair: (-counts[pair], pair))[:MOST_ROUTES]
  rows = {path: i for i, path in enumerate(tree.paths)}
  row_height, width = 0.27, figures.NARROW
  height = len(rows) * row_height + 0.2
  indent = min(0.16, 0.9 / max(tree.num_levels - 1, 1))
  names = {path: figures.fit(tree.name(path), 2.35 - indent * tree.depth(path), 8.5) for path in tree.paths}
  ends = {path: 0.1 + indent * tree.depth(path) + figures.text_width(names[path], 8.5) for path in tree.paths}
  start = max(ends.values()) + 0.15
  longest = max((abs(rows[a] - rows[b]) for a, b in shown), default=1)

  def y_of(path: str) -> float:
    return height - 0.1 - (rows[path] + 0.5) * row_height

  def paint(figure: Figure, theme: palette.Theme) -> None:
    ax = figures.canvas(figure)
    touched = {path for pair in shown for path in pair}
    for path in tree.paths:
      x = 0.1 + indent * tree.depth(path)
      if (parent := tree.parents[path]) is not None:
        corner = x - indent + 0.04
        ax.plot([corner, corner, x - 0.04], [y_of(parent) - 0.1, y_of(path), y_of(path)], color=theme.rule,
                linewidth=0.9, zorder=1)
      ax.text(x, y_of(path), names[path], size=8.5, va="center", color=theme.ink if path in touched else theme.muted)
      if path in touched:
        ax.plot([ends[path] + 0.06, start - 0.04], [y_of(path)] * 2, color=theme.rule, linewidth=0.8, zorder=1)
    most = max(counts.values(), default=1)
    for source, target in reversed(shown):
      far, thick = abs(rows[source] - rows[target]) / longest, 0.6 + 3.2 * counts[source, target] / most
      a, b = y_of(source), y_of(target)
      bend = 2.0 if a > b else 1.7  # there and back are two arcs
      reach = bend * (0.2 + 0.8 * far) * (width - start - 0.15) / (b - a)  # of a curve that goes half as far
      ax.add_patch(FancyArrowPatch(
        (start, a), (start, b), connectionstyle=f"arc3,rad={reach:.4f}", arrowstyle="-|>", mutation_scale=6 + thick,
        linewidth=thick, color=theme.series[0 if a > b else 2], linestyle="-" if a > b else (0, (4, 1)),
        alpha=0.8, shrinkA=0, shrinkB=0,
      ))

  return figures.render(name, alt, (width, height), paint)


def _rows(tree: Tree) -> dict[str, float]:
  """A row for each leaf; a parent stands in the middle of its children."""
  rows: dict[str, float] = {}
  leaves = 0
  for path in tree.paths:
    if not tree.children[path]:
      rows[path] = leaves
      leaves += 1
  for path in reversed(tree.paths):
    if path not in rows:
      inner = [rows[child] for child in tree.children[path]]
      rows[path] = (inner[0] + inner[-1]) / 2
  return rows
