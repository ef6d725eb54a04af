"""The page's style and its pieces of HTML. Nothing is loaded from the network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import gradio
from gradio.themes.utils.fonts import Font

from ld_common.release.release import Release
from ld_generate.age_curve import JUDGED
from ld_generate.web.drawing import PICTURES, EditResult
from ld_generate.writer import DIFFERENCE_LIMIT

NOTICE = (
    '<div class="notice" role="note"><b>Synthetic images, for research only.</b> '
    "What this page draws is model output, not an observation of a patient. Not for diagnosis.</div>"
)
DIFFERENCE_SCALE = (
    '<div class="scale"><span>darker</span><i></i><span>brighter</span></div>'
    f'<div class="note">Difference: what the edit changes; the strongest colour is '
    f"{50 * DIFFERENCE_LIMIT:.0f} % of the scan's grey range.</div>"
)
FONTS = [Font(name) for name in ("system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "sans-serif")]
MONOSPACE = [Font(name) for name in ("ui-monospace", "Consolas", "monospace")]

CHANGE = "change by the edit"
FAMILIAR = "<b>Familiar scan:</b> it lies within what the release's sites had."
UNFAMILIAR = (
    "<b>Unfamiliar scan: do not trust this answer.</b> It lies outside what the release's sites had; the warning above "
    "says what to check."
)
GAUGE_ENDS = '<div class="gauge-ends"><span>like the sites\' scans</span><span>limit</span><span>unlike</span></div>'

NAME_PICTURES = """() => {
    const name = () => document.querySelectorAll(".picture").forEach(block => {
        const title = block.querySelector('[data-testid="block-label"]')?.textContent.trim() || "picture";
        block.querySelectorAll("button").forEach(
            button => button.textContent.trim() || button.getAttribute("aria-label")
                || button.setAttribute("aria-label", `Enlarge: ${title}`));
        block.querySelectorAll("img").forEach(picture => picture.alt || (picture.alt = title));
    });
    new MutationObserver(name).observe(document.body, {childList: true, subtree: true});
    name();
}"""
"""JavaScript: pictures get their titles as names, which Gradio leaves out."""

CSS = """
.gradio-container { overflow: visible !important; padding: 0 !important; }
.gradio-container > .main { padding: 0 !important; max-width: none; }
.gradio-container .column { gap: 10px; }
.gradio-container .html-container { padding: 0 !important; }
footer { display: none !important; }
#notice { position: sticky; top: 0; z-index: 900; border-radius: 0; }
#title, #both { max-width: 1640px; width: 100%; margin: 0 auto; padding: 0 24px; }
#both { padding-bottom: 24px; }
.notice { background: #7a4100; color: #fff; padding: 7px 24px; font-size: 14px; line-height: 1.4; text-align: center; }
.notice b { color: #fff; }
#title h1 { font-size: 20px; font-weight: 650; margin: 0; }
#title p { margin: 0; font-size: 13px; color: var(--body-text-color-subdued); }
.group-name { font-size: 12px; font-weight: 650; letter-spacing: .04em; text-transform: uppercase;
              color: var(--body-text-color-subdued); margin-top: 4px; }
.hint { display: grid; place-content: center; text-align: center; min-height: 420px; font-size: 15px; line-height: 1.9;
        color: var(--body-text-color-subdued); border: 1px dashed var(--border-color-primary); border-radius: 8px; }
#both > .column { align-self: stretch; }
#message { position: sticky; top: 40px; z-index: 60; }
#message:has(.translucent) { min-height: 96px; }
.message { border-radius: 6px; padding: 9px 13px; font-size: 14px; line-height: 1.4; border-left: 4px solid; }
.message.error { background: #fdecea; color: #6d1b14; border-color: #c62f21; }
.message.warning { background: #fff4dc; color: #5c3a00; border-color: #d98a00; }
.message + .message { margin-top: 6px; }
.dark .message.error { background: #43150f; color: #ffd9d4; }
.dark .message.warning { background: #402c05; color: #ffe6b3; }
.files label[data-testid="block-label"], .picture label[data-testid="block-label"] {
    position: static; border: 0; background: none; box-shadow: none; padding: 5px 8px; font-size: 12px; }
.files label[data-testid="block-label"] span, .picture label[data-testid="block-label"] span { display: none; }
.files .icon-wrap { display: none; }
#ask :is(input[type="text"], textarea):disabled { background: var(--background-fill-secondary); }
#ask label:has(:disabled) { opacity: .7; }
#ask input[type="range"] { min-width: 0; }
#ask [id^="target-"] .reset-button { display: none; }
.files .wrap[data-testid="upload-text"] { font-size: 14px; line-height: 1.5; }
#draw { position: sticky; bottom: 0; z-index: 50; box-shadow: 0 0 0 10px var(--body-background-fill); }
.caption b { font-size: 17px; font-weight: 650; color: var(--body-text-color); }
.caption div { font-size: 13px; color: var(--body-text-color-subdued); }
.preview { max-width: 560px; }
.picture .image-container, .picture .image-container > button, .picture .image-frame { width: 100%; height: auto; }
.picture img { display: block; width: 100% !important; height: auto !important; max-height: 64vh; object-fit: contain; }
.block.fullscreen::before { content: "Synthetic images, for research only. Not for diagnosis.";
    display: block; padding: 7px 24px; background: #7a4100; color: #fff; font-size: 14px; text-align: center; }
.block.fullscreen img { max-height: calc(100vh - 80px); }
.gradio-container table.measured { border: 0; border-collapse: collapse; width: 100%; margin: 0; font-size: 13px;
                                   font-variant-numeric: tabular-nums; }
.gradio-container table.measured :is(tr, th, td) { border: 0; background: none; }
.gradio-container table.measured :is(th, td) { text-align: right; padding: 4px 0 4px 12px;
                                              color: var(--body-text-color);
                                              border-bottom: 1px solid var(--border-color-primary); }
.gradio-container table.measured :is(th, td):first-child { text-align: left; padding-left: 0; }
.gradio-container table.measured th { font-weight: 600; color: var(--body-text-color-subdued); }
.gauge { max-width: 560px; font-size: 13px; line-height: 1.4; }
.gauge-words b { color: var(--body-text-color); font-weight: 650; }
.gauge.unfamiliar .gauge-words b { color: #b3261e; }
.dark .gauge.unfamiliar .gauge-words b { color: #ff9d94; }
.gauge-bar { position: relative; height: 10px; border-radius: 5px; margin: 8px 0 4px;
             background: linear-gradient(90deg, #2e7d4f 0 30%, #d9a400 50%, #c62f21 70% 100%); }
.gauge-bar b { position: absolute; left: calc(50% - 1px); top: 0; width: 2px; height: 10px; background: #fff; }
.gauge-bar i { position: absolute; top: -4px; width: 6px; height: 18px; margin-left: -3px; border-radius: 3px;
               background: var(--body-text-color); box-shadow: 0 0 0 2px var(--body-background-fill); }
.gauge-ends { display: grid; grid-template-columns: 1fr auto 1fr; font-size: 12px;
              color: var(--body-text-color-subdued); }
.gauge-ends span:last-child { text-align: right; }
.wrap .or, .min_value, .max_value { color: var(--body-text-color-subdued) !important; }
.note { font-size: 12px; line-height: 1.4; color: var(--body-text-color-subdued); margin-top: 4px; }
.scale { display: grid; grid-template-columns: auto 1fr auto; gap: 8px; align-items: center; font-size: 12px; }
.scale i { height: 10px; border-radius: 3px;
           background: linear-gradient(90deg, #053061, #4393c3, #f7f7f7, #d6604d, #67001f); }
"""


def theme() -> gradio.themes.Base:
    """Greys, one blue, and fonts of the machine."""
    return gradio.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=FONTS,
        font_mono=MONOSPACE,
        text_size="sm",
        spacing_size="sm",
        radius_size="sm",
    ).set(  # the theme's own colours have too little contrast for small text
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        color_accent="*primary_700",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        slider_color="*primary_600",
    )


def title(release: Release, strict: bool = False) -> str:
    """The release, its signature, and whether the page is strict."""
    signed = f"signed by {release.signed_by}" if release.signed_by else "not signed: its origin is not verified"
    kind = release.modality.name.replace("_", " ")
    refuses = "; strict: scans and attributes that its sites did not have are refused" if strict else ""
    about = f"release “{escape(release.study.name)}”, {escape(signed + refuses)}"
    return f"<h1>Counterfactuals: {escape(kind)}</h1><p>{about}</p>"


def heading(text: str) -> gradio.HTML:
    """The name of a group of controls."""
    return gradio.HTML(f'<div class="group-name">{escape(text)}</div>')


def message(kind: str, line: str) -> str:
    """One line of kind `error` or `warning`."""
    return f'<div class="message {kind}" role="alert">{escape(line)}</div>'


def caption(name: str, result: EditResult) -> str:
    """What the pictures show, the scan's name and the settings."""
    settings = f"{escape(name)} · {escape(result.settings)}"
    return f'<div class="caption"><b>Synthetic: {escape(result.title)}</b><div>{settings}</div></div>'


def evaluation(lines: list[str]) -> str:
    """What the release's evaluation says of such edits; nothing where it says nothing."""
    if not lines:
        return ""
    items = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<div class="note">On test patients, this release was:<ul>{items}</ul></div>'


def familiarity_gauge(familiarity: Mapping[str, Any] | None) -> str:
    """How unlike the sites' scans a scan is, as a bar whose middle is the limit; empty where a release cannot tell."""
    if familiarity is None:
        return ""
    share = max(familiarity[name] / limit for name, limit in familiarity["limits"].items())
    words = UNFAMILIAR if familiarity["unfamiliar"] else FAMILIAR
    kind = "unfamiliar" if familiarity["unfamiliar"] else "familiar"
    return (
        f'<div class="gauge {kind}"><div class="gauge-words">{words}</div><div class="gauge-bar" role="meter" '
        f'aria-label="distance from the sites\' scans" aria-valuemin="0" aria-valuemax="2" '
        f'aria-valuenow="{min(share, 2):.2f}" aria-valuetext="{share:.2f} times the limit"><b></b>'
        f'<i style="left: {50 * min(share, 2):.1f}%"></i></div>{GAUGE_ENDS}</div>'
    )


def biomarker_table(
    biomarkers: Mapping[str, Sequence[float]], reference: str, band: Mapping[str, Any] | None = None
) -> str:
    """Areas in mm2 of one counterfactual as a table; the last row is its change from `reference`, of `PICTURES`.

    The note has the band around the change, as `record.json` holds it.
    """
    if not biomarkers:
        return ""
    columns = [[*values, values[2] - values[PICTURES.index(reference)]] for values in biomarkers.values()]
    rows = [
        [kind, *(f"{column[row]:{'+,.0f' if kind == CHANGE else ',.0f'}}" for column in columns)]
        for row, kind in enumerate((*PICTURES, CHANGE))
    ]
    note = f"Change by the edit: counterfactual minus {reference}."
    if band is not None:
        name = band["biomarker"]
        before = biomarkers[name][PICTURES.index(reference)]
        low, high = (band[end] - before for end in ("low_mm2", "high_mm2"))
        beyond = "; more years than were judged" if band["kind"] != JUDGED else ""
        note += f" {band['level']:.0%} band of {escape(name)}: {low:+,.0f} to {high:+,.0f} mm²{beyond}.".replace(
            "%", " %"
        )
    return _table(["picture", *(f"{name}, mm²" for name in biomarkers)], rows, note)


def sweep_table(rows: Sequence[Sequence[str]]) -> str:
    """The rows of a sweep's CSV, header first, as a table."""
    if not rows:
        return ""
    rounded = [[kind, *(f"{float(value):,.4g}" for value in values)] for kind, *values in rows[1:]]
    return _table(rows[0], rounded, "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], note: str) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    table = f'<table class="measured"><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>'
    return f'{table}<div class="note">{note}</div>' if note else table
