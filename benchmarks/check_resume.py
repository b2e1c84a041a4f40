"""Does the demo end the same after ``kill -9`` at ten random instants? ``make check-resume`` runs this.

One demo runs undisturbed; a second, at the same port and path (URLs are part of the data), is killed ten times,
then runs to its end. Their manifests must have the same digest, their teachers the same tensors, and no fetched byte
may stay behind.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.numpy import load_file

KILLS = 10


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    seed = parser.parse_args().seed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(prefix="check-resume-") as folder:
        demo = Path(folder) / "demo"  # one after the other in one place: paths of seed images are part of the data too
        start = time.monotonic()
        subprocess.run(_command(demo, port), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.monotonic() - start
        digest, teacher = _digest(demo), _teacher(demo)
        shutil.rmtree(demo)
        kills = _shake(demo, port, seconds, random.Random(seed))
        result = {
            "kills": kills,
            "calm_s": round(seconds, 1),
            "same_digest": digest == _digest(demo),
            "same_teacher": teacher == _teacher(demo),
            "raw_tars_left": len(list(demo.glob("run/*/raw/*.tar")) + list(demo.glob("run/*/*/raw/*.tar"))),
        }
    print(json.dumps(result))
    return 0 if result["same_digest"] and result["same_teacher"] and not result["raw_tars_left"] else 1


def _command(folder: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "curation.cli", "demo", "--folder", str(folder), "--port", str(port)]


def _shake(folder: Path, port: int, seconds: float, instants: random.Random) -> int:
    """Kill the demo ``KILLS`` times, beginning anew whenever it gets to its end, then let it end; return the kills."""
    kills = 0
    while kills < KILLS:
        process = subprocess.Popen(
            _command(folder, port),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            # Each attempt repeats imports and loading, so its share of the work is a little more than a tenth.
            _, errors = process.communicate(timeout=4 + instants.uniform(0, seconds / 5))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        if process.returncode:
            raise SystemExit(f"the demo failed after {kills} kills:\n{errors[-3000:]}")
        shutil.rmtree(folder)
    subprocess.run(_command(folder, port), check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return kills


def _digest(folder: Path) -> str:
    return str(json.loads((folder / "run" / "manifest.json").read_text())["digest"])


def _teacher(folder: Path) -> str:
    """Return a digest of the teacher's tensors; the order of the file's metadata is not part of it."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(folder / "train" / "teacher.safetensors").items()):
        digest.update(name.encode() + tensor.tobytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
