"""Real pages against a second extractor, built on another parser."""

import os
import re
import zipfile
from pathlib import Path
from urllib.parse import urljoin
from xml.etree.ElementTree import Element

import html5lib
import pytest

from curation.crawl.charset import decode_html
from curation.crawl.extract import LAZY_SRC, LAZY_SRCSET, extract
from curation.crawl.urls import normalise
from curation.errors import LinkError

PAGES = Path(os.environ.get("CURATION_TEST_DATA", "../shared/data")) / "pages.zip"
PAGE_URL = "https://site.example/section/page.html"


def reference(tree: Element) -> set[str]:
    """Return one address of each ``<img>`` or picture, by html5lib, a split of srcset and the library's urljoin."""
    bases = [node.get("href") for node in tree.iter("base") if node.get("href") is not None]
    base = urljoin(PAGE_URL, bases[0].strip()) if bases else PAGE_URL
    found = set()
    shown = [[picture, *picture.iter("img")] for picture in tree.iter("picture")]
    within = {node for _, *nodes in shown for node in nodes}
    shown += [[node, node] for node in tree.iter("img") if node not in within]
    for outer, *nodes in shown:
        around = [source for source in outer.iter("source") if "svg" not in (source.get("type") or "")]
        offers = [
            offer for item in (*around, *nodes) for name in (*LAZY_SRCSET, "srcset") for offer in split(item.get(name))
        ]
        offers.sort(key=lambda offer: offer[1], reverse=True)
        texts = [url for url, _ in offers] + [node.get(name) or "" for name in LAZY_SRC for node in nodes]
        texts += [node.get("src") or "" for node in nodes[::-1]]
        for text in texts:
            try:
                url = normalise(urljoin(base, re.sub(r"[\t\r\n]", "", text.strip())))
            except (LinkError, ValueError):
                continue
            if text.strip() and text.strip()[0] not in "{[" and not re.search(r"\.svgz?(\?|$)", url, re.IGNORECASE):
                found.add(url)
                break
    return found


def mentioned(tree: Element) -> set[str]:
    """Return every address that any attribute of an image or a source could mean, whole or in part."""
    bases = [node.get("href") for node in tree.iter("base") if node.get("href") is not None]
    base = urljoin(PAGE_URL, bases[0].strip()) if bases else PAGE_URL
    found = set()
    for node in (node for node in tree.iter() if node.tag in ("img", "amp-img", "source")):
        for value in node.attrib.values():
            for text in {value, *value.split(), *re.split(r"[\s,]+", value)}:
                try:
                    found.add(normalise(urljoin(base, re.sub(r"[\t\r\n]", "", text.strip()))))
                except (LinkError, ValueError):
                    continue
    return found


def split(srcset: str | None) -> list[tuple[str, tuple[float, float]]]:
    offers = []
    for url, size, unit in re.findall(r"\s*(\S*[^\s,])(?:\s+([0-9.]+)([wx]))?\s*(?:,|$)", srcset or ""):
        sizes = {"w": 0.0, "x": 1.0} | ({unit: float(size)} if unit else {})
        offers.append((url, (sizes["w"], sizes["x"])))
    return offers


@pytest.mark.slow
@pytest.mark.shared_data
@pytest.mark.skipif(not PAGES.exists(), reason=f"no real pages at {PAGES}; set CURATION_TEST_DATA")
def test_images_of_real_pages_agree_with_a_second_extractor():
    expected = ours = both = 0
    odd, invented = [], []
    with zipfile.ZipFile(PAGES) as pages:
        for name in pages.namelist():
            html, _ = decode_html(pages.read(name))
            tree = html5lib.parse(html, namespaceHTMLElements=False, scripting=False)
            theirs, found = reference(tree), set(extract(html, PAGE_URL).urls)
            expected, ours, both = expected + len(theirs), ours + len(found), both + len(theirs & found)
            odd += [(name, url) for url in sorted(theirs ^ found)]
            invented += [(name, url) for url in sorted(found - mentioned(tree))]

    assert expected > 1500
    assert both / expected >= 0.995, odd[:20]
    assert both / ours >= 0.995, odd[:20]
    assert not invented
