"""Every column of every table, once.

A table has one row for each row of its shard, in the same order, so tables of one shard are read side by side and
never joined. *Feature* tables hold what is expensive; *verdict* tables hold what a threshold or a group makes of it,
and carry ``reject_reason`` (null: kept).

Field metadata ``digest: no`` marks columns that say where bytes lie or when something happened. They are left out of
content digests, so that the same data stored elsewhere or fetched at another time counts as the same.
"""

from dataclasses import dataclass

import pyarrow as pa

_NOT_CONTENT = {"digest": "no"}


@dataclass(frozen=True)
class Table:
    """A named table of a collection: ``<name>/<shard>.parquet``."""

    name: str
    schema: pa.Schema

    @property
    def is_verdict(self) -> bool:
        """Whether the table rejects rows."""
        return "reject_reason" in self.schema.names


URL = pa.field("url", pa.string())  # normalised; file:///path[#member] for images of local sets
PAGE_URLS = pa.field("page_urls", pa.list_(pa.string()))  # pages that show the image, sorted
SOURCE_KIND = pa.field("source_kind", pa.string(), metadata=_NOT_CONTENT)  # web | file | tar | parquet
SOURCE_PATH = pa.field("source_path", pa.string(), metadata=_NOT_CONTENT)  # null for web
SOURCE_OFFSET = pa.field("source_offset", pa.int64(), metadata=_NOT_CONTENT)  # tar: first byte; parquet: row number
OPT_OUT = pa.field("opt_out", pa.string())  # reason for which a page that shows the image forbids its use; null: none
HOST_SHARDS = pa.field("host_shards", pa.int32(), metadata=_NOT_CONTENT)  # shards that share the host; null: not web
EXTRA = pa.field("extra", pa.string())  # further columns of a URL list, a JSON object with sorted keys; null: none
SOURCE_BYTES = pa.field("source_bytes", pa.int64(), metadata=_NOT_CONTENT)  # tar and file: length
IMAGE_ID = pa.field("image_id", pa.string())  # first 128 bits of sha256 of the fetched bytes, hex; null: no bytes
WIDTH = pa.field("width", pa.int32())  # pixels, after EXIF orientation, and after `fetch.resize` like the next three
HEIGHT = pa.field("height", pa.int32())
FORMAT = pa.field("format", pa.string())  # jpeg | png | webp | avif | gif | bmp | tiff, by content
NUM_BYTES = pa.field("num_bytes", pa.int64())  # encoded size as fetched, or resized
HTTP_STATUS = pa.field("http_status", pa.int32(), metadata=_NOT_CONTENT)  # null for local sets and failures before it
NUM_REDIRECTS = pa.field("num_redirects", pa.int32(), metadata=_NOT_CONTENT)  # followed before the last answer
RECEIVED_BYTES = pa.field("received_bytes", pa.int64(), metadata=_NOT_CONTENT)  # of the body, as it came over the wire
ETAG = pa.field("etag", pa.string(), metadata=_NOT_CONTENT)  # header of the answer, for revisits
LAST_MODIFIED = pa.field("last_modified", pa.string(), metadata=_NOT_CONTENT)  # header of the answer, for revisits
FETCH_MS = pa.field("fetch_ms", pa.int32(), metadata=_NOT_CONTENT)  # milliseconds from first attempt to last byte
FETCH_DETAIL = pa.field("fetch_detail", pa.string(), metadata=_NOT_CONTENT)  # why, in words
RAW_ID = pa.field("raw_id", pa.string(), metadata=_NOT_CONTENT)  # like IMAGE_ID, of the bytes in the raw tar
RAW_OFFSET = pa.field("raw_offset", pa.int64(), metadata=_NOT_CONTENT)  # in the shard's raw tar; null: not stored
PCA_HASH_BITS = pa.field("pca_hash", pa.uint64())  # signs of 64 principal components, most significant first
NSFW_SCORE = pa.field("nsfw_score", pa.float32())  # probability in [0, 1]
NUM_FACES = pa.field("num_faces", pa.int32())
FACE_BOXES = pa.field("face_boxes", pa.list_(pa.list_(pa.float32(), 4)))  # left, top, right, bottom in pixels
FACE_SCORES = pa.field("face_scores", pa.list_(pa.float32()))  # in [0, 1], in the order of face_boxes
TAR_OFFSET = pa.field("tar_offset", pa.int64(), metadata=_NOT_CONTENT)  # in the blurred tar; null: not stored
STORED_BYTES = pa.field("stored_bytes", pa.int64())  # encoded size in the blurred tar
STORED_FORMAT = pa.field("stored_format", pa.string())  # format in the blurred tar
STORED_ID = pa.field("stored_id", pa.string())  # first 128 bits of sha256 of the stored bytes, hex
DECODE_ERROR = pa.field("decode_error", pa.string())  # one of IMAGE_REASONS: checked when fetched, refused when read
SSCD_DIM = 512
SSCD_DESCRIPTOR = pa.field("sscd", pa.list_(pa.float16(), SSCD_DIM))  # L2-normalised
SCORE_BIAS = pa.field("score_bias", pa.float64())  # mean cosine with the 3 nearest of the background sample; else null
SEARCHED = pa.field("searched", pa.bool_())  # kept so far, and with a descriptor that can be compared
SEARCH_CODE = pa.field("code", pa.binary())  # what the approximate search compares first; empty: it is exact
REJECT_REASON = pa.field("reject_reason", pa.string())  # null means kept
DUPLICATE_OF = pa.field("duplicate_of", pa.string())  # image id of the kept, seed or reference image
SIMILARITY = pa.field("similarity", pa.float32())  # cosine with duplicate_of, rounded to 1e-6
COMPONENT_ID = pa.field("component_id", pa.string())  # smallest image id of the near-duplicate component
COMPONENT_SIZE = pa.field("component_size", pa.int32())
CLUSTER_ID = pa.field("cluster_id", pa.int32())
CLUSTER_SIMILARITY = pa.field("cluster_similarity", pa.float32())  # cosine with the centroid
# The clusters that it lies in at each level above (cluster.levels), from the bottom; empty: there are none.
CLUSTER_ANCESTORS = pa.field("cluster_ancestors", pa.list_(pa.int32()))
URLS = pa.field("urls", pa.list_(pa.string()))  # every URL of the same bytes, sorted; null on rejected rows
SEEDS = pa.field("seeds", pa.list_(pa.string()))  # seed sets that retrieved the image, sorted
SEED_IMAGE_ID = pa.field("seed_image_id", pa.string())  # the most similar seed image (sample-based retrieval)
SEED_SIMILARITY = pa.field("seed_similarity", pa.float32())  # cosine with seed_image_id, rounded to 1e-6
BALANCED = pa.field("balanced", pa.bool_())  # selected by balanced sampling of the clusters; null: not asked for
NOMINAL_COUNT = pa.field("nominal_count", pa.int32())  # times retrieved, collisions counted
RETRY_OF = pa.field("retry_of", pa.int64(), metadata=_NOT_CONTENT)  # shard << 32 | row of the row that is tried again
RETRY_REASON = pa.field("retry_reason", pa.string(), metadata=_NOT_CONTENT)  # why that row failed
SHA256 = pa.field("sha256", pa.string())  # of the fetched bytes, hex

