import asyncio
import ipaddress
import random

import pytest

from curation.crawl.addresses import CheckedResolver, check_literal, is_public
from curation.crawl.urls import parse
from curation.errors import LinkError

FORGED = [
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
]
PUBLIC = ["http://93.184.216.34/", "http://8.8.8.8/", "http://[2606:4700::6810:84e5]/", "http://[64:ff9b::808:808]/"]


@pytest.mark.parametrize("url", FORGED)
def test_a_forged_address_is_refused(url):
    with pytest.raises(LinkError) as refused:
        check_literal(parse(url).host)

    assert refused.value.reason == "policy_address"


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_address_is_no_url(url):
    with pytest.raises(LinkError) as refused:
        parse(url)

    assert refused.value.reason == "bad_url"


@pytest.mark.parametrize("url", [*PUBLIC, "http://example.com/", "http://10.example.com/", "http://localhost.example/"])
def test_public_addresses_and_names_pass(url):
    check_literal(parse(url).host)


@pytest.mark.parametrize("answer", ["10.0.0.1", "127.0.0.1", "::ffff:169.254.169.254", "fe80::1%2", "64:ff9b::7f00:1"])
def test_a_name_that_resolves_to_a_refused_address_is_refused(answer):
    async def resolve():
        resolver = CheckedResolver(lookup=lambda host: [answer])
        try:
            await resolver.resolve("innocent.example", 80)
        finally:
            await resolver.close()

    with pytest.raises(LinkError) as refused:
        asyncio.run(resolve())

    assert refused.value.reason == "policy_address"


def test_only_the_public_addresses_of_a_name_are_connected_to():
    async def resolve():
        resolver = CheckedResolver(lookup=lambda host: ["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1"])
        found = await resolver.resolve("mixed.example", 443)
        await resolver.close()
        return [(result["host"], result["port"]) for result in found]

    assert asyncio.run(resolve()) == [("8.8.8.8", 443), ("2606:4700::1", 443)]


def test_concurrent_questions_for_a_name_are_asked_once():
    asked = []

    def lookup(host):
        asked.append(host)
        return ["8.8.8.8"]

    async def resolve():
        resolver = CheckedResolver(lookup=lookup)
        await asyncio.gather(*(resolver.resolve("one.example", 80) for _ in range(20)))
        await resolver.close()

    asyncio.run(resolve())

    assert asked == ["one.example"]


def test_what_python_calls_private_is_refused():
    rng = random.Random(0)
    for _ in range(5000):
        address = ipaddress.IPv4Address(rng.getrandbits(32))
        if not address.is_global or address.is_multicast:
            assert not is_public(address), address
