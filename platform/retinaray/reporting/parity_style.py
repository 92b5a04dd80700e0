"""The style sheet of the parity page: light and dark, and tables as cards on narrow screens."""

from __future__ import annotations

STYLE = """
:root { --page: #fbfbfc; --card: #ffffff; --text: #1c2024; --soft: #5c6570; --line: #dfe3e8;
  --bar: #4f7cac; --base: #8b95a1; --good: #0f7a3d; --good-back: #e2f5e9; --bad: #b3261e;
  --bad-back: #fde7e5; --reference: #0072e8; --candidate: #ff7a00; }
@media (prefers-color-scheme: dark) { :root { --page: #14171a; --card: #1c2126; --text: #e7eaee;
  --soft: #a3adb8; --line: #333b44; --bar: #6ea3da; --base: #77828e; --good: #6fdc9b;
  --good-back: #14351f; --bad: #ff9a90; --bad-back: #4a1a17; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 20px 64px; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 12px; }
h2 { font-size: 1.15rem; margin: 40px 0 10px; }
p { margin: 0 0 12px; max-width: 75ch; }
.file { overflow-wrap: anywhere; }
small { display: block; color: var(--soft); font-size: .8rem; font-weight: 400; }
section > ul { margin: 0; padding-left: 1.2em; overflow-wrap: anywhere; }
.facts { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0; padding: 0; list-style: none;
  color: var(--soft); }
.verdict { display: inline-block; border-radius: 6px; padding: 1px 10px; font-weight: 600; }
.verdict.pass { color: var(--good); background: var(--good-back); }
.verdict.fail { color: var(--bad); background: var(--bad-back); }
ul.fail li::marker { color: var(--bad); }
.cases { width: 100%; border-collapse: collapse; background: var(--card);
  border: 1px solid var(--line); font-variant-numeric: tabular-nums; font-size: .92rem; }
.cases th, .cases td { text-align: left; vertical-align: top; padding: 9px 12px; }
.cases thead th { color: var(--soft); font-size: .8rem; font-weight: 600;
  border-bottom: 1px solid var(--line); }
.cases tbody tr + tr:not(.reasons) { border-top: 1px solid var(--line); }
.cases tbody th { font-weight: 600; overflow-wrap: anywhere; }
.cases .limit { color: var(--soft); font-size: .8rem; white-space: nowrap; }
.reasons td { padding-top: 0; }
.reasons ul { margin: 0; padding-left: 1.2em; color: var(--bad); }
.charts { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(480px, 1fr)); }
figure { margin: 0; padding: 12px 14px; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figcaption { font-weight: 600; overflow-wrap: anywhere; }
figcaption small { display: inline; margin-left: 8px; }
.pair { display: grid; gap: 12px; grid-template-columns: 1fr 1fr; margin-top: 8px; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
.bars { list-style: none; margin: 10px 0 0; padding: 0; font-size: .92rem; }
.bars li { display: grid; grid-template-columns: minmax(120px, 280px) 1fr 9.5em; gap: 2px 12px;
  align-items: center; padding: 4px 0; }
.bars .name { overflow-wrap: anywhere; }
.bars .number { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.bars .bar { display: block; height: 14px; border-radius: 2px; background: var(--bar); }
.bars .bar.reference { background: var(--base); }
svg text { fill: var(--text); font-size: 11px; }
svg .title { font-size: 11.5px; }
svg .tick { fill: var(--soft); font-size: 10.5px; }
svg .axis { stroke: var(--base); stroke-width: 1; }
svg .bar { fill: var(--bar); }
svg line.limit { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 4 3; }
svg .limit-text { fill: var(--bad); font-size: 10.5px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 20px; }
.key { display: inline-block; width: 30px; border-top: 4px solid var(--reference);
  margin-right: 8px; vertical-align: middle; }
.key.candidate { border-top: 4px dashed var(--candidate); }
.pictures { display: grid; gap: 16px; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)); }
.pictures figure { padding: 0; overflow: hidden; }
.pictures img { display: block; width: 100%; height: auto; }
.pictures figcaption { padding: 8px 12px 10px; font-weight: 400; font-size: .9rem; }
.pictures small { display: block; margin-left: 0; }
@media (max-width: 860px) {
  main { padding: 16px 12px 48px; }
  h1 { font-size: 1.3rem; }
  .charts { grid-template-columns: 1fr; }
  .pictures { grid-template-columns: 1fr; }
  .cases, .cases tbody, .cases tr, .cases th, .cases td { display: block; }
  .cases { border: 0; background: none; }
  .cases thead, .cases .empty { display: none; }
  .cases tbody tr:not(.reasons) { background: var(--card); border: 1px solid var(--line);
    border-radius: 8px; padding: 6px 0; margin-top: 12px; }
  .cases td { display: grid; grid-template-columns: 8.5em 1fr; gap: 0 10px; padding: 4px 12px; }
  .cases td > * { grid-column: 2; justify-self: start; }
  .cases td::before { content: attr(data-label); color: var(--soft); font-size: .85rem;
    grid-column: 1; grid-row: 1 / span 4; }
  .cases tbody tr:has(+ .reasons) { border-bottom: 0; border-radius: 8px 8px 0 0; }
  .cases .reasons { background: var(--card); border: 1px solid var(--line); border-top: 0;
    border-radius: 0 0 8px 8px; }
  .cases .reasons td { display: block; padding: 0 12px 10px; }
  .cases .reasons td::before { content: none; }
  .bars li { grid-template-columns: 1fr 9.5em; }
  .bars .name { grid-column: 1 / -1; }
}
@media (max-width: 520px) {
  .pair { grid-template-columns: 1fr; }
  figure { padding: 10px; }
}
"""
