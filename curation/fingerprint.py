"""What a finished output was made from, and what it contains.

A *fingerprint* names the causes of an output: settings, stage version, weights, fitted artefacts and the content
digests of inputs. A *content digest* names the output itself. When an upstream step runs again and its content digest
is unchanged, everything behind it is still fresh.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MODULUS = 2**256


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Return the sha256, in hex, of plain values.

    Args:
        parts: Strings, booleans, integers, finite floats, None, and lists and string-keyed mappings of these.

    Raises:
        TypeError: For a value without a stable identity (an object, a function, a set, NaN), whose text could differ
            between two processes.
    """
    return hashlib.sha256(_canonical(parts).encode()).hexdigest()


def content_digest(table: pa.Table) -> str:
    """Return the sha256, in hex, of a table's content.

    Columns whose field says ``digest: no`` are left out. The digest depends neither on chunking nor on how Parquet
    encodes the table, nor on what lies under nulls.
    """
    digest = hashlib.sha256()
    digest.update(str(table.num_rows).encode())
    for field in table.schema:
        if in_digest(field):
            digest.update(f"\0{field.name}:{_type_name(field.type)}\0".encode())
            _update(digest, table.column(field.name).combine_chunks())
    return digest.hexdigest()


def rows_digest(table: pa.Table) -> int:
    """Return the sum modulo 2^256 of the sha256 of each row, without location and time columns.

    Sums of several tables add up to that of their concatenation in any order, so a digest of all rows needs no sort.
    """
    columns = table.select([field.name for field in table.schema if in_digest(field)])
    total = 0
    for batch in columns.to_batches(max_chunksize=10_000):
        for row in batch.to_pylist():
            text = json.dumps(list(row.values()), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
            total += int.from_bytes(hashlib.sha256(text.encode()).digest())
    return total % _MODULUS


def add_digests(digests: Sequence[int]) -> int:
    """Return the digest of the union of rows whose digests are given."""
    return sum(digests) % _MODULUS


def in_digest(field: pa.Field) -> bool:
    """Whether a column is content, and not a place or a time."""
    return (field.metadata or {}).get(b"digest") != b"no"


def _type_name(kind: pa.DataType) -> str:
    """Return the name of a type without those of list items: Parquet makes ``element`` of ``item``."""
    if pa.types.is_fixed_size_list(kind):
        return f"list<{_type_name(kind.value_type)}>[{kind.list_size}]"
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return f"list<{_type_name(kind.value_type)}>"
    return str(kind)


def _update(digest: Any, array: pa.Array | pa.ChunkedArray) -> None:
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks() if array.num_chunks != 1 else array.chunk(0)
    valid = np.asarray(pc.is_valid(array).to_numpy(zero_copy_only=False), dtype=bool)
    digest.update(np.packbits(valid).tobytes())
    kept = array.drop_null() if array.null_count else array
    kind = kept.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        digest.update(pc.list_value_length(kept).to_numpy(zero_copy_only=False).astype("<i8").tobytes())
        _update(digest, kept.flatten())
    elif pa.types.is_fixed_size_list(kind):
        _update(digest, kept.flatten())
    elif pa.types.is_string(kind) or pa.types.is_binary(kind):
        lengths = pc.binary_length(kept).to_numpy(zero_copy_only=False).astype("<i8")
        digest.update(lengths.tobytes())
        digest.update(b"".join(kept.cast(pa.binary()).to_pylist()))
    elif pa.types.is_boolean(kind):
        digest.update(np.packbits(kept.to_numpy(zero_copy_only=False).astype(bool)).tobytes())
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind):
        values = kept.to_numpy(zero_copy_only=False)
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    else:
        raise TypeError(f"no content digest for columns of type {kind}")


def _canonical(value: Any) -> str:
    if value is None or isinstance(value, (bool, str)):
        return json.dumps(value)
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise TypeError(f"{value} has no stable identity")
        return repr(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise TypeError("only mappings with string keys have a stable identity")
        return "{" + ",".join(f"{json.dumps(key)}:{_canonical(value[key])}" for key in sorted(value)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_canonical(item) for item in value) + "]"
    raise TypeError(f"a {type(value).__name__} has no stable identity; give plain values")
