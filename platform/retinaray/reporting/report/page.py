"""A report as one HTML file that needs nothing beside it: style, script, charts, images inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources

from retinaray.reporting.report.contents import KIND_NAMES, ReportedRun
from retinaray.reporting.report.gallery import PageGallery, render_data, render_gallery
from retinaray.reporting.report.markup import (
    Section,
    legend_of_runs,
    make_facts,
    make_table,
    show_number,
)
from retinaray.reporting.report.sections_curves import render_curves
from retinaray.reporting.report.sections_detection import (
    render_calibration,
    render_classes,
    render_confusion,
    render_errors,
    render_sizes,
)
from retinaray.reporting.report.sections_setup import render_anchors, render_parity, render_setup
from retinaray.reporting.report.sections_training import (
    render_speed,
    render_sweep,
    render_training,
)

# Nothing may be fetched, whatever a name in the data says.
_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)
_SCORES = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large", "AR_100")
_SHORT_TITLES: Mapping[str, str] = {
    "training": "Training",
    "trials": "Trials",
    "classes": "Classes",
    "curves": "Precision, recall",
    "sizes": "Size",
    "confusion": "Confusion",
    "errors": "Errors",
    "scores": "Scores",
    "parity": "Parity",
    "gallery": "Images",
    "anchors": "Anchors",
    "speed": "Speed",
    "setup": "Settings",
}


def render_page(runs: Sequence[ReportedRun], gallery: PageGallery) -> str:
    """Write the page.

    Args:
        runs: At least one. Sections that no run has anything for are left out, and the end of the
            page says why.
        gallery: Images with their boxes; may hold none.

    Returns:
        HTML that fetches nothing.
    """
    numbered = list(enumerate(runs))
    sections = [
        section
        for section in (
            render_training(numbered),
            render_sweep(numbered),
            render_classes(numbered),
            render_curves(numbered),
            render_sizes(numbered),
            render_confusion(numbered),
            render_errors(numbered),
            render_calibration(numbered),
            render_parity(numbered),
            render_gallery(gallery),
            render_anchors(numbered),
            render_speed(numbered),
            render_setup(numbered),
        )
        if section.body
    ]
    title = _name_page(runs)
    parts = [
        f"<!doctype html>\n{_render_start(title)}",
        _render_navigation(sections),
        f'<main id="content"><h1>{escape(title)}</h1>',
        _render_overview(numbered),
        *(
            f'<section id="{section.anchor}" aria-labelledby="{section.anchor}-title">'
            f'<h2 id="{section.anchor}-title">{escape(section.title)}</h2>{section.body}</section>'
            for section in sections
        ),
        _render_gaps(runs),
        _render_footer(gallery),
        f"</main>{_render_viewer() if gallery.pictures else ''}",
        render_data(gallery),
        f"<script>{_read('page.js')}</script></body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _name_page(runs: Sequence[ReportedRun]) -> str:
    if len(runs) == 1:
        return f"{runs[0].name}: {KIND_NAMES[runs[0].kind]}"
    return f"{len(runs)} runs compared: {', '.join(run.name for run in runs)}"


def _render_start(title: str) -> str:
    return (
        '<html lang="en" data-theme="auto"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{_read('page.css')}</style></head>\n"
        '<body><a class="skip" href="#content">To the content</a>'
    )


def _read(name: str) -> str:
    """A file that lies beside this module."""
    return resources.files("retinaray.reporting.report").joinpath(name).read_text("utf-8")


def _render_navigation(sections: Sequence[Section]) -> str:
    links = "".join(
        f'<a href="#{section.anchor}">{_SHORT_TITLES[section.anchor]}</a>' for section in sections
    )
    return (
        f'<nav aria-label="Sections">{links}<button type="button" id="theme" hidden>Theme</button>'
        "</nav>"
    )


def _render_overview(runs: Sequence[tuple[int, ReportedRun]]) -> str:
    """Key numbers: tiles for one run, a table for several."""
    if len(runs) == 1:
        run = runs[0][1]
        scores = list_scores(run)
        tiles = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{show_number(scores[name])}</dd></div>"
            for name in _SCORES
            if name in scores
        )
        head = f'<dl class="tiles">{tiles}</dl>' if tiles else ""
        return head + make_facts({"place": run.source, **run.facts})
    found = [list_scores(run) for _, run in runs]
    names = [name for name in _SCORES if any(name in scores for scores in found)]
    rows = [
        [
            escape(run.name),
            KIND_NAMES[run.kind],
            *(show_number(scores.get(name)) for name in names),
            f"<small>{_join_facts(run)}</small>",
        ]
        for (_, run), scores in zip(runs, found, strict=True)
    ]
    columns = ["run", "kind", *names, "about"]
    return legend_of_runs(runs) + make_table(columns, rows, caption="All runs", kind="overview")


def _join_facts(run: ReportedRun) -> str:
    return escape("; ".join(f"{name} {value}" for name, value in run.facts.items()))


def list_scores(run: ReportedRun) -> dict[str, float | None]:
    """COCO's numbers of a run: of its detections, else as recorded, else its best validation."""
    if run.analysis is not None:
        return dict(run.analysis.scores.summary)
    if run.scores:
        return {name: run.scores[name] for name in _SCORES if name in run.scores}
    scored = [e for e in run.events if e["kind"] == "validation" and e.get("AP") is not None]
    if not scored:
        return {}
    best = max(scored, key=lambda event: float(event["AP"]))
    return {name: best.get(name) for name in _SCORES if name in best}


def _render_gaps(runs: Sequence[ReportedRun]) -> str:
    items = "".join(
        f"<li>{escape(run.name)}: {escape(sentence)}</li>" for run in runs for sentence in run.gaps
    )
    if not items:
        return ""
    return (
        '<section id="gaps" aria-labelledby="gaps-title"><h2 id="gaps-title">What is not shown</h2>'
        f'<ul class="gap">{items}</ul></section>'
    )


def _render_footer(gallery: PageGallery) -> str:
    number = len(gallery.pictures)
    images = f"{number} images, {gallery.num_image_bytes / 1e6:.1f} MB of pixels" if number else ""
    text = "This page is one file and fetches nothing."
    return f"<footer>{text} {images}</footer>"


def _render_viewer() -> str:
    """The enlarged image, which the script opens."""
    return (
        '<dialog id="viewer" aria-labelledby="viewer-title"><div class="viewer"><header>'
        '<h2 id="viewer-title"></h2>'
        '<button type="button" id="zoom-out" aria-label="Zoom out" title="Zoom out (-)">−</button>'
        '<output id="zoom" aria-label="Zoom">100 %</output>'
        '<button type="button" id="zoom-in" aria-label="Zoom in" title="Zoom in (+)">+</button>'
        '<button type="button" id="previous" aria-label="Previous image">←</button>'
        '<button type="button" id="next" aria-label="Next image">→</button>'
        '<button type="button" id="close" autofocus>Close</button></header>'
        '<span class="frame" tabindex="0" role="region" aria-label="Image; arrow keys move it when '
        'it is enlarged"><img alt=""><svg aria-hidden="true"></svg></span>'
        '<p id="viewer-note" role="status"></p></div></dialog>'
    )
