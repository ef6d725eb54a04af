"""The style sheet and the script of the read-only pages. Nothing is loaded from anywhere."""

CSS = """
:root { color-scheme: light dark;
  --ground: #ffffff; --panel: #f6f7f9; --text: #16191d; --quiet: #4c5661; --line: #d3d8de; --link: #0a58b0;
  --good: #14632f; --good-ground: #e2f3e7; --warn: #6b4300; --warn-ground: #fff1d6;
  --bad: #8c1d13; --bad-ground: #fde8e6;
  --c0: #1f5fbf; --c1: #a84a00; --c2: #1b7a3d; --c3: #8a2aa0; --c4: #a8123a; --c5: #0b6b7a; --c6: #695900;
  --c7: #5448c8; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14171b; --panel: #1d2127; --text: #e8ebef; --quiet: #aab4bf; --line: #3a424c; --link: #8ec2ff;
  --good: #8ee0a8; --good-ground: #14331f; --warn: #ffd58a; --warn-ground: #3a2b0c;
  --bad: #ffb0a8; --bad-ground: #421712;
  --c0: #7db3ff; --c1: #ffab66; --c2: #6fd08c; --c3: #e08cf2; --c4: #ff8ba3; --c5: #5fd0e0; --c6: #d9c64a;
  --c7: #b0a8ff; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--text);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; overflow-wrap: anywhere; }
main, footer { max-width: 1180px; margin: 0 auto; padding: 0 24px; }
a { color: var(--link); }
a:focus-visible, main:focus-visible, [tabindex]:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
main:focus { outline: none; }
.skip { position: absolute; left: -999px; top: 0; padding: 8px 16px; background: var(--ground); z-index: 9; }
.skip:focus { left: 8px; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
h1 { font-size: 26px; line-height: 1.25; margin: 24px 0 2px; }
.about { margin: 0 0 12px; color: var(--quiet); }
.state { display: inline-block; margin: 0; padding: 5px 14px; border-radius: 8px; font-weight: 650; }
.good { color: var(--good); } .warn { color: var(--warn); } .bad { color: var(--bad); }
.state.good, .notice.good { background: var(--good-ground); }
.state.warn, .notice.warn { background: var(--warn-ground); }
.state.bad, .notice.bad { background: var(--bad-ground); }
.state.plain { background: var(--panel); }
td .good, td .warn, td .bad, dd .good, dd .warn, dd .bad { font-weight: 600; }
.notice { margin: 10px 0 0; padding: 9px 14px; border-radius: 8px; border-left: 5px solid; }
nav ul { display: flex; flex-wrap: wrap; gap: 4px 18px; list-style: none; padding: 0; margin: 16px 0 0; }
nav a { display: inline-block; padding: 4px 0; }
h2 { font-size: 19px; margin: 34px 0 10px; padding-top: 14px; border-top: 1px solid var(--line); }
section > p { max-width: 75ch; }
dl { display: grid; grid-template-columns: minmax(140px, max-content) 1fr; gap: 5px 22px; margin: 0 0 12px; }
dt { color: var(--quiet); } dd { margin: 0; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; margin: 0 0 18px; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 650; padding: 4px 0 6px; }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-bottom: 1px solid var(--line); }
thead th { overflow-wrap: normal; color: var(--quiet); font-weight: 600; font-size: 13.5px; vertical-align: bottom; }
tbody th { font-weight: 600; }
th.n, td.n { text-align: right; white-space: nowrap; }
@media (min-width: 761px) { .n + :not(.n) { padding-left: 10px; } tbody th { min-width: 9em; } }
@media (min-width: 1100px) { .short { white-space: nowrap; } }
.empty { color: var(--quiet); margin: 0 0 18px; }
.meter { margin: 0 0 16px; max-width: 520px; }
.meter svg { display: block; width: 100%; height: 14px; margin: 4px 0; }
.meter .whole { fill: var(--line); } .meter .used { fill: var(--c0); } .meter.full .used { fill: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 430px), 1fr)); gap: 8px 40px; }
figure { margin: 0 0 18px; min-width: 0; max-width: 640px; }
figcaption { font-weight: 650; margin-bottom: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 18px; list-style: none; margin: 0 0 10px; padding: 0;
  font-size: 14px; }
.key { width: 24px; height: 8px; margin-right: 7px; vertical-align: middle; }
.plot { display: grid; grid-template-columns: max-content 1fr; gap: 6px 10px; }
.plot > svg { width: 100%; height: 210px; overflow: visible; }
.heights, .rounds { display: flex; justify-content: space-between; font-size: 13px; line-height: 1; color: var(--quiet);
  font-variant-numeric: tabular-nums; }
.heights { flex-direction: column; text-align: right; margin: -6px 0; }
.rounds { grid-column: 2; } .rounds.one { justify-content: center; }
.axis { grid-column: 2; text-align: right; font-size: 13px; line-height: 1; color: var(--quiet); }
path { fill: none; vector-effect: non-scaling-stroke; stroke-width: 2; }
path.grid { stroke: var(--line); stroke-width: 1; }
path.dot { stroke-width: 7; stroke-linecap: round; stroke-dasharray: none !important; }
path.main { stroke: var(--text); stroke-width: 3.5; } path.dot.main { stroke-width: 8; }
path.c0 { stroke: var(--c0); } path.c1 { stroke: var(--c1); stroke-dasharray: 9 4; }
path.c2 { stroke: var(--c2); stroke-dasharray: 2 4; } path.c3 { stroke: var(--c3); stroke-dasharray: 9 4 2 4; }
path.c4 { stroke: var(--c4); stroke-dasharray: 14 4; } path.c5 { stroke: var(--c5); stroke-dasharray: 4 4; }
path.c6 { stroke: var(--c6); stroke-dasharray: 12 3 2 3 2 3; } path.c7 { stroke: var(--c7); stroke-dasharray: 1 3; }
footer { color: var(--quiet); font-size: 13.5px; padding-top: 8px; padding-bottom: 32px; }
@media (max-width: 760px) {
  main, footer { padding: 0 16px; } h1 { font-size: 22px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 8px; }
  table, tbody, tr, th, td, caption { display: block; width: 100%; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tbody tr { padding: 8px 0; border-bottom: 1px solid var(--line); }
  tbody th, tbody td, tbody .n { display: flex; justify-content: space-between; gap: 16px;
    padding: 2px 0; border: 0;
    text-align: right; white-space: normal; }
  tbody th { font-size: 16px; }
  tbody :is(th, td)::before { content: attr(data-head); color: var(--quiet); font-weight: 400; text-align: left;
    flex: none; max-width: 50%; }
  tbody td:has(> .nothing) { display: none; } }
@media print { nav, footer, .skip { display: none; } }
"""

