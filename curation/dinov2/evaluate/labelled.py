"""Images with a class each, read in order and never held: Parquet, or a folder for each class.

What stays in memory is one number a row: which rows are taken, and their classes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from curation.dinov2.evaluate.config import LabelledConfig
from curation.errors import InputError
from curation.local_files import IMAGE_SUFFIXES, expand, walk

NO_CLASS = -1
_ROWS_AT_A_TIME = 256  # of Parquet; with images of a megabyte a quarter of a gigabyte
_MAX_IMAGE_BYTES = 100_000_000
_PARQUET = frozenset({".parquet", ".pq"})


@dataclass(frozen=True)
class Part:
    """Images of one part of a set, in the set's order.

    Attributes:
        files: Parquet files, or one image each.
        rows: Rows that are taken, counted through all files; rising.
        label_N: Their classes; ``NO_CLASS`` where there is none.
        image_column: Of Parquet; None: files are images.
    """

    files: tuple[Path, ...]
    rows: npt.NDArray[np.int64]
    label_N: npt.NDArray[np.int64]
    image_column: str | None

    def __len__(self) -> int:
        return len(self.rows)

    def read(self) -> Iterator[tuple[bytes, int]]:
        """Yield encoded bytes and class of each image; no bytes where a row or file has none.

        Raises:
            InputError: A file can no longer be read.
        """
        if self.image_column is None:
            for row, label in zip(self.rows.tolist(), self.label_N.tolist(), strict=True):
                yield _file_bytes(self.files[row]), label
            return
        first = taken = 0
        for file in self.files:
            for table in _batches(file, [self.image_column]):
                end = taken + int(np.searchsorted(self.rows[taken:], first + table.num_rows))
                chosen = table.column(0).take(pa.array(self.rows[taken:end] - first))
                for image, label in zip(_image_bytes(chosen), self.label_N[taken:end].tolist(), strict=True):
                    yield image, label
                first, taken = first + table.num_rows, end


@dataclass(frozen=True)
class Labelled:
    """A set of two parts.

    Attributes:
        classes: Names, sorted; a label is a place in here.
        train: To learn from.
        test: To test on.
        num_unlabelled: Rows that were left out because they have no label.
    """

    classes: tuple[str, ...]
    train: Part
    test: Part
    num_unlabelled: int


def open_labelled(config: LabelledConfig, seed: int, *, needs_labels: bool = True) -> Labelled:
    """Find the images and classes of both parts.

    Args:
        config: Where they are.
        seed: Decides which are taken where there are more than asked for.
        needs_labels: Without, images need no class, and both parts may be the same images.

    Raises:
        InputError: Something is not there, columns are missing, there are no labels or only one class, or no test part.
    """
    is_parquet = _is_parquet(config.path)
    if config.test_path is not None and _is_parquet(config.test_path) != is_parquet:
        raise InputError(f"{config.path} and {config.test_path}: must both be Parquet, or both folders of classes")
    if is_parquet:
        parts, names = _parquet_parts(config, needs_labels)
    elif needs_labels:
        parts, names = _folder_parts(config)
    else:
        parts, names = [_flat_folder(config.path)] * 2, []
    num_unlabelled = sum(int((part.label_N == NO_CLASS).sum()) for part in parts) if needs_labels else 0
    if needs_labels:
        parts = [_only(part, np.flatnonzero(part.label_N != NO_CLASS)) for part in parts]
        _check_classes(config, parts, names)
    limits = (config.max_train, config.max_test)
    train, test = (
        drawn(part, limit, [seed, place]) for place, (part, limit) in enumerate(zip(parts, limits, strict=True))
    )
    return Labelled(tuple(names), train, test, num_unlabelled)


def _check_classes(config: LabelledConfig, parts: Sequence[Part], names: Sequence[str]) -> None:
    for what, part in zip(("to learn from", "to test on"), parts, strict=True):
        if not len(part):
            raise InputError(f"{config.path}: has no labelled images {what}; k-NN and probes need both parts")
    if len(set(parts[0].label_N.tolist())) < 2:
        raise InputError(
            f"{config.path}: all images to learn from are of one class ({names[int(parts[0].label_N[0])]}); "
            "telling classes apart needs at least two"
        )


def drawn(part: Part, limit: int | None, key: list[int]) -> Part:
    """Return at most so many images of a part, drawn by the key, in the part's order."""
    if limit is None or limit >= len(part):
        return part
    return _only(part, np.sort(np.random.default_rng(key).permutation(len(part))[:limit]))


def _only(part: Part, places: npt.NDArray[np.int64]) -> Part:
    return replace(part, rows=part.rows[places], label_N=part.label_N[places])


def _is_parquet(path: str) -> bool:
    found = Path(path).expanduser()
    if found.is_dir():
        return any(file.suffix.lower() in _PARQUET for file in found.iterdir())
    return Path(path).suffix.lower() in _PARQUET


