"""Run units on a Ray cluster: a fixed pool of actors a step, each holding the step's model.

What travels is the number of a shard; actors read and write the run themselves. An actor that dies with its worker or
node is started again and its units are tried again: outputs are committed by marker, so a unit done twice is done once.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from typing import Any

import ray
import yaml

from curation import config as settings
from curation.config import ResourceConfig, RunConfig
from curation.errors import CurationError, InputError, StageError
from curation.pipelines.context import Context
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Done, Unit
from curation.pipelines.work import execute
from curation.store import Run

_RETRIES = 8  # of a unit; a poisonous image costs two
_POLL_S = 0.5


class RayRunner:
    """Join the cluster at ``address``, or start one on this machine.

    Args:
        address: Such as ``auto`` or ``ray://head:10001``; None starts a local cluster.
        object_store_bytes: Shared memory of a local cluster; nothing large travels through it.
    """

    def __init__(self, address: str | None = None, object_store_bytes: int = 100_000_000) -> None:
        self._pools: dict[Any, list[Any]] = {}
        self._started = not ray.is_initialized()
        if not self._started:
            return
        options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if address is None:
            options |= {"include_dashboard": False, "object_store_memory": object_store_bytes}
        else:
            options["address"] = address
        try:
            ray.init(**options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where = address or "this machine"
            raise InputError(f"no Ray cluster at {where}: {' '.join(str(error).split())}") from error

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._end_pools()
        if self._started:
            ray.shutdown()

    def run(self, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
        """Yield each unit as it is done; after an error no other unit starts."""
        actors = self._pool(context, step)[: len(units)]
        waiting = iter(units)
        idle = list(actors)
        running: dict[Any, Any] = {}
        failed: BaseException | None = None
        try:
            while True:
                while idle and failed is None and not context.should_stop():
                    unit = next(waiting, None)
                    if unit is None:
                        break
                    actor = idle.pop()
                    running[actor.execute.remote(unit)] = actor
                if not running or context.should_stop():
                    break
                for reference in ray.wait(list(running), timeout=_POLL_S)[0]:
                    idle.append(running.pop(reference))
                    try:
                        yield ray.get(reference)
                    except CurationError as error:
                        failed = failed or _plain(error)
                    except ray.exceptions.RayActorError as error:
                        failed = failed or StageError(
                            step.stage, None, f"its worker died {_RETRIES + 1} times: {error}; is there enough memory?"
                        )
        finally:
            if running:  # stopped in the middle: what is at work ends with its actor
                self._end_pools()
        if failed is not None:
            raise failed

    def _pool(self, context: Context, step: Step) -> list[Any]:
        """Return the actors of a step: those of an earlier step if it asked for the same resources.

        An actor costs seconds of imports to start, and steps with the same needs follow each other.
        """
        resources = _resources(context.config, step)
        config = settings.dump(context.config)
        key = (context.run.url, context.run.fence, config, resources.workers, resources.cpus, resources.gpus)
        if key not in self._pools:
            self._end_pools()
            options = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
            self._pools[key] = [
                ray.remote(_Worker)
                .options(**options, max_restarts=_RETRIES, max_task_retries=_RETRIES)
                .remote(context.run.url, context.run.fence, config)
                for _ in range(resources.workers)
            ]
        return self._pools[key]

    def _end_pools(self) -> None:
        for actors in self._pools.values():
            for actor in actors:
                ray.kill(actor)
        self._pools.clear()


class _Worker:
    """Holds the model of the step at work, and does its units one after the other."""

    def __init__(self, url: str, fence: str, config: str) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._run = Run(url)
        self._run.fence = fence
        self._config = settings.parse(RunConfig, yaml.safe_load(config), "run.yaml")
        self._plan = build_plan(self._config)
        self._step = ""

    def execute(self, unit: Unit) -> Done:
        if unit.step != self._step:  # let the model of the step before go
            self._step, self._context = unit.step, Context(self._run, self._config)
        return execute(self._context, self._plan, unit)


def _resources(config: RunConfig, step: Step) -> ResourceConfig:
    default = config.resources.get("default", ResourceConfig())
    return config.resources.get(step.stage, default)


def _plain(error: CurationError) -> BaseException:
    """Return the error as it was raised in the actor, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, CurationError) else error
