"""A 64-bit hash of how an image looks: the signs of 64 principal components of its features.

The features are its small grey picture, or what an encoder says. Equal hashes are duplicates. What decides a bit is
exact up to its last step: features are whole numbers, sums of the fit are exact, the projection is float64 and rounded
to 1e-6 before its sign is taken, so the same images give the same hashes in any order and batch.

Source:
    Xu et al. 2023, "Demystifying CLIP data", gives the 64-bit recipe that LVD-142M leaves undefined:
    features, centred, 64 principal components, signs.
"""

import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from curation import schema
from curation.config.images import ImagesConfig, PcaHashConfig
from curation.errors import CorruptError, DimensionError, UsageError
from curation.stage import ImageRow
from curation.stages.image_hash import ImageHash
from curation.stages.small_grey import UNITS, small_grey

Features = npt.NDArray[np.uint16] | npt.NDArray[np.int16]
Row = npt.NDArray[np.float64]

NUM_BITS = 64
_DECIMALS = 6
_FIT_ROWS = 4096  # rows of one Gram matrix product: 32 MiB of float64 at 32 x 32 pixels
_ROUNDING = 1e-12  # of the mean square: what subtracting the mean from float64 sums leaves of nothing
_MIN_RELATIVE_VARIANCE = 1e-9  # of the first component; below it a direction is rounding noise
_WEIGHTS = np.left_shift(np.uint64(1), np.arange(NUM_BITS - 1, -1, -1, dtype=np.uint64))


