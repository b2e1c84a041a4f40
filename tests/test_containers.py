import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image, ImageCms

from curation import containers, images
from curation.config.images import ImagesConfig
from curation.errors import ImageError

LIMITS = ImagesConfig()
SECRETS = (
    b"SecretMake",
    b"SecretModel",
    b"Serial4711",
    b"SecretNote",
    b"SecretThumb",
    b"SecretXmp",
    b"SecretIptc",
    b"GPS",
)
MAKE, MODEL, ORIENTATION, EXIF_IFD, GPS_IFD, SERIAL, NOTE = 0x010F, 0x0110, 0x0112, 0x8769, 0x8825, 0xA431, 0x927C
POSITION = {0: b"\2\3\0\0", 1: "N", 2: (48.0, 51.0, 29.5), 3: "E", 4: (2.0, 17.0, 40.25), 29: "2024:05:06"}


def noise(height=40, width=64, channels=3, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, channels), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(rgb, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(rgb).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation=1, order="<"):
    found = Image.Exif()
    found.endian = order
    found[ORIENTATION], found[MAKE], found[MODEL] = orientation, "SecretMake", "SecretModel"
    found.get_ifd(GPS_IFD).update(POSITION)
    found.get_ifd(EXIF_IFD).update({SERIAL: "Serial4711", NOTE: b"SecretNote" * 20})
    return found


def position_bytes(order):
    """The latitude as it lies in an EXIF block written by Pillow: three rationals."""
    block = exif(order=order).tobytes()
    assert (b"II*" if order == "<" else b"MM\0*") in block
    degrees = [struct.pack(order + "II", n, d) for n, d in ((48, 1), (51, 1), (59, 2))]
    assert b"".join(degrees) in block
    return b"".join(degrees)


def tiff(rgb, order, orientation):
    """One uncompressed strip, with a position: latitude, make and bits at 8, 32 and 44, pixels at 52, directories."""
    height, width, _ = rgb.shape
    body = position_bytes(order) + b"SecretMake\0\0" + struct.pack(order + "4H", 8, 8, 8, 0) + rgb.tobytes()
    gps_at = 8 + len(body)
    gps = struct.pack(order + "HHHIII", 1, 2, 5, 3, 8, 0)
    entries = [(256, 3, 1, width), (257, 3, 1, height), (258, 3, 3, 44), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(MAKE, 2, 11, 32), (273, 4, 1, 52), (ORIENTATION, 3, 1, orientation), (277, 3, 1, 3)]
    entries += [(278, 3, 1, height), (279, 4, 1, height * width * 3), (GPS_IFD, 4, 1, gps_at)]
    packed = [
        struct.pack(
            order + ("HHIHH" if kind == 3 and count == 1 else "HHII"),
            tag,
            kind,
            count,
            value,
            *[0] * (kind == 3 and count == 1),
        )
        for tag, kind, count, value in entries
    ]
    header = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", gps_at + len(gps))
    return header + body + gps + struct.pack(order + "H", len(entries)) + b"".join(packed) + b"\0" * 4


def segment(code, payload):
    return bytes((0xFF, code)) + struct.pack(">H", len(payload) + 2) + payload


def insert(jpeg, *segments, before=0xDB):
    at = jpeg.index(bytes((0xFF, before)))
    return jpeg[:at] + b"".join(segments) + jpeg[at:]


def assert_clean(data, order, orientation=1):
    assert position_bytes(order) not in data
    assert not [secret for secret in SECRETS if secret in data]
    with Image.open(io.BytesIO(data)) as image:
        found = image.getexif()
        assert not found.get_ifd(GPS_IFD)
        assert not found.get_ifd(EXIF_IFD)
        assert dict(found) == ({} if orientation == 1 else {ORIENTATION: orientation})
        assert "mp" not in image.info
        assert not {"xmp", "photoshop", "comment", "parsed_exif"} & set(image.info)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_gps_goes_in_and_does_not_come_out_and_pixels_are_bit_identical(kind, order, orientation):
    options = {"WEBP": {"xmp": b"<x>SecretXmp</x>"}, "JPEG": {"comment": b"SecretNote"}}.get(kind, {})
    if kind == "TIFF":  # Pillow writes no positions into one
        data = tiff(noise(), order, orientation)
    else:
        data = encoded(noise(), kind, exif=exif(orientation, order), **options)
    assert b"SecretMake" in data
    assert position_bytes(order) in data
    with Image.open(io.BytesIO(data)) as image:
        assert image.getexif().get_ifd(GPS_IFD)[2] == (48.0, 51.0, 29.5)

    stripped, stored_format = images.strip_metadata(data, kind.lower())

    assert_clean(stripped, order, orientation if stored_format != "png" or kind == "PNG" else 1)
    assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_keeps_its_coded_data_byte_by_byte(progressive):
    data = encoded(noise(), "JPEG", quality=90, progressive=progressive, exif=exif())

    stripped = containers.strip_jpeg(data, 1)

    assert stripped.endswith(data[data.index(b"\xff\xda") :])
    assert stripped[:20] == data[:20]  # JFIF


