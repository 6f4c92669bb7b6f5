"""The page's style: system fonts, one column, light and dark by the reader's preference, and fit for printing."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --sheet: #f7f7f5; --ink: #1b1b1f; --soft: #5d5f66; --faint: #8b8d94; --rule: #e3e3df;
  --train: #3b5bdb; --eval: #d9480f; --chosen: #0b7285; --rejected: #b02a5b;
  --good: #18703c; --good-back: #e3f4e8; --bad: #ab2121; --bad-back: #fbe6e6; --open: #5d5f66; --open-back: #ececea;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #141518; --sheet: #1c1e22; --ink: #e9e9ec; --soft: #a9abb3; --faint: #7d8088; --rule: #2e3036;
    --train: #8da2fb; --eval: #ff9a5c; --chosen: #4cc9dc; --rejected: #f58bb0;
    --good: #7ddb9d; --good-back: #17331f; --bad: #ff9a9a; --bad-back: #3b1a1a; --open: #a9abb3; --open-back: #2a2c31;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 3.5rem 1.5rem 4rem; max-width: 66rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 Inter, system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", sans-serif;
  font-variant-numeric: tabular-nums; -webkit-text-size-adjust: 100%;
}
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -0.02em; margin: 0.1rem 0 0; overflow-wrap: anywhere; }
section > h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3.2rem 0 0.9rem; }
p { margin: 0 0 0.6rem; }
.kicker { color: var(--soft); font-size: 0.9rem; margin: 0; }
.facts { display: flex; flex-wrap: wrap; gap: 0.4rem 2rem; margin: 1.1rem 0 1.8rem; padding: 0; }
.facts div { display: flex; gap: 0.45rem; min-width: 0; }
.facts dt { color: var(--soft); } .facts dd { margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); }
.card { background: var(--sheet); border: 1px solid var(--rule); border-radius: 10px; padding: 1.1rem 1.25rem 1.15rem;
  display: flex; flex-direction: column; min-width: 0; overflow-wrap: anywhere; }
.card h2 { font-size: 0.9rem; font-weight: 600; color: var(--soft); margin: 0; }
.card .figure { font-size: 2.3rem; line-height: 1.25; font-weight: 650; letter-spacing: -0.02em;
  margin: 0.15rem 0 0.2rem; }
.card .was, .card .arrow { color: var(--faint); font-weight: 450; }
.card .note { margin: 0 0 0.9rem; } .card .note p { margin: 0; }
.card .strip { width: 100%; height: auto; margin: 0.1rem 0 0.35rem; }
.verdict { align-self: flex-start; margin: auto 0 0; font-size: 0.85rem; font-weight: 600; border-radius: 99px;
  padding: 0.2rem 0.7rem; }
.good { color: var(--good); background: var(--good-back); } .bad { color: var(--bad); background: var(--bad-back); }
.open { color: var(--open); background: var(--open-back); }
.note { color: var(--soft); font-size: 0.86rem; line-height: 1.45; }
.lead { max-width: 46rem; }
.identity { display: grid; grid-template-columns: max-content 1fr; gap: 0.3rem 1.4rem; margin: 1.1rem 0;
  font-size: 0.92rem; }
.identity dt { color: var(--soft); }
.identity dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace;
  font-size: 0.88em; line-height: 1.75; }
.charts { display: grid; gap: 1.6rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
figure { margin: 0; min-width: 0; break-inside: avoid; display: flex; flex-direction: column; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0.1rem 1rem; font-size: 0.92rem;
  margin-bottom: 0.3rem; flex: 1; align-content: flex-start; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 0.8rem; color: var(--soft); font-size: 0.82rem; }
.legend span { display: inline-flex; align-items: center; gap: 0.35rem; }
figure > svg { display: block; width: 100%; height: auto; }
.swatch { width: 22px; height: 10px; }
svg text { font-size: 11.5px; fill: var(--soft); } svg .unit { fill: var(--faint); }
.grid { stroke: var(--rule); stroke-width: 1; } .axis { stroke: var(--faint); stroke-width: 1; }
.baseline { stroke: var(--faint); stroke-width: 1; stroke-dasharray: 2 3; }
.series path { fill: none; } .series .solid, .series .dashed { stroke-width: 1.9; stroke-linejoin: round; }
.series .faint { stroke-width: 1; opacity: 0.32; } .series .dashed { stroke-dasharray: 5 3.5; }
.series .hover { fill: transparent; stroke: none; }
.train { stroke: var(--train); } .train .dot { fill: var(--train); }
.eval { stroke: var(--eval); } .eval .dot { fill: var(--eval); }
.chosen { stroke: var(--chosen); } .chosen .dot { fill: var(--chosen); }
.rejected { stroke: var(--rejected); } .rejected .dot { fill: var(--rejected); }
.strip .rail { stroke: var(--rule); stroke-width: 2; } .strip .mark { stroke: var(--faint); stroke-width: 1.5; }
.strip .interval { stroke: var(--train); stroke-width: 5; stroke-linecap: round; opacity: 0.45; }
.strip .estimate { fill: var(--train); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 0.93rem; margin-bottom: 1rem; }
th, td { padding: 0.42rem 1.2rem 0.42rem 0; border-bottom: 1px solid var(--rule); text-align: left; vertical-align: top;
  overflow-wrap: anywhere; }
tbody th { font-weight: 400; color: var(--soft); } thead th { font-weight: 600; }
.value { text-align: right; white-space: nowrap; } .long { white-space: normal; }
td.value:last-child, th.value:last-child { padding-right: 0.2rem; }
article { border-top: 1px solid var(--rule); padding: 1.1rem 0 0.9rem; break-inside: avoid; }
.prompt { color: var(--soft); white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.sides { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); }
.sides > div { min-width: 0; }
h3 { font-size: 0.85rem; font-weight: 600; color: var(--soft); margin: 0 0 0.3rem; display: flex; gap: 0.6rem; }
.score { color: var(--ink); } .delta { color: var(--faint); font-weight: 450; }
.quote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.role { display: inline-block; color: var(--faint); font-size: 0.82rem; margin-right: 0.5rem; }
details { margin-top: 1.4rem; } section > h2 + details { margin-top: 0; }
summary { cursor: pointer; color: var(--soft); font-size: 0.92rem; margin-bottom: 0.8rem; }
summary:hover { color: var(--ink); }
summary:focus-visible { outline: 2px solid var(--train); outline-offset: 3px; border-radius: 3px; }
pre { background: var(--sheet); border: 1px solid var(--rule); border-radius: 8px; padding: 1rem 1.2rem; margin: 0;
  overflow-x: auto; font-size: 0.85rem; line-height: 1.5; }
code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; overflow-wrap: anywhere; }
pre code { overflow-wrap: normal; }
footer { margin-top: 4rem; padding-top: 1rem; border-top: 1px solid var(--rule); color: var(--faint);
  font-size: 0.85rem; }
@media print { body { padding: 0; max-width: none; font-size: 11pt; } summary { display: none; } }
"""
