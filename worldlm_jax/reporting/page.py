"""The page: HTML that needs nothing but itself. Whatever is not `Html` is escaped on its way in."""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from worldlm_jax.reporting import figures, palette, words


class Html(str):
  """Text that is HTML already."""

  __slots__ = ()


def text(value: Any) -> Html:
  """Escapes everything but `Html`."""
  return value if isinstance(value, Html) else Html(words.attribute(value))


def join(parts: Iterable[Html]) -> Html:
  """One after the other."""
  return Html("\n".join(parts))


def tag(name: str, *content: Any, **attributes: str) -> Html:
  """An element; `class_` is its class."""
  given = "".join(f' {key.rstrip("_")}="{words.attribute(value)}"' for key, value in attributes.items())
  return Html(f"<{name}{given}>{''.join(text(part) for part in content)}</{name}>")


def paragraph(*content: Any, class_: str = "note") -> Html:
  """A paragraph of explanation."""
  return tag("p", *content, class_=class_)


def section(heading: str, *content: Html) -> Html:
  """A part of the page with its own place in the contents; empty content leaves it out."""
  inside = join(part for part in content if part)
  if not inside:
    return Html("")
  return tag("section", tag("h2", heading), inside, id=_anchor(heading))


def sections(parts: Mapping[str, Html], columns: Sequence[Sequence[Sequence[str]]]) -> Html:
  """Each part under its heading; where there is room, the headings of one of `columns` stand side by side."""
  done: set[str] = set()
  found = []
  for heading in parts:
    group = next((group for group in columns if any(heading in column for column in group)), None)
    if heading not in done and group is not None:
      stacks = [join(section(name, parts[name]) for name in column if parts[name]) for column in group]
      found.append(tag("div", *(tag("div", stack) for stack in stacks if stack), class_="columns"))
      done |= {name for column in group for name in column}
    elif heading not in done:
      found.append(section(heading, parts[heading]))
  return join(part for part in found if part)


def contents(headings: Sequence[str]) -> Html:
  """Links to the sections."""
  return tag("nav", *(tag("a", heading, href=f"#{_anchor(heading)}") for heading in headings), class_="contents")


def _anchor(heading: str) -> str:
  return "".join(letter if letter.isalnum() else "-" for letter in heading.lower())


def tiles(values: Sequence[tuple[str, str, str]]) -> Html:
  """Headline numbers: (what, number, small print)."""
  return tag("div", *(
    tag("div", tag("div", what, class_="what"), tag("div", number, class_="number"), tag("div", small, class_="small"),
        class_="tile") for what, number, small in values
  ), class_="tiles")


def chart(drawn: figures.Chart, caption: str) -> Html:
  """Both themes of a chart, one of them shown; a wide one scrolls sideways by itself."""
  width = f"{drawn.width * 72 * (1.4 if drawn.wide else 1.7):.0f}px"
  inner = join(tag("div", Html(svg), class_=theme, style=f"width:{width}") for theme, svg in drawn.svg.items())
  return tag("figure", tag("div", inner, class_="scroll wide" if drawn.wide else "narrow"),
             *([tag("figcaption", caption)] if caption else []), class_="wide" if drawn.wide else "")


def charts(drawn: Sequence[figures.Chart], caption: str) -> Html:
  """One after the other under their caption; from the third on they are folded away."""
  if not drawn:
    return Html("")
  shown = tag("div", *(chart(one, "") for one in drawn[:2]), class_="pages")
  if len(drawn) <= 2:
    return join([paragraph(caption), shown])
  rest = tag("div", *(chart(one, "") for one in drawn[2:]), class_="pages")
  return join([paragraph(caption), shown, details(f"More charts like these ({len(drawn) - 2})", rest)])


def table(headings: Sequence[Any], rows: Iterable[Sequence[Any]], *, left: int = 1, marked: int | None = None) -> Html:
  """A table that scrolls sideways; the first `left` columns are words, the others numbers; row `marked` stands out."""
  def cells(kind: str, values: Sequence[Any]) -> Html:
    return Html("".join(
      tag("th" if kind == "th" or not i else "td", value, class_="word" if i < left else "value")
      for i, value in enumerate(values)
    ))

  body = [tag("tr", cells("td", row), **({"class_": "marked"} if i == marked else {})) for i, row in enumerate(rows)]
  return tag("div", tag("table", tag("thead", tag("tr", cells("th", headings))), tag("tbody", join(body))),
             class_="scroll")


def details(summary: str, *content: Html) -> Html:
  """Folded away until asked for."""
  return tag("details", tag("summary", summary), *content)


def code(value: Any) -> Html:
  """A value as JSON, or a text as it is, in fixed pitch."""
  return tag("code", breakable(value if isinstance(value, str) else json.dumps(value)))


def breakable(name: Any) -> Html:
  """A path or a dotted name that may be broken where its parts meet."""
  return Html(re.sub(r"([/._])(?=\w)", r"\1<wbr>", text(name)))


def listing(value: Any) -> Html:
  """All of a JSON value."""
  return tag("pre", json.dumps(value, indent=2, ensure_ascii=False))


