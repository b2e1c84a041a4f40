"""HTML pages that link images in the ways the web does."""

from collections.abc import Mapping, Sequence
from html import escape
from urllib.parse import quote

_PLACEHOLDER = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="
STYLES = ("plain", "relative", "srcset", "picture", "lazy", "noscript", "base")


def gallery(style: str, images: Sequence[str], small: Mapping[str, str]) -> str:
    """Return a page at ``/gallery/<style>.html``.

    Args:
        style: One of ``STYLES``.
        images: Paths from the root of the site, without a leading slash.
        small: Image → a smaller version of it, offered beside it where the style is ``srcset``.
    """
    base = '<base href="/">' if style == "base" else ""
    figures = "\n".join(
        f"<figure>{_image(style, quote(image), quote(small.get(image, '')))}</figure>" for image in images
    )
    return _page(f"Gallery: {style}", base, figures)


def index(pages: Sequence[str], images: Sequence[str]) -> str:
    """Return the first page of the site, with links to the others and images of its own."""
    links = "\n".join(f'<li><a href="/{escape(quote(page))}">{escape(page)}</a></li>' for page in pages)
    shown = "\n".join(f'<img src="/{escape(quote(image))}" alt="">' for image in images)
    return _page("A demo website", "", f"<ul>\n{links}\n</ul>\n{shown}")


def _image(style: str, image: str, small: str) -> str:
    """Return the markup of one image; both paths are percent-encoded."""
    here = escape(image)
    match style:
        case "relative":
            return f'<img src="../{here}" alt="a photo" width=256 height=256>'
        case "srcset":
            choices = f"/{escape(small)} 128w, /{here} 256w" if small else f"/{here} 256w"
            return f'<img srcset="{choices}" sizes="256px" src="/{here}" alt="a photo">'
        case "picture":
            return f'<picture><source media="(min-width: 1px)" srcset="/{here}"><img src="/{here}" alt=""></picture>'
        case "lazy":
            return f'<img class="lazy" src="{_PLACEHOLDER}" data-src="/{here}" loading="lazy" alt="a photo">'
        case "noscript":
            return f'<noscript><img src="/{here}" alt="a photo"></noscript>'
        case "base":
            return f"<img src={here} alt='unquoted, relative to the base'>"
    return f'<img src="/{here}#top" alt="a photo &amp; its fragment">'


def _page(title: str, head: str, body: str) -> str:
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>{head}</head>\n'
        f"<body>\n<h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )
