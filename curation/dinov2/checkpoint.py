"""Saved state of a run: tensors in safetensors, everything else in JSON; nothing is ever unpickled.

::

    output/train.json                          settings and the manifests' digests, written first
    output/log.jsonl                           one line a step
    output/checkpoints/step_00000020.safetensors   student/…, teacher/…, exp_avg/…, exp_avg_sq/…, step/…, centre/…
    output/checkpoints/step_00000020.json      step, counters, cursor, digests; sha256 of the tensors; written last
    output/teacher.safetensors                 the teacher's backbone under timm's names
    output/teacher_best.safetensors            that of the best checkpoint, where there is a metric to compare by

A file is written under a name that starts with a dot, flushed to the disk and renamed. A checkpoint exists once its
JSON does, and counts only while its tensors have the digest written there: a run killed at any instant goes on from the
newest complete one.
"""

import errno
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from curation.errors import DiskFullError, TrainError

_NAME = re.compile(r"step_(\d{8,})\.json")
_MAX_JSON_BYTES = 10_000_000
_COUNTS = ("step", "num_updates", "num_skipped", "skipped_in_a_row", "num_replaced")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Best:
    """The checkpoint with the highest value of the metric that checkpoints are compared by."""

    step: int
    metric: str
    value: float


@dataclass(frozen=True)
class Progress:
    """Where a run stands.

    Attributes:
        step: Finished steps; sample positions and random numbers follow from it.
        num_updates: Steps that changed the weights.
        num_skipped: Steps without update because a loss or gradient was not finite.
        skipped_in_a_row: The latest of them, if they are the latest steps.
        num_replaced: Unreadable images that were replaced.
        last: Figures of the latest step.
        best: The best checkpoint so far; None where nothing was compared.
    """

    step: int = 0
    num_updates: int = 0
    num_skipped: int = 0
    skipped_in_a_row: int = 0
    num_replaced: int = 0
    last: dict[str, float | None] | None = None
    best: Best | None = None

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> "Progress":
        """Return what was written down.

        Raises:
            TypeError: It is something else.
        """
        best = content.get("best")
        found = cls(**{**content, "best": None if best is None else Best(**best)})
        if not all(isinstance(getattr(found, name), int) for name in _COUNTS):
            raise TypeError(f"{', '.join(_COUNTS)} must be whole numbers")
        return found


@dataclass(frozen=True)
class ManifestShare:
    """A manifest that a run is trained on."""

    digest: str
    num_images: int
    weight: float

    def __str__(self) -> str:
        return f"{self.digest} ({self.num_images} images, weight {self.weight:g})"


