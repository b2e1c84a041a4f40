"""All similar pairs by hashing: an inverted file from hashes of random rotations to rows.

Two rows are compared where enough of their hashes are equal and their sketches differ in few bits
(``cross_polytope``, ``collisions``); what is found is decided by exact similarities. So

- whether a pair is a candidate depends on its two rows and the fitted rotations alone: not on blocks, batches, threads
  or other rows; there is no k, and a hub of copies loses none of them to one;
- the chance to miss a pair depends on its cosine alone, not on where it lies or how the data clusters. Pairs exactly at
  the floor are the worst case, and the rotations are as many as those need for the wanted recall. Data decides the time
  only.

Time: a pass over the rows for each table, and comparisons in its buckets, which grow with the data. ``fit`` chooses how
many hashes a table joins for the size of the pool and the crowding that it sees in the sample. Memory: 100 to 350 bytes
of codes a row, 40 more while it searches and 12 for each thread, and pieces of edges. Vectors may stay on disk.
"""

import json
import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

from curation.errors import CorruptError, DimensionError, UsageError
from curation.indexes.collisions import MAX_SIZE, START, Buckets, Coded, Cursor, Table, buckets, collisions, tables
from curation.indexes.cross_polytope import SKETCH_WORDS, Words, compare, encode, num_rotations, random_signs
from curation.indexes.exact import Edges, self_join
from curation.indexes.identical import MAX_EDGES, distinct_rows, identical_rows, in_order, pieces, with_copies
from curation.indexes.preselect import thread_count
from curation.indexes.vectors import Rows, Singles, Vectors, check_shape, stored_similarities, widen

VERSION = 1
MAX_ROTATIONS = 64

_NUM_SIMULATED = 10_000  # pairs; the standard error of a recall of 0.99 is 0.001
_NUM_SAMPLED = 10_000  # rows of the sample in which buckets are counted and that are joined exactly
_SKETCH_MISSES = 0.3  # share of the misses that the sketches may make
# Nanoseconds on one core, measured: a row in a table, a comparison of sketches, a row's rotation.
_ROW_NS, _PAIR_NS, _ROTATION_NS = 55.0, 0.6, 400.0


@dataclass(frozen=True)
class Setting:
    """How pairs above a floor are searched.

    Attributes:
        floor: The lowest similarity it is for.
        size: Hashes that must be equal for two rows to meet.
        rotations: The first so many are searched.
        max_half_distance: Bits in which first halves of sketches may differ.
        max_distance: Bits in which sketches may differ.
        recall_at_floor: Share of simulated pairs found whose cosine is the floor; of all higher ones more are found.
        sample_pairs: Pairs above the floor in the sample.
        sample_recall: Share of them that is found; 1 if there are none.
        compared: Share of all pairs of the sample that meets, counted once in each table where it does.
    """

    floor: float
    size: int
    rotations: int
    max_half_distance: int
    max_distance: int
    recall_at_floor: float
    sample_pairs: int
    sample_recall: float
    compared: float


