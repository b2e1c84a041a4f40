"""Descriptors of images and of their copies, by the same stage, on the same way, as a run's."""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from PIL import Image

from curation.calibrate.sample import Sample
from curation.config.images import ImagesConfig
from curation.edits import Edit
from curation.errors import ImageError
from curation.images import decode
from curation.pipelines.image_pass import HEADROOM
from curation.pipelines.ingest import image_id
from curation.schema import SSCD_DIM
from curation.stage import ImageRow
from curation.stages.sscd import SscdStage

MAX_SIDE_PX = 1024  # copies are made of images no longer than this; the model sees about 300

Job = Callable[[], bytes]


@dataclass(frozen=True)
class Described:
    """What the stage says of N images.

    Attributes:
        vectors_ND: As they are stored: float16, L2-normalised; zeros where there is none.
        bias_N: Score bias, float64; NaN where there is none.
        good_N: Rows that have a descriptor.
    """

    vectors_ND: npt.NDArray[np.float16]
    bias_N: npt.NDArray[np.float64]
    good_N: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Copies:
    """How one edit is planted: a copy of every image, at strengths by turns.

    Attributes:
        edit: The edit.
        strength_N: Which of its strengths each copy has, (N,).
        others_NK: Other images that are to be seen in each copy, (N, K); -1: none.
    """

    edit: Edit
    strength_N: npt.NDArray[np.int64]
    others_NK: npt.NDArray[np.int64]


def plan_copies(edits: Sequence[Edit], num_images: int, seed: int) -> list[Copies]:
    """Return who gets which strength and which others; a function of the number of images and the seed."""
    plans = []
    for place, edit in enumerate(edits):
        strength_N = (np.arange(num_images) + place) % len(edit.strengths)
        num_others = max(edit.num_others(strength) for strength in edit.strengths)
        others_NK = np.full((num_images, min(num_others, max(0, num_images - 1))), -1)
        rng = np.random.default_rng([seed, place])
        for image in range(num_images):
            wanted = min(edit.num_others(edit.strengths[strength_N[image]]), others_NK.shape[1])
            shift = 1 + rng.choice(num_images - 1, wanted, replace=False) if wanted else ()
            others_NK[image, :wanted] = (image + np.array(shift, np.int64)) % num_images
        plans.append(Copies(edit, strength_N, others_NK))
    return plans


def copy_jobs(sample: Sample, copies: Copies, limits: ImagesConfig, seed: int) -> Iterator[Job]:
    """Yield what makes each copy, in the order of the sample."""
    for index in range(len(sample)):
        yield partial(_copy, sample, copies, index, limits, seed)


def _copy(sample: Sample, copies: Copies, index: int, limits: ImagesConfig, seed: int) -> bytes:
    edit, strength = copies.edit, copies.edit.strengths[copies.strength_N[index]]
    others = [_open(sample, int(other), limits) for other in copies.others_NK[index] if other >= 0]
    name = int.from_bytes(edit.name.encode())
    rng = np.random.default_rng([seed, name, round(strength * 1000), int(sample.ids[index], 16)])
    return edit(_open(sample, index, limits), strength, rng, others)


def _open(sample: Sample, index: int, limits: ImagesConfig) -> Image.Image:
    image = Image.fromarray(decode(sample.data(index), limits, MAX_SIDE_PX))
    image.thumbnail((MAX_SIDE_PX, MAX_SIDE_PX), Image.Resampling.LANCZOS)
    return image


def describe(
    jobs: Iterator[Job], num_jobs: int, stage: SscdStage, limits: ImagesConfig, on_images: Callable[[int], None]
) -> Described:
    """Describe what the jobs make, a batch a thread and a thread a core.

    Args:
        jobs: Make encoded images.
        num_jobs: Their number.
        stage: The run's.
        limits: Of decoding.
        on_images: Told how many more are done.
    """
    found = Described(
        np.zeros((num_jobs, SSCD_DIM), np.float16), np.full(num_jobs, np.nan), np.zeros(num_jobs, np.bool_)
    )

    def batch(start: int, some: Sequence[Job]) -> int:
        seen, rows = [], []
        for row, job in enumerate(some, start):
            try:
                data = job()
                rgb_HW3 = decode(data, limits, stage.min_side_px, HEADROOM)
                seen.append(stage.prepare(ImageRow(row, image_id(data), data, rgb_HW3)))
                rows.append(row)
            except ImageError:
                continue  # a copy that cannot be read is a copy that is not found
        if rows:
            columns = stage(seen)
            vectors, bias = columns["sscd"], columns["score_bias"]
            good = vectors.is_valid().to_numpy(zero_copy_only=False)
            rows_N = np.array(rows)
            flat = vectors.values.to_numpy(zero_copy_only=False).reshape(-1, SSCD_DIM)
            found.vectors_ND[rows_N[good]] = flat[good]
            found.bias_N[rows_N] = bias.to_numpy(zero_copy_only=False)
            found.good_N[rows_N] = good
        return len(some)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(cores, thread_name_prefix="calibrate")
    waiting: deque[Future[int]] = deque()
    try:
        for start in range(0, num_jobs, stage.batch_size):
            some = [next(jobs) for _ in range(min(stage.batch_size, num_jobs - start))]
            waiting.append(pool.submit(batch, start, some))
            while len(waiting) > cores:
                on_images(waiting.popleft().result())
        while waiting:
            on_images(waiting.popleft().result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
    return found