def test_every_jpeg_segment_that_is_no_coding_goes():
    plain = encoded(noise(), "JPEG")
    icc = segment(0xE2, b"ICC_PROFILE\0\1\1" + b"colours")
    dirty = insert(
        plain,
        segment(0xE1, b"Exif\0\0" + exif(1, ">").tobytes()[6:]),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>SecretXmp GPSLatitude</x>"),
        segment(0xE1, b"http://ns.adobe.com/xmp/extension/\0" + b"0" * 40 + b"SecretXmp"),
        segment(0xED, b"Photoshop 3.0\x008BIM\4\4\0\0\0\0\0\x0a\x1c\2\x5a\0\5SecretIptc"),
        segment(0xE0, b"JFXX\0\x10SecretThumb"),
        segment(0xE2, b"MPF\0II*\0SecretNote"),
        *(segment(code, b"SecretNote") for code in (*range(0xE3, 0xF0), 0xFE)),
        segment(0xE2, b"ICC_PROFILE\0\1\1" + b"SecretNote"),
        segment(0xE1, b"Exif\0\0" + exif(3, "<").tobytes()[6:]),
    )

    assert containers.strip_jpeg(dirty, 1, b"colours") == insert(plain, icc)
    assert containers.strip_jpeg(dirty, 1) == plain


def test_exif_behind_the_tables_and_twice_is_found_and_removed_and_the_first_orientation_counts():
    plain = encoded(noise(40, 64), "JPEG")
    first, second = (segment(0xE1, b"Exif\0\0" + exif(turn, ">").tobytes()[6:]) for turn in (6, 3))
    dirty = insert(plain, first, second, before=0xDA)

    assert images.decode(dirty, LIMITS).shape == (64, 40, 3)
    stripped, _ = images.strip_metadata(dirty, "jpeg")
    assert_clean(stripped, ">", 6)
    assert (images.decode(stripped, LIMITS) == images.decode(dirty, LIMITS)).all()


def test_a_thumbnail_inside_exif_or_jfif_goes():
    plain = encoded(noise(), "JPEG")
    jfif = plain[:20]
    assert jfif[6:11] == b"JFIF\0"
    thumbnail = segment(0xE0, jfif[6:18] + bytes((2, 2)) + b"SecretThumb!")
    directory = struct.pack("<HHHII", 1, 0x0201, 4, 1, 26)
    block = b"II*\0" + struct.pack("<IHI", 8, 0, 14) + directory + b"\0\0\0\0" + plain[:2] + b"SecretThumb"

    stripped = containers.strip_jpeg(jfif[:2] + thumbnail + segment(0xE1, b"Exif\0\0" + block) + plain[20:], 1)

    assert stripped == plain


def test_a_second_image_behind_the_end_with_its_own_position_goes():
    second = encoded(noise(seed=1), "JPEG", exif=exif())
    buffer = io.BytesIO()
    first = Image.fromarray(noise())
    first.save(buffer, "MPO", save_all=True, append_images=[Image.open(io.BytesIO(second))], exif=exif(6))
    for data in (buffer.getvalue(), encoded(noise(), "JPEG", exif=exif(6)) + second + b"SecretNote"):
        assert data.count(b"\xff\xd8\xff") >= 2
        assert images.inspect(data, LIMITS) == images.ImageInfo("jpeg", 40, 64)

        stripped, stored_format = images.strip_metadata(data, "jpeg")

        assert stored_format == "jpeg"
        assert stripped.count(b"\xff\xd8\xff") == 1
        assert stripped.endswith(b"\xff\xd9")
        assert_clean(stripped, "<", 6)
        assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


def test_fill_bytes_between_segments_go_without_encoding_anew():
    plain = encoded(noise(), "JPEG", exif=exif())
    dirty = insert(plain, b"\xff" * 7)

    assert images.strip_metadata(dirty, "jpeg") == images.strip_metadata(plain, "jpeg")


