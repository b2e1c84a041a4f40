"""What the README tells people to do works."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from curation import schema
from curation.config import RunConfig
from curation.settings import parse
from curation.stages.manifest import SUMMARY_KEY
from curation.tars import TarWriter

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TARS = ("pool/images/00000000-a.tar", "pool/images/00000001-b.tar", "seeds/birds/images/00000000-c.tar")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def encoded(seed):
    pixels = np.random.default_rng(seed).integers(0, 255, (20, 30, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG" if seed % 2 else "JPEG")
    return buffer.getvalue()


@pytest.fixture
def run(tmp_path):
    """A run's manifest and tars: nine images, two of each tar in the manifest, one image in two tars."""
    rows = []
    for number, name in enumerate(TARS):
        path = tmp_path / "runs/my" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream, TarWriter(stream) as tar:
            for seed in (3 * number, 3 * number + 1, 3 * number + 2, 0):
                data, kind = encoded(seed), "png" if seed % 2 else "jpeg"
                image_id = hashlib.sha256(data).hexdigest()[:32]
                offset = tar.add(image_id, data, kind)
                if seed % 3 < 2 and seed // 3 == number:
                    rows.append(
                        {
                            "image_id": image_id,
                            "collection": "pool" if number < 2 else "seeds/birds",
                            "url": f"https://example.org/{seed}",
                            "tar": name,
                            "tar_offset": offset,
                            "stored_bytes": len(data),
                            "stored_format": kind,
                            "width": 30,
                            "height": 20,
                            "nsfw_score": 0.01,
                        }
                    )
    rows = list({row["image_id"]: row for row in rows}.values())
    table = pa.Table.from_pylist(rows, schema=schema.MANIFEST)
    summary = {"digest": "d", "num_images": 6, "weights": {}}
    with pq.ParquetWriter(tmp_path / "runs/my/manifest.parquet", schema.MANIFEST) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({SUMMARY_KEY: json.dumps(summary).encode()})
    return tmp_path


def test_the_manifest_can_be_read_as_the_readme_says(run):
    for name in ("pandas", "datasets", "webdataset"):
        pytest.importorskip(name, reason=f"the README shows how to use {name}")
    private = {"HF_HOME": str(run / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks("python"))],
        cwd=run,
        env=os.environ | private,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"https://example.org/0 jpeg {len(encoded(0))}",
        "collection",
        "pool           4",
        "seeds/birds    2",
        "dtype: int64",
        "(30, 20)",
        "6 images",
        "d 6 {}",
    ]


def test_the_config_for_ones_own_data_is_right():
    (text,) = blocks("yaml")
    settings = parse(RunConfig, yaml.safe_load(text), "README.md")

    assert [source.kind for source in settings.pool.inputs] == ["folder", "urls"]
    assert list(settings.seeds) == ["birds"]


def test_every_file_that_is_linked_exists():
    links = re.findall(r"\]\(([^)#]+)\)", README)

    assert links
    for link in links:
        assert (Path(__file__).parents[1] / link).exists(), link


def test_every_command_that_is_shown_is_understood():
    for line in (line for block in blocks("sh") for line in block.splitlines() if line.startswith("curate ")):
        command, *options = line.partition("#")[0].split()[1:]
        shown = subprocess.run(
            [sys.executable, "-m", "curation.cli", command, "--help"], capture_output=True, text=True, check=True
        ).stdout
        for option in (option for option in options if option.startswith("--")):
            assert option in shown, line
