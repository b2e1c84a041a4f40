"""Every error that this package raises on purpose.

    CurationError
    ├── UsageError              the caller asked for something that does not exist (exit code 2)
    │   ├── ConfigError         a settings file is wrong; lists every mistake at once
    │   └── PlanError           stages that cannot follow each other
    ├── InputError              a source cannot be read
    ├── StoreError              a run's storage failed
    │   ├── DiskFullError       no space left, or too little for what comes next
    │   ├── CorruptError        a committed file is not what its marker says
    │   └── LeaseError          another process is writing this run
    ├── StageError              a stage failed on one shard
    ├── WeightsError            model weights are missing, altered or not licensed for this use
    ├── DimensionError          vectors of the wrong shape
    ├── VectorError             vectors that are not finite or not L2-normalised
    ├── LinkError               one URL is refused or cannot be fetched, with a reason; becomes a row, never a failure
    ├── ImageError              one image is refused, with a reason; becomes a row, never a failure
    │   └── BlocklistedError    it is on a list of images that must not be kept
    └── TrainError              training cannot start or go on
        └── LostProcessError    another process of several is gone without a word

A message says what happened, where, and what to do. ``curate`` prints it as one line and exits with 1, or with 2 for
``UsageError``; anything else that escapes is a bug and keeps its traceback.
"""


class CurationError(Exception):
    """Base of every error raised on purpose."""


class UsageError(CurationError):
    """The caller asked for something that does not exist or cannot be combined."""


class ConfigError(UsageError):
    """Settings are wrong.

    Attributes:
        problems: One ``"file: key: reason"`` line for each mistake, in the order of the file.
    """

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class PlanError(UsageError):
    """Stages cannot follow each other: a table is read before anything writes it."""


class InputError(CurationError):
    """A source (page list, folder, tar, Parquet file) cannot be read."""


class StoreError(CurationError):
    """Reading or writing a run's storage failed."""


class DiskFullError(StoreError):
    """There is not enough space for what would be written."""


class CorruptError(StoreError):
    """A committed file is missing or is not what its marker says."""


class LeaseError(StoreError):
    """Another process holds the run's lease."""


class StageError(CurationError):
    """A stage failed on one shard.

    Attributes:
        stage: Name of the stage, as given to ``curate run --stage``.
        shard: Zero-based shard number; None for a reduce.
    """

    def __init__(self, stage: str, shard: int | None, message: str) -> None:
        where = stage if shard is None else f"{stage} shard {shard:08d}"
        super().__init__(f"{where}: {message}")
        self.stage = stage
        self.shard = shard
        self.message = message

    def __reduce__(self) -> tuple[type["StageError"], tuple[str, int | None, str]]:
        return type(self), (self.stage, self.shard, self.message)


class WeightsError(CurationError):
    """Model weights are missing, do not match their digest, or carry a licence that was not accepted."""


class DimensionError(CurationError):
    """An array does not have the shape that was promised."""


class VectorError(CurationError):
    """A vector has a value that is not finite, or is not L2-normalised."""


class LinkError(CurationError):
    """One URL is refused or cannot be fetched.

    Attributes:
        reason: A short machine-readable word, one of ``curation.crawl.links.LINK_REASONS`` or ``http_<status>``.
        status: The last HTTP status, where there was one.
    """

    def __init__(self, reason: str, detail: str = "", status: int | None = None) -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail
        self.status = status

    def __reduce__(self) -> tuple[type["LinkError"], tuple[str, str, int | None]]:
        return type(self), (self.reason, self.detail, self.status)


class ImageError(CurationError):
    """One image is refused.

    Attributes:
        reason: A short machine-readable word, one of ``curation.schema.IMAGE_REASONS``.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["ImageError"], tuple[str, str]]:
        return type(self), (self.reason, self.detail)


class BlocklistedError(ImageError):
    """One image is on a list of ``fetch.blocked_hashes``.

    Attributes:
        sha256: Of its bytes, in hex.
        list_name: File name of the list.
    """

    def __init__(self, sha256: str, list_name: str) -> None:
        super().__init__("blocklisted")
        self.sha256 = sha256
        self.list_name = list_name

    def __reduce__(self) -> tuple[type["BlocklistedError"], tuple[str, str]]:
        return type(self), (self.sha256, self.list_name)


class TrainError(CurationError):
    """Training cannot start or go on."""


class LostProcessError(TrainError):
    """Another of the processes that train together is gone; why, only whoever started it may know."""
