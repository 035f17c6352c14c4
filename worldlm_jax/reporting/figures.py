"""Draws a chart once for each theme, as SVG with its text as text, and as a PNG for slides: the same each time."""

import contextlib
import dataclasses
import functools
import io
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.textpath import TextToPath
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from worldlm_jax.reporting import palette, words

NARROW = 4.4  # inches: a phone's width at a readable size
PNG_DPI = 200
# Wide fonts come first, so that whatever font the reader's browser has instead fits as well.
FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans Arabic", "Noto Sans Devanagari")
NO_DATES = {"Date": None, "Creator": None, "Format": None, "Type": None}

Paint = Callable[[Figure, palette.Theme], None]


@dataclasses.dataclass(frozen=True)
class Chart:
  """A drawn chart."""

  name: str  # of its file
  alt: str  # what it shows, for those who cannot see it
  svg: dict[str, str]  # by theme
  png: bytes
  width: float  # inches

  @property
  def wide(self) -> bool:
    """Whether it needs to be scrolled on a phone."""
    return self.width > NARROW + 0.01


def render(name: str, alt: str, size: tuple[float, float], paint: Paint) -> Chart:
  """Draws with `paint(figure, theme)` in every theme; `size` is in inches."""
  svg, png = {}, b""
  for theme in palette.THEMES:
    with _style(theme, f"{name} {theme.name}"):
      figure = Figure(figsize=size, dpi=72)
      paint(figure, theme)
      svg[theme.name] = _svg(figure, alt)
      if theme is palette.LIGHT:
        png = _png(figure)
  return Chart(name, alt, svg, png, size[0])


@contextlib.contextmanager
def _style(theme: palette.Theme, salt: str) -> Iterator[None]:
  with matplotlib.rc_context(), warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")  # the browser has more fonts than we
    matplotlib.rcdefaults()  # whatever the user's own matplotlibrc says
    matplotlib.rcParams.update({
      "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "text.usetex": False,
      "font.family": _fonts(), "font.size": 9, "axes.titlesize": 9, "axes.labelsize": 9, "xtick.labelsize": 8.5,
      "ytick.labelsize": 8.5, "legend.fontsize": 8.5, "legend.frameon": False, "text.color": theme.ink,
      "axes.labelcolor": theme.ink, "xtick.color": theme.muted, "ytick.color": theme.muted,
      "xtick.labelcolor": theme.ink, "ytick.labelcolor": theme.ink, "axes.edgecolor": theme.muted,
      "axes.facecolor": "none", "figure.facecolor": theme.surface, "axes.spines.top": False, "axes.spines.right": False,
      "axes.axisbelow": True, "axes.grid": False, "grid.color": theme.rule, "grid.linewidth": 0.7,
      "axes.linewidth": 0.7, "xtick.major.width": 0.7, "ytick.major.width": 0.7, "hatch.linewidth": 0.8,
      "lines.linewidth": 1.6, "axes.titlelocation": "left",
    })
    yield


def _fonts() -> list[str]:
  there = {font.name for font in font_manager.fontManager.ttflist}
  return [name for name in FONTS if name in there]


def _svg(figure: Figure, alt: str) -> str:
  """Ready to stand in a page: no prologue, no ids but those that something in it refers to."""
  file = io.StringIO()
  figure.patch.set_visible(False)
  FigureCanvasSVG(figure).print_svg(file, metadata=NO_DATES)  # savefig would draw everything twice
  text = file.getvalue()
  text = text[text.index("<svg"):]
  opening, _, rest = text.partition(">")
  box = re.search(r'viewBox="[^"]*"', opening)
  assert box
  rest = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
  rest = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", rest, flags=re.DOTALL)
  rest = re.sub(r'<g id="[^"]*"', "<g", rest)
  rest = re.sub(r'(<image\b[^>]*?) id="[^"]*"', r"\1", rest)
  links = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
  return f'<svg {links} {box[0]} role="img" aria-label="{words.attribute(alt)}">{rest.strip()}'


def _png(figure: Figure) -> bytes:
  file = io.BytesIO()
  figure.patch.set_visible(True)
  figure.set_dpi(PNG_DPI)
  FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
  return file.getvalue()


def canvas(figure: Figure) -> Axes:
  """Axes over the whole figure, in inches."""
  ax = figure.add_axes((0, 0, 1, 1))
  ax.set_axis_off()
  ax.set_xlim(0, figure.get_figwidth())
  ax.set_ylim(0, figure.get_figheight())
  return ax


def pixels(ax: Axes, colours: Sequence[Sequence[str]], corner: tuple[float, float], size: tuple[float, float]) -> None:
  """A grid of colours, the first row on top, on a canvas: one pixel each, which the page's style keeps sharp."""
  limits = ax.axis()
  (x, y), (width, height) = corner, size
  ax.imshow([[to_rgb(colour) for colour in line] for line in colours], interpolation="none",
            extent=(x, x + width, y, y + height))
  ax.axis(limits)
  ax.set_aspect("auto")


def margins(figure: Figure, left: float, right: float, bottom: float, top: float, **between: float) -> None:
  """What lies around the axes, in inches: laid out by hand, since letting matplotlib find it takes most of the time."""
  width, height = figure.get_size_inches()
  figure.subplots_adjust(left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height,
                         **between)


def legend(figure: Figure, handles: Iterable[Any], labels: Iterable[str], **options: Any) -> None:
  """At the bottom, in the middle."""
  figure.legend(handles, labels, loc="lower center", borderaxespad=0.3, **options)


def fit(text: str, inches: float, points: float) -> str:
  """`text`, shortened in the middle until it is at most `inches` wide in a font of `points`."""
  text = words.clean(text)
  length = len(text)
  while length > 3 and text_width(shown := words.shorten(text, length), points) > inches:
    length -= max(1, round((text_width(shown, points) - inches) * 72 / points))
  return words.shorten(text, max(length, 3))


def gutter(titles: Iterable[str], points: float, most: float) -> float:
  """How much room names need beside a chart, in inches; the longest of them are shortened."""
  return min(most, max((text_width(words.clean(title), points) for title in titles), default=0.0) + 0.1)


@functools.cache
def text_width(text: str, points: float) -> float:
  """In inches."""
  with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Glyph .* missing from")
    font = font_manager.FontProperties(family="DejaVu Sans", size=points)
    return float(TextToPath().get_text_width_height_descent(text, font, ismath=False)[0]) / 72


def plain_log(axis_of: Axes, which: str, values: Sequence[float]) -> None:
  """A logarithmic axis with round numbers on it, however small the range of `values` is."""
  good = [value for value in values if words.known(value) and value > 0]
  low, high = min(good, default=1.0), max(good, default=1.0)
  pad = max(0.04, 0.06 * (high / low - 1)) if high / low < 2 else 0.15
  low, high = low / (1 + pad), high * (1 + pad)
  axis = axis_of.xaxis if which == "x" else axis_of.yaxis
  (axis_of.set_xscale if which == "x" else axis_of.set_yscale)("log")
  (axis_of.set_xlim if which == "x" else axis_of.set_ylim)(low, high)
  axis.set_minor_locator(NullLocator())
  axis.set_minor_formatter(NullFormatter())
  if high / low >= 5:
    subs = (1.0, 2.0, 5.0) if high / low < 200 else (1.0, 3.0) if high / low < 3000 else (1.0,)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
  else:
    axis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
  axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
