"""``curate calibrate dedup``: plant copies, describe, count, and suggest a threshold.

What is measured: each copy against its own image (found or not) and against every other image of the sample (wrong if
above). The table has the precision within the sample. A threshold is suggested for the precision in a pool, where an
image has one copy and each copy meets every other image: copies grow with the pool and pairs with its square, so a
threshold that does for 500 images is too low for a million. How many images cannot be told apart is all that a
sample can say about a pool that is much larger: then the suggestion is called unsure.
"""

import hashlib
import json
import logging
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from curation.calibrate.counts import THRESHOLDS, Interval, Measured, Similar, intervals, measure, similar_originals
from curation.calibrate.counts import table_of as rows_of
from curation.calibrate.describe import Copies, Described, Job, copy_jobs, describe, plan_copies
from curation.calibrate.plot import plot
from curation.calibrate.sample import Sample, of_images, of_run
from curation.config.images import ImagesConfig
from curation.edits import EDITS
from curation.errors import InputError
from curation.fingerprint import fingerprint
from curation.pipelines.context import Context
from curation.pipelines.freshness import assess
from curation.pipelines.plan import Plan
from curation.stages.sscd import SscdStage

MIN_IMAGES = 20
logger = logging.getLogger(__name__)

_VERSION = 1  # of what copies look like; raise when an edit changes

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What is asked for.

    Attributes:
        output: Folder of results.
        images: An image set; None: the run's pool.
        size: Images of the sample.
        precision: Wanted.
        seed: Of the sample and of the edits.
        pool_size: Images of the pool that the precision is wanted in; None: as many as the sample was drawn from.
    """

    output: Path
    images: str | None = None
    size: int = 500
    precision: float = 0.99
    seed: int = 0
    pool_size: int | None = None


@dataclass(frozen=True)
class Calibration:
    """What came of it.

    Attributes:
        summary: As written to ``summary.json``.
        lines: For people.
    """

    summary: dict[str, Any]
    lines: list[str]


def calibrate_dedup(context: Context, plan: Plan, request: Request, on_images: Progress) -> Calibration:
    """Measure, and write ``table.parquet``, ``table.csv``, ``similar.csv``, ``plot.png`` and ``summary.json``.

    Descriptors are kept in ``request.output``: the same command with another ``precision`` starts from them, and one
    that was interrupted goes on.

    Args:
        context: Of the run, or of settings alone where ``request.images`` is given.
        plan: Of the settings.
        request: What is asked for.
        on_images: Told how many images are described, of how many.

    Raises:
        InputError: Fewer than 20 images; the run has not come so far; whitening that the run has not fitted.
    """
    if request.images is None:
        sample = of_run(context, plan, request.size, request.seed)
    else:
        sample = of_images(request.images, context.config, request.size, request.seed)
    try:
        if len(sample) < MIN_IMAGES:
            raise InputError(f"{len(sample)} images can be read, and at least {MIN_IMAGES} are needed to calibrate")
        planned = plan_copies(EDITS, len(sample), request.seed)
        described = _describe_all(context, plan, sample, planned, request, on_images)
    finally:
        sample.close()
    originals, copies = described[0], described[1:]
    similar = similar_originals(originals, context.config.dedup.threshold)
    scores = ["cosine"] + (["normalised"] if np.isfinite(originals.bias_N).any() else [])
    table: list[dict[str, Any]] = []
    measured: dict[str, list[Measured]] = {}
    for score in scores:
        pairs = zip(planned, copies, strict=True)
        measured[score] = [measure(originals, found, one.others_NK, similar, score) for one, found in pairs]
        table += _table(score, planned, measured[score])
    pool_size = max(request.pool_size or sample.population, len(sample))
    interval = intervals(measured["cosine"], pool_size, request.seed)
    summary = _summary(context, request, sample, similar, table, interval, pool_size)
    _write(request.output, summary, table, sample, similar, interval)
    return Calibration(summary, _lines(request, summary))


def _stage(context: Context, plan: Plan) -> SscdStage:
    """Return the run's stage, with what the run has fitted."""
    step = plan.step("sscd_fit")
    config = context.config.sscd
    if "fit" not in (config.whitening, config.score_norm):
        from curation.stages.sscd_postprocess import Postprocess

        encoder = step.make(context).load()
        return SscdStage(encoder, Postprocess.none())
    if any(found.state != "done" for found in assess(context, plan, step)):
        raise InputError(
            f"{context.run.url}: whitening or score_norm is not fitted with these settings; run `curate run --stage "
            "sscd` with them first"
        )
    stage: SscdStage = plan.step("sscd").make(context)
    return stage