@dataclass(frozen=True)
class PcaHash:
    """A fitted hash.

    Attributes:
        mean_D: Mean features; float64, shape (D,).
        components_KD: 64 orthonormal rows; float64.
    """

    mean_D: npt.NDArray[np.float64]
    components_KD: npt.NDArray[np.float64]

    @property
    def dim(self) -> int:
        """Features of one image."""
        return len(self.mean_D)

    def __call__(self, features_ND: Features) -> npt.NDArray[np.uint64]:
        """Return the hash of each row, most significant bit first, shape (N,), uint64.

        Raises:
            DimensionError: Rows of another length than the hash was fitted on.
        """
        if features_ND.ndim != 2 or features_ND.shape[1] != self.dim:
            raise DimensionError(f"features of shape {features_ND.shape}, not (N, {self.dim})")
        projected_NK = (features_ND.astype(np.float64) - self.mean_D) @ self.components_KD.T
        bits_NK = np.round(projected_NK, _DECIMALS) > 0
        return np.asarray((bits_NK * _WEIGHTS).sum(axis=1, dtype=np.uint64), dtype=np.uint64)

    def save(self, path: Path) -> None:
        """Write the fitted hash as ``.npz``; equal hashes give equal bytes."""
        with path.open("wb") as file:
            np.savez(file, mean=self.mean_D, components=self.components_KD)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a fitted hash.

        Raises:
            CorruptError: The file is not one.
        """
        try:
            with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
                mean_D, components_KD = arrays["mean"], arrays["components"]
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, AttributeError, TypeError) as error:
            raise CorruptError(f"{path}: not a fitted PCA hash: {error}") from error
        is_float = mean_D.dtype == components_KD.dtype == np.float64
        if not is_float or mean_D.ndim != 1 or components_KD.shape != (NUM_BITS, len(mean_D)):
            raise CorruptError(f"{path}: not a fitted PCA hash: shapes {mean_D.shape} and {components_KD.shape}")
        return cls(mean_D, components_KD)


def fit(greys_ND: npt.NDArray[np.uint16]) -> PcaHash:
    """Fit the hash on a sample of small grey pictures; the order of the sample does not matter.

    A sample of fewer than 65 different pictures spans fewer than 64 directions. The rest are the lowest frequencies of
    the discrete cosine transform, made orthogonal to those found: natural images vary most along them, so a hash of
    few images still tells others apart.

    Args:
        greys_ND: Square pictures, flattened, as ``small_grey`` makes them; shape (N, side_px ** 2). N may be 0.

    Raises:
        DimensionError: Pictures that are not square, or have fewer than 65 pixels.
    """
    dim = greys_ND.shape[1]
    side_px = math.isqrt(dim)
    if side_px * side_px != dim or dim <= NUM_BITS:
        raise DimensionError(f"pictures of {dim} pixels are not squares of more than {NUM_BITS} pixels")
    middle_D = np.full(dim, 127.5 * UNITS)
    return _fit(greys_ND, middle_D, _cosines(side_px))


def default_pca(side_px: int) -> PcaHash:
    """Return the hash that needs no sample: signs of the 64 lowest cosines around mid-grey."""
    return fit(np.empty((0, side_px**2), np.uint16))


def fit_model(features_ND: npt.NDArray[np.int16]) -> PcaHash:
    """Fit the hash on a sample of an encoder's features, as ``quantised`` makes them; directions missing are axes.

    Raises:
        DimensionError: Fewer than 65 features.
    """
    dim = features_ND.shape[1]
    if dim <= NUM_BITS:
        raise DimensionError(f"a model with {dim} features has no {NUM_BITS} principal components")
    return _fit(features_ND, np.zeros(dim), np.eye(dim))


def quantised(features_ND: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """Return L2-normalised features in steps of 2**-15, so that sums over a sample are exact."""
    return np.clip(np.round(features_ND.astype(np.float64) * 2**15), -(2**15), 2**15 - 1).astype(np.int16)


def _fit(features_ND: Features, middle_D: npt.NDArray[np.float64], more_MD: Iterable[Row]) -> PcaHash:
    count, dim = features_ND.shape
    if count == 0:
        return PcaHash(middle_D, _completed(np.empty((0, dim)), more_MD))
    # Products are below 2**30, so float64 adds those of 8 million rows exactly, in any order.
    sum_D, gram_DD = np.zeros(dim), np.zeros((dim, dim))
    for start in range(0, count, _FIT_ROWS):
        x_BD = features_ND[start : start + _FIT_ROWS].astype(np.float64)
        sum_D += x_BD.sum(axis=0)
        gram_DD += x_BD.T @ x_BD
    mean_D = sum_D / count
    variances_D, vectors_DD = np.linalg.eigh(gram_DD / count - np.outer(mean_D, mean_D))
    floor = max(_MIN_RELATIVE_VARIANCE * float(variances_D[-1]), _ROUNDING * float(np.trace(gram_DD)) / count)
    best = [index for index in range(dim - 1, dim - 1 - NUM_BITS, -1) if variances_D[index] > floor]
    return PcaHash(mean_D, _completed(vectors_DD.T[best], more_MD))


def _completed(found_KD: npt.NDArray[np.float64], more_MD: Iterable[Row]) -> npt.NDArray[np.float64]:
    """Return 64 orthonormal rows: those found, with a fixed sign, then others made orthogonal to the rows before."""
    rows = [_with_fixed_sign(row_D) for row_D in found_KD]
    for more_D in more_MD:
        if len(rows) == NUM_BITS:
            break
        rest_D = more_D
        for _ in range(2):  # the second pass removes what rounding left
            for row_D in rows:
                rest_D = rest_D - (rest_D @ row_D) * row_D
        length = float(np.sqrt(rest_D @ rest_D))
        if length > 0.1:
            rows.append(rest_D / length)
    return np.stack(rows)


def _with_fixed_sign(row_D: Row) -> Row:
    """Return the vector or its opposite, such that its largest entry (the first of equals) is positive."""
    largest = np.flatnonzero(np.abs(row_D) >= np.abs(row_D).max() * (1 - 1e-9))[0]
    return row_D if row_D[largest] > 0 else -row_D


def _cosines(side_px: int) -> list[Row]:
    """Return the 2-D cosine basis from low to high frequency, without the constant; unit length, flattened."""
    phase = (np.arange(side_px) + 0.5) * np.pi / side_px
    waves = [np.cos(phase * frequency) for frequency in range(side_px)]
    pairs = sorted(((u, v) for u in range(side_px) for v in range(side_px)), key=lambda uv: (sum(uv), uv))
    basis = (np.outer(waves[u], waves[v]).ravel() for u, v in pairs[1:])
    return [row_D / np.sqrt(row_D @ row_D) for row_D in basis]


class Encoder(Protocol):
    """What ``features: model`` needs of ``models.encoder.ImageEncoder``, whose import takes torch and timm."""

    batch_size: int
    dim: int

    def prepare(self, rgb_HW3: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Return what the model sees of one image."""

    def __call__(self, batch: Sequence[npt.NDArray[np.uint8]]) -> npt.NDArray[np.float32]:
        """Return L2-normalised features, shape (B, dim); NaN rows where there are none."""