SCRIPT = """
(() => {
  const every = Number(document.body.dataset.refresh) * 1000, told = document.getElementById("told");
  let tag = "", renewed = new Date();
  const clock = time => time.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
  const tell = (text, loud) => { told.textContent = text; told.className = loud ? "bad" : ""; };
  const replace = text => {
    const read = new DOMParser().parseFromString(text, "text/html"), fresh = read.querySelector("main");
    const shown = document.querySelector("main"), state = node => node.querySelector(".state").textContent;
    if (!fresh || fresh.innerHTML === shown.innerHTML) return;
    const held = document.activeElement, place = shown.contains(held) && held.getAttribute("href");
    if (state(fresh) !== state(shown)) document.getElementById("news").textContent = state(fresh);
    shown.replaceWith(document.adoptNode(fresh));
    document.title = read.title;
    if (place) document.querySelector(`main [href="${place}"]`)?.focus({ preventScroll: true });
  };
  const renew = async () => {
    if (document.hidden) return;
    try {
      const headers = tag ? { "If-None-Match": tag } : {};
      const answer = await fetch(location.pathname, { cache: "no-store", headers });
      if (answer.status === 200) { tag = answer.headers.get("ETag") ?? ""; replace(await answer.text()); }
      else if (answer.status !== 304) {
        return tell(`Not renewed since ${clock(renewed)}: ${(await answer.text()).trim().slice(0, 300)}`, true);
      }
      renewed = new Date();
      tell(`Renewed at ${clock(renewed)}, every ${every / 1000} seconds.`, false);
    } catch {
      tell(`The server of this page has ended. This is the state of ${clock(renewed)}.`, true);
    }
  };
  setInterval(renew, every);
  document.addEventListener("visibilitychange", renew);
})();
"""
