import asyncio
import ipaddress
import random
import socket

import pytest

from curation.crawl.addresses import CheckedResolver, anything, check_host, checked_socket, is_public
from curation.crawl.urls import parse
from curation.errors import LinkError

PUBLIC = ["http://93.184.216.34/", "http://8.8.8.8/", "http://[2606:4700::6810:84e5]/", "http://[64:ff9b::808:808]/"]


@pytest.mark.parametrize(
    "url",
    [
        *(
            *PUBLIC,
            "http://example.com/",
            "http://10.example.com/",
            "http://localhost.example/",
            "http://local.example/",
        ),
        *("http://[2606:4700::5efe:808:808]/", "http://home.arpa.example/", "http://example.com./"),
    ],
)
def test_public_addresses_and_names_pass(url):
    check_host(parse(url).host)


def test_local_names_pass_where_any_address_does():
    check_host("localhost", anything)


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


@pytest.mark.parametrize(("address", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_no_socket_is_made_for_an_address_that_is_not_allowed(address, family):
    info = (family, socket.SOCK_STREAM, 0, "", (address, 80))

    with pytest.raises(PermissionError):
        checked_socket(is_public)(info)
    checked_socket(anything)(info).close()