class PcaHashStage:
    """The hash of each image.

    Attributes:
        reads_pixels: False if baseline JPEGs are hashed from their bytes alone. The pixels of other images are decoded
            here where an ``ImageRow`` comes without them; the hash is the same either way.
    """

    name: ClassVar[str] = "pca_hash"
    version: ClassVar[int] = 3  # raise when the output for the same input changes
    writes: schema.Table = schema.PCA_HASH

    def __init__(
        self,
        pca: PcaHash,
        config: PcaHashConfig,
        limits: ImagesConfig | None = None,
        encoder: Encoder | None = None,
    ) -> None:
        """Take the fitted hash.

        Args:
            pca: From ``pca_hash_fit``; methods other than ``pca`` have no use for it.
            config: Settings.
            limits: Of decoding; None: the defaults.
            encoder: For ``features: model``.

        Raises:
            DimensionError: It was fitted on other features, or on pictures of another size than ``config.side_px``.
            UsageError: The method needs a library that is not installed, or the features an encoder.
        """
        self.config = config
        self._limits = limits or ImagesConfig.model_validate({})
        self._pca = pca
        self._encoder = encoder_for(config, encoder)
        self._image_hash = ImageHash(config.method) if config.method != "pca" else None
        dim = config.side_px**2 if self._encoder is None else self._encoder.dim
        if pca.dim != dim and self._image_hash is None:
            raise DimensionError(f"the PCA was fitted on {pca.dim} features an image, here are {dim}")
        self.min_side_px: int | None = None  # hashes of other decodes would differ
        self.reads_pixels = self._image_hash is not None or self._encoder is not None
        # A matrix product of 64 x 1024 an image: any size will do.
        self.batch_size = 256 if self._encoder is None else self._encoder.batch_size

    def prepare(self, image: ImageRow) -> Any:
        """Return the hash, what the encoder sees, or the flattened grey picture of one image.

        Raises:
            ImageError: The row came without pixels, and they are refused.
        """
        if self._image_hash is not None:
            return self._image_hash(image.rgb_HW3)
        if self._encoder is not None:
            return self._encoder.prepare(image.rgb_HW3)
        return small_grey(image.data, self._limits, self.config.side_px, image.rgb_HW3).ravel()

    def __call__(self, batch: Sequence[Any]) -> Mapping[str, pa.Array]:
        """Return ``pca_hash``; null where the model gave no direction."""
        if self._image_hash is not None:
            return {"pca_hash": pa.array(np.array(batch, np.uint64))}
        if self._encoder is None:
            return {"pca_hash": pa.array(self._pca(np.stack(batch)))}
        features_ND = self._encoder(batch)
        good_N = np.asarray(np.isfinite(features_ND).all(axis=1))
        hashes_N = self._pca(quantised(np.where(good_N[:, None], features_ND, 0)))
        return {"pca_hash": pa.array(hashes_N, mask=~good_N)}


def encoder_for(config: PcaHashConfig, encoder: Encoder | None) -> Encoder | None:
    """Return the encoder if the features are a model's, else None.

    Raises:
        UsageError: It is needed and was not given.
    """
    if config.features == "pixels":
        return None
    if encoder is None:
        raise UsageError("pca_hash.features: model needs the encoder of the embed section")
    return encoder
