"""The frame of a report page: head, style sheet, navigation; no script, no network."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape

from fedsim.report.markup import Html, element, join

# A browser refuses whatever a hostile text might still try to load or run.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --muted: #59636e; --paper: #ffffff;
  --panel: #f6f8fa; --line: #d1d9e0; --accent: #0062a3; --warn: #9a3412; --warn-bg: #fff4ed; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --muted: #9da7b1;
  --paper: #0d1117; --panel: #161b22; --line: #30363d; --accent: #6cb6ff; --warn: #ffb38a;
  --warn-bg: #2d1a10; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 66rem; background: var(--paper);
  color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: .9rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.8rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin: 1.2rem 0 0; font-size: .92rem; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
.muted, figcaption, caption { color: var(--muted); font-size: .9rem; }
.scroll { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; caption-side: bottom; padding-top: .5rem; max-width: 46rem; }
th, td { padding: .42rem .6rem; text-align: right; border-bottom: 1px solid var(--line);
  white-space: nowrap; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--line); }
thead th { white-space: normal; vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 9rem; max-width: 20rem; white-space: normal;
  overflow-wrap: anywhere; }
td strong { color: var(--accent); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.4rem; margin: .8rem 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
figure { margin: 1.4rem 0; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 8px;
  border: 1px solid var(--line); padding: .6rem; }
figcaption { margin-top: .45rem; max-width: 46rem; }
.warn { background: var(--warn-bg); border-left: 4px solid var(--warn); border-radius: 4px;
  padding: .6rem 1rem; margin: 1rem 0; }
.warn p, .warn ul { margin: .2rem 0; }
.bad { color: var(--warn); font-weight: 600; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  padding: .9rem 1rem; overflow-x: auto;
  font: 13px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
summary { cursor: pointer; color: var(--accent); margin: .6rem 0; }
footer { margin-top: 3rem; padding-top: 1rem; border-top: 1px solid var(--line); }
@media print { nav { display: none; } body { max-width: none; } figure { break-inside: avoid; } }
"""


def page(title: str, lead: Html, sections: Mapping[str, tuple[str, Html]], footer: str) -> str:
    """Returns a whole HTML document.

    lead: what stands below the title. sections: id → (heading, body); empty bodies are left out.
    """
    shown = {key: pair for key, pair in sections.items() if pair[1]}
    links = [element("a", heading, href=f"#{key}") for key, (heading, _) in shown.items()]
    body = join(
        [
            element("header", element("h1", title), lead, element("nav", *links)),
            *(
                element("section", element("h2", heading), inside, id=key)
                for key, (heading, inside) in shown.items()
            ),
            element("footer", footer, class_="muted"),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{CSS}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )
