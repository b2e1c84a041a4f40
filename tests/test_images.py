import io
import os
import struct
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from curation import colours, icc, images, schema
from curation.config.images import ImagesConfig
from curation.errors import ImageError

LIMITS = ImagesConfig()
SHARED = Path(os.environ.get("CURATION_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
GPS_IFD = 0x8825


def photo(height=48, width=64):
    y, x = np.mgrid[0:height, 0:width]
    rgb = np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (width + height)], axis=-1)
    return rgb.astype(np.uint8)


def saved(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def encoded(rgb, kind, **options):
    return saved(Image.fromarray(rgb), kind, **options)


def refusal(data, limits=LIMITS, act=images.decode):
    with pytest.raises(ImageError) as caught:
        act(data, limits)
    assert caught.value.reason in schema.IMAGE_REASONS
    return caught.value.reason


def camera_exif(orientation=1):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "SecretCamera"
    exif.get_ifd(GPS_IFD)[2] = (48.0, 51.0, 29.0)
    return exif


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_every_allowed_format_decodes_to_upright_rgb(kind):
    data = encoded(photo(), kind)

    assert images.inspect(data, LIMITS) == images.ImageInfo(kind.lower(), 64, 48)
    decoded = images.decode(data, LIMITS)
    assert decoded.shape == (48, 64, 3)
    assert decoded.dtype == np.uint8
    assert decoded.flags.writeable
    assert np.abs(decoded.astype(int) - photo()).mean() < 6


@pytest.mark.parametrize("kind", ["PPM", "ICO", "TGA", "PCX", "SGI", "JPEG2000"])
def test_other_formats_are_not_images_here(kind):
    assert refusal(encoded(photo(), kind)) == "not_an_image"
    assert refusal(encoded(photo(), kind), act=images.inspect) == "not_an_image"


def test_a_known_signature_on_broken_content_is_undecodable():
    data = bytearray(encoded(photo(), "PNG"))
    data[20] ^= 0xFF  # in the header chunk, whose checksum then fails

    assert refusal(bytes(data)) == "undecodable"


def test_html_and_nothing_are_not_images():
    assert refusal(b"<html><body>404</body></html>") == "not_an_image"
    assert refusal(b"") == "not_an_image"


def test_content_decides_and_not_the_limits_of_another_format():
    assert images.inspect(encoded(photo(), "PNG"), LIMITS).format == "png"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied(orientation, kind):
    upright = photo()
    undo = {1: 1, 2: 2, 3: 3, 4: 4, 5: 5, 6: 8, 7: 7, 8: 6}[orientation]
    method = colours._TRANSPOSE.get(undo)
    stored = np.asarray(Image.fromarray(upright).transpose(method)) if method is not None else upright
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    data = encoded(stored, kind, exif=camera_exif(orientation), **options)

    info = images.inspect(data, LIMITS)
    assert (info.width, info.height) == (64, 48)
    assert np.abs(images.decode(data, LIMITS).astype(int) - upright).max() <= (8 if kind == "JPEG" else 0)


def test_alpha_is_composited_on_white():
    rgba = np.zeros((20, 20, 4), np.uint8)
    rgba[:, 10:, 3] = 255

    decoded = images.decode(encoded(rgba, "PNG"), LIMITS)

    assert (decoded[:, :10] == 255).all()
    assert (decoded[:, 10:] == 0).all()


def test_palette_transparency_is_composited_on_white():
    image = Image.new("P", (20, 20), 0)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(1, (10, 0, 20, 20))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", transparency=0)

    decoded = images.decode(buffer.getvalue(), LIMITS)

    assert decoded[0, 0].tolist() == [255, 255, 255]
    assert decoded[0, 15].tolist() == [200, 100, 50]


def test_sixteen_bit_grey_keeps_its_high_byte():
    grey = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)

    for kind in ("PNG", "TIFF"):
        decoded = images.decode(encoded(grey, kind), LIMITS)
        assert (decoded == (grey >> 8)[:, :, None]).all()


