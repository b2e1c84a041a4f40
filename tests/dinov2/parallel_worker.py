"""One of several processes that train together: ``parallel_worker.py RANK SIZE STORE JOBS``, jobs as JSON."""

import json
import os
import sys
from pathlib import Path

import torch
from torch import distributed

from curation.dinov2.config import TrainConfig
from curation.dinov2.data import ManifestImages
from curation.dinov2.train import train
from curation.errors import CurationError

rank, size, store, jobs = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
torch.set_num_threads(1)
if "TEST_SAMPLES" in os.environ:
    read = ManifestImages.read

    def note(self, index):
        with open(os.environ["TEST_SAMPLES"], "a") as file:
            file.write(f"{index}\n")
        return read(self, index)

    ManifestImages.read = note
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
for job in jobs:
    seen = []
    try:
        train(
            job["manifest"],
            TrainConfig.model_validate_json(json.dumps(job["config"])),
            Path(job["output"]),
            resume=job["resume"],
            device="cpu",
            should_stop=lambda seen=seen, job=job: seen.append(1) or len(seen) == job["stop_after"],
        )
    except CurationError as error:
        Path(f"{job['output']}.{rank}.error").write_text(str(error))
distributed.barrier()
sys.stderr.flush()
os._exit(0)  # as the command does: a thread of gloo that still runs aborts a process that is torn down
