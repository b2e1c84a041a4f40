"""The three layouts in which img2dataset leaves its images."""

import io
import json
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import crawl
from curation.config.inputs import InputConfig, PoolConfig


def sidecar(number):
    known = {"caption": f"photo {number}", "url": f"http://site.example/{number}.jpg", "key": f"{number:09d}"}
    return known | {"status": "success", "error_message": None, "width": 48, "exif": "{}"}


def as_tar(folder, images):
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number, image in enumerate(images):
            parts = {"jpg": image, "json": json.dumps(sidecar(number)).encode(), "txt": b"photo"}
            for suffix, data in parts.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.Table.from_pylist([sidecar(number) for number in range(len(images))]), folder / "00000.parquet")
    (folder / "00000_stats.json").write_text("{}")


def as_files(folder, images):
    (folder / "00000").mkdir()
    for number, image in enumerate(images):
        (folder / "00000" / f"{number:09d}.jpg").write_bytes(image)
        (folder / "00000" / f"{number:09d}.json").write_text(json.dumps(sidecar(number)))
    pq.write_table(pa.Table.from_pylist([sidecar(number) for number in range(len(images))]), folder / "00000.parquet")


def as_parquet(folder, images):
    rows = [sidecar(number) | {"jpg": image} for number, image in enumerate(images)]
    rows.append(sidecar(99) | {"jpg": None, "status": "failed_to_download"})
    pq.write_table(pa.Table.from_pylist(rows), folder / "00000.parquet")


@pytest.mark.parametrize("layout", [as_tar, as_files, as_parquet])
def test_images_keep_their_url_and_what_is_known_of_them(settings, make_image, tmp_path, layout):
    images = [make_image(number) for number in range(3)]
    layout(tmp_path, images)
    config = settings()
    config = config.model_copy(
        update={"pool": PoolConfig(inputs=(InputConfig(kind="img2dataset", path=str(tmp_path)),))}
    )
    counts = Counter()

    links = list(crawl.read_inputs(config.pool.inputs, config, lambda reason: counts.update([reason])))
    fetched = list(crawl.fetch(links, config))

    assert [link.url for link in links] == [f"http://site.example/{number}.jpg" for number in range(3)]
    assert json.loads(links[1].extra) == {"caption": "photo 1", "exif": "{}", "width": 48}
    assert [found.data for found in fetched] == images
    assert counts == ({"not_downloaded": 1} if layout is as_parquet else {})


def test_damage_is_counted_and_what_is_before_it_is_kept(settings, make_image, tmp_path):
    as_tar(tmp_path, [make_image(number) for number in range(3)])
    data = (tmp_path / "00000.tar").read_bytes()
    third = data.index(b"000000002.jpg")
    (tmp_path / "00000.tar").write_bytes(data[: third + 600].replace(b'"caption": "photo 1"', b'"caption" "photo 1"]'))
    source = InputConfig(kind="img2dataset", path=str(tmp_path))
    counts = Counter()

    links = list(crawl.read_inputs([source], settings(), lambda reason: counts.update([reason])))

    assert [link.url for link in links] == [
        "http://site.example/0.jpg",
        f"file://{tmp_path}/00000.tar#000000001.jpg",
    ]
    assert counts == {"damaged_sidecar": 1, "truncated_member": 1}
