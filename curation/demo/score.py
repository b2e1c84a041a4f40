"""What a run made of the demo's website, against the truth."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pyarrow as pa

from curation.demo.truth import Item, Truth

MIN_RECALL = 0.95
COLUMNS = ("url", "image_id", "reject_reason", "reject_stage", "duplicate_of")


@dataclass(frozen=True)
class Row:
    """One row of the pool.

    Attributes:
        url: As crawled.
        image_id: Null where nothing was fetched.
        reject_reason: The first; null: kept.
        reject_stage: Who gave it.
        duplicate_of: Image id, of the stage that rejected the row.
    """

    url: str
    image_id: str | None
    reject_reason: str | None
    reject_stage: str | None
    duplicate_of: str | None


@dataclass(frozen=True)
class Score:
    """The outcome; every tuple of strings is a list of what went wrong, and empty is good.

    Attributes:
        by_edit: Edit → (found, planted) of the mild copies that were crawled.
        exact_copies: (found, planted).
        missed: Mild and exact copies that are neither rejected as copies of their photo nor kept in its place.
        wrong_merges: Images called copies of something whose source region does not overlap theirs.
        broken_kept: Broken, missing and tracking images without a reason.
        robots_fetched: Images behind robots.txt that were fetched or kept.
        reference_copies_kept: Copies of reference images without a reason.
        seed_copies_kept: Copies of seed images without a reason.
        not_crawled: Links of the site that have no row.
        unknown: Rows whose URL the site does not link.
        broken_reasons: Reason → number of broken, missing and tracking images rejected with it.
    """

    by_edit: dict[str, tuple[int, int]]
    exact_copies: tuple[int, int]
    missed: tuple[str, ...]
    wrong_merges: tuple[str, ...]
    broken_kept: tuple[str, ...]
    robots_fetched: tuple[str, ...]
    reference_copies_kept: tuple[str, ...]
    seed_copies_kept: tuple[str, ...]
    not_crawled: tuple[str, ...]
    unknown: tuple[str, ...]
    broken_reasons: dict[str, int]

    @property
    def planted(self) -> int:
        """Mild copies that were crawled."""
        return sum(planted for _, planted in self.by_edit.values())

    @property
    def found(self) -> int:
        """Mild copies that were found."""
        return sum(found for found, _ in self.by_edit.values())

    @property
    def recall(self) -> float:
        """Share of the mild copies that were found, in [0, 1]."""
        return self.found / self.planted if self.planted else 0.0

    @property
    def passed(self) -> bool:
        """Whether the run did all that the demo promises."""
        return (
            self.recall >= MIN_RECALL
            and self.exact_copies[0] == self.exact_copies[1]
            and not any(names for title, names in self._failures() if title != "missed")
        )

    def lines(self) -> list[str]:
        """Return the score as lines of text."""
        edits = ", ".join(f"{edit} {found}/{planted}" for edit, (found, planted) in sorted(self.by_edit.items()))
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.broken_reasons.items()))
        return [
            f"planted copies found: {self.found} of {self.planted} ({self.recall:.1%}): {edits}",
            f"exact copies found: {self.exact_copies[0]} of {self.exact_copies[1]}",
            f"broken files with a reason: {sum(self.broken_reasons.values())}: {reasons or 'none'}",
            *(f"{title}: {len(names)}{_shown(names)}" for title, names in self._failures()),
        ]

    def _failures(self) -> Iterator[tuple[str, tuple[str, ...]]]:
        yield "missed", self.missed
        yield "wrong merges", self.wrong_merges
        yield "broken files kept", self.broken_kept
        yield "fetched against robots.txt", self.robots_fetched
        yield "reference copies kept", self.reference_copies_kept
        yield "seed copies kept", self.seed_copies_kept
        yield "links not crawled", self.not_crawled
        yield "rows of no link", self.unknown


def score(truth: Truth, base_url: str, images: pa.Table) -> Score:
    """Compare a run with the truth.

    A planted copy is found when it is rejected as a copy of an image of its group, or when it stands for the group:
    when its original is rejected as a copy, directly or by way of others, of it.

    Args:
        truth: Of the website.
        base_url: Where it was served.
        images: One row for each row of the pool, with ``COLUMNS``; further columns are ignored.
    """
    rows = {row["url"]: Row(**row) for row in images.select(list(COLUMNS)).to_pylist()}
    return _Comparison(truth, base_url, rows).score()


class _Comparison:
    def __init__(self, truth: Truth, base_url: str, rows: dict[str, Row]) -> None:
        by_url = {item.url(base_url): item for item in truth.items if item.on_site}
        self.rows = {item.path: rows[url] for url, item in by_url.items() if url in rows}
        self.items = tuple(item for item in truth.items if item.path in self.rows)
        self.not_crawled = _paths(
            item for item in by_url.values() if item.path not in self.rows and item.kind != "small"
        )
        self.unknown = tuple(sorted(rows.keys() - by_url.keys()))
        self.group_of_id = {item.image_id: item.group for item in truth.items if item.image_id is not None}
        self.kept_by_id = {
            row.image_id: row.duplicate_of
            for row in self.rows.values()
            if row.duplicate_of is not None
            and row.duplicate_of != row.image_id  # equal: a second URL of the same bytes
        }

    def score(self) -> Score:
        mild, exact = self._of("copy", "small"), self._of("exact_copy")
        found = {item.path for item in (*mild, *exact) if self._found(item)}
        planted_by_edit = Counter(item.edit or "" for item in mild)
        found_by_edit = Counter(item.edit or "" for item in mild if item.path in found)
        worthless = self._of("broken", "missing", "tracking_pixel")
        reasons = (self.rows[item.path].reject_reason for item in worthless)
        return Score(
            by_edit={edit: (found_by_edit[edit], planted) for edit, planted in planted_by_edit.items()},
            exact_copies=(sum(item.path in found for item in exact), len(exact)),
            missed=_paths(item for item in (*mild, *exact) if item.path not in found),
            wrong_merges=tuple(self._wrong_merges()),
            broken_kept=self._kept(worthless),
            robots_fetched=tuple(
                item.path
                for item in self._of("robots")
                if self.rows[item.path].image_id is not None or self.rows[item.path].reject_reason is None
            ),
            reference_copies_kept=self._kept(self._of("reference_copy")),
            seed_copies_kept=self._kept(self._of("seed_copy")),
            not_crawled=self.not_crawled,
            unknown=self.unknown,
            broken_reasons=dict(Counter(reason for reason in reasons if reason is not None)),
        )

    def _of(self, *kinds: str) -> tuple[Item, ...]:
        return tuple(item for item in self.items if item.kind in kinds)

    def _kept(self, items: Iterable[Item]) -> tuple[str, ...]:
        return _paths(item for item in items if self.rows[item.path].reject_reason is None)

    def _merged(self, item: Item) -> bool:
        """Return whether the image was rejected as a copy of an image of its own group."""
        row = self.rows[item.path]
        if row.reject_reason is None or row.duplicate_of is None:
            return False
        return self.group_of_id.get(row.duplicate_of) == item.group

    def _found(self, item: Item) -> bool:
        if self._merged(item):
            return True
        row, original = self.rows[item.path], self.rows.get(item.group)
        if row.duplicate_of is not None or row.image_id is None or original is None or original.duplicate_of is None:
            return False
        return self._representative(original) == row.image_id

    def _representative(self, row: Row) -> str | None:
        """Return the image that stands for a row after all merges."""
        image_id = row.image_id
        for _ in range(len(self.rows)):  # not `while`: tables that go round in circles are wrong, but must not hang
            if image_id not in self.kept_by_id:
                break
            image_id = self.kept_by_id[image_id]
        return image_id

    def _wrong_merges(self) -> Iterator[str]:
        for item in self.items:
            other = self.rows[item.path].duplicate_of
            if other is not None and not self._merged(item):
                yield f"{item.path} with {self.group_of_id.get(other, other)} in {self.rows[item.path].reject_stage}"


def _paths(items: Iterable[Item]) -> tuple[str, ...]:
    return tuple(item.path for item in items)


def _shown(names: tuple[str, ...], most: int = 5) -> str:
    if not names:
        return ""
    return ": " + ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
