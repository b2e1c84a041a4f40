"""Where images come from: the inputs of pool, seeds and references."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from curation.settings import Settings

_READ_HERE = frozenset({"html", "img2dataset", "folder", "webdataset", "parquet"})
_THIS_MACHINE = re.compile(r"(?:file|local)://(?=/)")


class InputConfig(Settings):
    """One source of pages, links or images."""

    kind: Literal["pages", "html", "warc", "wat", "urls", "img2dataset", "folder", "webdataset", "parquet"] = Field(
        description=(
            "pages: a list of page URLs to visit; html: saved HTML files; warc, wat: archives of pages, or of what "
            "Common Crawl found in them; urls: a list of image URLs (txt, csv, tsv, parquet); img2dataset: what that "
            "tool has downloaded; folder, webdataset, parquet: images that exist already."
        )
    )
    path: str = Field(
        "",
        description=(
            "File, folder or glob; of kinds pages, warc, wat and urls also a URL (http, https, s3, others of fsspec), "
            "of warc and wat also a listing such as warc.paths.gz. May be left out when `urls` is given."
        ),
    )
    urls: tuple[str, ...] = Field((), description="URLs written here instead of in a file (kinds pages and urls).")
    url_column: str | None = Field(
        None, description="Column with the URL in lists and image sets; null: url, image_url or the like."
    )
    columns: tuple[str, ...] | None = Field(
        None, description="Further columns of a list that the manifest keeps as `extra`; null: all (urls, img2dataset)."
    )
    mirror: str = Field(
        "https://data.commoncrawl.org/",
        min_length=1,
        description="URL or folder in front of each line of a listing (warc, wat), such as s3://commoncrawl/.",
    )
    image_column: str = Field("image", description="Column with the image struct {bytes, path} or bytes (parquet).")
    base_url: str = Field("", description="URL that relative links of saved HTML files start from (html).")

    @field_validator("path", "mirror")
    @classmethod
    def _without_file_scheme(cls, path: str) -> str:
        return _THIS_MACHINE.sub("", path, count=1)

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.kind in _READ_HERE and "://" in self.path:
            raise ValueError(
                f"path {self.path}: inputs of kind {self.kind} lie on this machine; copy them here, or mount them"
            )
        if self.urls and self.kind not in ("pages", "urls"):
            raise ValueError(f"urls cannot be given for kind {self.kind}; use path")
        if bool(self.path) == bool(self.urls):
            raise ValueError("give either path or urls")
        return self


class PoolConfig(Settings):
    """The images to curate."""

    inputs: tuple[InputConfig, ...] = Field((), description="Where images come from.")


class SeedConfig(Settings):
    """A curated set to retrieve towards."""

    inputs: tuple[InputConfig, ...] = Field(min_length=1)
    as_is: bool = Field(True, description="Put the seed images themselves into the manifest.")
    retrieve: Literal["none", "sample", "cluster"] = Field("sample", description="How the pool is searched.")
    k: int = Field(4, ge=1, description="Pool images per seed image (sample).")
    min_seed_images: int = Field(3, ge=0, description="Clusters with more seed images than this are taken (cluster).")
    images_per_cluster: int = Field(10_000, ge=1, description="Images from each such cluster (cluster).")
    max_images: int = Field(1_000_000, ge=1, description="At most this many retrieved images (cluster).")


class ReferenceConfig(Settings):
    """An evaluation set to keep out of the manifest."""

    inputs: tuple[InputConfig, ...] = Field(min_length=1)