CRAWL = Table(
    "crawl",
    pa.schema([URL, PAGE_URLS, OPT_OUT, EXTRA, HOST_SHARDS, SOURCE_KIND, SOURCE_PATH, SOURCE_OFFSET, SOURCE_BYTES]),
)
FETCH = Table(
    "fetch",
    pa.schema(
        [
            IMAGE_ID,
            WIDTH,
            HEIGHT,
            FORMAT,
            NUM_BYTES,
            HTTP_STATUS,
            NUM_REDIRECTS,
            RECEIVED_BYTES,
            ETAG,
            LAST_MODIFIED,
            FETCH_MS,
            FETCH_DETAIL,
            RAW_OFFSET,
            RAW_ID,
            REJECT_REASON,
        ]
    ),
)
PCA_HASH = Table("pca_hash", pa.schema([PCA_HASH_BITS]))
PCA_HASH_VERDICT = Table("pca_hash_verdict", pa.schema([REJECT_REASON, DUPLICATE_OF, URLS]))
NSFW = Table("nsfw", pa.schema([NSFW_SCORE, DECODE_ERROR]))
NSFW_VERDICT = Table("nsfw_verdict", pa.schema([REJECT_REASON]))
FACES = Table(
    "faces",
    pa.schema([NUM_FACES, FACE_BOXES, FACE_SCORES, TAR_OFFSET, STORED_BYTES, STORED_FORMAT, STORED_ID, DECODE_ERROR]),
)
FACES_VERDICT = Table("faces_verdict", pa.schema([REJECT_REASON]))
SSCD = Table("sscd", pa.schema([SSCD_DESCRIPTOR, SCORE_BIAS]))
DEDUP_CODES = Table("dedup_codes", pa.schema([SEARCHED, SEARCH_CODE]))
DEDUP = Table("dedup", pa.schema([REJECT_REASON, DUPLICATE_OF, SIMILARITY, COMPONENT_ID, COMPONENT_SIZE]))
CLUSTER = Table("cluster", pa.schema([CLUSTER_ID, CLUSTER_SIMILARITY, CLUSTER_ANCESTORS]))
RETRIEVE = Table("retrieve", pa.schema([REJECT_REASON, SEEDS, SEED_IMAGE_ID, SEED_SIMILARITY, NOMINAL_COUNT, BALANCED]))
MANIFEST_VERDICT = Table("manifest_verdict", pa.schema([REJECT_REASON]))
RETRY = Table("retry", pa.schema([RETRY_OF, RETRY_REASON]))  # of shards that `--retry` has added, row by row
BLOCKLISTED = Table(  # all that is recorded of the images of a shard that are on a list; not aligned with its rows
    "blocklisted",
    pa.schema(
        [
            SHA256,
            pa.field("time", pa.timestamp("s", "UTC"), metadata=_NOT_CONTENT),  # when it was recognised
            pa.field("list", pa.string()),  # file name of the list
        ]
    ),
)