def _describe_all(
    context: Context, plan: Plan, sample: Sample, planned: list[Copies], request: Request, on_images: Progress
) -> list[Described]:
    """Return the originals' descriptors, and those of the copies of each edit."""
    stage = _stage(context, plan)
    config, limits = context.config, context.config.images
    cause = {
        "version": _VERSION,
        "seed": request.seed,
        "ids": hashlib.sha256("".join(sample.ids).encode()).hexdigest(),
        "weights": context.weights(config.sscd.weights).sha256,
        "sscd": config.sscd.model_dump(mode="json"),
        "postprocess": stage.fitted,
        "images": limits.model_dump(mode="json", exclude={"decode_threads"}),
    }
    folder = request.output / "descriptors"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made: {error.strerror}; give another --output") from error
    total, done = len(sample) * (1 + len(planned)), 0

    def said(number: int) -> None:
        nonlocal done
        done += number
        on_images(done, total)

    found = []
    for one in [None, *planned]:
        name = "original" if one is None else one.edit.name
        strengths = [] if one is None else list(map(float, one.edit.strengths))
        path = folder / f"{name}-{fingerprint({**cause, 'edit': name, 'strengths': strengths})[:16]}.npz"
        described = _load(path)
        if described is None:
            if context.should_stop():
                raise KeyboardInterrupt
            described = _described(sample, one, stage, limits, request.seed, said)
            _save(path, described)
        else:
            said(len(sample))
        found.append(described)
    return found


def _described(
    sample: Sample, one: Copies | None, stage: SscdStage, limits: ImagesConfig, seed: int, said: Callable[[int], None]
) -> Described:
    jobs: Iterator[Job] = (partial(sample.data, index) for index in range(len(sample)))
    if one is not None:
        jobs = copy_jobs(sample, one, limits, seed)
    return describe(jobs, len(sample), stage, limits, said)


def _save(path: Path, found: Described) -> None:
    attempt = path.with_suffix(".part")
    with attempt.open("wb") as file:
        np.savez(file, vectors=found.vectors_ND, bias=found.bias_N, good=found.good_N)
        file.flush()
        os.fsync(file.fileno())
    attempt.replace(path)


