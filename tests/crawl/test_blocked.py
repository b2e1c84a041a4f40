"""Images that look like listed ones are recognised, whatever their bytes are."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from curation.config.fetch import FetchConfig
from curation.config.images import ImagesConfig
from curation.crawl import blocked
from curation.crawl.blocked import BlockedImages, blocked_images
from curation.errors import BlocklistedError, ImageError, InputError, UsageError

LIMITS = ImagesConfig()


def photo(seed, side_px=600, quality=90):
    """A JPEG of smooth noise with some detail, always the same for a seed."""
    rng = np.random.default_rng(seed)
    layers = [
        np.asarray(Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8)).resize((600, 600)), np.float64)
        for cells in (4, 9, 20)
    ]
    buffer = io.BytesIO()
    picture = Image.fromarray((sum(layers) / 3).astype(np.uint8)).resize((side_px, side_px))
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


@pytest.fixture
def lists(tmp_path):
    """Lists with the PDQ hash of ``photo(1)`` among a thousand others."""
    pdqhash = pytest.importorskip("pdqhash", reason="needs the extra `pdq`")
    bits, quality = pdqhash.compute(np.asarray(Image.open(io.BytesIO(photo(1)))))
    assert quality >= 50
    rng = np.random.default_rng(0)
    hashes = [rng.bytes(32).hex() for _ in range(1000)]
    hashes.insert(700, np.packbits(np.asarray(bits, bool)).tobytes().hex())
    (tmp_path / "alike.txt").write_text("\n".join(hashes))
    return BlockedImages(FetchConfig(blocked_pdq=(str(tmp_path / "alike.txt"),)), LIMITS)


@pytest.mark.parametrize("options", [{}, {"quality": 40}, {"side_px": 200}, {"side_px": 1600}])
def test_the_same_picture_in_other_bytes_is_refused_with_the_digest_of_its_own(lists, options):
    data = photo(1, **options)

    with pytest.raises(BlocklistedError) as refused:
        lists.check(data)

    assert (refused.value.sha256, refused.value.list_name) == (hashlib.sha256(data).hexdigest(), "alike.txt")


def test_other_pictures_pass(lists):
    for seed in range(2, 12):
        lists.check(photo(seed))


def test_a_flat_picture_passes_because_its_hash_says_little(lists):
    buffer = io.BytesIO()
    Image.new("RGB", (300, 300), (10, 200, 10)).save(buffer, "PNG")

    lists.check(buffer.getvalue())


def test_what_does_not_decode_has_its_own_reason(lists):
    with pytest.raises(ImageError) as refused:
        lists.check(b"no image")

    assert refused.value.reason == "not_an_image"


def test_a_line_that_is_no_hash_is_an_error_that_names_it(tmp_path):
    (tmp_path / "alike.txt").write_text("00ff\n")

    with pytest.raises(InputError, match=r"fetch.blocked_pdq: .*alike.txt: line 1 is no PDQ hash"):
        BlockedImages(FetchConfig(blocked_pdq=(str(tmp_path / "alike.txt"),)), LIMITS)


def test_without_the_library_its_lists_are_refused_and_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "alike.txt").touch()

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(blocked.importlib, "import_module", missing)

    with pytest.raises(UsageError, match=r"curation\[pdq\]"):
        blocked_images(FetchConfig(blocked_pdq=(str(tmp_path / "alike.txt"),)), LIMITS)
    assert not blocked_images(FetchConfig(), LIMITS)
