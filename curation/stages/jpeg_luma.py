"""The small grey picture of a baseline JPEG, straight from its coefficients: no pixel is ever made.

Most of the time of decoding a photo goes into what a 32 x 32 picture averages away again. Resizing and the inverse DCT
are both linear, so one pair of matrices takes the lowest coefficients of each luma block to the small picture; all
other coefficients are stepped over in the bit stream. Nothing is rounded on the way, which is why a hash of it moves
less under edits than one of 8-bit pixels.

Whatever is unusual or broken (progressive, arithmetic, CMYK, RGB, several scans, a bad code, an early end) is left to
the caller's ordinary decoder, which knows the reasons.
"""

import functools

import numpy as np
import numpy.typing as npt

from curation.config.images import ImagesConfig
from curation.stages import jpeg_scan
from curation.stages.jpeg_header import Code, Header, read_header

UNITS = 64  # a grey level has this many steps in a small picture
_AXIS_PX = 512  # an axis longer than this is computed each time, a small part of reading its picture
_BASIS_UX = np.cos(np.outer(np.arange(8), 2 * np.arange(8) + 1) * np.pi / 16) / 2
_BASIS_UX[0] /= np.sqrt(2)


def small_luma(data: bytes, limits: ImagesConfig, side_px: int) -> npt.NDArray[np.uint16] | None:
    """Return the upright small grey picture of a JPEG, or None where the ordinary decoder has to look at it.

    Triangle weights over twice the distance of two small pixels, as Pillow's bilinear filter reduces.

    Args:
        data: Encoded bytes of anything.
        limits: An image that they refuse is left to the ordinary decoder.
        side_px: Side of the picture.

    Returns:
        Luma in steps of 1 / ``UNITS`` grey levels, shape (side_px, side_px).
    """
    header = read_header(data)
    if header is None or not _accepted(header, limits):
        return None
    kept = _kept(min(header.width, header.height), side_px)
    if kept == 0:
        return None
    _, across, down, table = header.components[0]
    if len(header.components) == 1:
        across = down = 1  # a scan of one component has blocks, not units of several
    units_x, units_y = -(-header.width // (8 * across)), -(-header.height // (8 * down))
    intervals = -(-units_x * units_y // header.restart_interval) if header.restart_interval else 1
    plain = np.zeros(((len(data) - header.scan) // 4 + intervals + jpeg_scan.PADDING) * 4, np.uint8)
    spans_R2 = np.zeros((intervals, 2), np.int64)
    num_words = jpeg_scan.unstuff(np.frombuffer(data, np.uint8), header.scan, plain, spans_R2)
    if num_words < 0:
        return None
    blocks = tuple(c[1] * c[2] for c in header.components) if len(header.components) > 1 else (1,)
    codes = tuple(sorted(header.codes.items()))
    blocks_YKX = np.zeros((units_y * down, kept * (kept + 1) // 2, units_x * across), np.float32)
    if not jpeg_scan.read(
        plain[: (num_words + jpeg_scan.PADDING) * 4].view(">u4").astype(np.int64),
        spans_R2,
        header.restart_interval,
        *_tables(codes),
        _layout(tuple(name for name, _ in codes), blocks, tuple(header.tables_C2)),
        across,
        down,
        units_x,
        header.quantisation[table],
        blocks_YKX,
    ):
        return None
    small = np.zeros((side_px, side_px), np.uint16)
    jpeg_scan.shrink(
        blocks_YKX, *_axis(header.width, kept, side_px), *_axis(header.height, kept, side_px), UNITS, small
    )
    return _upright(small, header.orientation)


def _kept(short_px: int, side_px: int) -> int:
    """Return how many diagonals of coefficients matter at so many blocks a small pixel.

    Of 1,000 photos of 256 px (1 block a pixel) 34 % have another hash than their full pixels give with one diagonal,
    10 % with 2, 4.4 % with 3, 3.7 % with 4 and 3.6 % with 6: what is left is the rounding of the pixels. Small pictures
    need every coefficient, and their pixels cost little: 0.
    """
    blocks = short_px / 8 / side_px
    return 0 if blocks < 0.4 else 5 if blocks < 0.8 else 3 if blocks < 2.5 else 2 if blocks < 5 else 1


def _accepted(header: Header, limits: ImagesConfig) -> bool:
    short, long = sorted((header.width, header.height))
    return (
        short >= limits.min_side_px
        and short * long <= limits.max_pixels
        and long <= limits.max_aspect * short
        and header.components[0][3] in header.quantisation
        and all(dc in header.codes and 16 + ac in header.codes for dc, ac in header.tables_C2)
    )


def _upright(small: npt.NDArray[np.uint16], orientation: int) -> npt.NDArray[np.uint16]:
    if orientation >= 5:
        small = small.T
    if orientation in (3, 4, 7, 8):
        small = small[::-1]
    if orientation in (2, 3, 6, 7):
        small = small[:, ::-1]
    return np.ascontiguousarray(small)


def _axis(num_px: int, kept: int, side_px: int) -> tuple[jpeg_scan.Floats, jpeg_scan.Ints]:
    return _axis_kept(num_px, kept, side_px) if num_px <= _AXIS_PX else jpeg_scan.axis(num_px, kept, _BASIS_UX, side_px)


@functools.lru_cache(maxsize=64)  # photos share few lengths of sides; 32 to 82 kB each at 32 px
def _axis_kept(num_px: int, kept: int, side_px: int) -> tuple[jpeg_scan.Floats, jpeg_scan.Ints]:
    return jpeg_scan.axis(num_px, kept, _BASIS_UX, side_px)


@functools.lru_cache(maxsize=64)
def _layout(
    names: tuple[int, ...], blocks: tuple[int, ...], tables_C2: tuple[tuple[int, int], ...]
) -> npt.NDArray[np.int64]:
    """Return (component, DC code, AC code) of each block of a unit, as places in what ``_tables`` returns."""
    rows = []
    for index, (dc, ac) in enumerate(tables_C2):
        rows += [(index, names.index(dc), names.index(16 + ac))] * blocks[index]
    return np.array(rows, np.int64)


@functools.lru_cache(maxsize=64)
def _tables(codes: tuple[tuple[int, Code], ...]) -> jpeg_scan.Tables:
    """Return the tables of ``jpeg_scan.read`` for each code."""
    short = np.zeros((len(codes), 1 << jpeg_scan.SHORT_BITS), np.int32)
    several = np.zeros((len(codes), 1 << jpeg_scan.LONG_BITS), np.int32)
    limits = np.zeros((len(codes), jpeg_scan.MAX_CODE_BITS + 1, 2), np.int64)
    symbols = np.zeros((len(codes), 256), np.uint8)
    for index, (name, (lengths, values)) in enumerate(codes):
        symbols[index, : len(values)] = np.frombuffer(values, np.uint8)
        jpeg_scan.fill(np.frombuffer(lengths, np.uint8), symbols[index], name < 16, short[index], limits[index])
        if name >= 16:
            jpeg_scan.fill_several(short[index], several[index])
    return short, several, limits, symbols
