"""Tars that any tool reads, whose offsets are known without parsing them."""

import io
import tarfile

import numpy as np
import pytest

from curation.images import encode
from curation.store import Run
from curation.tars import EXTENSIONS, TarWriter


class Kept(io.BytesIO):
    """A stream whose content is there after it was closed."""

    def close(self) -> None:
        self.content = self.getvalue()
        super().close()


def packed(images):
    """Return the bytes of a tar of (id, data, format) and the offset of each."""
    stream = Kept()
    with TarWriter(stream) as tar:
        offsets = [tar.add(*image) for image in images]
    return stream.content, offsets


def some_images(sizes=(0, 1, 511, 512, 513, 10_240, 70_000)):
    random = np.random.default_rng(5)
    return [(f"{index:032x}", random.bytes(size), "jpeg") for index, size in enumerate(sizes)]


def test_a_tar_is_byte_for_byte_what_tarfile_writes():
    images = some_images()
    content, _ = packed(images)

    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data, _ in images:
            member = tarfile.TarInfo(f"{name}.jpg")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert content == written.getvalue()


def test_offsets_are_those_that_tarfile_finds():
    images = some_images()
    content, offsets = packed(images)

    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
        assert [member.offset_data for member in members] == offsets
        assert [tar.extractfile(member).read() for member in members] == [data for _, data, _ in images]
        assert [member.name for member in members] == [f"{image_id}.jpg" for image_id, _, _ in images]
    assert [content[offset : offset + len(data)] for offset, (_, data, _) in zip(offsets, images, strict=True)] == [
        data for _, data, _ in images
    ]


def test_the_same_images_make_the_same_bytes():
    assert packed(some_images())[0] == packed(some_images())[0]


def test_no_time_and_no_owner_is_stored():
    with tarfile.open(fileobj=io.BytesIO(packed(some_images())[0])) as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname, member.gname) for member in tar} == {
            (0, 0, 0, "", "")
        }


def test_an_image_that_comes_again_is_stored_once_and_shares_its_offset():
    first, second = some_images((600, 700))
    content, offsets = packed([first, second, first])

    assert offsets[0] == offsets[2] != offsets[1]
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert len(tar.getnames()) == 2


def test_a_tar_without_images_is_a_tar():
    with tarfile.open(fileobj=io.BytesIO(packed([])[0])) as tar:
        assert tar.getnames() == []


@pytest.mark.parametrize("kind", sorted(EXTENSIONS))
def test_every_format_has_an_extension_of_its_own(kind):
    content, _ = packed([("0" * 32, b"x", kind)])

    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert tar.getnames() == [f"{'0' * 32}.{EXTENSIONS[kind]}"]


def test_a_tar_that_an_error_interrupts_leaves_no_file_and_no_noise(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(RuntimeError), run.create("pool/raw/x.tar") as stream, TarWriter(stream) as tar:  # noqa: PT012
        tar.add(*some_images()[-1])
        raise RuntimeError

    assert not run.exists("pool/raw/x.tar")


@pytest.mark.filterwarnings("ignore")  # webdataset's own
def test_webdataset_reads_the_images(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    random = np.random.default_rng(5)
    pixels = [random.integers(0, 256, (24, 32, 3), dtype=np.uint8) for _ in range(3)]
    images = [(f"{index:032x}", encode(rgb, "png"), "png") for index, rgb in enumerate(pixels)]
    (tmp_path / "00000000-a.tar").write_bytes(packed(images)[0])

    samples = list(webdataset.WebDataset(str(tmp_path / "00000000-a.tar"), shardshuffle=False).decode("rgb8"))

    assert [sample["__key__"] for sample in samples] == [image_id for image_id, _, _ in images]
    assert all(np.array_equal(sample["png"], rgb) for sample, rgb in zip(samples, pixels, strict=True))
