"""Which index a pool gets: one table, each entry of which the settings may override.

| pool | index |
|---|---|
| images * dimension < 2^25 | ``flat``: an exact search takes about a millisecond |
| more | ``ivf_pq`` |

| of ``ivf_pq`` | default |
|---|---|
| lists | 2 * sqrt(images), at most 2^18 |
| training sample | 40 images a list, at least 65,536 |
| dimensions that are coded | all up to 256; of more the 256 that vary most |
| bytes of a code | dimensions that are coded / 6: three in 4 bits; at least 8, or one dimension in 4 bits |
| probes, re-rank depth | measured on the pool, see ``IvfPqIndex.tune`` |

docs/index.md has what was measured.
"""

import math
from dataclasses import dataclass
from typing import Literal

MIN_VALUES = 1 << 25
MAX_LISTS = 1 << 18
MAX_CODED_DIM = 256
MIN_CODE_BYTES = 8
MIN_SAMPLE = 1 << 16
SAMPLE_PER_LIST = 40


@dataclass(frozen=True)
class Parameters:
    """What an index is trained with.

    Attributes:
        kind: Its kind.
        num_lists: Inverted lists.
        code_bytes: Of a vector's code, without its row number.
        coded_dim: Dimensions that are coded.
        sample_size: Vectors that it is trained on.
    """

    kind: Literal["flat", "ivf_pq"]
    num_lists: int = 0
    code_bytes: int = 0
    coded_dim: int = 0
    sample_size: int = 0


def choose(
    num_vectors: int,
    dim: int,
    kind: Literal["auto", "flat", "ivf_pq"] = "auto",
    num_lists: int | None = None,
    code_bytes: int | None = None,
) -> Parameters:
    """Return the table's entry for a pool.

    Args:
        num_vectors: In the pool.
        dim: Theirs.
        kind: ``auto``: by size.
        num_lists: None: by size.
        code_bytes: None: by dimension.
    """
    if kind == "flat" or not num_vectors or (kind == "auto" and num_vectors * dim < MIN_VALUES):
        return Parameters("flat")
    num_lists = num_lists or min(max(1, round(2 * math.sqrt(num_vectors))), MAX_LISTS)
    coded_dim = min(dim, MAX_CODED_DIM)
    return Parameters(
        "ivf_pq",
        num_lists,
        code_bytes or max(-(-coded_dim // 6), min(MIN_CODE_BYTES, -(-coded_dim // 2))),
        coded_dim,
        min(num_vectors, max(MIN_SAMPLE, SAMPLE_PER_LIST * num_lists)),
    )
