"""Kernels that walk the entropy-coded scan of a baseline JPEG and keep the lowest luma coefficients.

The bytes are hostile. Every place in a table is masked to its size, every place in a picture comes from a loop over its
shape, and the one thing that the bytes decide, how far to read, is checked after each block: a block takes at most 64 x
31 bits, less than the ``PADDING`` behind the last word.

Source:
    ITU-T T.81 (1992), annexes A, C and F.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from curation.indexes.compiled import compiled

SHORT_BITS = 10  # codes up to this long are found in one step
LONG_BITS = 12  # several codes that fit into so many bits are stepped over at once
MAX_CODE_BITS = 16
PADDING = 128  # words
_CHUNK = 16  # bytes
_END = 256  # places that an end of block goes on: behind any block
_ZIGZAG = np.array(  # place -> row * 8 + column; the first 36 go along the diagonals
    [
        *(0, 1, 8, 16, 9, 2, 3, 10, 17, 24, 32, 25, 18, 11, 4, 5, 12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13, 6),
        *(7, 14, 21, 28, 35, 42, 49, 56),
    ],
    np.int64,
)

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Tables = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], Ints, npt.NDArray[np.uint8]]


@compiled
def unstuff(data: npt.NDArray[np.uint8], place: int, plain: npt.NDArray[np.uint8], spans_R2: Ints) -> int:
    """Copy a scan without the zeros behind bytes of 255, each restart interval from a whole word on.

    Args:
        data: The file.
        place: First byte of the scan.
        plain: Receives the bytes; zeros before.
        spans_R2: Receives the first word and the number of bits of each of the intervals that there must be.

    Returns:
        Words, or -1 if the file ends early, or another marker or another number of intervals is found.
    """
    num_spans = start = to = 0
    room = plain.shape[0] - _CHUNK
    while place + 1 < data.shape[0] and to < room:
        while place + _CHUNK < data.shape[0] and to < room:  # most chunks are copied whole
            num_markers = 0
            for index in range(_CHUNK):
                num_markers += data[np.uint64(place + index)] == 0xFF
            if num_markers > 0:
                break
            for index in range(_CHUNK):
                plain[np.uint64(to + index)] = data[np.uint64(place + index)]
            place += _CHUNK
            to += _CHUNK
        byte = data[place]
        place += 1
        if byte != 0xFF:
            plain[to] = byte
            to += 1
            continue
        marker = data[place]
        place += 1
        if marker == 0:
            plain[to] = 0xFF
            to += 1
            continue
        is_last = num_spans + 1 == spans_R2.shape[0]
        if marker != (0xD9 if is_last else 0xD0 + num_spans % 8):
            return -1
        spans_R2[num_spans, 0] = start
        spans_R2[num_spans, 1] = (to - start * 4) * 8
        num_spans += 1
        start = (to + 3) // 4
        to = start * 4
        if is_last:
            return start
    return -1


@compiled
def _entry(length: Any, symbol: Any, is_dc: Any) -> Any:
    """Pack what a code means: bits to step over, bits of the value (<< 5), places to go on (<< 9)."""
    size = symbol & 15
    if is_dc:
        return length + size | size << 5 | 1 << 9 if symbol <= 11 else 0
    on = (symbol >> 4) + 1 if size > 0 or symbol == 0xF0 else _END
    return length + size | size << 5 | on << 9


@compiled
def fill(
    lengths_16: npt.NDArray[np.uint8],
    symbols_256: npt.NDArray[np.uint8],
    is_dc: bool,
    short: npt.NDArray[np.int32],
    limits_L2: Ints,
) -> None:
    """Build the tables of one canonical code: the codes of a length are consecutive.

    Args:
        lengths_16: Codes of each length from 1 on.
        symbols_256: Their symbols.
        is_dc: Whether it codes DC differences.
        short: Receives an entry for the next ``SHORT_BITS`` bits; 0: the code is longer, or there is none.
        limits_L2: Receives, by length, the first code that is longer, and what makes a code the place of its symbol.
    """
    code = 0
    place = 0
    for length in range(1, MAX_CODE_BITS + 1):
        limits_L2[length, 1] = place - code
        for _ in range(lengths_16[length - 1]):
            if length <= SHORT_BITS:
                start = code << (SHORT_BITS - length)
                for entry in range(start, min(start + (1 << (SHORT_BITS - length)), 1 << SHORT_BITS)):
                    short[entry] = _entry(length, np.int64(symbols_256[place & 255]), is_dc)
            code += 1
            place += 1
        limits_L2[length, 0] = code
        code <<= 1


@compiled
def fill_several(short: npt.NDArray[np.int32], several: npt.NDArray[np.int32]) -> None:
    """Join the AC codes that fit into ``LONG_BITS``: bits, their places (<< 9), 1 << 20 if the end follows."""
    for window in range(1 << LONG_BITS):
        bits: Any = 0
        places: Any = 0
        ends = 0
        while ends == 0:
            left = LONG_BITS - bits
            entry = np.int64(short[(window << SHORT_BITS >> left) & ((1 << SHORT_BITS) - 1)])
            if entry == 0 or entry & 31 > left:
                break
            bits += entry & 31
            if entry >> 9 == _END:
                ends = 1
            else:
                places += entry >> 9
        several[window] = bits | places << 9 | ends << 20


@compiled
def _long_entry(peek: Any, table: Any, limits_TL2: Any, symbols: Any, is_dc: Any) -> Any:
    """Return the entry of a code of up to 16 bits; 0 if there is none."""
    for length in range(1, MAX_CODE_BITS + 1):
        code = peek >> (MAX_CODE_BITS - length)
        if code < limits_TL2[table, length, 0]:
            return _entry(length, np.int64(symbols[table, (code + limits_TL2[table, length, 1]) & 255]), is_dc)
    return 0


@compiled
def _value(behind: Any, entry: Any) -> Any:
    """Return the value whose bits are the lowest of ``behind``: those that start with 0 are negative."""
    ones = (1 << ((entry >> 5) & 15)) - 1
    value = behind & ones
    return value - ones if value * 2 <= ones else value


@compiled
def read(
    words: Ints,
    spans_R2: Ints,
    interval: int,
    short_TS: npt.NDArray[np.int32],
    several_TS: npt.NDArray[np.int32],
    limits_TL2: Ints,
    symbols_TS: npt.NDArray[np.uint8],
    layout_B3: Ints,
    across: int,
    down: int,
    units_x: int,
    steps: Ints,
    blocks_YKX: npt.NDArray[np.float32],
) -> bool:
    """Fill the lowest coefficients of each luma block; return False if the scan is broken.

    Args:
        words: What ``unstuff`` wrote, 32 bits each.
        spans_R2: Likewise.
        interval: Units in a restart interval; 0: there is one interval.
        short_TS: Tables of ``fill``, by code.
        several_TS: Of ``fill_several``.
        limits_TL2: Of ``fill``.
        symbols_TS: Symbols by place.
        layout_B3: Component (0: luma), DC code and AC code of each block of a unit, luma first.
        across: Luma blocks of a unit side by side.
        down: And above each other.
        units_x: Units side by side.
        steps: Quantisation of luma.
        blocks_YKX: Receives the first K coefficients in zigzag order, K <= 36.
    """
    short, several = short_TS.reshape(-1), several_TS.reshape(-1)
    short_mask, long_mask = (1 << SHORT_BITS) - 1, (1 << LONG_BITS) - 1
    units = blocks_YKX.shape[0] // down * units_x
    if interval == 0:
        interval = units
    acc: Any = 0  # the bits read last
    bits: Any = 0  # and how many of them are not used yet
    word: Any = 0
    start: Any = 0
    stop: Any = 0
    previous: Any = 0  # DC of luma
    k: Any
    for unit in range(units):
        if unit % interval == 0:
            word = start = spans_R2[unit // interval, 0]
            stop = spans_R2[unit // interval, 1]
            acc, bits, previous = 0, 0, 0
        top, left = unit // units_x * down, unit % units_x * across
        for block in range(layout_B3.shape[0]):
            is_luma = layout_B3[block, 0] == 0
            limit = blocks_YKX.shape[1] - 1 if is_luma else -1
            y, x = top + block // across, left + block % across
            dc, ac = layout_B3[block, 1], layout_B3[block, 2]
            if bits < 32:
                acc, word, bits = (acc << 32) | words[word], word + 1, bits + 32
            entry = np.int64(short[(dc << SHORT_BITS) + ((acc >> (bits - SHORT_BITS)) & short_mask)])
            if entry == 0:
                entry = _long_entry((acc >> (bits - MAX_CODE_BITS)) & 0xFFFF, dc, limits_TL2, symbols_TS, True)
                if entry == 0:
                    return False
            bits -= entry & 31
            if is_luma:
                previous += _value(acc >> bits, entry)
                blocks_YKX[y, 0, x] = previous * steps[0]
            k = 1
            while k <= limit:
                if bits < 32:
                    acc, word, bits = (acc << 32) | words[word], word + 1, bits + 32
                entry = np.int64(short[(ac << SHORT_BITS) + ((acc >> (bits - SHORT_BITS)) & short_mask)])
                if entry == 0:
                    entry = _long_entry((acc >> (bits - MAX_CODE_BITS)) & 0xFFFF, ac, limits_TL2, symbols_TS, False)
                    if entry == 0:
                        return False
                bits -= entry & 31
                k += entry >> 9
                if k - 1 <= limit:
                    blocks_YKX[y, k - 1, x] = _value(acc >> bits, entry) * steps[k - 1]
            while k < 64:
                if bits < 32:
                    acc, word, bits = (acc << 32) | words[word], word + 1, bits + 32
                entry = np.int64(several[(ac << LONG_BITS) + ((acc >> (bits - LONG_BITS)) & long_mask)])
                next_k = k + ((entry >> 9) & 0x7FF)
                if entry > 0 and next_k < 64:  # codes behind the 64th place are the next block's
                    bits -= entry & 31
                    k = next_k + (entry >> 20) * _END
                    continue
                entry = np.int64(short[(ac << SHORT_BITS) + ((acc >> (bits - SHORT_BITS)) & short_mask)])
                if entry == 0:
                    entry = _long_entry((acc >> (bits - MAX_CODE_BITS)) & 0xFFFF, ac, limits_TL2, symbols_TS, False)
                    if entry == 0:
                        return False
                bits -= entry & 31
                k += entry >> 9
            if 64 < k < _END or (word - start) * 32 - bits > stop:
                return False
        # Seven bits of padding may follow an interval; more is data that the picture has no room for.
        if ((unit + 1) % interval == 0 or unit == units - 1) and stop - (word - start) * 32 + bits >= 8:
            return False
    return True


@compiled
def axis(num_px: int, kept: int, basis_UX: Floats, side: int) -> tuple[Floats, Ints]:
    """Return the weight of each block's coefficients in each small pixel of one axis, and which pixels it reaches.

    Args:
        num_px: Pixels of the picture, without what fills its last block.
        kept: Diagonals of coefficients.
        basis_UX: One-dimensional cosine basis, unit length.
        side: Small pixels.
    """
    weights_BUO, range_B2 = np.zeros(((num_px + 7) // 8, kept, side)), np.zeros(((num_px + 7) // 8, 2), np.int64)
    scale = num_px / side
    reach = max(scale, 1.0)
    range_B2[:, 0] = side
    for out in range(side):
        centre = (out + 0.5) * scale
        first, last = max(0, int(centre - reach)), min(num_px, int(centre + reach) + 1)
        total = 0.0
        for px in range(first, last):
            total += max(0.0, 1 - abs(px + 0.5 - centre) / reach)
        for px in range(first, last):
            weight = max(0.0, 1 - abs(px + 0.5 - centre) / reach) / total
            block = px >> 3
            range_B2[block, 0] = min(range_B2[block, 0], out)
            range_B2[block, 1] = max(range_B2[block, 1], out + 1)
            for u in range(kept):
                weights_BUO[block, u, out] += weight * basis_UX[u, px & 7]
    return weights_BUO, range_B2


@compiled
def shrink(
    blocks_YKX: npt.NDArray[np.float32],
    wide_BUO: Floats,
    wide_B2: Ints,
    high_BUO: Floats,
    high_B2: Ints,
    units: int,
    small: npt.NDArray[np.uint16],
) -> None:
    """Resize and transform back at once: multiply the coefficients from both sides with the weights of their axis.

    Args:
        blocks_YKX: From ``read``.
        wide_BUO: From ``axis``, for the width; U * (U + 1) / 2 = K.
        wide_B2: Likewise. Blocks behind it fill a unit and are not looked at.
        high_BUO: For the height.
        high_B2: Likewise.
        units: Steps of a grey level.
        small: Receives the picture.
    """
    rows, columns, kept, side = high_B2.shape[0], wide_B2.shape[0], wide_BUO.shape[1], small.shape[0]
    lines_OUX = np.zeros((side, kept, columns))
    for row in range(rows):
        for k in range(blocks_YKX.shape[1]):
            v, u = _ZIGZAG[k] >> 3, _ZIGZAG[k] & 7
            for out in range(high_B2[row, 0], high_B2[row, 1]):
                weight = high_BUO[row, v, out]
                for column in range(columns):
                    lines_OUX[out, u, column] += weight * blocks_YKX[row, k, column]
    lines_UXO = np.empty((kept, columns, side))
    for y in range(side):
        for u in range(kept):
            for column in range(columns):
                lines_UXO[u, column, y] = lines_OUX[y, u, column]
    sums_XY = np.zeros((side, side))
    for u in range(kept):
        for column in range(columns):
            for x in range(wide_B2[column, 0], wide_B2[column, 1]):
                weight = wide_BUO[column, u, x]
                for y in range(side):
                    sums_XY[x, y] += weight * lines_UXO[u, column, y]
    for y in range(side):
        for x in range(side):
            small[y, x] = np.uint16(min(max((sums_XY[x, y] + 128) * units + 0.5, 0.0), 255.0 * units))
