"""URLs that strangers write to reach what only this machine can reach: none gets a byte.

Every connection that is attempted, to whatever address, ends at a listener of the test, and every name resolves to what
the test says. So each trick would work if it were not refused, and one test shows that it does.
"""

import asyncio
import socket
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from curation import crawl
from curation.config import RunConfig
from curation.config.fetch import FetchConfig
from curation.config.images import ImagesConfig
from curation.config.inputs import InputConfig
from curation.crawl.addresses import CheckedResolver, anything, is_public
from curation.crawl.fetcher import Fetcher
from curation.crawl.inputs import read_inputs
from curation.crawl.links import Link

LITERALS = [
    "http://127.0.0.1/",
    "http://127.1/",
    "http://127.0.1/",
    "http://2130706433/",
    "http://0x7f000001/",
    "http://0x7f.0.0.1/",
    "http://0177.0.0.1/",
    "http://017700000001/",
    "http://0x7f.1/",
    "http://127.0.0.1./",
    "http://127.255.255.254/",
    "http://0/",
    "http://0.0.0.0/",
    "http://0x0/",
    "http://%31%32%37.0.0.1/",
    "http://１２７.0.0.1/",
    "http://127。0。0。1/",
    "http://①②⑦.⓪.⓪.①/",
    "http:\\\\127.0.0.1\\",
    "http:///127.0.0.1/",
    "http:127.0.0.1/",
    " \thttp://127.0.0.1/",
    "http://127.0\n.0.1/",
    "http://10.0.0.1/",
    "http://10.255.255.255:8080/",
    "http://172.16.0.1/",
    "http://172.31.255.255/",
    "http://192.168.1.1/",
    "http://3232235777/",
    "http://169.254.169.254/latest/meta-data/",
    "http://0xA9FEA9FE/",
    "http://0251.0376.0251.0376/",
    "http://168.63.129.16/",
    "http://100.64.0.1/",
    "http://100.100.100.200/",
    "http://192.0.0.192/",
    "http://192.0.2.1/",
    "http://198.18.0.1/",
    "http://198.51.100.7/",
    "http://203.0.113.9/",
    "http://192.88.99.1/",
    "http://224.0.0.1/",
    "http://240.0.0.1/",
    "http://255.255.255.255/",
    "http://[::]/",
    "http://[::1]/",
    "http://[0:0:0:0:0:0:0:1]/",
    "http://[::ffff:127.0.0.1]/",
    "http://[::ffff:7f00:1]/",
    "http://[::ffff:10.0.0.1]/",
    "http://[::127.0.0.1]/",
    "http://[64:ff9b::127.0.0.1]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[64:ff9b:1::1]/",
    "http://[2002:7f00:1::]/",
    "http://[2002:c0a8:101::1]/",
    "http://[2001:0:4136:e378:8000:63bf:3fff:fdd2]/",
    "http://[2001:db8::1]/",
    "http://[3fff::1]/",
    "http://[fc00::1]/",
    "http://[fd00:ec2::254]/",
    "http://[fe80::1]/",
    "http://[fec0::1]/",
    "http://[ff02::1]/",
    "http://[100::1]/",
    "http://[5f00::1]/",
    "http://[::ffff:0:127.0.0.1]/",
    "http://[0:0:0:0:0:ffff:a9fe:a9fe]/",
    "http://[::10.0.0.1]/",
    "http://[2606:4700::5efe:10.0.0.1]/",
    "http://[2606:4700::200:5efe:169.254.169.254]/",
    "http://[2001:20::1]/",
    "http://[4000::1]/",
    "http://0x7f.0x0.0x0.0x1/",
    "http://0177.0x0.0.1/",
    "http://0x7F000001./",
    "http://000000177.0.0.1/",
    "http://127.0.257/",
    "http://%30%78%37%66.1/",
    "http://１６９。２５４。１６９。２５４/",
    "http://169.254.169.254.:80/",
    "http://192.31.196.1/",
    "http:/\\/\\10.0.0.1/",
    "https:127.0.0.1:80/",
]
NAMES = [
    "http://localhost/",
    "http://LOCALHOST./",
    "http://ｌｏｃａｌｈｏｓｔ/",
    "http://%6cocalhost/",
    "http://a.localhost/",
    "http://localhost.localdomain/",
    "http://intranet/",
    "http://metadata/computeMetadata/v1/",
    "http://metadata.google.internal/computeMetadata/v1/",
    "http://instance-data.ec2.internal/latest/meta-data/",
    "http://printer.local/",
    "http://router.home.arpa/",
    "http://kubernetes.default.svc/",
    "http://kubernetes.default.svc.cluster.local/",
    "http://db.corp/",
    "http://abcdefghij.onion/",
]
MALFORMED = [
    "http://[fe80::1%25eth0]/",
    "http://[::1/",
    "http://127.0.0.256/",
    "http://0x100000000/",
    "http://1.2.3.4.5/",
    "http://127.0.0.08/",
    "http://user@127.0.0.1/",
    "http://example.com@127.0.0.1/",
    "http://example.com%40127.0.0.1/",
    "http://127.0.0.1%00.example.com/",
    "http://127.0.0.1%2f.example.com/",
    "http://127.0.0.1:0/",
    "http://127.0.0.1:99999/",
    "http://127.0.0.1:80:80/",
    "http:///",
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
    "dict://127.0.0.1:11211/",
    "http://[::ffff:127.0.0.1%25lo]/",
    "http://127.0.0.1%09/",
    "http://127.0.0.1%5c.example.com/",
    "http://[127.0.0.1]/",
    "http://127.0.0.1;.example.com:25/",
    "http://user:pass@[::1]/",
    "ftp://127.0.0.1/",
    "jar:http://127.0.0.1!/",
    "//127.0.0.1/",
    "http://127.0.0.1 .example.com/",
    "http://127.0.0.1\u2044.example.com@10.0.0.1/",
]
PORTS = [f"http://8.8.8.8:{port}/" for port in (22, 25, 110, 143, 6000, 6667, 10080)]
FORGED = LITERALS + NAMES + MALFORMED + PORTS
REFUSED = {"policy_address", "policy_scheme", "policy_credentials", "policy_port", "bad_url"}
# What a public name may resolve to.
ANSWERS = [
    *("127.0.0.1", "10.0.0.1", "169.254.169.254", "0.0.0.0", "100.100.100.200", "168.63.129.16", "224.0.0.1"),
    *("::1", "::", "::ffff:127.0.0.1", "::ffff:a9fe:a9fe", "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::"),
    *("fe80::1%2", "fd00:ec2::254", "ff02::1", "2001:0:4136:e378:8000:63bf:3fff:fdd2", "2606:4700::5efe:7f00:1"),
]


