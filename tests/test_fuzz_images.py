"""Mutated images in child processes with little memory: no crash, no hang, bounded memory, a reason.

``python tests/test_fuzz_images.py JPEG 0 2500 /tmp/last`` does what one test does with one child, and leaves the number
of the mutation it was at in the last argument; ``mutation(base_files(kind), seed)`` makes it again.
"""

import io
import json
import os
import resource
import struct
import subprocess
import sys
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from curation import images, schema
from curation.config.images import ImagesConfig
from curation.errors import ImageError

LIMITS = ImagesConfig(max_pixels=1 << 20, min_side_px=1, max_aspect=1000.0)
MAX_SECONDS = 2.0
# A decode holds at most about 18 bytes a pixel (WebP: three canvases, a copy and the result); the rest is for what
# libraries, threads and the allocator keep.
MAX_GROWTH_BYTES = 18 * LIMITS.max_pixels + (48 << 20)
ADDRESS_SPACE_BYTES = 512 << 20


def photo(mode, height=60, width=88, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (9, 11, 4), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return image.convert("RGB").convert(mode) if mode != "RGBA" else image


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def base_files(kind):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8825)[2] = (48.0, 51.0, 29.0)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"s\0R\0G\0B", b"x\0R\0G\0B")
    rgb, more = photo("RGB"), {"append_images": [photo("RGB", seed=n) for n in (1, 2)], "save_all": True}
    rich = {"exif": exif, "icc_profile": profile}
    variants = {
        "JPEG": [
            (rgb, rich),
            (rgb, {"progressive": True}),
            (photo("L"), {}),
            (photo("CMYK"), rich),
            (rgb, {"restart_marker_blocks": 2}),
        ],
        "MPO": [(rgb, more)],
        "PNG": [
            (rgb, rich),
            (photo("RGBA"), {}),
            (photo("P"), {"transparency": 3}),
            (photo("1"), {}),
            (photo("I;16"), {}),
            (rgb, more),
        ],
        "WEBP": [(rgb, rich), (photo("RGBA"), {"lossless": True}), (photo("RGBA"), {}), (rgb, more)],
        "GIF": [(photo("P"), {"comment": b"hello"}), (photo("P"), {"transparency": 3}), (rgb, more)],
        "TIFF": [(rgb, {"compression": name}) for name in ("raw", "tiff_lzw", "jpeg", "tiff_adobe_deflate")]
        + [(photo("I;16"), {})],
        "BMP": [(rgb, {}), (photo("P"), {}), (photo("1"), {})],
        "AVIF": [(rgb, {"exif": exif, "speed": 10}), (photo("RGBA"), {"speed": 10})],
    }
    files = [saved(image, kind, **options) for image, options in variants[kind]]
    return files + (base_files("MPO") if kind == "JPEG" else [])


