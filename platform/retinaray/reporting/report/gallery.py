"""The gallery of a report: images inside the page, and boxes that its script draws on them.

Each image is in the page once, whatever number of runs and groups show it. Boxes are data, so that
the reader's threshold can decide which of them are drawn.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from retinaray.evaluation.gallery_choice import GalleryImage
from retinaray.reporting.report.markup import Section

GROUP_NAMES: Mapping[str, str] = {
    "best": "Best",
    "worst": "Worst",
    "confused": "Most confused",
    "random": "Random",
}
"""Keys of the groups and their names, in the order of the page."""
VERDICTS = (
    "hit",
    "classification",
    "localisation",
    "both",
    "duplicate",
    "background",
    "ignored",
)
"""Verdicts by the numbers that stand for them in the page; its script has the same list."""
_KEYS = {
    "hit": "hit",
    "false": "false: on background or poorly placed",
    "confused": "false: another class",
    "duplicate": "false: second on one object",
    "missed": "missed object",
}


@dataclass(frozen=True)
class View:
    """What one run has in one image.

    Attributes:
        run: Position of the run in the gallery.
        image: Its boxes.
        groups: Keys of `GROUP_NAMES` in which the image was chosen for this run; empty when only
            another run chose it.
    """

    run: int
    image: GalleryImage
    groups: tuple[str, ...]


@dataclass(frozen=True)
class GalleryPicture:
    """One image.

    Attributes:
        name: To show.
        height: Of the original, in pixels.
        width: Likewise.
        webp: The image, shrunk.
        views: One for each run that has it, at least one.
    """

    name: str
    height: int
    width: int
    webp: bytes
    views: tuple[View, ...]


@dataclass(frozen=True)
class GalleryRun:
    """One run of the gallery.

    Attributes:
        name: As everywhere on the page.
        classes: Names by class index.
        thresholds: The run's own score thresholds by class index.
    """

    name: str
    classes: tuple[str, ...]
    thresholds: tuple[float, ...]


@dataclass(frozen=True)
class PageGallery:
    """All pictures.

    Attributes:
        runs: At least one where there are pictures.
        pictures: In the order in which each group shows them.
    """

    runs: tuple[GalleryRun, ...] = ()
    pictures: tuple[GalleryPicture, ...] = ()

    @property
    def num_image_bytes(self) -> int:
        """Length of all images before they are made text."""
        return sum(len(picture.webp) for picture in self.pictures)


def render_gallery(gallery: PageGallery) -> Section:
    """The controls, and an empty grid that the script fills."""
    body = ""
    if gallery.pictures:
        body = (
            '<noscript><p class="gap">The gallery needs JavaScript, which is turned off.</p>'
            f'</noscript><div id="gallery-body" hidden>{_render_controls(gallery)}'
            '<p id="gallery-count" class="soft" role="status"></p>'
            '<div id="grid" class="grid" role="group" aria-label="Images: arrow keys move, Enter '
            'enlarges"></div></div>'
        )
    return Section("gallery", "Images: what was hit, missed and made up", body)


def _render_controls(gallery: PageGallery) -> str:
    buttons = "".join(
        f'<button type="button" data-group="{key}" aria-pressed="false">{name}</button>'
        for key, name in {"all": "All", **GROUP_NAMES}.items()
        if key == "all" or _is_used(gallery.pictures, key)
    )
    options = "".join(
        f'<option value="{number}">{escape(run.name)}</option>'
        for number, run in enumerate(gallery.runs)
    )
    hidden = " hidden" if len(gallery.runs) < 2 else ""
    keys = "".join(_render_key(kind, text) for kind, text in _KEYS.items())
    return (
        '<div class="controls">'
        f'<div role="group" aria-label="Which images" class="groups">{buttons}</div>'
        f'<label{hidden}>Boxes of <select id="run">{options}</select></label>'
        '<label>Score above <input id="threshold" type="range" min="0" max="0.99" step="0.01" '
        'value="0.5"></label> <output id="threshold-value" for="threshold"></output>'
        '<button type="button" id="own-thresholds">Thresholds of the run</button></div>'
        f'<ul class="legend">{keys}</ul>'
    )


def _render_key(kind: str, text: str) -> str:
    place = 'x="3" y="3" width="38" height="10"'
    return (
        '<li><svg class="key box" viewBox="0 0 44 16" aria-hidden="true">'
        f'<rect class="halo" {place}/><rect class="{kind}" {place}/></svg>{text}</li>'
    )


def _is_used(pictures: Sequence[GalleryPicture], key: str) -> bool:
    return any(key in view.groups for picture in pictures for view in picture.views)


def render_data(gallery: PageGallery) -> str:
    """Script elements with the boxes and the images, for the end of the page; empty without any.

    An image is the text of an element of its own, so that the browser decodes none before it is
    shown.
    """
    if not gallery.pictures:
        return ""
    values = {
        "runs": [
            {
                "name": run.name,
                "classes": run.classes,
                "thresholds": [round(value, 6) for value in run.thresholds],
            }
            for run in gallery.runs
        ],
        "pictures": [
            {
                "name": picture.name,
                "height": picture.height,
                "width": picture.width,
                "views": {str(view.run): _describe_view(view) for view in picture.views},
            }
            for picture in gallery.pictures
        ],
    }
    # A `<` in a name could end the element.
    text = json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")
    images = "".join(
        f'<script type="text/plain" id="picture-{number}">'
        f"{base64.b64encode(picture.webp).decode('ascii')}</script>\n"
        for number, picture in enumerate(gallery.pictures)
    )
    return f'<script type="application/json" id="gallery-data">{text}</script>\n{images}'


def _describe_view(view: View) -> dict[str, object]:
    image = view.image
    return {
        "groups": {key: _explain_choice(image, key) for key in view.groups},
        "found": [
            [
                *_to_xywh(box.box_xyxy),
                round(box.score, 4),
                box.class_index,
                VERDICTS.index(box.verdict),
            ]
            # The best last, so that it lies on top.
            for box in reversed(image.detections)
        ],
        "truth": [
            [
                *_to_xywh(box.box_xyxy),
                -1 if box.hit_score is None else round(box.hit_score, 4),
                box.class_index,
            ]
            for box in image.truths
            if not box.is_ignored
        ],
    }


def _explain_choice(image: GalleryImage, group: str) -> str:
    if group == "confused":
        return f"{image.num_confused} taken for another class"
    if group == "random" or image.f1 is None:
        return ""
    return f"F1 {image.f1:.2f}"


def _to_xywh(box_xyxy: tuple[float, float, float, float]) -> list[float]:
    left, top, right, bottom = box_xyxy
    return [round(value, 1) for value in (left, top, right - left, bottom - top)]
