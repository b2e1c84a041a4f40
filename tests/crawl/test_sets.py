import io
import os
import tarfile
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import crawl
from curation.config.inputs import InputConfig, PoolConfig
from curation.crawl.links import from_table, to_table
from curation.crawl.local import read_local
from curation.errors import InputError
from curation.schema import CRAWL


def read(settings, *inputs, **fetch):
    config = settings(**fetch).model_copy(update={"pool": PoolConfig(inputs=inputs)})
    counts = Counter()
    links = list(crawl.read_inputs(inputs, config, lambda reason: counts.update([reason])))
    return config, links, counts


def write_tar(path, members, kind=tarfile.GNU_FORMAT):
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_parquet(path, values, kind=None, **columns):
    kind = kind or pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [{"bytes": value, "path": None} if pa.types.is_struct(kind) else value for value in values]
    pq.write_table(pa.table({"image": pa.array(rows, kind), **columns}), path, row_group_size=7)


def test_a_folder_gives_its_images_sorted_without_hidden_ones(settings, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".hidden").mkdir()
    for name in ("b/2.JPG", "a 1#.png", "c.txt", ".d.jpg", ".hidden/e.jpg", "z.WebP"):
        (tmp_path / name).write_bytes(b"123")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "linked.jpg").symlink_to(tmp_path / "b" / "2.JPG")
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe.jpg")

    _, links, counts = read(settings, InputConfig(kind="folder", path=str(tmp_path)))

    names = [link.source_path.removeprefix(f"{tmp_path}/") for link in links]
    assert names == ["a 1#.png", "b/2.JPG", "linked.jpg", "z.WebP"]
    assert links[0].url == f"file://{tmp_path}/a%201%23.png"
    assert {(link.source_kind, link.source_bytes, link.source_offset) for link in links} == {("file", 3, None)}
    assert not counts


def test_local_failures_are_reasons(settings, tmp_path, make_image):
    for name in ("gone", "big", "html", "empty", "good"):
        (tmp_path / f"{name}.jpg").write_bytes(make_image(1))
    (tmp_path / "big.jpg").write_bytes(bytes(5000))
    (tmp_path / "html.jpg").write_text("<html>")
    (tmp_path / "empty.jpg").write_bytes(b"")
    config, links, _ = read(settings, InputConfig(kind="folder", path=str(tmp_path / "*.jpg")), max_bytes=4000)
    (tmp_path / "gone.jpg").unlink()
    (tmp_path / "gone.jpg").mkdir()

    reasons = [result.reject_reason for result in crawl.fetch(links, config)]

    assert reasons == ["too_large", "empty", "unreadable", None, "not_an_image"]


def test_a_removed_file_is_missing(settings, tmp_path, make_image):
    (tmp_path / "a.jpg").write_bytes(make_image(1))
    config, links, _ = read(settings, InputConfig(kind="folder", path=str(tmp_path)))
    (tmp_path / "a.jpg").unlink()

    assert [result.reject_reason for result in crawl.fetch(links, config)] == ["missing_file"]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_gives_its_image_members(settings, tmp_path, make_image, kind):
    images = [
        (f"{'long' * (40 if kind != tarfile.USTAR_FORMAT else 1)}/{number} ä#.jpg", make_image(number))
        for number in range(9)
    ]
    members = [item for name, data in images for item in ((name, data), (name.replace(".jpg", ".json"), b"{}"))]
    write_tar(tmp_path / "x.tar", members, kind)

    config, links, counts = read(settings, InputConfig(kind="webdataset", path=str(tmp_path / "x.tar")))
    results = list(crawl.fetch(links, config))

    assert [result.data for result in results] == [data for _, data in images]
    assert all(link.url.startswith(f"file://{tmp_path}/x.tar#long") and " " not in link.url for link in links)
    assert not counts


