"""The report's part on near-duplicates: sizes of components, and the largest with thumbnails."""

import base64
from collections.abc import Sequence

from curation.report.data import Component, Member, ReportData, SizeBin
from curation.report.markup import Markup, element, joined, text
from curation.report.words import counted

_DROPPED = {
    "reference_copy": "dropped whole: copies an image of an evaluation set",
    "seed_copy": "dropped whole: copies a seed image that is in the manifest as it is",
}


def near_duplicates(report: ReportData) -> Markup:
    """Return the section, or a word about why there is nothing to show."""
    title = element("h2", "Near-duplicates")
    found = report.components
    if found is None:
        return element("section", title, element("p", "The dedup stage is not finished."))
    about = (
        f"Images of the pool with a cosine above {report.threshold:g} are linked, and what hangs together is one "
        f"component, of which one image is kept. {counted(found.num_singles, 'image')} stand alone."
    )
    content = [title, element("p", about), histogram(found.bins, "component")]
    if found.largest:
        content.append(element("h3", f"The {len(found.largest)} largest components"))
        content.append(
            element(
                "p",
                "The representative comes first, then those that are least like it: the ones to doubt. "
                "Pictures are made from the blurred images.",
                class_="small soft",
            )
        )
        content.append(element("div", *(_component(component) for component in found.largest), class_="components"))
    return element("section", *content)


def histogram(bins: Sequence[SizeBin], what: str) -> Markup:
    """Return bars: how many groups, called ``what``, there are of each size."""
    if not bins:
        return Markup("")
    most = max(entry.num_components for entry in bins)
    bars: list[str] = []
    for entry in bins:
        width = f"width:{100 * entry.num_components / most:.4f}%"
        numbers = f"{counted(entry.num_components, what)}, {counted(entry.num_images, 'image')}"
        bars += [
            element("div", _sizes(entry), class_="name"),
            element("div", element("div", class_="kept", style=width) if entry.num_components else "", class_="track"),
            element("div", numbers, class_="n"),
        ]
    return element("div", element("div", *bars, class_="bars"), class_="card")


def _sizes(entry: SizeBin) -> str:
    if entry.smallest == entry.largest:
        return counted(entry.smallest, "image")
    return f"{entry.smallest:,} to {entry.largest:,}"


def _component(component: Component) -> Markup:
    decision = next((_DROPPED[m.reason] for m in component.members if m.reason in _DROPPED), "")
    head = [
        element("b", counted(component.num_images, "image")),
        element("code", component.component_id, class_="soft"),
    ]
    if decision:
        head.append(element("span", decision, class_="warn small"))
    shown = [_figure(member) for member in component.members]
    more = component.num_images - len(component.members)
    if more > 0:
        shown.append(element("div", f"and {more:,} more", class_="more"))
    return element("div", element("header", *head), element("div", *shown, class_="members"), class_="component")


def _figure(member: Member) -> Markup:
    is_first = member.copy_of is None
    facts = "representative" if is_first else similarity_text(member)
    return figure(member, facts, "first" if is_first else "other")


def similarity_text(member: Member) -> str:
    """Return the similarity with three decimals, or a dash."""
    return "–" if member.similarity is None else f"{member.similarity:.3f}"


def figure(member: Member, facts: str, class_: str) -> Markup:
    """Return an image's thumbnail, if it may be shown, with its fate and address."""
    if member.thumbnail is None:
        picture: Markup = element("span", "no picture")
    else:
        data = base64.b64encode(member.thumbnail).decode("ascii")
        picture = Markup(f'<img alt="image {text(member.image_id)}" src="data:image/jpeg;base64,{data}">')
    fate = member.reason or "kept"
    caption = [
        element("b", facts),
        Markup("<br>"),
        fate.replace("_", " "),
        element("span", element("bdi", member.url), class_="url", title=member.url) if member.url else "",
    ]
    return element(
        "figure", element("div", picture, class_="pic"), element("figcaption", joined(caption)), class_=class_
    )