def _parquet_parts(config: LabelledConfig, needs_labels: bool) -> tuple[list[Part], list[str]]:
    paths = [config.path] if config.test_path is None else [config.path, config.test_path]
    sets = [expand(path, _PARQUET, "parquet")[0] for path in paths]
    needs_split = config.test_path is None
    texts = [[_label_texts(file, config, needs_labels, needs_split) for file in files] for files in sets]
    given = {str(name) for part in texts for labels, _ in part for name in labels if name is not None}
    names = sorted(given, key=_turn)
    place = {name: number for number, name in enumerate(names)}
    parts = []
    for files, found in zip(sets, texts, strict=True):
        labels = np.array([place.get(name, NO_CLASS) for text, _ in found for name in text], dtype=np.int64)
        parts.append(Part(tuple(files), np.arange(len(labels), dtype=np.int64), labels, config.image_column))
    if config.test_path is not None:
        return parts, names
    splits = [split for _, split in texts[0]]
    if any(split is None for split in splits):  # only where no labels are needed
        return parts * 2, names
    split = np.concatenate([part for part in splits if part is not None])
    wanted = (config.train_split, config.test_split)
    halves = [_only(parts[0], np.flatnonzero(split == name)) for name in wanted]
    for half, name in zip(halves, wanted, strict=True):
        if not len(half) and needs_labels:
            there = ", ".join(f"{value} ({count})" for value, count in sorted(Counter(map(str, split)).items())[:10])
            raise InputError(
                f"{config.path}: no row has {config.split_column} {name!r}; it has {there}; set data.train_split and "
                "data.test_split"
            )
    return (halves if all(map(len, halves)) else parts * 2), names


def _turn(name: str) -> tuple[bool, int, str]:
    """Sort whole numbers by their value, and before names: as text 10 would come before 2."""
    is_number = name.isdecimal()
    return not is_number, len(name) if is_number else 0, name


def _label_texts(
    file: Path, config: LabelledConfig, needs_labels: bool, needs_split: bool
) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.object_] | None]:
    """Return the labels of a file as text (None where there is none), and its splits."""
    try:
        with pq.ParquetFile(file) as parquet:
            schema, rows = parquet.schema_arrow, parquet.metadata.num_rows
            _check_columns(file, schema, config, needs_labels, needs_split)
            has_labels = config.label_column in schema.names and needs_labels
            labels = _texts(parquet, config.label_column) if has_labels else np.full(rows, None, dtype=object)
            has_split = needs_split and config.split_column in schema.names
            return labels, _texts(parquet, config.split_column) if has_split else None
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {error}") from error


def _check_columns(
    file: Path, schema: pa.Schema, config: LabelledConfig, needs_labels: bool, needs_split: bool
) -> None:
    names = ", ".join(schema.names)
    if config.image_column not in schema.names:
        raise InputError(f"{file}: no column {config.image_column}; set data.image_column to one of {names}")
    kind = schema.field(config.image_column).type
    inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    if not any(test(inner) for test in (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)):
        raise InputError(f"{file}: column {config.image_column} is {kind}; it must hold bytes or {{bytes, path}}")
    if needs_labels and config.label_column not in schema.names:
        raise InputError(
            f"{file}: no labels: there is no column {config.label_column}; set data.label_column to one of {names}, or "
            "ask only for what needs none: --tasks spectrum pictures"
        )
    if needs_labels and needs_split and config.split_column not in schema.names:
        raise InputError(
            f"{file}: no column {config.split_column} says what to test on; give --test FILE, or set "
            f"data.split_column to one of {names}"
        )


def _texts(parquet: pq.ParquetFile, column: str) -> npt.NDArray[np.object_]:
    values = parquet.read(columns=[column]).column(0)
    if pa.types.is_dictionary(values.type):
        values = values.cast(values.type.value_type)
    return np.array([None if value is None else str(value) for value in values.to_pylist()], dtype=object)


def _batches(file: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        with pq.ParquetFile(file) as parquet:
            yield from parquet.iter_batches(_ROWS_AT_A_TIME, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file}: cannot be read as Parquet: {error}") from error


def _image_bytes(column: pa.Array) -> Iterator[bytes]:
    for value in column.to_pylist():
        yield (value.get("bytes") if isinstance(value, dict) else value) or b""


def _file_bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(_MAX_IMAGE_BYTES + 1) if path.stat().st_size <= _MAX_IMAGE_BYTES else b""
    except OSError:
        return b""


def _folder_parts(config: LabelledConfig) -> tuple[list[Part], list[str]]:
    first = Path(config.path).expanduser()
    folders = [first / config.train_split, first / config.test_split]
    if config.test_path is not None:
        folders = [first, Path(config.test_path).expanduser()]
    for folder in folders:
        if not folder.is_dir():
            raise InputError(
                f"{folder}: is not there; {config.path} must be Parquet, or a folder with {config.train_split}/ and "
                f"{config.test_split}/ that have a folder for each class (or give --test FOLDER)"
            )
    found = [_class_files(folder) for folder in folders]
    names = sorted({name for files in found for name, _ in files})
    place = {name: number for number, name in enumerate(names)}
    return [_of_files([file for _, file in files], [place[name] for name, _ in files]) for files in found], names


def _class_files(folder: Path) -> list[tuple[str, Path]]:
    found = [(file.relative_to(folder).parts[0], file) for file in walk(folder) if file.parent != folder]
    found = [(name, file) for name, file in found if file.suffix.lower() in IMAGE_SUFFIXES]
    if not found:
        raise InputError(f"{folder}: no labels: there is no folder of images for each class in it")
    return found


def _flat_folder(path: str) -> Part:
    files = expand(path, IMAGE_SUFFIXES, "folder")[0]
    return _of_files(files, [NO_CLASS] * len(files))


def _of_files(files: list[Path], labels: list[int]) -> Part:
    return Part(tuple(files), np.arange(len(files), dtype=np.int64), np.array(labels, dtype=np.int64), None)