def _tiff(samples, bits, kind, white_is_zero=False):
    """An uncompressed little-endian grey TIFF of packed samples, shape (height, bytes a row)."""
    height, row_bytes = samples.shape
    values = {256: row_bytes * 8 // bits, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8, 277: 1}
    values |= {278: height, 279: samples.size, 339: kind}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values.items())
    directory = struct.pack("<H", len(values)) + entries + bytes(4)
    return b"II*\0" + struct.pack("<I", 8 + samples.size) + samples.tobytes() + directory


@pytest.mark.parametrize(("value", "expected"), [(0, 0), (1.0, 255), (0.5, 128)])
def test_float_samples_are_greys_from_0_to_1(value, expected):
    decoded = images.decode(encoded(np.full((20, 20), value, np.float32), "TIFF"), LIMITS)

    assert (decoded == expected).all()


@pytest.mark.parametrize("value", [np.nan, 1.5, -0.1, 300.0])
def test_float_samples_without_a_defined_white_are_refused(value):
    samples = np.full((20, 20), 0.5, np.float32)
    samples[3, 3] = value

    with pytest.raises(ImageError, match="white is not defined") as caught:
        images.decode(encoded(samples, "TIFF"), LIMITS)
    assert caught.value.reason == "undecodable"


@pytest.mark.parametrize("kind", [np.int16, np.int32])
def test_signed_samples_are_refused(kind):
    samples = np.full((20, 20), 100, kind).view(np.uint8)

    with pytest.raises(ImageError, match="signed samples"):
        images.decode(_tiff(samples, kind().itemsize * 8, 2), LIMITS)


@pytest.mark.parametrize("value", [0, 0x01FFFFFF, 0x7F000000, 0x80000000, 0xFFFFFFFF])
def test_samples_of_32_bits_keep_their_highest_8(value):
    samples = np.full((20, 20), value, np.uint32).view(np.uint8)

    assert (images.decode(_tiff(samples, 32, 1), LIMITS) == value >> 24).all()


def test_samples_of_12_bits_keep_their_highest_8():
    samples = np.tile(np.frombuffer(b"\xab\xcd\xef", np.uint8), (20, 10))  # two samples in three bytes

    decoded = images.decode(_tiff(samples, 12, 1), LIMITS)

    assert decoded[0, :2, 0].tolist() == [0xAB, 0xDE]


def test_white_is_zero_where_a_16_bit_file_says_so():
    samples = np.full((20, 20), 0x2000, np.uint16).view(np.uint8)

    assert (images.decode(_tiff(samples, 16, 1, white_is_zero=True), LIMITS) == 255 - 0x20).all()


