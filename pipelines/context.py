"""What work on a run needs, built once in each process that works: settings, store, weights, artefacts, stages."""

import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from curation.config import RunConfig
from curation.errors import CorruptError
from curation.models.weights import Weights, resolve
from curation.schema import Table
from curation.store import Run

T = TypeVar("T")


class Context:
    """A run as a worker sees it."""

    def __init__(self, run: Run, config: RunConfig, should_stop: Callable[[], bool] = lambda: False) -> None:
        self.run = run
        self.config = config
        self.should_stop = should_stop
        self.on_rows: Callable[[int], None] = lambda num_rows: None  # told of rows as they are worked on
        self.num_cores = 1  # of this machine, for each unit at work; runners on one machine say it
        self._lock = threading.RLock()
        self._made: dict[str, Any] = {}

    def once(self, key: str, make: Callable[[], T]) -> T:
        """Return ``make()``, called once for a key; models and fitted files are shared by all threads."""
        with self._lock:
            if key not in self._made:
                self._made[key] = make()
            made: T = self._made[key]
            return made

    def weights(self, name: str) -> Weights:
        """Return the file, digest and licence of a model's weights."""
        return self.once(f"weights:{name}", lambda: resolve(name, self.config.accept_licenses))

    def artefacts(self, step: str) -> Path:
        """Return a folder of this machine with the files that a step made, under their own names.

        Raises:
            CorruptError: If the step has not made them.
        """
        marker = self.run.artefact_marker(step)
        if marker is None:
            raise CorruptError(f"{self.run.url}: {step} is not finished; run its stage first")

        def gather() -> Path:
            folder = self._folder / f"{step}-{marker.fingerprint[:12]}-{len(self._made)}"
            folder.mkdir()
            for name, path in marker.files.items():
                copy = self.run.local_copy(path, folder)
                if copy != folder / name:
                    (folder / name).symlink_to(copy.resolve())
            return folder

        return self.once(f"artefacts:{sorted(marker.files.values())}", gather)

    def device(self, stage: str) -> str:
        """Return where a stage's model runs: the config decides, never the machine that builds the plan."""
        resources = self.config.resources.get(stage, self.config.resources.get("default"))
        return "cuda" if resources is not None and resources.gpus > 0 else "cpu"

    def num_threads(self, stage: str) -> int:
        """Return how many threads a unit of a stage may use: its cores here, or the CPUs that the settings give it."""
        resources = self.config.resources.get(stage, self.config.resources.get("default"))
        return max(self.num_cores, 1 if resources is None else int(resources.cpus))

    def collections(self, kind: str) -> list[str]:
        """Return the collections of a kind: ``pool``, ``seeds`` or ``references``."""
        if kind == "pool":
            return ["pool"]
        names = self.config.seeds if kind == "seeds" else self.config.references
        return sorted(f"{kind}/{name}" for name in names)

    def kept(self, collection: str, shard: int, num_rows: int, verdicts: tuple[Table, ...]) -> npt.NDArray[np.bool_]:
        """Return which rows of a shard none of the verdicts rejects, shape (num_rows,)."""
        kept = np.ones(num_rows, dtype=bool)
        for verdict in verdicts:
            reasons = self.run.read_table(collection, verdict.name, shard, ["reject_reason"]).column(0)
            kept &= reasons.is_null().to_numpy()
        return kept

    @cached_property
    def _folder(self) -> Path:
        folder = Path(tempfile.mkdtemp(prefix="curation-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        return folder
