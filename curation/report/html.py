"""The report: one HTML file that needs nothing else, for screens and paper, in light and dark.

Its policy forbids scripts and everything from elsewhere; addresses of images are text and no links.
"""

from collections.abc import Iterator, Sequence
from importlib import resources

from curation.report.clusters import clusters
from curation.report.data import ReportData
from curation.report.gallery import near_duplicates
from curation.report.markup import Markup, element, joined, table, text
from curation.report.overview import CollectionOverview, FunnelEntry, HostOverview, step_notes
from curation.report.words import counted, reason_text, share, size, took

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def render(report: ReportData) -> str:
    """Return the page."""
    css = (resources.files("curation.report") / "report.css").read_text(encoding="utf-8")
    body = (_head(report), _facts(report), _funnels(report), _reasons(report), _seeds(report))
    rest = (
        near_duplicates(report),
        clusters(report),
        _fetching(report),
        _stages(report),
        _models(report),
        _settings(report),
    )
    foot = element("footer", f"Made by curation {report.overview.version}.")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{text(_POLICY)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{text(report.title)} – curation report</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
        f"{element('main', *body, *rest, foot)}\n</body>\n</html>\n"
    )


def _section(title: str, about: str, *content: str) -> Markup:
    return element("section", element("h2", title), element("p", about), *content)


def _head(report: ReportData) -> Markup:
    manifest, collections = report.overview.manifest, report.overview.collections
    pool = next((found for found in collections if found.name == "pool"), None)
    tiles = []
    if manifest is not None:
        images = element("b", manifest.num_images) + element("span", "images in the manifest")
        tiles.append(element("div", Markup(images), class_="tile main"))
    if pool is not None and pool.crawled:
        tiles.append(_tile(f"{pool.num_rows:,}", "links in the pool"))
        if pool.fetch is not None:
            tiles.append(_tile(f"{pool.fetch.num_kept:,}", "of them are images" + _so_far(pool)))
        dedup = pool.entry("dedup")
        if dedup is not None:
            copies = dedup.num_in - dedup.num_out
            tiles.append(_tile(share(copies, dedup.num_in), "of what reached dedup was a copy"))
    tiles.append(_tile(size(sum(found.image_bytes for found in collections)), "of images stored"))
    about = "Curation report"
    if manifest is None:
        about += " of a run that is not finished"
    return joined(
        (
            element("h1", report.title),
            element("p", about, class_="soft"),
            element("div", *tiles, class_="tiles"),
        )
    )


def _so_far(pool: CollectionOverview) -> str:
    return "" if pool.fetch is not None and pool.fetch.num_rows == pool.num_rows else " so far"


def _tile(number: str, about: str) -> Markup:
    return element("div", element("b", number), element("span", about), class_="tile")


def _facts(report: ReportData) -> Markup:
    manifest = report.overview.manifest
    facts: list[tuple[str, str]] = [("Run", element("bdi", report.overview.run))]
    if manifest is not None:
        facts.append(("Digest", element("code", manifest.digest)))
        if not manifest.current:
            facts.append(
                ("", element("span", "The manifest is outdated: something it is made from has changed.", class_="warn"))
            )
        facts.append(("Written by", f"curation {manifest.version}"))
    accepted = ", ".join(report.accept_licenses) or "none"
    facts.append(("Non-commercial licences accepted", accepted))
    cells = [element("dt", name) + element("dd", value) for name, value in facts]
    return element("div", element("dl", Markup("".join(cells)), class_="facts"), class_="card")


def _funnels(report: ReportData) -> Markup:
    about = "Every row stays to the end: each is kept, or rejected by the first stage that has a reason."
    key = joined(
        (
            element("span", class_="key kept"),
            "kept",
            element("span", class_="key lost"),
            "rejected by this stage",
        )
    )
    charts = [element("p", key, class_="small soft")]
    first, *others = [_funnel(found) for found in report.overview.collections]
    return _section("Funnel", about, *charts, first, element("div", *others, class_="pair"))


def _funnel(found: CollectionOverview) -> Markup:
    title = element("h3", found.name)
    if not found.crawled:
        return element("div", title, element("p", "Not crawled yet.", class_="soft"))
    bars: list[str] = []
    for entry in found.funnel:
        bars.append(element("div", entry.stage, class_="name"))
        bars.append(element("div", *_bar(entry, found.num_rows), class_="track"))
        bars.append(element("div", entry.num_out, class_="n"))
        if entry.rejected:
            why = ", ".join(f"− {count:,} {reason}" for reason, count in entry.rejected.items())
            bars.append(element("div", why, class_="why"))
    chart = element("div", *bars, class_="bars")
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in found.skipped.items())
    note = (
        element("p", f"Left out by the crawl, so not among the rows: {skipped}.", class_="small soft")
        if skipped
        else ""
    )
    return element("div", title, element("div", chart, note, class_="card"))


def _bar(entry: FunnelEntry, total: int) -> Iterator[Markup]:
    for class_, number in (("kept", entry.num_out), ("lost", entry.num_in - entry.num_out)):
        if number:
            yield element("div", class_=class_, style=f"width:{100 * number / total:.4f}%")