def _swapped_profile():
    """A profile that turns red into green."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    profile[:] = profile.replace(b"s\0R\0G\0B", b"x\0R\0G\0B").replace(b"rXYZ", b"tXYZ")
    return bytes(profile.replace(b"gXYZ", b"rXYZ").replace(b"tXYZ", b"gXYZ"))


@pytest.mark.parametrize(
    ("mode", "kind"), [("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("P", "PNG"), ("RGB", "PNG")]
)
def test_a_profile_is_applied_before_alpha_is_composited(mode, kind):
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 128))
    image.paste((0, 0, 255, 0), (0, 0, 40, 20))
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    half = [127, 255, 127]
    if mode == "RGB":  # one transparent colour
        image, options, half = image.convert("RGB"), {"transparency": (0, 0, 255)}, [0, 255, 0]
    elif mode == "P":
        indices = np.repeat(np.array([[0], [1]], np.uint8), 20, axis=0) * np.ones((1, 40), np.uint8)
        image = Image.fromarray(indices, "L").convert("P")
        image.putpalette([0, 0, 255, 255, 0, 0])
        options = {"transparency": bytes([0, 128])}

    decoded = images.decode(saved(image, kind, icc_profile=_swapped_profile(), **options), LIMITS)

    assert decoded[5, 5].tolist() == [255, 255, 255]
    assert np.abs(decoded[35, 5].astype(int) - half).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_make_the_whole(monkeypatch, orientation):
    data = encoded(photo(), "PNG", exif=camera_exif(orientation))
    whole = images.decode(data, LIMITS)

    monkeypatch.setattr(colours, "_STRIP_PIXELS", 7 * whole.shape[1])

    assert (images.decode(data, LIMITS) == whole).all()


def test_cmyk_becomes_rgb():
    buffer = io.BytesIO()
    Image.new("CMYK", (20, 20), (255, 0, 0, 0)).save(buffer, "JPEG")

    red, green, blue = images.decode(buffer.getvalue(), LIMITS)[10, 10].tolist()

    assert red < 60
    assert min(green, blue) > 180


def test_an_embedded_profile_is_converted_to_srgb_and_a_broken_one_ignored():
    lab_white = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(lab_white)
    table = {swapped[i : i + 4].decode("latin1"): i for i in range(132, 132 + 12 * swapped[131], 12)}
    red, blue = table["rXYZ"] + 4, table["bXYZ"] + 4
    swapped[red : red + 8], swapped[blue : blue + 8] = swapped[blue : blue + 8], swapped[red : red + 8]
    swapped = bytes(swapped).replace(b"s\0R\0G\0B", b"x\0y\0z\0w").replace(b"sRGB", b"xyzw")
    rgb = np.zeros((20, 20, 3), np.uint8)
    rgb[:, :, 0] = 255

    plain = images.decode(encoded(rgb, "PNG", icc_profile=lab_white), LIMITS)
    turned = images.decode(encoded(rgb, "PNG", icc_profile=swapped), LIMITS)
    broken = images.decode(encoded(rgb, "PNG", icc_profile=b"\0" * 400), LIMITS)

    assert plain[0, 0].tolist() == broken[0, 0].tolist() == [255, 0, 0]
    assert turned[0, 0].tolist() == [0, 0, 255]


def test_animated_images_give_their_first_frame():
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        red, _, blue = images.decode(buffer.getvalue(), LIMITS)[10, 10].tolist()
        assert red > 240
        assert blue < 15


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, kind)

    assert refusal(data[: len(data) * 2 // 3]) in ("truncated", "undecodable")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "AVIF"])
def test_a_truncated_web_image_says_so(kind):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(noise, kind)

    assert refusal(data[: len(data) * 2 // 3]) == "truncated"


@pytest.mark.parametrize(
    ("limits", "size", "reason"),
    [
        ({"max_pixels": 64 * 48 - 1}, (48, 64), "too_many_pixels"),
        ({"min_side_px": 49}, (48, 64), "too_small"),
        ({"max_aspect": 2.0}, (20, 41), "bad_aspect"),
    ],
)
def test_limits_refuse_what_exceeds_them_by_one(limits, size, reason):
    data = encoded(photo(*size), "PNG")

    assert refusal(data, ImagesConfig(**limits)) == reason
    assert refusal(data, ImagesConfig(**limits), act=images.inspect) == reason


@pytest.mark.parametrize("limits", [{"max_pixels": 64 * 48}, {"min_side_px": 48}, {"max_aspect": 64 / 48}])
def test_limits_accept_what_meets_them(limits):
    assert images.decode(encoded(photo(), "PNG"), ImagesConfig(**limits)).shape == (48, 64, 3)


def test_a_bomb_is_refused_before_its_pixels_are_allocated():
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))

    assert refusal(data) == "too_many_pixels"
    assert refusal(data + chunk(b"IEND", b""), act=images.inspect) == "too_many_pixels"


def test_reduced_decoding_keeps_the_short_side_and_the_picture():
    rgb = photo(900, 1200)
    data = encoded(rgb, "JPEG", quality=95)

    reduced = images.decode(data, LIMITS, min_side_px=200)

    assert reduced.shape == (225, 300, 3)
    expected = np.asarray(Image.fromarray(rgb).resize((300, 225), Image.Resampling.BOX), dtype=int)
    assert np.abs(reduced - expected).mean() < 2
    assert images.decode(data, LIMITS, min_side_px=901).shape == rgb.shape


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_metadata_goes_and_pixels_stay_bit_identical(kind, orientation):
    options = {"JPEG": {"comment": b"my secret"}, "WEBP": {"xmp": b"<x>secret</x>"}}.get(kind, {})
    data = encoded(photo(), kind, exif=camera_exif(orientation), **options)
    assert b"SecretCamera" in data

    stripped, stored_format = images.strip_metadata(data, kind.lower())

    assert b"ecret" not in stripped
    assert images.inspect(stripped, LIMITS).format == stored_format
    assert stored_format == ("png" if kind == "TIFF" else kind.lower())
    with Image.open(io.BytesIO(stripped)) as image:
        assert not image.getexif().get_ifd(GPS_IFD)
        assert set(image.getexif()) <= {0x0112}
    assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


def test_a_jpeg_keeps_its_colours_and_loses_what_follows_its_end():
    profile = _swapped_profile()
    data = encoded(photo(), "JPEG", icc_profile=profile, progressive=True)

    stripped, _ = images.strip_metadata(data + b"\xff\xd8 a second, unblurred picture", "jpeg")

    assert stripped == images.strip_metadata(data, "jpeg")[0]
    with Image.open(io.BytesIO(stripped)) as image:
        assert image.info["icc_profile"] == icc.slimmed(profile)
    assert (images.decode(stripped, LIMITS) == images.decode(data, LIMITS)).all()


def test_later_frames_are_not_stored():
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "PNG"):
        buffer = io.BytesIO()
        frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
        stripped, stored_format = images.strip_metadata(buffer.getvalue(), kind.lower())
        assert stored_format == "png"
        with Image.open(io.BytesIO(stripped)) as image:
            assert getattr(image, "n_frames", 1) == 1
        assert (images.decode(stripped, LIMITS) == images.decode(buffer.getvalue(), LIMITS)).all()


def test_mutated_files_decode_or_are_refused_with_a_reason():
    rng = np.random.default_rng(7)
    outcomes = set()
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        valid = np.frombuffer(encoded(photo(), kind), np.uint8)
        for _ in range(60):
            mutated = valid.copy()
            mutated[rng.integers(0, len(valid), 4)] = rng.integers(0, 256, 4, dtype=np.uint8)
            data = mutated.tobytes()
            try:
                decoded = images.decode(data, LIMITS)
                info = images.inspect(data, LIMITS)
                stripped, _ = images.strip_metadata(data, info.format)
                assert decoded.shape == (info.height, info.width, 3)
                assert images.decode(stripped, LIMITS).shape == decoded.shape
                outcomes.add("decoded")
            except ImageError as error:
                outcomes.add(error.reason)
    assert outcomes <= {"decoded", *schema.IMAGE_REASONS}
    assert {"decoded", "undecodable", "truncated"} <= outcomes


def test_decoding_in_threads_gives_what_one_thread_gives():
    files = [encoded(photo(40 + n, 60), kind) for n in range(8) for kind in ("JPEG", "PNG", "WEBP", "GIF")]
    expected = [images.decode(data, LIMITS) for data in files]

    with ThreadPoolExecutor(8) as pool:
        decoded = list(pool.map(lambda data: images.decode(data, LIMITS), files * 4))

    assert all((a == b).all() for a, b in zip(decoded, expected * 4, strict=True))


def test_pillows_warnings_about_odd_images_stay_silent():
    data = encoded(photo(), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff broken")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        images.decode(data, LIMITS)
    assert not caught


def test_broken_tiffs_are_refused_without_a_word_on_standard_error(capfd):
    data = bytearray(encoded(photo(), "TIFF", compression="tiff_lzw"))
    data[20:40] = b"\xff" * 20

    assert refusal(bytes(data)) == "undecodable"
    assert capfd.readouterr().err == ""


def test_an_encoded_image_has_no_metadata_and_a_format_that_cannot_be_written_is_refused():
    assert images.inspect(images.encode(photo(), "jpeg", 80), LIMITS).format == "jpeg"
    assert (images.decode(images.encode(photo(), "png"), LIMITS) == photo()).all()
    with pytest.raises(ImageError):
        images.encode(photo(), "gif")
    with pytest.raises(ImageError):
        images.encode(np.zeros((1, 70_000, 3), np.uint8), "jpeg")


@pytest.mark.shared_data
def test_malformed_and_exotic_files_decode_or_are_refused_with_a_reason(capfd):
    path = SHARED / "malformed.zip"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    limits = ImagesConfig(min_side_px=1, max_aspect=1000.0)
    outcomes = set()
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            try:
                decoded = images.decode(data, limits)
                info = images.inspect(data, limits)
                stripped, _ = images.strip_metadata(data, info.format, limits)
                assert decoded.shape == (info.height, info.width, 3), name
                assert images.decode(stripped, limits).shape == decoded.shape, name
                outcomes.add("decoded")
            except ImageError as error:
                outcomes.add(error.reason)
    assert capfd.readouterr().err == ""
    assert outcomes <= {"decoded", *schema.IMAGE_REASONS}
    assert {"decoded", "not_an_image", "undecodable", "truncated", "too_many_pixels"} <= outcomes


def jpeg_variants():
    """The same 800 x 600 picture in the ways that JPEGs come in."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = bytearray(profile)
    table = {swapped[i : i + 4].decode("latin1"): i for i in range(132, 132 + 12 * swapped[131], 12)}
    red, blue = table["rXYZ"] + 4, table["bXYZ"] + 4
    swapped[red : red + 8], swapped[blue : blue + 8] = swapped[blue : blue + 8], swapped[red : red + 8]
    foreign = bytes(swapped).replace(b"s\0R\0G\0B", b"x\0y\0z\0w").replace(b"sRGB", b"xyzw")
    variants = {"plain": {}, "progressive": {"progressive": True}, "turned": {"exif": camera_exif(6)}}
    variants |= {"profile": {"icc_profile": foreign}, "full chroma": {"subsampling": 0}}
    files = {name: encoded(photo(600, 800), "JPEG", quality=95, **options) for name, options in variants.items()}
    for mode in ("L", "CMYK"):
        buffer = io.BytesIO()
        Image.fromarray(photo(600, 800)).convert(mode).save(buffer, "JPEG", quality=95)
        files[mode] = buffer.getvalue()
    return files


