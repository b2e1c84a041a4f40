"""Only public addresses are connected to.

A crawler follows URLs that strangers wrote, so a URL must not reach what this machine can reach and strangers cannot:
its own services, its network, its cloud's metadata service. Names are resolved once, every address of the answer is
checked, and the connection goes to a checked address, so that a name that resolves differently a moment later gains
nothing. Hosts that are written as addresses are checked as they stand, and names that mean something on local networks
only are refused without a look-up. Each redirect goes through the same checks, and each socket once more before it
connects.
"""

import asyncio
import errno
import ipaddress
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from aiohttp import AddrInfoType
from aiohttp.abc import AbstractResolver, ResolveResult

from curation.errors import LinkError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

# IANA special-purpose registries (RFC 6890 and its updates), and Azure's metadata service, which has a public address.
_REFUSED_V4 = tuple(
    map(
        ipaddress.IPv4Network,
        (
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "168.63.129.16/32", "169.254.0.0/16"),
            *("172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24"),
            *("192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24", "198.18.0.0/15", "198.51.100.0/24"),
            *("203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        ),
    )
)
_GLOBAL_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6 = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")))
# Top-level names that the public DNS does not have (RFC 6761, 6762, 7686, 9476, ICANN's reservation of .internal, names
# that ICANN withholds for their use at home). Clouds serve credentials at metadata.google.internal and its like.
_LOCAL_NAMES = frozenset(
    {
        *("alt", "corp", "home", "internal", "intranet", "lan", "local", "localdomain", "localhost", "mail", "onion"),
        *("private", "svc"),
    }
)
# Networks whose addresses carry an IPv4 address: (network, bits to the right of it).
_EMBEDDED_V4 = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)
_ISATAP = 0x00005EFE  # upper half of the interface identifier, but for its bits "universal" and "group" (RFC 5214)


@lru_cache(1 << 16)
def is_public(address: IPAddress) -> bool:
    """Return whether anybody on the internet can reach ``address``.

    IPv4-mapped, NAT64, 6to4 and ISATAP addresses are judged by the IPv4 address inside them too.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _REFUSED_V4)
    if address.scope_id is not None:
        return False
    for network, shift in _EMBEDDED_V4:
        if address in network:
            return is_public(ipaddress.IPv4Address((int(address) >> shift) & 0xFFFFFFFF))
    if (int(address) >> 32) & 0xFCFFFFFF == _ISATAP and not is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)):
        return False
    return address in _GLOBAL_V6 and not any(address in network for network in _REFUSED_V6)


def anything(address: IPAddress) -> bool:
    """Allow every address; for tests and intranets."""
    return True


def check_host(host: str, allow: Callable[[IPAddress], bool] = is_public) -> None:
    """Refuse a host by what is written: an address that is not allowed, or a name of local networks.

    Args:
        host: As ``urls.WebUrl.host`` has it; IPv6 with or without brackets.
        allow: The rule; ``anything`` allows local names too.

    Raises:
        LinkError: With reason ``policy_address``.
    """
    address = _literal(host)
    if address is None:
        if allow is not anything and _is_local_name(host):
            raise LinkError("policy_address", f"{host} is a name of local networks")
    elif not allow(address):
        raise LinkError("policy_address", f"{address} is not a public address")


def is_literal(host: str) -> bool:
    """Return whether a host is written as an address."""
    return _literal(host) is not None


@lru_cache(1 << 14)
def _literal(host: str) -> IPAddress | None:
    try:
        return ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _is_local_name(host: str) -> bool:
    name = host.removesuffix(".").lower()
    _, dot, last = name.rpartition(".")
    # Names without a dot are looked up in the local domain first.
    return not dot or last in _LOCAL_NAMES or f".{name}".endswith(".home.arpa")


def checked_socket(allow: Callable[[IPAddress], bool]) -> Callable[[AddrInfoType], socket.socket]:
    """Return a factory of sockets that makes none for an address that is not allowed, whoever asks for it.

    The factory raises PermissionError, which counts as an address that cannot be connected to: others are tried.
    """

    def make(info: AddrInfoType) -> socket.socket:
        family, kind, protocol, _, place = info
        if not allow(ipaddress.ip_address(place[0])):
            raise PermissionError(errno.EACCES, f"{place[0]} is not a public address")
        return socket.socket(family=family, type=kind, proto=protocol)

    return make


Lookup = Callable[[str], list[str]]


def lookup_addresses(host: str) -> list[str]:
    """Return the addresses of a name, in the system's order of preference; blocks."""
    answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(answer[4][0]) for answer in answers))


class CheckedResolver(AbstractResolver):
    """Resolve names for aiohttp; answers hold only allowed addresses and are cached.

    Args:
        allow: The rule.
        lookup: Turns a name into addresses; called in threads of its own, so that slow names hold up nothing else.
        num_threads: Look-ups at a time.
    """

    TTL_S = 300.0
    NEGATIVE_TTL_S = 30.0
    MAX_ENTRIES = 20_000

    def __init__(
        self,
        allow: Callable[[IPAddress], bool] = is_public,
        lookup: Lookup = lookup_addresses,
        num_threads: int = 32,
    ) -> None:
        self._allow = allow
        self._lookup = lookup
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dns")
        self._answers: OrderedDict[str, tuple[float, list[str] | LinkError]] = OrderedDict()
        self._running: dict[str, asyncio.Task[list[str] | LinkError]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """Return the allowed addresses of ``host``.

        Raises:
            LinkError: With reason ``dns`` or ``policy_address``.
        """
        answer = self._cached(host)
        if answer is None:
            task = self._running.get(host)
            if task is None:
                task = self._running[host] = asyncio.create_task(self._ask(host))
            answer = await asyncio.shield(task)
        if isinstance(answer, LinkError):
            raise LinkError(answer.reason, answer.detail)
        results = [_result(host, address, port) for address in answer]
        return [result for result in results if family in (socket.AF_UNSPEC, result["family"])]

    async def close(self) -> None:
        """Forget everything; look-ups that still run are left to end by themselves."""
        for task in self._running.values():
            task.cancel()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _cached(self, host: str) -> list[str] | LinkError | None:
        entry = self._answers.get(host)
        if entry is None or entry[0] < time.monotonic():
            return None
        self._answers.move_to_end(host)
        return entry[1]

    async def _ask(self, host: str) -> list[str] | LinkError:
        answer: list[str] | LinkError
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._pool, self._lookup, host)
            answer = self._checked(host, found)
        except (OSError, UnicodeError) as error:
            answer = LinkError("dns", f"{host} does not resolve: {error}")
        finally:
            self._running.pop(host, None)
        ttl_s = self.NEGATIVE_TTL_S if isinstance(answer, LinkError) else self.TTL_S
        self._answers[host] = (time.monotonic() + ttl_s, answer)
        while len(self._answers) > self.MAX_ENTRIES:
            self._answers.popitem(last=False)
        return answer

    def _checked(self, host: str, found: list[str]) -> list[str] | LinkError:
        allowed = [address for address in found if self._allow(ipaddress.ip_address(address))]
        if allowed:
            return allowed
        if not found:
            return LinkError("dns", f"{host} has no addresses")
        return LinkError("policy_address", f"{host} resolves to {found[0]}, which is not a public address")


def _result(host: str, address: str, port: int) -> ResolveResult:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    flags = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
    return ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=flags)