def _reasons(report: ReportData) -> Markup:
    kinds: dict[str, int] = {}
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for found in report.overview.collections:
        kind = found.name.partition("/")[0]
        for entry in found.funnel:
            for reason, count in entry.rejected.items():
                by = counts.setdefault((entry.stage, reason), {})
                by[kind] = by.get(kind, 0) + count
        if found.crawled:
            kinds[kind] = kinds.get(kind, 0) + found.num_rows
    if not counts:
        return Markup("")
    rows: list[list[str | int]] = [["", "All rows", "", *kinds.values()]]
    for (stage, reason), by in counts.items():
        numbers = [by.get(kind) or "–" for kind in kinds]
        rows.append([stage, element("code", reason), reason_text(reason), *numbers])
    kept = [kinds[kind] - sum(by.get(kind, 0) for by in counts.values()) for kind in kinds]
    rows.append(["", "Kept so far" if report.overview.manifest is None else "Kept", "", *kept])
    shown = table(["Stage", "Reason", "Meaning", *kinds], rows, range(3, 3 + len(kinds)), "sum")
    return _section(
        "Reasons", "Why rows were rejected: rows less rejected is kept.", element("div", shown, class_="card")
    )


def _seeds(report: ReportData) -> Markup:
    if not report.seeds:
        return Markup("")
    rows: list[list[str | int]] = [
        [row.seed, row.kind, row.num_images, *("–" if n is None else n for n in (row.nominal, row.unique, row.final))]
        for row in report.seeds
    ]
    manifest = report.overview.manifest
    last = ""
    if manifest is not None:
        rows.append(["", "Different images in the manifest", "", "", "", manifest.num_images])
        last = "sum"
    head = ["Seed set", "Kind", "Seed images", "Retrieved, nominal", "Retrieved, different", "Final"]
    about = (
        "What each curated set brought. Nominal counts an image each time a seed image retrieves it; an image that "
        "several sets retrieve is final in each."
    )
    return _section("Seed sets", about, element("div", table(head, rows, range(2, 6), last), class_="card"))


def _fetching(report: ReportData) -> Markup:
    pool = next((found for found in report.overview.collections if found.name == "pool"), None)
    if pool is None or pool.fetch is None:
        return Markup("")
    fetch = pool.fetch
    outcomes: list[list[str | int]] = [["", "became an image", fetch.num_kept, share(fetch.num_kept, fetch.num_rows)]]
    for reason, count in fetch.rejected.items():
        outcomes.append([element("code", reason), reason_text(reason), count, share(count, fetch.num_rows)])
    about = f"What became of {counted(fetch.num_rows, 'link')} of the pool."
    if fetch.num_retried:
        about += f" {fetch.num_retried:,} were tried again, of which {fetch.num_recovered:,} became images."
    fetched = _section(
        "Fetched",
        about,
        element("div", table(["Reason", "Meaning", "Links", "Share"], outcomes, (2, 3)), class_="card"),
    )
    about = "Where the pool's links lead, hosts with the most links first, and where most of them failed."
    if not fetch.exact_hosts:
        about += " There were too many hosts to count each: these are lower bounds."
    shown = [element("div", _hosts(hosts), class_="card") for hosts in (fetch.hosts, fetch.failing) if hosts]
    return joined((fetched, _section("Hosts", about, *shown)))


def _hosts(hosts: Sequence[HostOverview]) -> Markup:
    rows: list[list[str | int]] = [
        [
            element("bdi", host.host or "files of this machine"),
            host.num_rows,
            host.num_failed,
            share(host.num_failed, host.num_rows),
            ", ".join(f"{reason} {count:,}" for reason, count in host.rejected.items()),
        ]
        for host in hosts
    ]
    return table(["Host", "Links", "Failed", "Share", "Why"], rows, (1, 2, 3))


def _stages(report: ReportData) -> Markup:
    rows: list[list[str | int]] = []
    notes: list[str] = []
    for stage in report.overview.stages:
        for step in stage.steps:
            rate = step.rows_per_s
            state = element("span", step.state, class_=f"pill {step.state}")
            numbers = [f"{step.done:,} of {step.num_units:,}", step.num_rows or "–", took(step.seconds)]
            rows.append([stage.name, step.name, state, *numbers, "–" if rate is None else f"{rate:,.0f}"])
            notes += step_notes(step)
    head = ["Stage", "Step", "State", "Units done", "Rows", "Work", "Rows/s"]
    listed = [element("p", note, class_="small warn") for note in notes]
    about = "Work is summed over workers, as measured when each unit was last made; the rate is that of one worker."
    return _section("Stages", about, element("div", table(head, rows, (3, 4, 5, 6)), *listed, class_="card"))


def _models(report: ReportData) -> Markup:
    rows = [
        [use.name, ", ".join(use.stages), use.license, element("code", f"{use.sha256[:16]}…" if use.sha256 else "–")]
        for use in report.weights
    ]
    shown = table(["Weights", "Used by", "Licence", "sha256"], rows, ())
    return _section("Models", "Weights that shaped this run, and their licences.", element("div", shown, class_="card"))


def _settings(report: ReportData) -> Markup:
    lines = joined(joined((line, Markup("\n"))) for line in report.config.splitlines())
    settings = element(
        "details", element("summary", "All settings, as resolved"), element("pre", element("code", lines))
    )
    num_lines = counted(len(report.config.splitlines()), "line")
    return _section("Settings", f"What the run was made with ({num_lines}).", settings)
