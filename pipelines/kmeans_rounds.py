"""k-means over many workers, whatever runs them: each round, parts of the pool are units, and their sums make a state.

A group of shards is a part. Its points are gathered once; then, for each iteration, workers assign the points of parts
and leave partial sums, which are merged here. Sums are exact, so the centroids are those of one process, bit for bit. A
worker that dies costs its part of one round; a run that was killed goes on from its last state; a full disk leaves that
state as it is. The layout of the files is in ``kmeans_part``.

A part has at least ``_ROWS_A_CLUSTER`` points a cluster, so that its sums are no larger than its points. Where that
makes one part of the whole pool, the fit is a reduce like any other, in one process.

Disk: 2 * dim + 16 bytes an image of the sample, and 8 * dim bytes a cluster for each part.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from curation.config.selection import ClusterConfig
from curation.errors import CorruptError
from curation.fingerprint import fingerprint
from curation.indexes import kmeans
from curation.indexes.keys import Keys
from curation.indexes.vectors import Vectors
from curation.pipelines.context import Context
from curation.pipelines.kmeans_part import FOLDER, GATHER, get, load_points, temporary
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Done, Part, Unit, shard_markers
from curation.pipelines.work import Inputs, commit_artefacts
from curation.stages.cluster import ClusterFit

_ROWS_A_CLUSTER = 4


class Runner(Protocol):
    """See ``curation.pipelines.driver.Runner``."""

    def run(self, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
        """Yield each unit as it is done."""


def run(runner: Runner, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
    """Do the one unit of a fit; yield it unless the run is stopped before the end."""
    rows = {shard: marker.num_rows for shard, marker in shard_markers(context, "pool").items()}
    groups = split(rows, context.config.cluster)
    if len(groups) < 2:
        yield from runner.run(context, plan, step, units)
        return
    for unit in units:
        start = time.monotonic()
        fit = _Fit(runner, context, plan, step, unit, groups)
        state = fit.run()
        if state is None:
            return
        with temporary(step.name) as folder:
            fit.stage.finish(state, folder)
            commit_artefacts(context, step, unit, folder, start, {})
        context.run.remove_folder(FOLDER)
        yield Done(unit, 0, 0, time.monotonic() - start)


def split(rows: Mapping[int, int], config: ClusterConfig) -> list[tuple[int, ...]]:
    """Return groups of consecutive shards, each with about ``_ROWS_A_CLUSTER`` sampled rows a cluster or more.

    Args:
        rows: Rows of each shard.
        config: Says how large the sample is.
    """
    total = sum(rows.values())
    share = 1.0 if config.sample_size is None else min(1.0, config.sample_size / max(1, total))
    groups: list[tuple[int, ...]] = []
    waiting: list[int] = []
    num_waiting = 0
    for shard, num_rows in sorted(rows.items()):
        waiting.append(shard)
        num_waiting += num_rows
        if num_waiting * share >= _ROWS_A_CLUSTER * config.num_clusters:
            groups.append(tuple(waiting))
            waiting, num_waiting = [], 0
    if waiting and groups:
        groups[-1] += tuple(waiting)
    elif waiting:
        groups.append(tuple(waiting))
    return groups


class _Fit:
    """One fit in rounds."""

    def __init__(
        self, runner: Runner, context: Context, plan: Plan, step: Step, unit: Unit, groups: Sequence[tuple[int, ...]]
    ) -> None:
        self._runner, self._context, self._plan, self._step, self._unit = runner, context, plan, step, unit
        self._groups = groups
        self._inputs = Inputs(context, plan, step)
        self._key = self._made_from()
        self.stage: ClusterFit = step.make(context)

    def run(self) -> kmeans.Centroids | None:
        """Return the last state; None where the run is to stop."""
        number, state = self._latest()
        if state is None:
            self._context.run.remove_folder(FOLDER)  # of other settings or images, or cut short
            if not self._round(GATHER, self.stage.limit(self._inputs.shards("pool"))):
                return None
            number, state = 1, self.stage.start(self._points)
            self._put(number, state)
        while len(state.history) < self.stage.config.iterations and not state.converged:
            if not self._round(number):
                return None
            total = kmeans.PartialSums.empty(*state.vectors.shape)
            sums = [f"{self._folder}/sums-{number}-{group}.npz" for group in range(len(self._groups))]
            for name in sums:
                total.merge(get(self._context, name, kmeans.PartialSums.load))
            state = kmeans.advance(state, total)
            self._put(number + 1, state)
            for name in (*sums, self._state(number)):
                self._context.run.remove(name)
            number += 1
        return state

    def _round(self, number: int, limit: tuple[int, int, int] | None = None) -> bool:
        """Do a round; return whether all of it was done."""
        units = [
            replace(self._unit, collection="pool", shard=group, part=Part(self._key, number, shards, limit))
            for group, shards in enumerate(self._groups)
        ]
        done = sum(1 for _ in self._runner.run(self._context, self._plan, self._step, units))
        return done == len(units)

    def _points(self) -> Iterator[tuple[Vectors, Keys]]:
        for group in range(len(self._groups)):
            yield get(self._context, f"{self._folder}/points-{group}.npz", load_points)

    def _made_from(self) -> str:
        """Name what the fit is made from: a fit of other images does not go on with its files."""
        made_from: dict[str, str] = {"unit": self._unit.fingerprint}
        for table in (*self._step.reads, *self._step.after):
            markers = self._context.run.markers("pool", table.name)
            made_from |= {f"{table.name}/{shard}": marker.digest for shard, marker in markers.items()}
        return fingerprint(made_from)[:16]

    @property
    def _folder(self) -> str:
        return f"{FOLDER}/{self._key}"

    def _state(self, number: int) -> str:
        return f"{self._folder}/state-{number}.npz"

    def _put(self, number: int, state: kmeans.Centroids) -> None:
        with temporary("state") as folder:
            path = folder / "state.npz"
            state.save(path)
            self._context.run.write_bytes(self._state(number), path.read_bytes())

    def _latest(self) -> tuple[int, kmeans.Centroids | None]:
        """Return the number of the last state of this fit that is whole, and the state."""
        for number in range(self.stage.config.iterations + 1, 0, -1):
            if self._context.run.exists(self._state(number)):
                try:
                    return number, get(self._context, self._state(number), kmeans.Centroids.load)
                except CorruptError:  # cut short where nothing can be renamed; the one before it is still there
                    continue
        return 0, None
