"""One of several processes that work together: ``parallel_worker.py RANK SIZE STORE``.

It reads lists of jobs from its input, JSON a line, and answers each with a line ``answer`` and the errors of the runs,
by the name of their output. A job is a run to train, or a script of this folder (``script``, ``arguments``).
"""

import json
import os
import runpy
import sys
from pathlib import Path

import torch
from torch import distributed

from curation.dinov2.config import TrainConfig
from curation.dinov2.data import ManifestImages
from curation.dinov2.train import train
from curation.errors import CurationError

rank, size, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
samples = None
stored = ManifestImages.stored


def noted(self, index):
    """Write down which image is read."""
    if samples is not None:
        with open(samples, "a") as file:
            file.write(f"{index}\n")
    return stored(self, index)


def run(job):
    """Train as a job says; return the error that ended it, if any."""
    done = []

    def after_a_step():
        done.append(1)
        if len(done) == job["dies_after"].get(str(rank)):
            os._exit(3)
        if len(done) == job["loses_after"].get(str(rank)):
            Path(job["manifests"][rank]).parent.joinpath("../images/00000001.tar").unlink()
        return len(done) == job["stop_after"]

    try:
        train(
            job["manifests"][rank],
            TrainConfig.model_validate_json(json.dumps(job["config"])),
            Path(job["output"]),
            resume=job["resume"],
            device="cpu",
            should_stop=after_a_step,
        )
    except CurationError as error:
        return str(error)
    return None


torch.set_num_threads(1)
ManifestImages.stored = noted
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
for line in sys.stdin:
    errors = {}
    for job in json.loads(line):
        if "script" in job:
            sys.argv = [job["script"], *job["arguments"]]
            runpy.run_path(str(Path(__file__).with_name(job["script"])))
            continue
        samples = job["samples"]
        error = run(job)
        if error is not None:
            errors[Path(job["output"]).name] = error
    sys.stdout.write(f"answer {json.dumps(errors)}\n")
    sys.stdout.flush()
distributed.barrier()
sys.stderr.flush()
os._exit(0)  # as the command does: a thread of gloo that still runs aborts a process that is torn down
