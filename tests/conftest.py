"""What tests of every folder may ask for."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real images that is no part of the project."""
    folder = Path(os.environ.get("CURATION_TEST_DATA", _ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"needs real images at {folder}; set CURATION_TEST_DATA to the folder that holds them")
    return folder


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    mounted = mount and subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if not mounted or mounted.returncode != 0:
        pytest.skip("needs a small disk of its own: only root may mount one")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.fixture
def fill() -> Callable[[Path], Path]:
    """``fill(folder)`` takes all the space there is, and returns the file that does."""

    def take(folder: Path) -> Path:
        filler = folder / "filler"
        with filler.open("ab", buffering=0) as stream, suppress(OSError):
            while stream.write(bytes(4096)):
                pass
        return filler

    return take
