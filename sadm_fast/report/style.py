"""The report's colours and style sheet: one palette for page and charts, light, dark and on paper."""

# Colours that people with any colour vision can tell apart (after Okabe and Ito, "Color Universal Design", 2008).
# A role has one colour on the whole page. Charts are drawn in the light colours; in the page each becomes var(--role),
# so that dark mode changes it.
LIGHT = {
    "ink": "#1c2126",
    "muted": "#5d656e",
    "rule": "#dfe3e8",
    "denoiser": "#0072b2",
    "discriminator": "#d55e00",
    "structure": "#007e5d",
    "floor": "#9a4f80",
    "q1": "#7db4da",
    "q2": "#3d8bc0",
    "q3": "#1b5f94",
    "q4": "#0a2f50",
}
DARK = {
    "ink": "#e7eaed",
    "muted": "#a0a9b3",
    "rule": "#30373f",
    "denoiser": "#56b4e9",
    "discriminator": "#f58d3d",
    "structure": "#3ecba0",
    "floor": "#dd9fc6",
    "q1": "#2f6f9f",
    "q2": "#4e9bd0",
    "q3": "#8cc5ec",
    "q4": "#dcf0ff",
}


def style_sheet() -> str:
    """The page's CSS."""
    return _SHEET.replace("%LIGHT%", _variables(LIGHT)).replace("%DARK%", _variables(DARK))


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{role}: {color};" for role, color in colors.items())


_SHEET = """
:root { color-scheme: light dark; %LIGHT% --page: #ffffff; --panel: #f5f7f9; }
@media screen and (prefers-color-scheme: dark) { :root { %DARK% --page: #14181c; --panel: #1c2127; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 72rem; background: var(--page); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums;
}
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0; letter-spacing: -0.015em; overflow-wrap: anywhere; }
h2 { font-size: 1.35rem; line-height: 1.3; margin: 3.2rem 0 0.6rem; padding-top: 1.1rem;
  border-top: 1px solid var(--rule); letter-spacing: -0.01em; }
h3 { font-size: 1rem; margin: 1.8rem 0 0.4rem; }
p { max-width: 46rem; margin: 0.5rem 0 1rem; }
code, pre { font: 0.86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
pre { background: var(--panel); border-radius: 6px; padding: 0.8rem 1rem; white-space: pre-wrap;
  overflow-wrap: anywhere; margin: 0.4rem 0 1rem; }
a { color: var(--denoiser); text-underline-offset: 0.15em; }
header p { margin: 0.35rem 0 0; color: var(--muted); max-width: none; }
header .verdict { color: var(--ink); font-size: 1.15rem; line-height: 1.5; margin-top: 1.1rem;
  max-width: 60rem; }
nav { margin: 1.4rem 0 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; font-size: 0.92rem; }
.badge { display: inline-block; padding: 0.05rem 0.6rem; border-radius: 99px; font-size: 0.85rem;
  font-weight: 600; color: var(--page); background: var(--denoiser); vertical-align: 0.1em; }
.missing { color: var(--muted); border-left: 3px solid var(--rule); padding: 0.1rem 0 0.1rem 0.8rem; }
.tiles { display: grid; gap: 1rem; margin: 1.6rem 0 0.6rem;
  grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); }
.tile { background: var(--panel); border-radius: 10px; padding: 1rem 1.2rem 1.1rem; }
.tile h3 { margin: 0; font-size: 0.9rem; }
.tile .score { font-size: 2.3rem; line-height: 1.25; font-weight: 650; letter-spacing: -0.02em;
  margin: 0.1rem 0; }
.tile p { margin: 0; font-size: 0.88rem; line-height: 1.45; color: var(--muted); }
.tile strong { color: var(--ink); font-weight: 600; }
figure { margin: 0; break-inside: avoid; }
figcaption { font-size: 0.86rem; line-height: 1.45; color: var(--muted); margin-top: 0.35rem;
  max-width: 46rem; }
figcaption b { color: var(--ink); font-weight: 600; }
img { display: block; width: 100%; height: auto; border-radius: 3px; background: var(--panel); }
.chart { display: block; width: 100%; height: auto; }
.chart * { stroke-linejoin: round; stroke-linecap: butt; }
.chart text { font-family: inherit; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(2, 1fr); gap: 1.8rem 2rem; margin: 1.2rem 0; }
.three { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1.6rem 1.8rem; margin: 1.2rem 0; }
.strip { display: grid; grid-template-columns: repeat(4, 1fr); gap: 1rem; margin: 1.2rem 0; }
.stage { display: grid; grid-template-columns: 2.06fr 1fr; gap: 1.4rem; margin: 1.2rem 0;
  align-items: start; }
.stage .aside { display: grid; gap: 1rem; }
.framed { display: grid; gap: 0.25rem; grid-template-columns: minmax(0, 1fr); }
.framed.by-row { grid-template-columns: auto minmax(0, 1fr); }
.asked { display: grid; color: var(--muted); font-size: 0.82rem; line-height: 1.2; }
.asked span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0; }
.by-column > .asked { grid-template-columns: repeat(var(--count), minmax(0, 1fr)); text-align: center; }
.by-row > .asked { grid-template-rows: repeat(var(--count), minmax(0, 1fr)); align-items: center;
  text-align: right; max-width: 8rem; }
.aside .asked, .strip .asked { font-size: 0.7rem; }
.two > p { margin: 0; }
.maps, .pairs { margin: 1.2rem 0 1.8rem; }
.pairs { max-width: 46rem; }
table { border-collapse: collapse; font-size: 0.88rem; line-height: 1.45; }
th, td { text-align: left; vertical-align: top; padding: 0.22rem 1rem 0.22rem 0;
  border-bottom: 1px solid var(--rule); overflow-wrap: anywhere; }
td.short { white-space: nowrap; }
thead th { color: var(--muted); font-weight: 600; border-bottom-width: 2px; }
tbody th { font-weight: 400; color: var(--muted); }
table.numbers { margin: 1rem 0; }
.wide { overflow-x: auto; }
table.numbers td, table.numbers th { text-align: right; padding: 0.22rem 0 0.22rem 2rem; }
table.numbers th:first-child, table.numbers td:first-child { padding-left: 0; }
.settings { columns: 3 17rem; column-gap: 2.4rem; margin: 1rem 0; }
.settings section { break-inside: avoid; margin: 0 0 1.4rem; }
.settings h3 { margin: 0 0 0.2rem; }
.settings table { width: 100%; }
.settings td { text-align: right; padding-right: 0; }
summary { cursor: pointer; color: var(--muted); font-size: 0.92rem; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--muted);
  font-size: 0.86rem; }
@media screen and (max-width: 50rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .two, .three, .tiles, .stage { grid-template-columns: minmax(0, 1fr); }
  .strip { grid-template-columns: repeat(2, 1fr); }
  .maps { overflow-x: auto; }
  .maps .chart { min-width: 44rem; }
}
@media print {
  @page { margin: 14mm; }
  html { font-size: 12px; }
  body { padding: 0; max-width: none; font-size: 12px; }
  h2 { margin-top: 2rem; }
  nav { display: none; }
  h2, h3 { break-after: avoid; }
  .tile { background: none; border: 1px solid var(--rule); break-inside: avoid; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""