def scan_of(data):
    """Where the coded data of the first scan begins."""
    at = data.index(b"\xff\xda") + 2
    return at + int.from_bytes(data[at : at + 2], "big")


NOTE_BYTES = b"SecretNote" * 3
ODD_JPEGS = {
    "junk between segments": lambda jpeg, scan: insert(jpeg, NOTE_BYTES),
    "no end": lambda jpeg, scan: jpeg[:-2],
    "text for an end": lambda jpeg, scan: jpeg[:-2] + NOTE_BYTES,
    "text behind the last block": lambda jpeg, scan: jpeg[:-2] + NOTE_BYTES + jpeg[-2:],
    "a height behind the scan": lambda jpeg, scan: jpeg[:-2] + segment(0xDC, NOTE_BYTES) + jpeg[-2:],
    "a height before the frame": lambda jpeg, scan: insert(jpeg, segment(0xDC, NOTE_BYTES)),
    "arithmetic conditioning": lambda jpeg, scan: insert(jpeg, segment(0xCC, NOTE_BYTES)),
    "an unknown segment": lambda jpeg, scan: insert(jpeg, segment(0xF3, NOTE_BYTES)),
    "a comment behind the scan": lambda jpeg, scan: jpeg[:-2] + segment(0xFE, NOTE_BYTES) + jpeg[-2:],
    "tables behind the scan": lambda jpeg, scan: jpeg[:-2] + segment(0xDB, b"\3" + bytes([9]) * 64) + jpeg[-2:],
    "an unknown marker in the scan": lambda jpeg, scan: jpeg[: scan + 20] + b"\xff\3" + jpeg[scan + 20 :],
    "a segment in the scan": lambda jpeg, scan: jpeg[: scan + 20] + segment(3, NOTE_BYTES) + jpeg[scan + 20 :],
    "restarts that nothing announced": lambda jpeg, scan: jpeg[: scan + 20] + b"\xff\xd0" + jpeg[scan + 20 :],
    "a scan too many": lambda jpeg, scan: jpeg[:-2] + jpeg[jpeg.index(b"\xff\xda") : scan] + NOTE_BYTES + jpeg[-2:],
    "a second picture without a start": lambda jpeg, scan: jpeg[:-2] + jpeg[2:],
    "a second frame": lambda jpeg, scan: insert(jpeg, jpeg[jpeg.index(b"\xff\xc0") :][:19]),
    "an end before the frame": lambda jpeg, scan: insert(jpeg, b"\xff\xd9"),
    "a second start": lambda jpeg, scan: insert(jpeg, b"\xff\xd8"),
    "a segment beyond the end": lambda jpeg, scan: jpeg[:-2] + b"\xff\xfe\xff\xff",
}


@pytest.mark.parametrize("name", ODD_JPEGS)
def test_a_jpeg_that_decoders_step_over_parts_of_is_not_copied(name):
    plain = encoded(noise(80, 80), "JPEG", quality=90)
    odd = ODD_JPEGS[name](plain, scan_of(plain))

    assert containers.strip_jpeg(plain, 1) == plain
    assert containers.strip_jpeg(odd, 1) is None
    with suppress(ImageError):
        stripped, _ = images.strip_metadata(odd, "jpeg")
        assert b"Secret" not in stripped
        assert images.decode(stripped, LIMITS).shape == (80, 80, 3)


def test_restarts_out_of_turn_are_not_copied():
    data = encoded(noise(80, 80), "JPEG", restart_marker_blocks=1)

    assert containers.strip_jpeg(data, 1) == data
    assert containers.strip_jpeg(data.replace(b"\xff\xd3", b"\xff\xd4"), 1) is None