def cuts(data):
    """Where the parts of a file seem to begin: JPEG markers, chunks, boxes and blocks; else anywhere."""
    if data[:2] == b"\xff\xd8":
        return [at for at in range(len(data) - 1) if data[at] == 0xFF and data[at + 1] not in (0, 0xFF)]
    if data[:4] in (b"\x89PNG", b"RIFF"):
        position, found, order, extra = (8, [], ">I", 12) if data[0] == 0x89 else (12, [], "<I", 8)
        while position + 8 <= len(data):
            found.append(position)
            (length,) = struct.unpack_from(order, data, position + (0 if extra == 12 else 4))
            position += extra + length + (length % 2 if extra == 8 else 0)
        return found
    return list(range(6, len(data), max(1, len(data) // 40)))


def mutation(files, seed):
    """Return mutated bytes; the same for the same seed."""
    rng = np.random.default_rng(seed)
    data = bytearray(files[rng.integers(len(files))])
    other = files[rng.integers(len(files))]
    for _ in range(rng.integers(1, 4)):
        marks, at = cuts(bytes(data)) or [0], int(rng.integers(len(data) or 1))
        way = rng.integers(8)
        if way == 0:
            data[at : at + 1] = bytes([(data[at : at + 1] or b"\0")[0] ^ 1 << int(rng.integers(8))])
        elif way == 1:
            size = int(rng.integers(1, 9))
            data[at : at + size] = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
        elif way == 2:
            del data[at:]
        elif way == 3:  # splice
            begin = int(rng.integers(len(other)))
            data[at : at + int(rng.integers(200))] = other[begin : begin + int(rng.integers(200))]
        elif way == 4:  # an extreme in a length, size or offset
            mark = marks[rng.integers(len(marks))] + int(rng.integers(12))
            form = [">H", ">I", "<H", "<I"][rng.integers(4)]
            value = int(rng.choice([0, 1, 2, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
            packed = struct.pack(form, value & (0xFFFF if form[1] == "H" else 0xFFFFFFFF))
            data[mark : mark + len(packed)] = packed
        elif way in (5, 6) and len(marks) > 2:  # move or repeat a part
            chosen = int(rng.integers(len(marks) - 1))
            part = data[marks[chosen] : marks[chosen + 1]]
            if way == 5:
                del data[marks[chosen] : marks[chosen + 1]]
            to = min(marks[rng.integers(len(marks))], len(data))
            data[to:to] = part * int(rng.integers(1, 4))
        else:
            del data[at : at + int(rng.integers(1, 30))]
    return with_checksums(bytes(data)) if rng.integers(2) else bytes(data)


def with_checksums(data):
    """A PNG whose checksums are right again, so that decoders get to see the damage; anything else as it is."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return data
    fixed, position = bytearray(data), 8
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        fixed[end - 4 : end] = struct.pack(">I", zlib.crc32(data[position + 4 : end - 4]))
        position = end
    return bytes(fixed)


def outcome(data):
    """Decode in full and reduced, inspect and strip; return ``decoded`` or the reason."""
    try:
        decoded = images.decode(data, LIMITS)
        reduced = images.decode(data, LIMITS, 16)
        info = images.inspect(data, LIMITS)
        stripped, _ = images.strip_metadata(data, info.format, LIMITS)
    except ImageError as error:
        if isinstance(error.__cause__, MemoryError):
            raise error.__cause__ from error
        return error.reason
    again = images.decode(stripped, LIMITS)
    if not decoded.shape == again.shape == (info.height, info.width, 3):
        raise ValueError(f"{decoded.shape}, {again.shape}, {info}")
    coded = stripped[stripped.find(b"\xff\xda") : -2] if info.format == "jpeg" else b""
    copied = coded in data and info.format != "avif"  # a JPEG with a broken structure and an AVIF are encoded anew
    if reduced.shape[2] != 3 or (copied and not (decoded == again).all()):
        raise ValueError("stripping changed pixels")
    return "decoded"


def peak_bytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def child(kind, start, count, path):
    files = base_files(kind)
    for data in files:
        if outcome(data) != "decoded":
            raise ValueError(f"a valid {kind} is {outcome(data)}")
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + ADDRESS_SPACE_BYTES,) * 2)
    outcomes, slowest, before = Counter(), (0.0, start), peak_bytes()
    with open(path, "wb", buffering=0) as last:
        for seed in range(start, start + count):
            last.seek(0)
            last.write(b"%d" % seed)
            data = mutation(files, seed)
            began = time.perf_counter()
            outcomes[outcome(data)] += 1
            slowest = max(slowest, (time.perf_counter() - began, seed))
    return {"outcomes": outcomes, "slowest_s": slowest[0], "slowest": slowest[1], "growth": peak_bytes() - before}


def run(kind, start, count, tmp_path):
    last = tmp_path / "last"
    command = [sys.executable, "-W", "ignore", __file__, kind, str(start), str(count), str(last)]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(images.__file__).parents[1]),
    }  # the code that this process tests
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=MAX_SECONDS * count, check=False, env=environment
    )
    assert done.returncode == 0, f"{kind} {last.read_text()}: exit {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def check(result, count):
    assert set(result["outcomes"]) <= {"decoded", *schema.IMAGE_REASONS}
    assert sum(result["outcomes"].values()) == count
    assert result["slowest_s"] < MAX_SECONDS, f"mutation {result['slowest']}"
    assert result["growth"] < MAX_GROWTH_BYTES


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_a_hundred_mutations_each(kind, tmp_path):
    check(run(kind, 0, 100, tmp_path), 100)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF"])
def test_twenty_thousand_mutations(kind, part, tmp_path):
    result = run(kind, 1_000 + 2_500 * part, 2_500, tmp_path)

    check(result, 2_500)
    assert {"decoded", "undecodable", "truncated"} <= set(result["outcomes"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TIFF", "BMP", "AVIF"])
def test_a_thousand_mutations_of_the_other_formats(kind, tmp_path):
    check(run(kind, 0, 1_000, tmp_path), 1_000)


if __name__ == "__main__":
    report = child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
    sys.stdout.write(json.dumps(report) + "\n")
