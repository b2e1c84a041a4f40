"""What a request adds to collections that are fetched: links that failed, once more, and links of inputs that grew."""

from collections.abc import Iterator, Sequence

from curation.errors import UsageError
from curation.pipelines.context import Context
from curation.pipelines.extension import unread
from curation.pipelines.freshness import assess
from curation.pipelines.ingest import input_names, inputs_of
from curation.pipelines.plan import Plan
from curation.pipelines.retry import add_retries, is_left, wanted_reasons
from curation.pipelines.units import Unit, crawl_marker


class Growth:
    """Made before anything is done, so that it knows what an earlier command has left.

    Args:
        context: Of the run.
        plan: Its plan.
        retry: Reasons for which links are to be tried again.
        extend: Whether to read all inputs again.
    """

    def __init__(self, context: Context, plan: Plan, retry: Sequence[str], extend: bool) -> None:
        self._context = context
        self._plan = plan
        self._retry = retry
        self._wanted = wanted_reasons(retry)
        self._extend = extend
        self._unfinished = {name for name in self._crawled() if retry and is_left(context, name)}

    def retry(self) -> Iterator[tuple[bool, str]]:
        """Append shards of links that failed; yield whether there are any, and what to say, for each collection.

        A retry that was interrupted is finished by the same command, and no other one begins.
        """
        reasons = ", ".join(self._retry)
        for collection in self._crawled() if self._wanted else ():
            if collection in self._unfinished:
                yield (
                    False,
                    f"{collection}: an earlier retry had not come to its end, and has now; run again for another",
                )
                continue
            found = add_retries(self._context, collection, self._wanted)
            if not found.num_shards:
                yield False, f"{collection}: nothing to try again: no link failed for {reasons}"
                continue
            why = ", ".join(f"{reason} {count:,}" for reason, count in found.reasons.most_common())
            yield True, f"{collection}: {found.reasons.total():,} links are tried again ({why})"

    def extensions(self, but: set[str]) -> list[Unit]:
        """Return units that add links of inputs; ``but`` are collections whose inputs have just been read."""
        units = []
        for found in assess(self._context, self._plan, self._plan.step("crawl")):
            collection = found.unit.collection
            numbers = self.unread(collection)
            if numbers and collection not in but:
                units.append(Unit("crawl", collection, None, found.unit.inputs, extend=numbers))
        return units

    def unread(self, collection: str) -> tuple[int, ...]:
        """Return the numbers of the inputs of a collection that are to be read, if it has been crawled."""
        marker = self._context.run.artefact_marker(crawl_marker(collection))
        names = input_names(inputs_of(self._context.config, collection))
        if marker is None:
            return ()
        return tuple(range(len(names))) if self._extend else unread(marker.read, names)

    def _crawled(self) -> list[str]:
        names = [name for kind in ("pool", "seeds", "references") for name in self._context.collections(kind)]
        return [name for name in names if self._context.run.artefact_marker(crawl_marker(name)) is not None]


def check(
    stage: str, stages: Sequence[str], only: bool, retry: Sequence[str], extend: bool, redo: frozenset[str]
) -> None:
    """Refuse reasons that do not exist, and what cannot be asked for at the same time.

    Raises:
        UsageError: It says what to leave out.
    """
    wanted_reasons(retry)
    for option, is_given, needed in (("--retry", bool(retry), "fetch"), ("--extend", extend, "crawl")):
        if not is_given:
            continue
        if needed not in stages:
            raise UsageError(f"{option}: --stage {stage} ends before {needed}; choose a later --stage")
        if only and stage not in ("crawl", "fetch"):
            raise UsageError(f"{option} adds to crawl and fetch, and --only {stage} refuses to; leave out --only")
        if redo & {"crawl", "fetch"}:
            raise UsageError(f"{option} keeps what was fetched, and --redo does it again; choose one of them")