@pytest.mark.parametrize("options", [{"subsampling": 2}, {"progressive": True}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_usual_jpegs_are_copied(mode, options):
    buffer = io.BytesIO()
    Image.fromarray(noise(90, 70)).convert(mode).save(buffer, "JPEG", **options)

    assert containers.strip_jpeg(buffer.getvalue(), 1) == buffer.getvalue()


def test_restart_markers_belong_to_the_coded_data():
    data = encoded(noise(80, 80), "JPEG", restart_marker_blocks=1, exif=exif())
    assert b"\xff\xd0" in data

    stripped, _ = images.strip_metadata(data, "jpeg")

    assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()
    assert stripped.count(b"\xff\xd0") == data.count(b"\xff\xd0")


def test_a_segment_shorter_than_its_length_is_refused():
    with pytest.raises(ImageError):
        images.strip_metadata(insert(encoded(noise(), "JPEG"), b"\xff\xe1\0\1"), "jpeg")


def test_cmyk_keeps_what_says_how_its_colours_are_coded():
    buffer = io.BytesIO()
    Image.fromarray(noise(channels=4), "CMYK").save(buffer, "JPEG", exif=exif())
    stripped, _ = images.strip_metadata(buffer.getvalue(), "jpeg")

    assert b"Adobe" in stripped
    assert_clean(stripped, "<")
    assert (images.decode(stripped, LIMITS) == images.decode(buffer.getvalue(), LIMITS)).all()


def chunk(kind, body):
    return containers._png_chunk(kind + body)


def test_every_png_chunk_that_is_no_colour_goes():
    plain = encoded(noise(), "PNG")
    dirty = (
        plain[:33]
        + chunk(b"tEXt", b"Author\0SecretNote")
        + chunk(b"zTXt", b"Comment\0\0x\x9cSecretNote")
        + chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x>SecretXmp</x>")
        + chunk(b"tIME", b"\x07\xe8\5\6\7\10\11")
        + chunk(b"eXIf", exif(6).tobytes()[6:])
        + chunk(b"prVt", b"SecretNote")
        + plain[33:-12]
        + chunk(b"eXIf", exif(3).tobytes()[6:])
        + chunk(b"tEXt", b"Raw profile type exif\0SecretNote")
        + plain[-12:]
        + b"SecretNote"
    )

    stripped, _ = images.strip_metadata(dirty, "png")

    assert_clean(stripped, "<", 6)
    assert not [kind for kind in (b"tEXt", b"zTXt", b"iTXt", b"tIME", b"prVt") if kind in stripped]
    assert images.strip_metadata(plain, "png")[0] == plain
    assert (images.decode(stripped, LIMITS) == images.decode(plain, LIMITS).transpose(1, 0, 2)[:, ::-1]).all()


def secret_profile(name=b"x\0R\0G\0B"):
    """Display colours other than sRGB, a private tag that nobody reads, and bytes behind the end."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = profile.replace(b"s\0R\0G\0B", name).replace(b"chrm", b"Priv")
    place = 128 + 4 + 12 * [profile[at : at + 4] for at in range(132, 132 + 12 * 20, 12)].index(b"Priv")
    entry = struct.pack(">4sII", b"Priv", len(profile), len(SECRET_BLOCK))
    profile = profile[:place] + entry + profile[place + 12 :] + SECRET_BLOCK
    assert profile.count(SECRET_BLOCK) == 1
    return struct.pack(">I", len(profile)) + profile[4:]


SECRET_BLOCK = b"SecretNote GPS 48.858N " * 4


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
def test_profiles_keep_colours_only(kind):
    data = encoded(noise(), kind, icc_profile=secret_profile(), exif=exif())

    stripped, stored = images.strip_metadata(data, kind.lower())

    assert b"ecret" not in b"".join(revealed(stripped))
    with Image.open(io.BytesIO(stripped)) as image:
        assert ("icc_profile" in image.info) == (kind in ("JPEG", "PNG", "WEBP"))
    if stored == kind.lower():
        assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("profile", [secret_profile(b"s\0R\0G\0B"), b"SecretNote" * 40], ids=["sRGB", "no profile"])
def test_a_profile_that_changes_nothing_goes(kind, profile):
    data = encoded(noise(), kind, icc_profile=profile)

    stripped, _ = images.strip_metadata(data, kind.lower())

    with Image.open(io.BytesIO(stripped)) as image:
        assert "icc_profile" not in image.info
    assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


def revealed(data):
    """The bytes of a file, and of whatever zlib streams are in it."""
    yield data
    for start in range(len(data)):
        if data[start] == 0x78:
            with suppress(zlib.error):
                yield zlib.decompressobj().decompress(data[start:])


def png_chunk(body):
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def png_with_pixels(plain, change):
    """The PNG with its zlib stream changed."""
    at = plain.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", plain, at)
    return plain[:at] + png_chunk(b"IDAT" + change(plain[at + 8 : at + 8 + length])) + plain[at + 12 + length :]


PNG = encoded(noise(), "PNG")
WEBP = encoded(noise(), "WEBP", lossless=True)
JPEG = encoded(noise(), "JPEG")
GIF = encoded(noise(), "GIF")
AVIF = encoded(noise(), "AVIF", speed=10)
HIDDEN = {
    "png, behind the zlib stream": png_with_pixels(PNG, lambda coded: coded + SECRET_BLOCK),
    "png, in rows that no decoder reads": png_with_pixels(
        PNG, lambda coded: zlib.compress(zlib.decompress(coded) + SECRET_BLOCK)
    ),
    "png, in a palette of no use": PNG[:33] + png_chunk(b"PLTE" + SECRET_BLOCK[:90]) + PNG[33:],
    "png, in a chunk that is too long": PNG[:33] + png_chunk(b"gAMA" + bytes(4) + SECRET_BLOCK) + PNG[33:],
    "png, in a private chunk": PNG[:33] + png_chunk(b"prVt" + SECRET_BLOCK) + PNG[33:],
    "png, behind the end": PNG + SECRET_BLOCK,
    "jpeg, behind the end": JPEG + SECRET_BLOCK,
    "jpeg, in a second picture": JPEG + JPEG[:2] + segment(0xFE, SECRET_BLOCK) + JPEG[2:],
    "webp, in an unknown chunk": WEBP + b"priv" + struct.pack("<I", len(SECRET_BLOCK)) + SECRET_BLOCK,
    "webp, behind the end": WEBP + SECRET_BLOCK,
    "gif, in a comment": GIF[:13]
    + GIF[13:].replace(b",\0\0\0\0", b"!\xfe" + bytes((92,)) + SECRET_BLOCK + b"\0,\0\0\0\0", 1),
    "gif, in an application's block": GIF[:13]
    + GIF[13:].replace(b",\0\0\0\0", b"!\xff\x0bSecretNote1" + bytes((92,)) + SECRET_BLOCK + b"\0,\0\0\0\0", 1),
    "gif, behind the end": GIF + SECRET_BLOCK,
    "tiff, between its parts": tiff(noise(), "<", 1),
    "tiff, behind the end": encoded(noise(), "TIFF") + SECRET_BLOCK,
    "avif, in a free box": AVIF + struct.pack(">I", 8 + len(SECRET_BLOCK)) + b"free" + SECRET_BLOCK,
}
HIDDEN["webp, in an unknown chunk"] = (
    b"RIFF" + struct.pack("<I", len(HIDDEN["webp, in an unknown chunk"]) - 8) + HIDDEN["webp, in an unknown chunk"][8:]
)


@pytest.mark.parametrize("name", HIDDEN)
def test_what_no_decoder_reads_goes(name):
    data = HIDDEN[name]
    kind = name.split(",")[0]
    assert b"ecret" in b"".join(revealed(data))

    stripped, stored = images.strip_metadata(data, kind)

    assert b"ecret" not in b"".join(revealed(stripped))
    assert stored == {"gif": "png", "tiff": "png", "avif": "jpeg"}.get(kind, kind)
    if stored != "jpeg" or kind == "jpeg":
        assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


@pytest.mark.parametrize("lossless", [False, True])
def test_webp_keeps_pixels_and_orientation_only(lossless):
    data = encoded(noise(), "WEBP", lossless=lossless, exif=exif(8), xmp=b"SecretXmp")
    dirty = data + b"JUNK" + struct.pack("<I", 10) + b"SecretNote"
    dirty = dirty[:4] + struct.pack("<I", len(dirty) - 8) + dirty[8:] + b"SecretNote"

    stripped, stored_format = images.strip_metadata(dirty, "webp")

    assert stored_format == "webp"
    assert_clean(stripped, "<", 8)
    assert int.from_bytes(stripped[4:8], "little") == len(stripped) - 8
    assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


def webp(*chunks):
    body = b"".join(kind + struct.pack("<I", len(part)) + part + bytes(len(part) % 2) for kind, part in chunks)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WEBP" + body


def test_webp_chunks_in_another_order_than_the_formats_are_not_copied():
    lossy, lossless = encoded(noise(), "WEBP"), encoded(noise(), "WEBP", lossless=True)
    coded, exact = (lossy[12:16], lossy[20:]), (lossless[12:16], lossless[20:])
    extended, profile = (b"VP8X", struct.pack("<IIH", 0, 63 | 39 << 24, 0)), (b"ICCP", b"colours")
    alpha, text = (b"ALPH", bytes(1 + 40 * 64)), (b"XMP ", b"SecretXmp")

    for chunks in ([coded], [exact], [coded, text], [extended, coded], [extended, profile, exact, text, text]):
        assert b"Secret" not in containers.strip_webp(webp(*chunks), 1)
        assert images.decode(containers.strip_webp(webp(*chunks), 1), LIMITS).shape == (40, 64, 3)
    for chunks in (
        [coded, coded, alpha, coded],
        [coded, coded],
        [coded, exact],
        [alpha, coded],
        [extended, alpha, coded],
        [coded, extended],
        [extended, extended, coded],
        [profile, coded],
        [extended, coded, profile],
        [text, coded],
        [extended],
        [],
    ):
        assert containers.strip_webp(webp(*chunks), 1) is None


def transparent_files():
    """Files whose transparent parts, seen as white, hold other colours."""
    rgba = noise(channels=4).copy()
    rgba[:20, :, 3] = 0
    grey = Image.fromarray(rgba).convert("LA")
    palette = Image.fromarray(rgba[:, :, :3]).quantize(16)
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True, "exact": True}), ("WEBP", {"exact": True})):
        yield f"{kind} {options.get('lossless', '')}", encoded(rgba, kind, **options)
    for name, image, options in (
        ("PNG LA", grey, {}),
        ("PNG palette", palette, {"transparency": bytes(8)}),
        ("PNG key", Image.fromarray(rgba[:, :, :3]), {"transparency": tuple(map(int, rgba[0, 0, :3]))}),
    ):
        buffer = io.BytesIO()
        image.save(buffer, "PNG", **options)
        yield name, buffer.getvalue()


TRANSPARENT = dict(transparent_files())


@pytest.mark.parametrize("name", TRANSPARENT)
def test_colours_under_transparency_which_were_never_searched_are_not_stored(name):
    data = TRANSPARENT[name]

    stripped, stored = images.strip_metadata(data, name.split()[0].lower())

    assert stored == "png"
    with Image.open(io.BytesIO(stripped)) as image:
        assert image.mode == "RGB"
        assert "transparency" not in image.info
        assert (np.asarray(image) == images.decode(data, LIMITS)).all()
    with Image.open(io.BytesIO(data)) as image:
        assert (np.asarray(image.convert("RGB")) != images.decode(data, LIMITS)).any()


def test_an_avif_loses_its_position_and_keeps_its_turn():
    data = encoded(noise(), "AVIF", exif=exif(6), quality=90)
    assert b"SecretMake" in data

    stripped, stored_format = images.strip_metadata(data, "avif")

    assert stored_format == "jpeg"
    assert_clean(stripped, "<")
    assert images.decode(stripped, LIMITS).shape == images.decode(data, LIMITS).shape == (64, 40, 3)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("kind", [(1, "B3x"), (3, "H2x"), (4, "I")])
def test_orientation_is_read_in_both_byte_orders_and_as_any_integer(order, value, kind):
    code, form = kind
    mark = b"II*\0" if order == "<" else b"MM\0*"
    block = mark + struct.pack(order + "IHHHI" + form, 8, 1, ORIENTATION, code, 1, value)

    assert containers.exif_orientation(block) == (value if 1 <= value <= 8 else 1)
    assert containers.exif_orientation(b"Exif\0\0" + block) == (value if 1 <= value <= 8 else 1)


def test_broken_exif_says_nothing():
    block = exif(6).tobytes()
    assert containers.exif_orientation(block) == 6
    for data in (b"", b"Exif\0\0", b"II*\0", b"II*\0\xff\xff\xff\xff", block[:20], b"II*\0\x08\0\0\0\xff\xff"):
        assert containers.exif_orientation(data) == 1


@pytest.mark.parametrize(
    "first", ["pixels of another picture before the header", "and behind a chunk of text", "twice"]
)
def test_pixels_in_odd_places_do_not_change_what_is_stored(first):
    at = PNG.index(b"IDAT") - 4
    end = at + 12 + struct.unpack_from(">I", PNG, at)[0]
    other = encoded(noise(seed=5), "PNG")
    start = other.index(b"IDAT") - 4
    foreign = other[start : start + 12 + struct.unpack_from(">I", other, start)[0]]
    data = {
        "pixels of another picture before the header": PNG[:8] + foreign + PNG[8:],
        "and behind a chunk of text": PNG[:end] + png_chunk(b"tEXtSecretNote") + foreign + PNG[end:],
        "twice": PNG[:end] + foreign + PNG[end:],
    }[first]

    stripped, _ = images.strip_metadata(data, "png")

    assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()
    assert b"ecret" not in stripped
    assert foreign[8:-4] not in stripped