class InvertedPairs:
    """The approximate backend of ``pairs.PairSearch``."""

    def __init__(self, dim: int, signs_RW: npt.NDArray[np.bool_], settings: Sequence[Setting], num_rows: int) -> None:
        """Take what ``fit`` found; settings by ascending floor."""
        self.dim = dim
        self.num_rows = num_rows
        self.settings = tuple(settings)
        self._signs_RW = signs_RW

    @property
    def code_bytes(self) -> int:
        """Bytes of a row's code: its sketch, and 8 hashes for each rotation."""
        return 8 * (SKETCH_WORDS + num_rotations(self._signs_RW))

    @classmethod
    def fit(
        cls,
        sample_SD: Vectors,
        num_rows: int,
        floors: Sequence[float],
        recall: float = 0.99,
        seed: int = 0,
        num_threads: int | None = None,
    ) -> Self:
        """Choose rotations and settings.

        Args:
            sample_SD: L2-normalised float16 rows of the pool, in an order that does not depend on its sharding. 10,000
                are used; without any, the pool is taken for isotropic.
            num_rows: Rows of the pool, or of the largest part of it that is searched at a time.
            floors: Similarities above which pairs will be asked for.
            recall: Of pairs exactly at a floor.
            seed: Of rotations and simulated pairs.
            num_threads: Threads; None: Faiss's setting.

        Raises:
            DimensionError: The sample is not float16 (N, dim).
            VectorError: A row is not finite or not L2-normalised.
            UsageError: A floor is too low for the wanted recall, or a number is out of range.
        """
        if not floors or not all(0 < floor < 1 for floor in floors) or not 0 < recall < 1 or num_rows < 0:
            raise UsageError(
                f"floors and recall must lie between 0 and 1 and num_rows must not be negative, got "
                f"{list(floors)}, {recall} and {num_rows}"
            )
        check_shape(sample_SD)
        dim = sample_SD.shape[1]
        signs_RW = random_signs(dim, MAX_ROTATIONS, seed)
        rows_S = distinct_rows(len(sample_SD), identical_rows(sample_SD, -np.inf))
        sample_SD = sample_SD[rows_S[:: -(-len(rows_S) // _NUM_SAMPLED) or 1]]
        words_SC = encode(sample_SD, signs_RW, num_threads)
        crowding = [_crowding(words_SC, size) for size in range(1, MAX_SIZE + 1)]
        joined = list(self_join(sample_SD, min(floors), num_threads=num_threads))
        rng = np.random.default_rng(seed)
        settings = []
        for floor in sorted(set(floors)):
            left_PD, right_PD = _pairs_at(sample_SD, floor, rng)
            simulated = compare(encode(left_PD, signs_RW, num_threads), encode(right_PD, signs_RW, num_threads))
            setting = _cheapest(floor, recall, num_rows, crowding, *simulated)
            settings.append(_measured(setting, words_SC, joined))
        most = max(setting.rotations for setting in settings)
        return cls(dim, signs_RW[: len(signs_RW) - MAX_ROTATIONS + most], settings, num_rows)

    def encode(self, vectors_ND: Vectors, num_threads: int | None = None) -> npt.NDArray[np.uint8]:
        """Return codes, (N, ``code_bytes``); each depends on its row alone.

        Raises:
            DimensionError: Not float16 (N, dim).
            VectorError: A row is not finite or not L2-normalised.
        """
        check_shape(vectors_ND, self.dim)
        return encode(vectors_ND, self._signs_RW, num_threads).view(np.uint8)

    def self_pairs(
        self, vectors_ND: Vectors, codes_NW: npt.NDArray[np.uint8], floor: float, num_threads: int | None = None
    ) -> Iterator[Edges]:
        """Yield pairs as ``PairSearch`` has it.

        Raises:
            DimensionError: Vectors or codes of the wrong shape or dtype.
            UsageError: ``floor`` is below all that were fitted.
        """
        words_NC, setting = self._words(vectors_ND, codes_NW), self._setting(floor)
        identical = identical_rows(vectors_ND, floor)
        yield from pieces(identical)
        side = _Side(vectors_ND, words_NC, distinct_rows(len(vectors_ND), identical))
        yield from _search(side, side, setting, floor, thread_count(num_threads))

    def cross_pairs(
        self,
        left_ND: Vectors,
        left_codes_NW: npt.NDArray[np.uint8],
        right_MD: Vectors,
        right_codes_MW: npt.NDArray[np.uint8],
        floor: float,
        num_threads: int | None = None,
    ) -> Iterator[Edges]:
        """Yield pairs as ``PairSearch`` has it. Errors are those of ``self_pairs``."""
        setting = self._setting(floor)
        left_words, right_words = self._words(left_ND, left_codes_NW), self._words(right_MD, right_codes_MW)
        copies = identical_rows(left_ND, floor), identical_rows(right_MD, floor)
        left = _Side(left_ND, left_words, distinct_rows(len(left_ND), copies[0]))
        right = _Side(right_MD, right_words, distinct_rows(len(right_MD), copies[1]))
        for edges in _search(left, right, setting, floor, thread_count(num_threads)):
            yield from with_copies(edges, *copies)

    def save(self, path: str | Path) -> None:
        """Write the fitted rotations and settings to an ``.npz`` file."""
        about = json.dumps(self.describe()).encode()
        with Path(path).open("wb") as file:
            np.savez(
                file,
                version=np.int64(VERSION),
                width=np.int64(self._signs_RW.shape[1]),
                signs=np.packbits(self._signs_RW, axis=1),
                about=np.frombuffer(about, np.uint8),
            )

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            CorruptError: The file is missing, damaged, or holds something else.
        """
        try:
            with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if int(arrays["version"]) != VERSION:
                    raise ValueError(f"its version is {int(arrays['version'])}, not {VERSION}")
                about = json.loads(arrays["about"].tobytes())
                signs_RW = np.unpackbits(arrays["signs"], axis=1, count=int(arrays["width"])).astype(bool)
            settings = [
                Setting(**{key: setting[key] for key in Setting.__annotations__}) for setting in about["floors"]
            ]
            found = cls(int(about["dim"]), signs_RW, settings, int(about["num_rows"]))
            if found.code_bytes != about["code_bytes"] or random_signs(found.dim, 0, 0).shape[1] != signs_RW.shape[1]:
                raise ValueError("its rotations do not fit its description")
            found._check()
        except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, DimensionError) as error:
            raise CorruptError(f"{path}: is not a fitted pair search: {error}; fit it again") from error
        return found

    def describe(self) -> dict[str, Any]:
        """Return what was chosen and measured: dim, num_rows, code_bytes, and ``Setting`` for each floor."""
        return {
            "dim": self.dim,
            "num_rows": self.num_rows,
            "code_bytes": self.code_bytes,
            "floors": [
                asdict(setting) | {"tables": len(tables(setting.rotations, setting.size))} for setting in self.settings
            ],
        }

    def _check(self) -> None:
        # What kernels take on trust.
        for setting in self.settings:
            counts = (setting.size, setting.rotations, setting.max_half_distance, setting.max_distance)
            limits = (MAX_SIZE, num_rotations(self._signs_RW), 512, 512)
            if not all(isinstance(n, int) and 1 <= n <= most for n, most in zip(counts, limits, strict=True)):
                raise ValueError(f"its setting for {setting.floor} is out of range")
        floors = [setting.floor for setting in self.settings]
        if not floors or floors != sorted(floors):
            raise ValueError("its floors are not ascending")

    def _setting(self, floor: float) -> Setting:
        fitted = [setting for setting in self.settings if setting.floor <= floor]
        if not fitted:
            raise UsageError(
                f"pairs above {floor} were asked of a search fitted for {self.settings[0].floor} and above"
            )
        return fitted[-1]

    def _words(self, vectors_ND: Vectors, codes_NW: npt.NDArray[np.uint8]) -> Words:
        check_shape(vectors_ND, self.dim)
        if len(vectors_ND) > np.iinfo(np.int32).max:
            raise DimensionError(f"{len(vectors_ND)} rows are too many to search at a time: cut them into blocks")
        wanted = (len(vectors_ND), self.code_bytes)
        if codes_NW.dtype != np.uint8 or codes_NW.shape != wanted:
            raise DimensionError(f"codes must be uint8 {wanted}, got {codes_NW.dtype} {codes_NW.shape}")
        return np.require(codes_NW, requirements=["C", "A"]).view(np.uint64)


class _Side:
    """Distinct rows of one side of a search."""

    def __init__(self, vectors_ND: Vectors, words_NC: Words, rows_P: Rows) -> None:
        self.vectors = vectors_ND
        self.codes = Coded.of(words_NC if len(rows_P) == len(words_NC) else words_NC[rows_P])
        self.rows = rows_P


def _search(left: _Side, right: _Side, setting: Setting, floor: float, num_threads: int) -> Iterator[Edges]:
    allowed = setting.max_half_distance, setting.max_distance

    def step(table: Table, sides: tuple[Buckets, Buckets] | None, cursor: Cursor) -> tuple[Edges, Any]:
        if sides is None:
            of_left = buckets(left.codes.words, table)
            sides = of_left, of_left if left is right else buckets(right.codes.words, table)
        left_places, right_places, rest = collisions(
            left.codes, sides[0], right.codes, sides[1], table, allowed, cursor, MAX_EDGES
        )
        left_P, right_P = left.rows[left_places], right.rows[right_places]
        found_P = stored_similarities(left.vectors, right.vectors, left_P, right_P)
        kept = found_P > floor
        edges = in_order(Edges(left_P[kept], right_P[kept], found_P[kept]))
        return edges, None if rest is None else (table, sides, rest)

    # Pieces come in the order of tables, whatever thread is first. One more is under way than there are threads, so
    # that none waits for the piece that is yielded next.
    remaining = iter(tables(setting.rotations, setting.size))
    under_way: deque[Future[tuple[Edges, Any]]] = deque()
    with ThreadPoolExecutor(num_threads) as pool:
        while True:
            while len(under_way) <= num_threads and (table := next(remaining, None)) is not None:
                under_way.append(pool.submit(step, table, None, START))
            if not under_way:
                return
            edges, again = under_way.popleft().result()
            if again is not None:
                under_way.appendleft(pool.submit(step, *again))
            if len(edges.left):
                yield edges


def _crowding(words_SC: Words, size: int) -> float:
    """Return the share of pairs of rows that meet in a table, averaged over some tables."""
    if len(words_SC) < 2:
        return float(128.0**-size)
    some = tables(8, size)[:: max(1, len(tables(8, size)) // 8)]
    met = 0.0
    for table in some:
        starts = buckets(words_SC, table).starts.astype(np.int64)
        counts = starts[1:] - starts[:-1]
        met += float(counts @ (counts - 1))
    return met / len(some) / (len(words_SC) * (len(words_SC) - 1))


def _pairs_at(sample_SD: Vectors, floor: float, rng: np.random.Generator) -> tuple[Vectors, Vectors]:
    """Return pairs whose cosine is ``floor``, but for rounding: rows of the sample, moved in random directions."""
    dim = sample_SD.shape[1]
    noise_PD: Singles = rng.standard_normal((_NUM_SIMULATED, dim), np.float32)
    rows_PD: Singles = rng.standard_normal((_NUM_SIMULATED, dim), np.float32)
    if len(sample_SD):
        rows_PD = widen(sample_SD[rng.integers(0, len(sample_SD), _NUM_SIMULATED)])
    _normalise(rows_PD)
    if dim > 1:
        noise_PD -= np.einsum("pd,pd->p", noise_PD, rows_PD)[:, None] * rows_PD
    _normalise(noise_PD)
    moved_PD: Singles = floor * rows_PD + np.float32(math.sqrt(1 - floor * floor)) * noise_PD
    _normalise(moved_PD)
    return rows_PD.astype(np.float16), moved_PD.astype(np.float16)


def _normalise(rows_PD: Singles) -> None:
    rows_PD /= np.sqrt(np.einsum("pd,pd->p", rows_PD, rows_PD))[:, None]


def _cheapest(
    floor: float,
    recall: float,
    num_rows: int,
    crowding: Sequence[float],
    equal_PR: npt.NDArray[np.uint8],
    distances_P2: npt.NDArray[np.int64],
) -> Setting:
    # Of the misses that sketches may make, halves make one half and wholes the other.
    share = 1 - _SKETCH_MISSES / 2 * (1 - recall)
    allowed_2 = np.sort(distances_P2, axis=0)[int(np.ceil(share * len(distances_P2))) - 1]
    half, whole = allowed_2.tolist()
    near_P = (distances_P2 <= allowed_2).all(axis=1)
    wanted = recall + 2 * np.sqrt(recall * (1 - recall) / len(near_P))  # two standard errors above
    best: tuple[float, Setting] | None = None
    for size, met in enumerate(crowding, 1):
        found_R = (np.logical_or.accumulate(equal_PR >= size, axis=1) & near_P[:, None]).mean(axis=0)
        if found_R[-1] < min(wanted, 1.0):
            continue
        rotations = int(np.argmax(found_R >= min(wanted, 1.0))) + 1
        num_tables = len(tables(rotations, size))
        cost = num_tables * (_ROW_NS + _PAIR_NS * met * num_rows / 2) + rotations * _ROTATION_NS
        if best is None or cost < best[0]:
            found = float(found_R[rotations - 1])
            best = cost, Setting(floor, size, rotations, half, whole, found, 0, 1.0, met * num_tables)
    if best is None:
        raise UsageError(
            f"a recall of {recall} at a similarity of {floor} needs more than {MAX_ROTATIONS} rotations: raise "
            "dedup.edge_floor or dedup.reference_floor, lower dedup.recall, or set dedup.backend to exact"
        )
    return best[1]


def _measured(setting: Setting, words_SC: Words, joined: Sequence[Edges]) -> Setting:
    found, total = 0, 0
    for edges in joined:
        above = edges.similarity > setting.floor
        equal_PR, distances_P2 = compare(words_SC[edges.left[above]], words_SC[edges.right[above]])
        meets_P = (equal_PR[:, : setting.rotations] >= setting.size).any(axis=1)
        near_P = (distances_P2 <= (setting.max_half_distance, setting.max_distance)).all(axis=1)
        found += int((meets_P & near_P).sum())
        total += int(above.sum())
    return Setting(**asdict(setting) | {"sample_pairs": total, "sample_recall": found / total if total else 1.0})
