"""The report's part on clusters of embeddings: a map, their sizes, drift, and members with thumbnails."""

import base64

from curation.report.data import Cluster, EmbeddingMap, ReportData
from curation.report.gallery import figure, histogram, similarity_text
from curation.report.markup import Markup, element
from curation.report.words import counted, share


def clusters(report: ReportData) -> Markup:
    """Return the section, or a word about why there is nothing to show."""
    content = [element("h2", "Clusters")]
    if report.embedding_map is not None:
        content.append(_map(report.embedding_map))
    found = report.clusters
    if found is None:
        return element("section", *content, element("p", "The cluster stage is not finished."))
    about = f"Spherical k-means of the embeddings: {counted(found.num_clusters, 'centroid')}"
    about += f", {found.num_empty:,} of them without an image of the pool." if found.num_empty else "."
    content += [element("p", about), histogram(found.bins, "cluster")]
    if report.overview.drift is not None:
        content.append(element("p", f"Drift: {report.overview.drift.text()}."))
    note = (
        "Images nearest to the centroid come first, with their similarity to it, then some others drawn by the seed. "
        "Pictures are made from the blurred images."
    )
    content.append(element("p", note, class_="small soft"))
    for title, shown in (("The largest clusters", found.largest), ("Some of the others", found.drawn)):
        if shown:
            content.append(element("h3", title))
            content.append(element("div", *(_cluster(cluster) for cluster in shown), class_="components"))
    return element("section", *content)


def _map(found: EmbeddingMap) -> Markup:
    data = base64.b64encode(found.png).decode("ascii")
    key = [
        element("span", element("span", class_="key", style=f"background:{colour}"), f"{name} ({number:,})")
        for name, number, colour in found.collections
    ]
    about = (
        f"A sample of the embeddings along their first two principal components, which hold "
        f"{share(round(found.explained * 10_000), 10_000)} of its variance."
    )
    picture = Markup(f'<img class="map" alt="map of the embeddings" src="data:image/png;base64,{data}">')
    return element("div", picture, element("p", *key, class_="small soft"), element("p", about), class_="card")


def _cluster(cluster: Cluster) -> Markup:
    head = [
        element("b", counted(cluster.num_images, "image")),
        element("span", f"cluster {cluster.cluster_id}", class_="soft"),
    ]
    if cluster.seeds:
        seeds = ", ".join(f"{name} {number:,}" for name, number in cluster.seeds)
        head.append(element("span", f"seed images: {seeds}", class_="small"))
    shown = [figure(member, similarity_text(member), "first") for member in cluster.nearest]
    shown += [figure(member, similarity_text(member), "other") for member in cluster.others]
    more = cluster.num_images - len(shown)
    if more > 0:
        shown.append(element("div", f"and {more:,} more", class_="more"))
    return element("div", element("header", *head), element("div", *shown, class_="members"), class_="component")