@dataclass(frozen=True)
class Identity:
    """What must be equal for a run to go on.

    Attributes:
        settings: Flattened to dotted keys.
        manifests: Its images.
        sources: Digests of what weights come from, by the setting that names it.
    """

    settings: dict[str, Any]
    manifests: list[ManifestShare]
    sources: dict[str, str] = field(default_factory=dict)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        output: The run's folder.
        keep: Newest checkpoints that are kept, besides the best one.
    """

    def __init__(self, output: Path, keep: int) -> None:
        self._output = output
        self._folder = output / "checkpoints"
        self._keep = keep

    def is_used(self) -> bool:
        """Return whether the run's folder holds more than what a run leaves that failed before its first step."""
        visible = {path.name: path for path in self._output.iterdir() if not path.name.startswith(".")}
        if "train.json" in visible:
            del visible["train.json"]
            for name in ("checkpoints", "log.jsonl"):
                if name in visible and _is_empty(visible[name]):
                    del visible[name]
        return bool(visible)

    def start(self, identity: Identity) -> None:
        """Make the folders and write down what the run is."""
        with clear_errors(self._output, "the run's folder"):
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in [*self._folder.glob(".*"), *self._output.glob(".*.writing")]:
                left.unlink()
        write_json(self._output / "train.json", asdict(identity))

    def identity(self) -> Identity | None:
        """Return what the run in the folder is; None where there is none.

        Raises:
            TrainError: If it was written by something else.
        """
        path = self._output / "train.json"
        if not path.exists():
            return None
        content = read_json(path)
        try:
            manifests = [ManifestShare(**manifest) for manifest in content["manifests"]]
            return Identity(content["settings"], manifests, content["sources"])
        except (KeyError, TypeError) as error:
            raise TrainError(f"{path}: is not what this version writes; give another folder") from error

    def save(self, progress: Progress, tensors: Mapping[str, Tensor]) -> Path:
        """Write a checkpoint, then forget the oldest ones but the best; return the file of its tensors.

        Raises:
            DiskFullError: If there is no space; earlier checkpoints stay.
        """
        path = self.path(progress)
        write_tensors(path, tensors, {"format": "pt"})
        content: dict[str, Any] = {"progress": asdict(progress), "sha256": _sha256(path)}
        identity = self.identity()
        if identity is not None:
            content["sample_cursor"] = progress.step * int(identity.settings["data.batch_size"])
            content["manifests"] = [asdict(manifest) for manifest in identity.manifests]
        write_json(path.with_suffix(".json"), content)
        for step in list(self._steps())[self._keep :]:
            if progress.best is not None and step == progress.best.step:
                continue
            old = self._folder / f"step_{step:08d}.json"
            old.unlink()  # first, so that no marker is left without tensors
            old.with_suffix(".safetensors").unlink(missing_ok=True)
        return path

    def path(self, progress: Progress) -> Path:
        """Return where the tensors of a checkpoint lie."""
        return self._folder / f"step_{progress.step:08d}.safetensors"

    def newest(self) -> tuple[Progress, dict[str, Tensor], Path] | None:
        """Return the newest complete checkpoint, None where there never was one; damaged ones are passed over.

        Raises:
            TrainError: All are damaged.
        """
        damaged = None
        for step in self._steps():
            path = self._folder / f"step_{step:08d}.safetensors"
            try:
                content = read_json(path.with_suffix(".json"))
                progress = Progress.of(content["progress"])
                if progress.step != step or _sha256(path) != content["sha256"]:
                    raise TrainError(f"{path}: is not what was written")
                return progress, load_file(path), path
            except (TrainError, OSError, SafetensorError, KeyError, TypeError, AttributeError) as error:
                _log.warning("checkpoint %s is damaged and was passed over: %s", path, error)
                damaged = path
        if damaged is not None:
            raise TrainError(
                f"{damaged.parent}: all checkpoints are damaged; put a copy back, or delete them to train anew"
            )
        return None

    def newest_digest(self) -> str | None:
        """Return the digest of the tensors that ``newest`` would give; None where there are none."""
        for step in self._steps():
            marker = self._folder / f"step_{step:08d}.json"
            with suppress(TrainError, OSError):  # said, and passed over, when it is read
                written = read_json(marker).get("sha256")
                if written == _sha256(marker.with_suffix(".safetensors")):
                    return str(written)
        return None

    def has_begun(self) -> bool:
        """Return whether there is a checkpoint, whole or not."""
        return next(self._steps(), None) is not None

    def _steps(self) -> Iterator[int]:
        found = [int(match[1]) for path in self._folder.glob("step_*.json") if (match := _NAME.fullmatch(path.name))]
        return iter(sorted(found, reverse=True))


def differences(was: Mapping[str, Any], now: Mapping[str, Any], free: tuple[str, ...]) -> list[str]:
    """Return ``key: old → new`` for each setting that differs, but for keys that start with one of ``free``."""
    keys = sorted({*was, *now})
    return [
        f"{key}: {was.get(key)!r} → {now.get(key)!r}"
        for key in keys
        if was.get(key) != now.get(key) and not key.startswith(free)
    ]


def flattened(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all."""
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_whole(path, lambda temporary: save_file(on_cpu, temporary, metadata=dict(metadata)))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    text = json.dumps(content, allow_nan=False, indent=1)
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON mapping.

    Raises:
        TrainError: If it is not one, or too large to be one of ours.
    """
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(_MAX_JSON_BYTES))
    except (OSError, ValueError) as error:
        raise TrainError(f"{path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise TrainError(f"{path}: is not what was written")
    return content


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Have a file written beside its place and put it there, whole or not at all, for all whom the umask lets read.

    Raises:
        DiskFullError: There is no space.
        TrainError: It cannot be written.
    """
    temporary = path.with_name(f".{path.name}.writing")
    with clear_errors(path, path.name):
        try:
            temporary.touch()
            mode = stat.S_IMODE(temporary.stat().st_mode)
            write(temporary)
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


class clear_errors:  # noqa: N801 - reads as a statement
    """Turn failures to write into one line that says what to do."""

    def __init__(self, path: Path, what: str) -> None:
        self._path = path
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (OSError, SafetensorError)):
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)
            if full:
                raise DiskFullError(
                    f"{self._path}: no space left for {self._what}; free some and run the command again "
                    "(`curate train` with --resume)"
                ) from error
            raise TrainError(
                f"{self._path}: cannot be written: {error}; earlier checkpoints stay, and --resume goes on from them"
            ) from error


def _is_empty(path: Path) -> bool:
    return not any(path.iterdir()) if path.is_dir() else not path.stat().st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
