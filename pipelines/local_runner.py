"""Run units in threads of this process: what tests, debuggers and runs in memory want.

Models run on one thread each and are shared, so several shards keep all cores busy, and results are those of Ray. Where
there are fewer units than workers, such as a fit, each is told how many cores it has for itself.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from curation.pipelines.context import Context
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Done, Unit, cores_of_each
from curation.pipelines.work import execute


class LocalRunner:
    """Run at most ``num_workers`` units at a time."""

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = num_workers

    def run(self, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
        """Yield each unit as it is done; after an error, units at work end and no other starts."""
        waiting = iter(units)
        running: set[Future[Done]] = set()
        failed: BaseException | None = None
        stop = False
        asked = context.should_stop
        context.should_stop = lambda: stop or asked()
        context.num_cores = cores_of_each(self.num_workers, units)
        pool = ThreadPoolExecutor(self.num_workers, thread_name_prefix=step.name)
        try:
            while True:
                while failed is None and len(running) < self.num_workers and not asked():
                    unit = next(waiting, None)
                    if unit is None:
                        break
                    running.add(pool.submit(execute, context, plan, unit))
                if not running:
                    break
                finished, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in finished:
                    error = future.exception()
                    if error is None:
                        yield future.result()
                    elif not isinstance(error, InterruptedError):
                        failed, stop = failed or error, True
        finally:
            stop = True
            pool.shutdown(wait=True, cancel_futures=True)
            context.should_stop, context.num_cores = asked, 1
        if failed is not None:
            raise failed