def _load(path: Path) -> Described | None:
    """Return what was described before; None where there is nothing, or it is damaged: then it is made again."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return Described(arrays["vectors"], arrays["bias"], arrays["good"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        logger.warning("%s is damaged and is made again", path)
        return None


def _table(score: str, planned: list[Copies], measured: list[Measured]) -> list[dict[str, Any]]:
    every = [np.ones(len(one.strength_N), bool) for one in planned]
    table = rows_of(score, "all", None, list(zip(measured, every, strict=True)))
    for one, counts, rows in zip(planned, measured, every, strict=True):
        table += rows_of(score, one.edit.name, None, [(counts, rows)])
        for place, strength in enumerate(one.edit.strengths):
            table += rows_of(score, one.edit.name, float(strength), [(counts, one.strength_N == place)])
    return table


def _summary(
    context: Context,
    request: Request,
    sample: Sample,
    similar: Similar,
    table: list[dict[str, Any]],
    interval: Interval,
    pool_size: int,
) -> dict[str, Any]:
    overall = [row for row in table if (row["score"], row["edit"]) == ("cosine", "all")]
    points = [_point(row, interval, place, pool_size) for place, row in enumerate(overall)]
    sure = [point for point in points if point["precision_interval"][0] >= request.precision]
    seen = [point for point in points if point["precision"] >= request.precision]
    suggested = min(sure or seen, key=lambda point: point["threshold"], default=None)
    current = context.config.dedup.threshold
    config = context.config.sscd
    return {
        "wanted_precision": request.precision,
        "suggested": suggested,
        "suggested_is_sure": bool(sure),
        "current": min(points, key=lambda point: abs(point["threshold"] - current)),
        "at_suggested": {} if suggested is None else _recalls(table, suggested["threshold"]),
        "images": len(sample),
        "drawn_from": sample.population,
        "pool_size": pool_size,
        "seed": request.seed,
        "copies": overall[0]["copies"],
        "different_pairs": overall[0]["different_pairs"],
        "similar_originals": {"above": current, "pairs": len(similar.left)},
        "sscd": config.model_dump(mode="json"),
        "weights_sha256": context.weights(config.weights).sha256,
    }


def _point(row: dict[str, Any], interval: Interval, place: int, pool_size: int) -> dict[str, Any]:
    pairs = pool_size * (pool_size - 1) / 2
    high = interval.wrong_high[place] / row["different_pairs"] if row["different_pairs"] else None
    return {
        **{name: row[name] for name in ("threshold", "recall", "found", "wrong", "wrong_pair_rate")},
        "precision": float(interval.precision[place]),
        "precision_in_sample": row["precision"],
        "precision_interval": [float(interval.precision_low[place]), float(interval.precision_high[place])],
        "recall_interval": [float(interval.recall_low[place]), float(interval.recall_high[place])],
        "precision_in_sample_if_similar_originals_differ": row["precision_similar_wrong"],
        "wrong_pairs_expected_in_pool": None if high is None else row["wrong_pair_rate"] * pairs,
        "wrong_pairs_at_most_in_pool": None if high is None else float(high) * pairs,
    }


def _recalls(table: list[dict[str, Any]], threshold: float) -> dict[str, Any]:
    """Return recall by edit and strength at a threshold."""
    found: dict[str, Any] = {}
    for row in table:
        if row["score"] == "cosine" and row["threshold"] == threshold and row["strength"] is not None:
            found.setdefault(row["edit"], {})[f"{row['strength']:g}"] = row["recall"]
    return found


def _write(
    output: Path,
    summary: dict[str, Any],
    table: list[dict[str, Any]],
    sample: Sample,
    similar: Similar,
    interval: Interval,
) -> None:
    rows = pa.Table.from_pylist(table)
    pq.write_table(rows, output / "table.parquet")
    pyarrow.csv.write_csv(rows, output / "table.csv")
    ids = np.array(sample.ids)
    pairs = pa.table({"left": ids[similar.left], "right": ids[similar.right], "cosine": similar.cosine})
    pyarrow.csv.write_csv(pairs, output / "similar.csv")
    (output / "summary.json").write_text(json.dumps(summary, indent=1, allow_nan=False) + "\n")

    def line(edit: str, column: str) -> npt.NDArray[np.float64]:
        wanted = (row for row in table if (row["score"], row["edit"], row["strength"]) == ("cosine", edit, None))
        return np.array([np.nan if row[column] is None else row[column] for row in wanted])

    suggested = summary["suggested"]
    plot(
        output / "plot.png",
        THRESHOLDS["cosine"],
        {edit.name: line(edit.name, "recall") for edit in EDITS},
        (interval.precision_low, interval.precision, interval.precision_high),
        (interval.recall_low, line("all", "recall"), interval.recall_high),
        None if suggested is None else suggested["threshold"],
        f"{summary['copies']:,} planted copies of {summary['images']:,} images",
    )


def _lines(request: Request, summary: dict[str, Any]) -> list[str]:
    lines = [f"{'edit':<14} recall at the suggested threshold, by strength"]
    for edit, recalls in summary["at_suggested"].items():
        lines.append(f"{edit:<14} " + "  ".join(f"{strength}: {recall:.3f}" for strength, recall in recalls.items()))
    similar = summary["similar_originals"]
    lines.append(
        f"{similar['pairs']} pairs of originals are above {similar['above']:g} already and left out; see similar.csv"
    )
    for name, point in (("dedup.threshold now", summary["current"]), ("suggested", summary["suggested"])):
        if point is None:
            lines.append(f"no threshold reaches precision {request.precision:g} on this sample")
            continue
        low, high = point["precision_interval"]
        expected, most = point["wrong_pairs_expected_in_pool"], point["wrong_pairs_at_most_in_pool"]
        lines.append(
            f"{name} {point['threshold']:.2f}: precision {point['precision']:.4f} (95 %: {low:.4f} to {high:.4f}) in a "
            f"pool of {summary['pool_size']:,}, recall {point['recall']:.4f}; {point['wrong']} of "
            f"{summary['different_pairs']:,} different pairs are above: {expected:.3g} to expect, {most:.3g} at most"
        )
    if summary["suggested"] is not None and not summary["suggested_is_sure"]:
        lines.append("the sample is too small to be sure of that precision in such a pool: raise --size")
    lines.append(f"details  {request.output}/summary.json, table.csv, plot.png")
    return lines
