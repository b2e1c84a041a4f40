"""The manifest's digest does not depend on shards, runner, file system or interruptions."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from curation.pipelines.local_runner import LocalRunner
from curation.store import Run


def test_five_shards_give_the_digest_of_one(finished, bring, tree, digest, tmp_path):
    bring(tmp_path / "run", tree(rows=12))

    assert len(Run(tmp_path / "run").markers("pool", "faces")) == 5
    assert digest(tmp_path / "run") == digest(finished)


def test_a_store_without_rename_gives_the_same_digest(finished, bring, tree, digest):
    bring("memory://same-answer", tree(rows=30), runner=LocalRunner(1))

    assert digest("memory://same-answer") == digest(finished)


@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_ray_gives_the_same_digest(finished, bring, tree, digest, tmp_path, ray_runner):
    settings = tree(rows=12) | {"resources": {"default": {"workers": 2, "cpus": 1}}}

    bring(tmp_path / "run", settings, runner=ray_runner)

    assert digest(tmp_path / "run") == digest(finished)


@pytest.mark.timeout(600)
def test_kill_9_at_ten_random_instants_changes_nothing(finished, tree, digest, tmp_path):
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(tree(rows=12)))
    command = [sys.executable, "-m", "curation.cli", "run", "--config", str(config), "--run", str(run)]
    command += ["--workers", "2"]
    instants = random.Random(9)
    killed = 0
    while killed < 10:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        _wait_for_start(process, run)
        time.sleep(instants.uniform(0, 2.5))
        if process.poll() is not None:  # so quick that it ended: take some of it away and go on
            assert process.returncode == 0, process.stderr.read()
            _forget(run, instants)
            continue
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += 1

    subprocess.run(command, check=True, capture_output=True)

    assert digest(run) == digest(finished)
    assert not list(run.glob("*/raw/*.tar")), "fetched bytes stay behind"


def _wait_for_start(process: subprocess.Popen, run: Path) -> None:
    """Wait until the process has taken the lease: before that there is nothing to interrupt."""
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        lease = run / "lease.json"
        if lease.exists() and f'"pid": {process.pid}' in lease.read_text():
            return
        time.sleep(0.02)


def _forget(run: Path, instants: random.Random) -> None:
    for name in ("sscd", "embed", "dedup"):
        for marker in sorted((run / "pool" / name).glob("*.json")):
            if instants.random() < 0.7:
                os.remove(marker)
    for marker in (run / "artefacts").glob("dedup.json"):
        os.remove(marker)
