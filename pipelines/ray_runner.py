"""Run units on a Ray cluster: a fixed pool of actors a step, each holding the step's model.

What travels is the number of a shard; actors read and write the run themselves. An actor that dies with its worker or
node is replaced, on its node if that still lives, and its unit is tried again: outputs are committed by marker, so a
unit done twice is done once.
"""

import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import ray
import yaml
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from curation import settings
from curation.config import ResourceConfig, RunConfig
from curation.crashes import watch
from curation.errors import CurationError, InputError, StageError
from curation.pipelines.context import Context
from curation.pipelines.lvd142m import build_plan
from curation.pipelines.plan import Plan, Step
from curation.pipelines.units import Done, Unit
from curation.pipelines.work import execute
from curation.store import Run

_DEATHS_OF_A_UNIT = 8  # that told nothing about an image, see curation/crashes.py; nodes may be taken away
_POLL_S = 0.5
_REACH_S = 10.0


@dataclass(eq=False)
class _Member:
    """One actor of a pool.

    Attributes:
        actor: Its handle.
        born: Reference to its node and what was known there of crashes when it started.
    """

    actor: Any
    born: Any


def _reach(address: str) -> None:
    """See that somebody listens at an address with a port: Ray itself tries for minutes.

    Raises:
        OSError: Nobody does.
        ValueError: It is no address.
    """
    place = urlsplit(address if "://" in address else f"ray://{address}")
    if place.port is not None:
        socket.create_connection((place.hostname or "", place.port), timeout=_REACH_S).close()


class RayRunner:
    """Join the cluster at ``address``, or start one on this machine.

    Args:
        address: Such as ``auto`` or ``ray://head:10001``; None starts a local cluster.
        object_store_bytes: Shared memory of a local cluster; nothing large travels through it.
    """

    def __init__(self, address: str | None = None, object_store_bytes: int = 100_000_000) -> None:
        self._pools: dict[Any, list[_Member]] = {}
        self._started = not ray.is_initialized()
        if not self._started:
            return
        options: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if address is None:
            options |= {"include_dashboard": False, "object_store_memory": object_store_bytes}
        else:
            options["address"] = address
        try:
            if address is not None:
                _reach(address)
            ray.init(**options)
        except (ConnectionError, OSError, RuntimeError, ValueError) as error:
            where, hint = address or "this machine", ""
            if "InvalidAuthToken" in f"{error} {error.__cause__}":
                hint = "; it wants a token: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
            raise InputError(f"no Ray cluster at {where}: {' '.join(str(error).split())}{hint}") from error

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        self._end_pools()
        if self._started:
            ray.shutdown()

    def run(self, context: Context, plan: Plan, step: Step, units: Sequence[Unit]) -> Iterator[Done]:
        """Yield each unit as it is done; after an error no other unit starts."""
        pool = self._pool(context, step)
        idle = pool[: len(units)]
        waiting = deque(units)
        running: dict[Any, tuple[_Member, Unit]] = {}
        deaths = _Deaths()
        failed: BaseException | None = None
        try:
            while True:
                while idle and waiting and failed is None and not context.should_stop():
                    member, unit = idle.pop(), waiting.popleft()
                    running[member.actor.execute.remote(unit)] = member, unit
                if not running or context.should_stop():
                    break
                for reference in ray.wait(list(running), timeout=_POLL_S)[0]:
                    member, unit = running.pop(reference)
                    try:
                        done = ray.get(reference)
                    except CurationError as error:
                        failed = failed or unwrapped(error)
                    except ray.exceptions.RayActorError as error:
                        node, findings = _born(member)
                        pool[pool.index(member)] = member = _start(context, step, node)
                        if deaths.of(unit, node, findings) < _DEATHS_OF_A_UNIT:
                            waiting.appendleft(unit)
                        else:
                            said = f"its worker died {_DEATHS_OF_A_UNIT} times: {error}; is there enough memory?"
                            failed = failed or StageError(step.stage, unit.shard, said)
                    else:
                        yield done
                    idle.append(member)
        finally:
            if running:  # stopped in the middle: what is at work ends with its actor
                self._end_pools()
        if failed is not None:
            raise failed

    def _pool(self, context: Context, step: Step) -> list[_Member]:
        """Return the actors of a step: those of an earlier step if it asked for the same resources.

        An actor costs seconds of imports to start, and steps with the same needs follow each other.
        """
        resources = _resources(context.config, step)
        config = settings.dump(context.config)
        key = (context.run.url, context.run.fence, config, resources.workers, resources.cpus, resources.gpus)
        if key not in self._pools:
            self._end_pools()
            self._pools[key] = [_start(context, step) for _ in range(resources.workers)]
        return self._pools[key]

    def _end_pools(self) -> None:
        for members in self._pools.values():
            for member in members:
                ray.kill(member.actor)
        self._pools.clear()


class _Deaths:
    """How often workers died of a unit without anything being found out by it."""

    def __init__(self) -> None:
        self._times: Counter[tuple[str, int | None]] = Counter()
        self._known: dict[tuple[str, int | None, str], int] = {}

    def of(self, unit: Unit, node: str, findings: int) -> int:
        """Count a death of a worker that knew of ``findings`` on its node when it started, and return the number."""
        place = unit.collection, unit.shard
        has_learned = findings > self._known.get((*place, node), findings)
        self._known[*place, node] = findings
        self._times[place] = 1 if has_learned else self._times[place] + 1
        return self._times[place]


def _start(context: Context, step: Step, node: str = "") -> _Member:
    """Start an actor for a step; on a node that lives rather than on another one."""
    resources = _resources(context.config, step)
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if node:
        options["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node, soft=True)
    arguments = context.run.url, context.run.fence, settings.dump(context.config)
    actor: Any = ray.remote(_Worker).options(**options).remote(*arguments)
    return _Member(actor, actor.born.remote())


def _born(member: _Member) -> tuple[str, int]:
    """Return what an actor that has died said at its start; nothing if it never did."""
    try:
        node, findings = ray.get(member.born)
    except ray.exceptions.RayActorError:
        return "", 0
    return node, findings


class _Worker:
    """Holds the model of the step at work, and does its units one after the other."""

    def __init__(self, url: str, fence: str, config: str) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        watch().enforce_deadlines()
        self._run = Run(url)
        self._run.fence = fence
        self._config = settings.parse(RunConfig, yaml.safe_load(config), "run.yaml")
        self._plan = build_plan(self._config)
        self._step = ""

    def born(self) -> tuple[str, int]:
        return ray.get_runtime_context().get_node_id(), watch().num_findings()

    def execute(self, unit: Unit) -> Done:
        if unit.step != self._step:  # let the model of the step before go
            self._step, self._context = unit.step, Context(self._run, self._config)
        return execute(self._context, self._plan, unit)


def _resources(config: RunConfig, step: Step) -> ResourceConfig:
    default = config.resources.get("default", ResourceConfig())
    return config.resources.get(step.stage, default)


def unwrapped(error: CurationError) -> BaseException:
    """Return the error as it was raised in the actor, without Ray's wrapping."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, CurationError) else error