EMBED = Table("embed", pa.schema([pa.field("embedding", pa.list_(pa.float16()))]))  # of any encoder; see ``embed``


def embed(dim: int) -> Table:
    """Return the ``embed`` table of an encoder with ``dim`` features: L2-normalised float16 rows."""
    return Table("embed", pa.schema([pa.field("embedding", pa.list_(pa.float16(), dim))]))


MANIFEST = pa.schema(
    [
        IMAGE_ID,
        pa.field("collection", pa.string()),  # pool, or seeds/<name> for seed images taken as they are
        URL,
        URLS,
        PAGE_URLS,
        EXTRA,
        pa.field("tar", pa.string(), metadata=_NOT_CONTENT),  # path relative to the manifest
        TAR_OFFSET,
        STORED_BYTES,
        STORED_FORMAT,
        STORED_ID,
        WIDTH,
        HEIGHT,
        FORMAT,
        NUM_BYTES,
        PCA_HASH_BITS,
        NSFW_SCORE,
        NUM_FACES,
        COMPONENT_ID,
        COMPONENT_SIZE,
        CLUSTER_ID,
        CLUSTER_SIMILARITY,
        CLUSTER_ANCESTORS,
        SEEDS,
        SEED_IMAGE_ID,
        SEED_SIMILARITY,
        NOMINAL_COUNT,
        BALANCED,
    ]
)

EDGES = pa.schema(  # pairs of images whose cosine is above a floor
    [
        pa.field("left_shard", pa.int32()),
        pa.field("left_row", pa.int32()),
        pa.field("right_shard", pa.int32()),
        pa.field("right_row", pa.int32()),
        pa.field("millionths", pa.int32()),  # cosine, rounded to 1e-6, as a whole number
    ]
)

REASONS = {
    "exact_duplicate": "the same bytes under another URL",
    "hash_duplicate": "the same 64-bit PCA hash as a kept image",
    "nsfw": "Open-NSFW score at or above nsfw.max_score",
    "not_scored": "Open-NSFW gave no score: it cannot be called safe",
    "discarded": "bytes deleted under an earlier, stricter pixel policy; `--redo fetch` gets them again",
    "near_duplicate": "a copy of the image that represents its component",
    "reference_copy": "its component copies an image of an evaluation set",
    "seed_copy": "its component copies a seed image that is in the manifest as it is",
    "not_retrieved": "no seed set retrieved it, and balanced sampling did not select it",
    "excluded_url": "on a list of manifest.exclude.urls",
    "excluded_domain": "on a list of manifest.exclude.domains",
    "excluded_id": "on a list of manifest.exclude.ids",
    "blocklisted": "on a list of fetch.blocked_hashes; neither its bytes nor its link are kept",
}

IMAGE_REASONS = frozenset(
    {
        "not_an_image",  # content is none of the allowed formats
        "truncated",  # ends before its pixels do
        "undecodable",  # right format, broken content
        "crashes_decoder",  # kills the process that works on it, or raises an error that is none of ours
        "decode_timeout",  # takes longer than images.decode_timeout_s or images.prepare_timeout_s
        "too_many_pixels",
        "too_large",  # bytes
        "too_small",  # a side under the minimum
        "bad_aspect",
        "too_many_frames",
    }
)