@pytest.mark.parametrize("name", list(jpeg_variants()))
@pytest.mark.parametrize("headroom", [1.0, 2.0])
def test_reduced_decoding_turns_and_converts_as_full_decoding_does(headroom, name):
    data = jpeg_variants()[name]
    full = images.decode(data, LIMITS)

    reduced = images.decode(data, LIMITS, min_side_px=75, headroom=headroom)

    scale = 8 if headroom == 1.0 else 4
    assert reduced.shape == (full.shape[0] // scale, full.shape[1] // scale, 3)
    boxes = full.reshape(reduced.shape[0], scale, reduced.shape[1], scale, 3).mean(axis=(1, 3))
    assert np.abs(reduced - boxes).mean() < 2


def test_headroom_keeps_that_many_times_the_consumers_side():
    data = encoded(photo(600, 800), "JPEG")

    sides = [min(images.decode(data, LIMITS, 75, headroom).shape[:2]) for headroom in (0.5, 1.0, 1.01, 2.0, 4.0, 9.0)]

    assert sides == [75, 75, 150, 150, 300, 600]


def test_a_consumer_may_choose_its_side_by_the_upright_size():
    seen = []
    for name, exif in (("plain", {}), ("turned", {"exif": camera_exif(6)})):
        data = encoded(photo(600, 800), "JPEG", **exif)

        def side(width, height):
            seen.append((width, height))
            return 150

        np.testing.assert_array_equal(images.decode(data, LIMITS, side), images.decode(data, LIMITS, 150), name)
        np.testing.assert_array_equal(images.decode(data, LIMITS, lambda *_: None), images.decode(data, LIMITS), name)

    assert seen == [(800, 600), (600, 800)]


@pytest.mark.parametrize("has_adobe_marker", [True, False])
def test_cmyk_is_inverted_as_adobe_writes_it_with_and_without_its_marker(has_adobe_marker):
    # Photoshop, libjpeg and all browsers take four-component JPEGs as inverted, whether or not the marker is there.
    buffer = io.BytesIO()
    Image.new("CMYK", (32, 32), (0, 255, 255, 0)).save(buffer, "JPEG", quality=100)
    data = buffer.getvalue()
    at = data.index(b"\xff\xeeA".replace(b"A", b"\0\x0eAdobe"))
    if not has_adobe_marker:
        data = data[:at] + data[at + 16 :]

    assert images.decode(data, LIMITS)[16, 16].tolist() == pytest.approx([255, 0, 0], abs=3)


def test_ycck_is_converted_through_ycc():
    # Components of a CMYK JPEG, called YCCK afterwards: Y, Cb, Cr of the inverted ink, and inverted black.
    luma, blue, red, black = 120, 90, 170, 255
    buffer = io.BytesIO()
    Image.new("CMYK", (32, 32), (255 - luma, 255 - blue, 255 - red, 255 - black)).save(buffer, "JPEG", quality=100)
    data = bytearray(buffer.getvalue())
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    data[at] = 2

    # JFIF's YCC; libjpeg gives ink = 255 - colour, and files hold inverted ink.
    r, g, b = luma + 1.402 * (red - 128), luma - 0.344 * (blue - 128) - 0.714 * (red - 128), luma + 1.772 * (blue - 128)
    assert images.decode(bytes(data), LIMITS)[16, 16].tolist() == pytest.approx([255 - r, 255 - g, 255 - b], abs=4)


@pytest.mark.parametrize(
    ("mode", "kind", "color", "expected"),
    [
        ("1", "PNG", 1, (255, 255, 255)),
        ("1", "TIFF", 0, (0, 0, 0)),
        ("L", "PNG", 77, (77, 77, 77)),
        ("LA", "PNG", (77, 255), (77, 77, 77)),
        ("LA", "PNG", (77, 0), (255, 255, 255)),
        ("LA", "TIFF", (0, 128), (127, 127, 127)),
        ("RGBA", "WEBP", (10, 20, 30, 0), (255, 255, 255)),
        ("RGBA", "TIFF", (10, 20, 30, 255), (10, 20, 30)),
        ("I;16", "PNG", 0x1234, (0x12, 0x12, 0x12)),
        ("I;16", "TIFF", 0xFEFF, (0xFE, 0xFE, 0xFE)),
        ("F", "TIFF", 1.0, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb(mode, kind, color, expected):
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    Image.new(mode, (20, 20), color).save(buffer, kind, **options)

    assert images.decode(buffer.getvalue(), LIMITS)[10, 10].tolist() == pytest.approx(expected, abs=1)


@pytest.mark.parametrize("depth_in_tuple", [1, 3])
def test_the_transparent_colour_of_a_16_bit_png_is_compared_in_its_high_byte(depth_in_tuple):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    wide = np.array([0x1234, 0x3412, 0x0034], ">u2")
    rows = np.repeat(np.repeat(wide, depth_in_tuple)[None], 3, axis=0)
    header = struct.pack(">IIBBBBB", 3, 3, 16, 0 if depth_in_tuple == 1 else 2, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    key = chunk(b"tRNS", struct.pack(">H", 0x1234) * depth_in_tuple)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + key + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")

    decoded = images.decode(data, ImagesConfig(min_side_px=1))

    assert decoded[0, :, 0].tolist() == [255, 0x34, 0]


def test_a_picture_with_further_pictures_gives_its_first():
    buffer = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(
        buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (40, 30), "blue")]
    )

    assert images.inspect(buffer.getvalue(), LIMITS).format == "jpeg"
    assert images.decode(buffer.getvalue(), LIMITS)[5, 5].tolist() == pytest.approx([255, 0, 0], abs=3)
    assert images.decode(buffer.getvalue(), LIMITS, min_side_px=8).shape == (15, 20, 3)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"isom"])
def test_heic_and_films_are_not_images_here(brand):
    box = b"ftyp" + brand + b"\0\0\0\0" + brand + b"heic"
    data = struct.pack(">I", len(box) + 4) + box + struct.pack(">I", 1000) + b"meta" + bytes(1000)

    assert refusal(data) == "not_an_image"


def test_a_wrong_checksum_of_png_pixels_is_refused():
    data = bytearray(encoded(photo(), "PNG"))
    data[data.index(b"IEND") - 5] ^= 1

    assert refusal(bytes(data)) == "undecodable"
