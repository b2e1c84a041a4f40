"""Frames are counted without decoding, and as Pillow counts them."""

import io

import pytest
from PIL import Image

from curation.config.images import ImagesConfig
from curation.crawl.verify import verify
from curation.errors import ImageError
from curation.frames import has_more


def animation(kind: str, num_frames: int) -> bytes:
    frames = [Image.new("RGB", (40, 40), (index * 9 % 256, 80, index * 31 % 256)) for index in range(num_frames)]
    buffer = io.BytesIO()
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("num_frames", [2, 7])
def test_frames_are_counted_as_pillow_counts_them(kind, num_frames):
    data = animation(kind, num_frames)

    assert Image.open(io.BytesIO(data)).n_frames == num_frames
    assert [has_more(data, limit) for limit in (num_frames - 1, num_frames)] == [True, False]


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF", "JPEG", "BMP"])
def test_a_single_image_is_one_frame_and_a_cut_one_ends_the_count(kind):
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40)).save(buffer, kind)

    assert not has_more(buffer.getvalue(), 1)
    for end in range(0, len(buffer.getvalue()), 5):
        assert not has_more(buffer.getvalue()[:end], 1)


def test_a_tiff_whose_directories_run_in_a_circle_has_too_many():
    data = bytearray(animation("TIFF", 1))
    first = int.from_bytes(data[4:8], "little")
    count = int.from_bytes(data[first : first + 2], "little")
    data[first + 2 + 12 * count : first + 6 + 12 * count] = first.to_bytes(4, "little")

    assert has_more(bytes(data), 1000)


def test_films_are_refused_when_they_are_fetched():
    with pytest.raises(ImageError) as refused:
        verify(animation("GIF", 7), ImagesConfig(max_frames=6))
    assert refused.value.reason == "too_many_frames"
    assert verify(animation("GIF", 7), ImagesConfig(max_frames=7)).info.format == "gif"
