"""Steps on pairs of groups of shards: how work that is quadratic in a collection becomes tasks.

A collection is cut into *groups*: consecutive shards of at most so many rows together. A *block* is two groups of the
same or of two collections, and is a unit of work with a marker of its own. Its fingerprint names the tables of exactly
its shards, so new shards make new blocks, and redo those of the group that they fill up.

Blocks of two collections lie under ``edges/<left>+<right>`` and are numbered so that numbers stay when either grows.
"""

from collections.abc import Iterator

from curation.fingerprint import fingerprint
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Span, Unit, crawl_marker, shard_markers
from curation.store import Marker

_FOLDER = "edges"


def place(left: str, right: str) -> str:
    """Return the folder of the blocks of two collections."""
    return f"{_FOLDER}/{left.replace('/', '.')}+{right.replace('/', '.')}"


def places(context: Context, step: Step) -> list[str]:
    """Return the folders of all blocks of a step."""
    return [place(left, right) for left, right in step.pairs(context)]


def groups(context: Context, collection: str) -> list[tuple[Span, int]]:
    """Return the groups of a collection and their rows; a shard that is too large is one alone.

    Raises:
        InputError: The collection has not been crawled.
    """
    limit = context.config.dedup.block_rows
    found: list[tuple[Span, int]] = []
    for shard, marker in shard_markers(context, collection).items():
        if found and found[-1][1] + marker.num_rows <= limit:
            span, num_rows = found[-1]
            found[-1] = (Span(collection, span.first, shard + 1), num_rows + marker.num_rows)
        else:
            found.append((Span(collection, shard, shard + 1), marker.num_rows))
    return found


def numbers(num_left: int, num_right: int | None) -> Iterator[tuple[int, int, int]]:
    """Yield (number, left group, right group) of all blocks; they stay what they are when there are more groups.

    Args:
        num_left: Groups of the left collection.
        num_right: Of the right one; None: it is the left one, and each pair counts once.
    """
    if num_right is None:
        for right in range(num_left):
            for left in range(right + 1):
                yield right * (right + 1) // 2 + left, left, right
        return
    for left in range(num_left):
        for right in range(num_right):  # squares that grow: those with the larger of both below n come first
            yield (left * left + left + right if left >= right else right * right + left), left, right


def units(context: Context, step: Step, fixed: dict[str, str]) -> Iterator[tuple[Unit, Marker | None, int]]:
    """Yield the blocks of a step, their markers and their rows.

    Args:
        context: Of the run.
        step: Of the kind ``blocks``.
        fixed: Parts of the fingerprint that all of them share.
    """
    known: dict[str, list[tuple[Span, int, str]]] = {}
    for left, right in step.pairs(context):
        for collection in {left, right} - known.keys():
            cut = groups(context, collection)
            made = {table.name: context.run.markers(collection, table.name) for table in step.reads}
            known[collection] = [(span, num_rows, _digest(span, made)) for span, num_rows in cut]
        inputs = fixed | {"settings": fingerprint(step.settings(context.config, right))}
        folder = place(left, right)
        markers = context.run.markers(folder, step.name)
        same = left == right
        for number, i, j in numbers(len(known[left]), None if same else len(known[right])):
            (left_span, left_rows, left_digest), (right_span, right_rows, right_digest) = (
                known[left][i],
                known[right][j],
            )
            alone = left_span == right_span
            unit = Unit(
                step.name,
                folder,
                number,
                inputs | {"table left": left_digest, "table right": right_digest},
                block=(left_span, right_span),
            )
            yield unit, markers.get(number), left_rows if alone else left_rows + right_rows


def digests(context: Context, step: Step) -> dict[str, str]:
    """Return what the blocks of a step contain, by folder."""
    found = {}
    for left, right in step.pairs(context):
        folder = place(left, right)
        markers = context.run.markers(folder, step.name)
        made = [markers.get(number) for number in _existing(context, left, right)]
        found[folder] = fingerprint({"blocks": ["" if marker is None else marker.digest for marker in made]})
    return found


def markers(context: Context, step: Step, left: str, right: str) -> Iterator[Marker | None]:
    """Yield the markers of the blocks of two collections, None for one that is not finished."""
    for number in _existing(context, left, right):
        yield context.run.marker(place(left, right), step.name, number)


def forget_gone(context: Context, plan: Plan) -> None:
    """Take back the markers of blocks that are no more, because collections have fewer shards or larger groups."""
    for step in plan.steps:
        for left, right in step.pairs(context) if step.kind == "blocks" else ():
            folder = place(left, right)
            crawled = [context.run.artefact_marker(crawl_marker(collection)) for collection in (left, right)]
            made = context.run.markers(folder, step.name)
            if made and None not in crawled:
                for number in made.keys() - set(_existing(context, left, right)):
                    context.run.forget(folder, step.name, number)


def _existing(context: Context, left: str, right: str) -> list[int]:
    num_left = len(groups(context, left))
    num_right = None if left == right else len(groups(context, right))
    return [number for number, _, _ in numbers(num_left, num_right)]


def _digest(span: Span, made: dict[str, dict[int, Marker]]) -> str:
    """Return a digest of the tables of a group, and of the numbers of its shards, which the output names."""
    tables = {
        name: [markers[shard].digest if shard in markers else "" for shard in range(span.first, span.stop)]
        for name, markers in made.items()
    }
    return fingerprint({"first": span.first, **tables})