def test_a_damaged_tar_gives_what_comes_before_the_damage(settings, tmp_path, make_image):
    members = [(f"{number}.jpg", make_image(number)) for number in range(6)]
    for name in ("a", "b", "c"):
        write_tar(tmp_path / f"{name}.tar", members)
    whole = (tmp_path / "b.tar").read_bytes()
    sizes = [512 + -(-len(data) // 512) * 512 for _, data in members]
    (tmp_path / "b.tar").write_bytes(whole[: sum(sizes[:3]) + 600])
    (tmp_path / "c.tar").write_bytes(b"not a tar" * 500)

    config, links, counts = read(settings, InputConfig(kind="webdataset", path=str(tmp_path / "*.tar")))
    results = list(crawl.fetch(links, config))

    assert len(links) == 6 + 3
    assert counts == {"truncated_member": 1, "damaged_tar": 1}
    assert {result.reject_reason for result in results} == {None}


def test_a_parquet_set_is_read_by_row_in_any_order(settings, tmp_path, make_image):
    images = [make_image(number) for number in range(40)]
    write_parquet(tmp_path / "x.parquet", images)

    config, links, _ = read(settings, InputConfig(kind="parquet", path=str(tmp_path / "x.parquet")))

    assert [link.source_offset for link in links] == list(range(40))
    assert links[17].url == f"file://{tmp_path}/x.parquet#17"
    assert [result.data for result in crawl.fetch(links, config)] == images
    assert [result.data for result in crawl.fetch(links[::-1], config)] == images[::-1]
    assert [data for _, data, _, _ in read_local([links[3], links[39], links[3]], config)] == [
        *(images[3], images[39], images[3])
    ]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
def test_a_parquet_set_may_hold_plain_bytes_and_urls(settings, tmp_path, make_image, kind):
    urls = pa.array(["HTTP://EXAMPLE.com/a", None, "not a url"])
    write_parquet(tmp_path / "x.parquet", [make_image(0), None, b"x" * 5000], kind, url=urls)

    config, links, counts = read(settings, InputConfig(kind="parquet", path=str(tmp_path)), max_bytes=4000)
    results = list(crawl.fetch(links, config))

    assert [link.url for link in links] == [
        "http://example.com/a",
        f"file://{tmp_path}/x.parquet#1",
        f"file://{tmp_path}/x.parquet#2",
    ]
    assert [result.reject_reason for result in results] == [None, "missing_file", "too_large"]
    assert counts == {"bad_url": 1}


def test_the_image_column_is_the_one_of_the_input(settings, tmp_path, make_image):
    table = pa.table({"image": pa.array([b"no"]), "photo": pa.array([make_image(1)])})
    pq.write_table(table, tmp_path / "x.parquet")

    config, links, _ = read(settings, InputConfig(kind="parquet", path=str(tmp_path), image_column="photo"))

    assert [result.reject_reason for result in crawl.fetch(links, config)] == [None]


def test_a_damaged_parquet_among_others_is_counted_and_damaged_rows_are_rows(settings, tmp_path, make_image):
    for name in ("a", "b", "c"):
        write_parquet(tmp_path / f"{name}.parquet", [make_image(number, 100) for number in range(20)])
    (tmp_path / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-100])
    data = bytearray((tmp_path / "c.parquet").read_bytes())
    data[4:2000] = bytes(1996)
    (tmp_path / "c.parquet").write_bytes(data)

    config, links, counts = read(settings, InputConfig(kind="parquet", path=str(tmp_path / "*.parquet")))
    results = list(crawl.fetch(links, config))

    assert counts == {"damaged_parquet": 1}
    assert len(results) == len(links) == 40
    assert [result.reject_reason for result in results[:20]] == [None] * 20
    assert None not in [result.reject_reason for result in results[20:27]]
    assert [result.reject_reason for result in results[27:]] == [None] * 13


@pytest.mark.parametrize("kind", ["folder", "webdataset", "parquet", "html", "urls", "pages"])
def test_an_input_that_does_not_exist_is_named(settings, tmp_path, kind):
    for path in (tmp_path / "gone", tmp_path / "*.gone"):
        with pytest.raises(InputError, match="gone"):
            read(settings, InputConfig(kind=kind, path=str(path)))


def test_a_set_that_is_something_else_says_what_to_do(settings, tmp_path):
    (tmp_path / "x.tar").write_bytes(b"\x1f\x8b" + b"x" * 2000)
    (tmp_path / "x.parquet").write_bytes(b"x" * 2000)
    pq.write_table(pa.table({"label": [1]}), tmp_path / "y.parquet")

    with pytest.raises(InputError, match=r"x\.tar.*unpack"):
        read(settings, InputConfig(kind="webdataset", path=str(tmp_path / "x.tar")))
    with pytest.raises(InputError, match=r"x\.parquet: cannot be read"):
        read(settings, InputConfig(kind="parquet", path=str(tmp_path / "x.parquet")))
    with pytest.raises(InputError, match=r"y\.parquet: no column image; set image_column to one of.*label"):
        read(settings, InputConfig(kind="parquet", path=str(tmp_path / "y.parquet")))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds no images"):
        read(settings, InputConfig(kind="folder", path=str(tmp_path / "none")))


def test_links_are_rows_of_the_crawl_table(settings, tmp_path, make_image):
    write_parquet(tmp_path / "x.parquet", [make_image(0)])
    (tmp_path / "a.jpg").write_bytes(b"1")
    inputs = InputConfig(kind="parquet", path=str(tmp_path)), InputConfig(kind="folder", path=str(tmp_path))
    _, links, _ = read(settings, *inputs)
    links.append(crawl.Link("http://example.com/", ("http://a.example/", "http://b.example/")))

    table = to_table(links)

    assert table.schema.equals(CRAWL.schema)
    assert list(from_table(table)) == links


def test_a_file_url_is_a_path_for_every_kind(settings, tmp_path):
    (tmp_path / "a.png").write_bytes(b"123")
    (tmp_path / "p.html").write_text("<img src=https://site.example/x.jpg>")
    (tmp_path / "u.txt").write_text("https://site.example/y.jpg")
    kinds = {"folder": tmp_path, "html": tmp_path / "p.html", "urls": tmp_path / "u.txt"}

    _, links, _ = read(settings, *(InputConfig(kind=kind, path=f"file://{path}") for kind, path in kinds.items()))

    assert [link.url for link in links] == [
        *(f"file://{tmp_path}/a.png", "https://site.example/x.jpg", "https://site.example/y.jpg")
    ]
