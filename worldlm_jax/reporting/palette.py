"""Colours, for a light and a dark page. Nothing is told by colour alone: there are markers, dashes, numbers as well.

The series were searched so that any two differ (in OKLab, by at least 0.08) to people with protanopia, deuteranopia
and tritanopia too, and stand out from the page by a contrast of at least 3; `tests/report_palette_test.py` checks it.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Theme:
  """The colours of one kind of page, as #rrggbb."""

  name: str
  page: str  # behind everything
  surface: str  # behind charts and tables
  ink: str  # text
  muted: str  # lesser text, axes
  rule: str  # grid, borders
  series: tuple[str, ...]  # own first, training alone second
  scale: tuple[str, ...]  # from little to much
  diverging: tuple[str, ...]  # from worse over the same to better


LIGHT = Theme(
  "light", page="#f6f6f4", surface="#ffffff", ink="#1c1d1f", muted="#5a5d63", rule="#dcdcd8",
  series=("#1f5fbf", "#4d4d4d", "#aa6155", "#789d12", "#5c0b83", "#e06889", "#10a0b4", "#7c5806"),
  scale=("#f1f6fc", "#b9d4f0", "#6ba3dc", "#2c6cb5", "#0d3a73"),
  diverging=("#8f3d06", "#d98a4a", "#f6d9bf", "#f4f4f2", "#c5dcf3", "#5b97d6", "#12498c"),
)
DARK = Theme(
  "dark", page="#121416", surface="#1b1e22", ink="#eceae6", muted="#a9adb3", rule="#3a3e44",
  series=("#6aa9ff", "#c4c4c4", "#feba71", "#5f9729", "#ba6bc0", "#ea848d", "#36e0ff", "#c5a830"),
  scale=("#1f2a38", "#24466b", "#3470ae", "#6aa5e3", "#c3defa"),
  diverging=("#ffb77a", "#c8733a", "#5b3b26", "#33363b", "#28476b", "#4784c9", "#a8d0ff"),
)
THEMES = (LIGHT, DARK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "p", "h")
DASHES: tuple[tuple[int, tuple[float, ...]], ...] = (
  (0, ()), (0, (5, 1.5)), (0, (1.2, 1.4)), (0, (5, 1.5, 1.2, 1.5)), (0, (3, 3)), (0, (8, 2)),
  (0, (5, 1.5, 1.2, 1.5, 1.2, 1.5)),
)


def ink_on(colour: str) -> str:
  """Black or white, whichever reads better on `colour`: the contrast is at least 4.5."""
  return "#000000" if contrast(colour, "#000000") >= contrast(colour, "#ffffff") else "#ffffff"


def contrast(one: str, other: str) -> float:
  """WCAG's contrast of two colours: 1 (the same) to 21."""
  lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
  return (lighter + 0.05) / (darker + 0.05)


def luminance(colour: str) -> float:
  """Relative luminance of #rrggbb: 0 to 1."""
  channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
  red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
  return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def between(stops: tuple[str, ...], share: float) -> str:
  """The colour at `share` (0 to 1) of the way along `stops`."""
  place = min(max(share, 0.0), 1.0) * (len(stops) - 1)
  i = min(int(place), len(stops) - 2)
  mixed = [
    round(int(stops[i][k : k + 2], 16) * (1 - place + i) + int(stops[i + 1][k : k + 2], 16) * (place - i))
    for k in (1, 3, 5)
  ]
  return "#" + "".join(f"{value:02x}" for value in mixed)
