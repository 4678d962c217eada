"""The look of every page that Towers writes: one file that needs no network."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --ink: #1d2530; --soft: #67707d; --line: #d9dee5; --paper: #fff;
  --s0: #2f6fb3; --s1: #c8641b; --s2: #2a8a57; --s3: #8a4fb0; --s4: #b23a55;
  --s5: #1f8a93; --s6: #a8811a; --s7: #5b5bd0; --s8: #7a5a3c; --s9: #d2559b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --soft: #9aa4b2; --line: #343c47;
  --paper: #14181d; --s0: #6ba6e8; --s1: #f0975a; --s2: #62c08f; --s3: #bd8ce0; --s4: #e8788f;
  --s5: #55c3cc; --s6: #d8b44a; --s7: #9a9af5; --s8: #b99674; --s9: #f08fc4; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1000px; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; font-weight: 600; } h2 { margin-top: 2.2rem; }
.charts { display: flex; flex-wrap: wrap; gap: 1.2rem 0.4rem; margin-top: 1.2rem; }
figure { margin: 0; max-width: 100%; }
figcaption, .soft, td.soft { color: var(--soft); font-size: 13px; }
svg { max-width: 100%; overflow: visible; } svg text { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); }
svg polyline { fill: none; stroke-width: 1.6; stroke-linecap: round; } svg polygon { opacity: .25; }
svg circle { stroke: var(--paper); }
table { border-collapse: collapse; } td, th { padding: 2px 10px 2px 0; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
.cells td { padding: 2px 5px; text-align: right; font-size: 12px; min-width: 24px; }
.kernels { display: flex; gap: 2rem; flex-wrap: wrap; }
img { max-width: 100%; } .kernels img { image-rendering: pixelated; }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem; }
.bar { height: 8px; background: var(--s0); } .bar.right { background: var(--s2); }
pre { background: color-mix(in srgb, var(--line) 40%, transparent); padding: 1rem; overflow: auto; }
"""


def page(body: str) -> str:
    """A whole HTML page with this body."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Towers</title>'
        f"<style>{STYLE}</style></head><body>{body}</body></html>\n"
    )
