import multiprocessing
import random

import pytest

from curation.crawl.domain_lists import load_domains
from curation.crawl.domains import registrable_domain
from curation.errors import InputError

HOSTS = """\ufeff# A hosts file\r
127.0.0.1 localhost
::1 ip6-localhost ip6-loopback
fe80::1%lo0 localhost
0.0.0.0 ads.example  # inline
0.0.0.0\ttracker.example stats.example
"""
PLAIN = """! comment
; comment
// comment
example.org
*.wild.example
.dotted.example.
UPPER.Example
bücher.example
xn--mnchen-3ya.example
under_score.example
192.0.2.7
2001:DB8::1
[2001:db8::2]
http://not-a-domain.example/
"""


@pytest.fixture
def lists(tmp_path):
    paths = [tmp_path / "hosts.txt", tmp_path / "plain.txt"]
    for path, text in zip(paths, (HOSTS, PLAIN), strict=True):
        path.write_text(text)
    return [str(path) for path in paths]


def test_plain_lists_and_hosts_files_are_read_into_one_set(lists, tmp_path):
    domains = load_domains(lists, cache_dir=tmp_path)

    covered = [
        *("localhost", "ip6-loopback", "ads.example", "a.b.ads.example", "tracker.example", "stats.example"),
        *("example.org", "www.example.org.", "wild.example", "a.wild.example", "dotted.example", "upper.example"),
        *("xn--bcher-kva.example", "xn--mnchen-3ya.example", "under_score.example", "192.0.2.7", "[2001:db8::1]"),
        "[2001:db8::2]",
    ]
    others = [
        *("example", "org", "myexample.org", "example.org.com", "not-a-domain.example", "comment", "inline", "", ".")
    ]
    assert [host for host in covered if not domains.covers(host)] == []
    assert [host for host in others if domains.covers(host)] == []
    assert len(domains) == 16


def test_a_listed_host_can_stand_for_its_registrable_domain(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("www.shop.example.co.uk\n192.0.2.7\nco.uk\n")
    exact, whole = (load_domains([str(path)], whole, tmp_path) for whole in (False, True))

    assert [exact.covers(host) for host in ("www.shop.example.co.uk", "co.uk", "example.com")] == [True, True, False]
    assert [whole.covers(host) for host in ("example.co.uk", "a.example.co.uk", "192.0.2.7")] == [True] * 3


@pytest.mark.parametrize(
    ("host", "domain"),
    [
        ("www.example.co.uk", "example.co.uk"),
        ("example.com", "example.com"),
        ("example.com.", "example.com"),
        ("a.b.github.io", "github.io"),
        ("a.xn--bcher-kva.xn--p1ai", "xn--bcher-kva.xn--p1ai"),
        *(("co.uk", None), ("localhost", None), ("1.2.3.4", None), ("[::1]", None), ("a.notasuffix", None)),
    ],
)
def test_the_registrable_domain_is_that_of_the_public_suffix_list(host, domain):
    assert registrable_domain(host) == domain


def test_no_suffix_list_is_downloaded_and_no_cache_written(tmp_path, monkeypatch):
    from curation.crawl import domains

    def refuse(*args, **options):
        raise AssertionError("a download was tried")

    monkeypatch.setenv("TLDEXTRACT_CACHE", str(tmp_path))
    monkeypatch.setattr("requests.Session.send", refuse)
    domains._suffixes.cache_clear()
    registrable_domain.cache_clear()

    assert registrable_domain("a.example.co.jp") == "example.co.jp"
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_sorted_once_and_then_mapped(lists, tmp_path):
    load_domains(lists, cache_dir=tmp_path)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "domains").iterdir()}

    assert load_domains(lists, cache_dir=tmp_path).covers("ads.example")
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "domains").iterdir()} == made


def test_another_content_is_another_set_whatever_its_name(lists, tmp_path):
    assert not load_domains(lists, cache_dir=tmp_path).covers("new.example")
    with open(lists[0], "a") as stream:
        stream.write("new.example\n")

    assert load_domains(lists, cache_dir=tmp_path).covers("new.example")


def test_a_cache_that_cannot_be_written_costs_memory_only(lists, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")

    assert load_domains(lists, cache_dir=blocked).covers("ads.example")


def _covers(job):
    paths, cache_dir, host = job
    return load_domains(paths, cache_dir=cache_dir).covers(host)


def test_processes_that_start_at_once_agree(lists, tmp_path):
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert pool.map(_covers, [(lists, tmp_path, "ads.example")] * 6) == [True] * 6

    assert sorted(file.suffix for file in (tmp_path / "domains").iterdir()) == [".json", ".u64"]


@pytest.mark.parametrize(
    "data", [b"\x00\xff\xfe" * 100, b"http://a.example/\nhttp://b.example/\n", b"two words.example\n1,1,a.example\n"]
)
def test_a_file_that_is_no_list_is_refused(data, tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(data)

    with pytest.raises(InputError, match="name no domain"):
        load_domains([str(path)], cache_dir=tmp_path)


@pytest.mark.parametrize("is_cached", [False, True])
def test_what_names_no_domain_is_counted_with_the_line_of_the_first(tmp_path, is_cached):
    path, blocked = tmp_path / "list.txt", tmp_path / "file"
    blocked.write_text("")
    lines = [f"a{number}.example" for number in range(100)]
    lines[40:40] = ["x" * 70_000 + "# long", "# none", "no domain here", "b.example", "http://x.example/"]
    path.write_text("\n".join(lines))
    good = tmp_path / "good.txt"
    good.write_text("c.example\n")

    for _ in range(2):
        domains = load_domains([str(path), str(good)], cache_dir=tmp_path if is_cached else blocked)

        assert domains.contents == ((101, 3, 41), (1, 0, 0))


def test_lines_without_end_are_not_held(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"a" * 3_000_000 + b"\ngood.example" * 10)

    assert load_domains([str(path)], cache_dir=tmp_path).covers("good.example")


def test_a_hundred_thousand_entries_are_found_and_nothing_else(tmp_path):
    rng = random.Random(0)
    names = [f"{rng.getrandbits(64):x}.example" for _ in range(100_000)]
    path = tmp_path / "list.txt"
    path.write_text("\n".join(names))

    domains = load_domains([str(path)], cache_dir=tmp_path)

    assert len(domains) == 100_000
    assert all(domains.covers(f"www.{name}") for name in names[::50])
    assert not any(domains.covers(f"x{name}") for name in names[::50])