def document(title: str, body: Html) -> str:
  """The whole page. Its policy lets nothing in from outside and runs no script, whatever may stand in it."""
  policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
  icon = base64.b64encode(_ICON.encode()).decode()
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{text(title)}</title>
<link rel="icon" href="data:image/svg+xml;base64,{icon}">
<style>{_style()}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


_ICON = (
  '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16"><path d="M4 8h4M8 3v10M8 3h3M8 13h3M8 8h3" fill="none" '
  'stroke="#6ba3dc" stroke-width="1.5"/><circle cx="3" cy="8" r="2.4" fill="#2c6cb5"/>'
  '<g fill="#6ba3dc"><circle cx="13" cy="3" r="2"/><circle cx="13" cy="8" r="2"/><circle cx="13" cy="13" r="2"/></g>'
  "</svg>"
)


def _variables(theme: palette.Theme) -> str:
  return (f"--page:{theme.page};--surface:{theme.surface};--ink:{theme.ink};--muted:{theme.muted};--rule:{theme.rule};"
          f"--accent:{theme.series[0]};--warn:{theme.series[2]};")


def _style() -> str:
  return f"""
:root {{ {_variables(palette.LIGHT)} }}
.dark {{ display: none; }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ {_variables(palette.DARK)} }}
  .light {{ display: none; }}
  .dark {{ display: block; }}
}}
{_RULES}"""


_RULES = """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 28px 24px 60px; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 0 0 10px; }
h3 { font-size: 1rem; margin: 18px 0 6px; }
p { margin: 0 0 10px; max-width: 75ch; overflow-wrap: anywhere; }
a { color: var(--accent); }
.lead { font-size: 1.1rem; }
.sub, .note, figcaption, .small { color: var(--muted); }
.note, figcaption { font-size: .9rem; max-width: 75ch; }
.banner { background: var(--surface); border: 1px solid var(--rule); border-left: 5px solid var(--warn);
  border-radius: 8px; padding: 10px 14px; max-width: none; margin: 14px 0; }
.contents { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0 18px; font-size: .92rem; }
.contents a { text-decoration: none; padding: 4px 0; }
.contents a:hover { text-decoration: underline; }
section, .tiles { margin: 0 0 18px; }
section { background: var(--surface); border: 1px solid var(--rule); border-radius: 10px; padding: 18px 20px 14px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 10px; }
.tile { background: var(--surface); border: 1px solid var(--rule); border-radius: 10px; padding: 12px 14px;
  min-width: 0; }
.what { font-size: .85rem; color: var(--muted); }
.number { font-size: 1.6rem; line-height: 1.25; font-weight: 650; overflow-wrap: anywhere; }
.small { font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 500px), 1fr)); gap: 0 18px; }
.columns > div { min-width: 0; }
.pages { display: flex; flex-wrap: wrap; gap: 0 32px; }
.pages > figure { min-width: 0; max-width: 100%; }
figure { margin: 0 0 14px; }
.narrow > div { max-width: 100%; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "DejaVu Sans", sans-serif
  !important; }
figure svg image { image-rendering: pixelated; }
.scroll { overflow-x: auto; max-width: 100%; -webkit-overflow-scrolling: touch; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; margin: 0 0 10px; }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--rule); vertical-align: top; }
thead th { min-width: 3.8em; color: var(--muted); font-weight: 600; border-bottom-width: 2px; vertical-align: bottom; }
th:first-child, td:first-child { padding-left: 2px; }
.word { text-align: left; min-width: 8em; max-width: 26em; overflow-wrap: anywhere; }
.value { text-align: right; }
td.value { white-space: nowrap; }
tbody th { font-weight: 500; }
.marked > * { background: color-mix(in srgb, var(--accent) 12%, transparent); font-weight: 650; }
details { margin: 4px 0 10px; }
summary { cursor: pointer; color: var(--accent); padding: 4px 0; }
code, pre { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .85rem; }
code { overflow-wrap: anywhere; }
pre { overflow: auto; max-height: 30rem; background: var(--page); border: 1px solid var(--rule); border-radius: 8px;
  padding: 10px; margin: 6px 0; }
@media (max-width: 600px) {
  main { padding: 14px 8px 40px; }
  section { padding: 12px 8px 8px; border-radius: 8px; }
  h1 { font-size: 1.4rem; }
  .tiles { grid-template-columns: 1fr 1fr; gap: 8px; }
  .tile { padding: 10px; }
  .tile:last-child:nth-child(odd) { grid-column: 1 / -1; }
  .number { font-size: 1.3rem; }
}
@media print {
  @page { margin: 14mm; }
  html { color-scheme: light; background: #ffffff; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { background: none; font-size: 10.5pt; }
  main { padding: 0; max-width: none; }
  .contents { display: none; }
  section { border: 0; padding: 0; }
  .columns { display: block; }
  .scroll { overflow: visible; }
  .scroll.wide > div { width: 100% !important; }
  figure, tr, .tile { break-inside: avoid; }
  h2, thead { break-after: avoid; }
  pre { max-height: none; white-space: pre-wrap; }
}
"""
