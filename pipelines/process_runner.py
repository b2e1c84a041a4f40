"""Run units in processes of this machine: the default of the command line.

A process that dies (a decoder that crashes, the kernel's out-of-memory killer) costs its unit a retry and not the run;
each holds the models of the step at work, on one thread each, so results are those of the other runners. Where there
are fewer units than workers, such as a fit, each is told how many cores it has for itself. Workers die with the process
that started them, and leave Ctrl-C to it.
"""

import signal
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any

from curation import settings
from curation.crashes import watch
from curation.errors import StageError
from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Done, Unit, cores_of_each
from curation.pipelines.worker_process import Spawner, WorkerProcess

_POLL_S = 0.2
_DEATHS_OF_A_UNIT = 4  # that told nothing about an image, see curation/crashes.py


class ProcessRunner:
    """Run at most ``num_workers`` units at a time, each in a process of its own.

    Args:
        num_workers: Processes.
        spawner: One that may have started some of them already; None: a new one.
    """

    def __init__(self, num_workers: int, spawner: Spawner | None = None) -> None:
        self.num_workers = num_workers
        self._spawner = spawner or Spawner()
        self._stop = self._spawner.stop
        self._workers: list[WorkerProcess] = []
        self._key = ("", "", "")

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def run(self, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
        """Yield each unit as it is done; after an error no other unit starts."""
        self._start(context, min(self.num_workers, len(units)))
        waiting = deque(units)
        num_cores = cores_of_each(self.num_workers, units)
        deaths: Counter[tuple[str, int | None]] = Counter()
        known = watch().num_findings()
        failed: BaseException | None = None
        try:
            while True:
                if context.should_stop() or failed is not None:
                    self._stop.set()
                    waiting.clear()
                for worker in self._workers:
                    if worker.unit is None and waiting:
                        worker.unit = waiting.popleft()
                        with suppress(BrokenPipeError, ConnectionResetError):  # it died idle, as is met below
                            worker.pipe.send((worker.unit, num_cores))
                busy = [worker for worker in self._workers if worker.unit is not None]
                if not busy:
                    break
                for found in self._news(busy):
                    worker, kind, value = found
                    if kind == "rows":
                        context.on_rows(value)
                        continue
                    unit, worker.unit = worker.unit, None
                    if kind == "done":
                        yield value
                    elif kind == "error":
                        failed = failed or value
                    elif kind == "died" and unit is not None:
                        place = (unit.collection, unit.shard)
                        findings = watch().num_findings()
                        deaths[place] = deaths[place] + 1 if findings == known else 1
                        known = findings
                        self._replace(context, worker)
                        if deaths[place] < _DEATHS_OF_A_UNIT:
                            waiting.appendleft(unit)
                        else:
                            failed = failed or _died(step, unit, value, deaths[place])
        finally:
            if any(worker.unit is not None for worker in self._workers):
                self._stop.set()
                self.close()
            self._stop.clear()
        if failed is not None:
            raise failed

    def _news(self, busy: Sequence[WorkerProcess]) -> Iterator[tuple[WorkerProcess, str, Any]]:
        by_pipe = {worker.pipe: worker for worker in busy}
        for pipe in wait(list(by_pipe), _POLL_S):
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, ConnectionResetError):
                worker.process.join()
                kind, value = "died", worker.process.exitcode
            yield worker, kind, value

    def _start(self, context: Context, num_workers: int) -> None:
        key = (context.run.url, settings.dump(context.config), context.run.fence)
        if key != self._key:
            self.close()
            self._key = key
        while len(self._workers) < num_workers:
            self._workers.append(self._spawner.spawn(*self._key))

    def _replace(self, context: Context, worker: WorkerProcess) -> None:
        worker.pipe.close()
        fresh = self._spawner.spawn(*self._key)
        worker.process, worker.pipe = fresh.process, fresh.pipe


def _died(step: Step, unit: Unit, code: int | None, times: int) -> StageError:
    why = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
    hint = "; is there enough memory for --workers?" if code == -signal.SIGKILL else ""
    return StageError(step.stage, unit.shard, f"its process died {times} times ({why}){hint}")