class Trap:
    """A web server that all connections end at; it redirects where the path says so.

    Attributes:
        addresses: That were connected to.
        requests: Host and path of each request.
        dns: Name → its answers, in turn; the last one stays. Names that are not listed resolve to a public address.
    """

    def __init__(self) -> None:
        self.addresses: list[str] = []
        self.requests: list[tuple[str, str]] = []
        self.dns: dict[str, list[list[str]]] = {}
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._answer, "127.0.0.1", 0))
        self.port = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._server.close()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    def resolve(self, name: str) -> list[str]:
        answers = self.dns.get(name, [["93.184.216.34"]])
        return answers.pop(0) if len(answers) > 1 else answers[0]

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        path = head.split()[1]
        host = next(line[5:].strip() for line in head.split("\r\n") if line.lower().startswith("host:"))
        self.requests.append((host, path))
        target = parse_qs(urlsplit(path).query).get("url")
        if host.startswith(("robots", "tdmrep")) and path.startswith(("/robots.txt", "/.well-known")):
            target = [bytes.fromhex(host.split(".")[1]).decode()] if host.split(".")[0] in path else None
        status = "404 Not Found" if target is None else "302 Found"
        location = "" if target is None else f"Location: {quote(target[0], safe=':/?#[]@!$&()*+,;=%')}\r\n"
        writer.write(f"HTTP/1.1 {status}\r\n{location}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
        await writer.drain()
        writer.close()


@pytest.fixture
def trap(monkeypatch) -> Iterator[Trap]:
    server = Trap()
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_to_trap(sock, address):
        server.addresses.append(address[0])
        if sock.family == socket.AF_INET6:
            raise ConnectionRefusedError  # seen, and that is enough: not every machine has IPv6
        connect(sock, ("127.0.0.1", server.port))

    def getaddrinfo(host, port, *args, **options):
        try:
            return look_up(host, port, *args, **{**options, "flags": socket.AI_NUMERICHOST})
        except socket.gaierror:
            kind = {"type": socket.SOCK_STREAM, "flags": socket.AI_NUMERICHOST}
            return [look_up(answer, port, **kind)[0] for answer in server.resolve(host.rstrip(".").lower())]

    monkeypatch.setattr(socket.socket, "connect", connect_to_trap)
    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield server
    server.close()


def reasons(urls, **fetch):
    config = RunConfig(fetch=FetchConfig(**{"retries": 0, "timeout_s": 20.0, **fetch}))
    results = list(crawl.fetch([Link(url) for url in urls], config))
    assert sorted(result.index for result in results) == list(range(len(urls)))
    return {urls[result.index]: result.reject_reason for result in results}


def test_no_forged_url_gets_a_byte(trap):
    found = reasons(FORGED)

    assert len(FORGED) >= 120
    assert {url: reason for url, reason in found.items() if reason not in REFUSED} == {}
    assert {url for url in [*LITERALS, *NAMES] if found[url] != "policy_address"} == set()
    assert (trap.addresses, trap.requests) == ([], [])


def test_the_same_urls_reach_the_listener_where_any_address_is_allowed(trap):
    found = reasons([*LITERALS, *NAMES], allow_private_addresses=True, timeout_s=4.0)

    assert "policy_address" not in found.values()
    assert len(trap.addresses) >= len({urlsplit(url).netloc for url in found}) / 2
    assert {"127.0.0.1", "10.0.0.1", "169.254.169.254", "::1"} <= set(trap.addresses)


def test_no_redirect_to_a_forged_url_is_followed(trap):
    urls = [f"http://open.example/to?url={quote(url, safe='')}" for url in FORGED]

    found = reasons(urls)

    assert set(found.values()) <= REFUSED | {"bad_redirect", "http_404"}
    assert {host for host, _ in trap.requests} == {"open.example"}
    assert set(trap.addresses) == {"93.184.216.34"}


@pytest.mark.parametrize("file", ["robots", "tdmrep"])
def test_no_redirect_of_a_well_known_file_to_a_forged_url_is_followed(trap, file):
    targets = [
        "http://127.0.0.1/",
        "http://metadata.google.internal/",
        "http://8.8.8.8:25/",
        "http://[::1]/",
        "file:///",
    ]
    urls = [f"http://{file}.{target.encode().hex()}.example/a.jpg" for target in targets]

    reasons(urls)

    assert len(trap.requests) >= len(urls)
    assert all(host.endswith(".example") for host, _ in trap.requests)
    assert set(trap.addresses) == {"93.184.216.34"}


def test_no_name_that_resolves_to_a_forged_address_gets_a_byte(trap):
    trap.dns = {f"n{number}.example": [[answer]] for number, answer in enumerate(ANSWERS)}

    found = reasons([f"http://{name}/a.jpg" for name in trap.dns])

    assert set(found.values()) == {"policy_address"}
    assert (trap.addresses, trap.requests) == ([], [])


def test_of_a_mixed_answer_only_the_public_addresses_are_connected_to(trap):
    trap.dns = {"mixed.example": [["127.0.0.1", "93.184.216.34", "::1", "10.0.0.1"]]}

    assert reasons(["http://mixed.example/a.jpg"]) == {"http://mixed.example/a.jpg": "http_404"}
    assert set(trap.addresses) == {"93.184.216.34"}


def test_a_name_that_changes_its_mind_is_connected_to_where_it_was_checked(trap):
    trap.dns = {"rebind.example": [["93.184.216.34"], ["127.0.0.1"]]}

    reasons([f"http://rebind.example/{number}.jpg" for number in range(10)])

    assert set(trap.addresses) == {"93.184.216.34"}


@pytest.mark.parametrize("answers", [["127.0.0.1"], ["10.0.0.1", "::1", "127.0.0.1"], ["127.0.0.1", "93.184.216.34"]])
def test_a_resolver_that_lets_everything_through_is_not_enough_to_connect(trap, answers):
    resolver = CheckedResolver(anything, lookup=lambda host: answers)
    fetcher = Fetcher(FetchConfig(retries=0), ImagesConfig(), is_public, resolver)

    (fetched,) = fetcher.fetch_all([Link("http://evil.example/a.jpg")])

    assert fetched.reject_reason == ("http_404" if "93.184.216.34" in answers else "connect")
    assert set(trap.addresses) == {"93.184.216.34"} & set(answers)


def test_no_forged_page_is_visited(trap):
    seen = []
    source = InputConfig(kind="pages", urls=tuple(url for url in FORGED if url.isascii()))

    assert list(read_inputs([source], RunConfig(), seen.append)) == []
    assert {reason.removeprefix("page_") for reason in seen} <= REFUSED
    assert (trap.addresses, trap.requests) == ([], [])


def test_environment_proxies_do_not_see_a_request(trap, monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://10.9.8.7:3128")

    reasons(["http://open.example/a.jpg", "https://open.example/a.jpg"], timeout_s=2.0)

    assert set(trap.addresses) == {"93.184.216.34"}


def test_a_proxy_that_the_settings_name_sees_public_names_only(trap):
    trap.dns = {"private.example": [["10.0.0.1"]]}
    urls = ["http://open.example/a.jpg", "http://private.example/a.jpg", *LITERALS, *NAMES]
    urls.append(f"http://open.example/to?url={quote('http://private.example/')}")

    found = reasons(urls, proxy="http://10.9.8.7:3128")

    assert found.pop("http://open.example/a.jpg") == "http_404"
    assert set(found.values()) == {"policy_address"}
    assert {host for host, _ in trap.requests} == {"open.example"}
    assert set(trap.addresses) == {"10.9.8.7"}
