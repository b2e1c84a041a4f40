"""Train on a Ray cluster: one actor a process, of which the first says where the others meet.

What travels is the settings and, on the way back, what each step reports; actors read the manifest and write the
checkpoints themselves, so both must lie where all nodes see them. When an actor dies all of them start again and go on
from the newest checkpoint.
"""

import logging
import os
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
import yaml

from curation import settings
from curation.dinov2.config import TrainConfig
from curation.dinov2.log import StepReport
from curation.dinov2.train import TrainResult, train
from curation.errors import CurationError, LostProcessError, TrainError
from curation.pipelines.ray_runner import RayRunner, unwrapped

_POLL_S = 0.5
_START_TIMEOUT_S = 300.0
_LAST_WORDS_S = 10.0

_log = logging.getLogger(__name__)


def train_on_ray(
    manifest: str | None,
    config: TrainConfig,
    output: Path,
    *,
    address: str | None,
    resume: bool,
    device: str | None = None,
    on_step: Callable[[StepReport], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train as ``curation.dinov2.train.train`` does, in ``config.ray.workers`` processes of a cluster.

    Args:
        manifest: Path or URL; every node must be able to read it. None: those of ``data.manifests``.
        config: Settings.
        output: Folder that every node sees.
        address: Of the cluster, such as ``auto``; None starts one on this machine.
        resume: Go on from the newest checkpoint.
        device: Such as ``cpu``; None: a GPU where there is one.
        on_step: Called after each step.
        should_stop: Asked twice a second; true saves a checkpoint and returns.

    Raises:
        InputError: There is no such cluster.
        TrainError: As ``train``, or processes died more often than ``ray.max_restarts``.
    """
    arguments = (manifest, settings.dump(config), str(output.absolute()))
    cluster = RayRunner(address)
    try:
        for restarts in range(config.ray.max_restarts + 1):
            try:
                with _Group(config, device) as group:
                    # What died had begun, unless it died before it wrote anything: then there is nothing in the way.
                    return group.train(arguments, resume or restarts > 0, on_step, should_stop)
            except ray.exceptions.RayActorError as error:
                _log.warning("a training process died: %s", " ".join(str(error).split()))
        raise TrainError(
            f"training processes died {config.ray.max_restarts + 1} times; is there enough memory? "
            "The newest checkpoint is kept: --resume goes on"
        )
    finally:
        cluster.close()


class _Group:
    """The actors of one attempt."""

    def __init__(self, config: TrainConfig, device: str | None) -> None:
        self._size = config.ray.workers
        # One thread trains while others answer.
        options = {"num_cpus": config.ray.cpus, "num_gpus": config.ray.gpus, "max_concurrency": 3}
        member: Any = ray.remote(_Member).options(**options)
        self._members = [member.remote(device) for _ in range(self._size)]

    def __enter__(self) -> "_Group":
        try:
            points = ray.get([member.meeting_point.remote() for member in self._members], timeout=_START_TIMEOUT_S)
            on_node = Counter(address for address, _ in points)
            places = [
                member.join.remote(rank, self._size, on_node[point[0]], *points[0], os.getcwd())
                for rank, (member, point) in enumerate(zip(self._members, points, strict=True))
            ]
            ray.get(places, timeout=_START_TIMEOUT_S)
        except ray.exceptions.GetTimeoutError as error:
            self.__exit__()
            raise TrainError(
                f"the cluster has no room for ray.workers {self._size} with the CPUs and GPUs that `ray` asks for"
            ) from error
        return self

    def __exit__(self, *error: object) -> None:
        for member in self._members:
            ray.kill(member)

    def train(
        self,
        arguments: tuple[str | None, str, str],
        resume: bool,
        on_step: Callable[[StepReport], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> TrainResult:
        running = [member.train.remote(*arguments, resume) for member in self._members]
        ended: list[Any] = []
        asked = False
        while not ended:
            ended, _ = ray.wait(running, timeout=_POLL_S)
            if should_stop is not None and should_stop() and not asked:
                asked = True
                ray.get([member.stop.remote() for member in self._members])
            self._hand_on(on_step)
        # The others end soon after, and one of theirs may be the reason. They agreed on the last checkpoint before the
        # first of them ended, and all return the same: one that only fails to leave is not waited for.
        ray.wait(running, num_returns=len(running), timeout=_LAST_WORDS_S)
        reason = _reason(running)
        if reason is not None:
            raise reason
        self._hand_on(on_step)
        result: TrainResult = ray.get(ended[0])
        return result

    def _hand_on(self, on_step: Callable[[StepReport], None] | None) -> None:
        for report in ray.get(self._members[0].reports.remote()):
            if on_step is not None:
                on_step(report)


def _reason(running: list[Any]) -> BaseException | None:
    """Return why training failed, if it did: what a process says, else that one died, else what the others met then."""
    ended, _ = ray.wait(running, num_returns=len(running), timeout=0)
    errors = [error for reference in running if reference in ended and (error := _error(reference)) is not None]
    said = [error for error in errors if isinstance(error, CurationError) and not isinstance(error, LostProcessError)]
    died = [error for error in errors if isinstance(error, ray.exceptions.RayActorError)]
    errors = [*said, *died, *errors]
    return errors[0] if errors else None


def _error(reference: Any) -> BaseException | None:
    try:
        ray.get(reference)
    except CurationError as error:
        return unwrapped(error)
    except ray.exceptions.RayError as error:
        found: BaseException = error
        return found
    return None


class _Member:
    """One training process."""

    def __init__(self, device: str | None) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        self._device = device
        self._stop = threading.Event()
        self._reports: deque[StepReport] = deque()

    def meeting_point(self) -> tuple[str, int]:
        """Return an address of this node and a port that is free there."""
        of_node: Any = ray.util.get_node_ip_address
        address: str = of_node()
        with socket.socket() as probe:
            probe.bind((address, 0))
            return address, probe.getsockname()[1]

    def join(self, rank: int, size: int, on_node: int, address: str, port: int, folder: str) -> None:
        """Say which process this is, and of how many on this node.

        Relative paths of settings start where the command runs, if that is here.
        """
        with suppress(OSError):
            os.chdir(folder)
        place: dict[str, object] = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": on_node}
        place |= {"MASTER_ADDR": address, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()})

    def train(self, manifest: str | None, config: str, output: str, resume: bool) -> TrainResult:
        return train(
            manifest,
            settings.parse(TrainConfig, yaml.safe_load(config), "train.yaml"),
            Path(output),
            resume=resume,
            device=self._device,
            on_step=self._reports.append,
            should_stop=self._stop.is_set,
        )

    def reports(self) -> list[StepReport]:
        """Return what was reported since the last time."""
        return [self._reports.popleft() for _ in range(len(self._reports))]

    def stop(self) -> None:
        self._stop.set()
