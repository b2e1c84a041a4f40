"""One of the two ranks of ``losses_2ranks.safetensors``: ``golden_worker.py FILE FOLDER`` in a process of two.

It writes what this process computes, under the names that the file has for its rank, to a file in the folder.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import distributed

from curation.dinov2 import losses
from curation.dinov2.centring import RunningCentre, SinkhornKnopp
from curation.dinov2.objective import Inputs
from curation.dinov2.scores import Projected, Scores
from curation.dinov2.world import World

file, folder = sys.argv[1:]
TEMPERATURE, STUDENT, CHUNK_ROWS = 0.05, 0.1, 4


def scores(scores_NK):
    return Scores(Projected(scores_NK, torch.eye(scores_NK.shape[1])), CHUNK_ROWS)


rank = distributed.get_rank()
world = World.join(torch.device("cpu"))
given = {name.removeprefix(f"in/rank{rank}/"): value for name, value in load_file(file).items()}
cpu = torch.device("cpu")
found = {}
for kind, prototypes in (("dino", 48), ("ibot", 40)):
    centre = RunningCentre(prototypes, 0.9, cpu, world, each_process_equal=True)
    for name, centring in (("sk", SinkhornKnopp(3, world)), ("center", centre)):
        for step in (0, 1):
            if name == "center":
                found[f"{kind}/center/center_used_{step}"] = centre.value_K
            p = centring.assign(scores(given[f"{kind}/teacher_logits_{step}"]), TEMPERATURE)
            eye = torch.eye(prototypes)
            if kind == "dino":
                student = given[f"dino/student_local_{step}"].clone().requires_grad_()
                crops = Projected(torch.cat([torch.zeros(6, prototypes), student]), eye)
                views = p.split([3, 3])
                total, _, local = losses.dino_loss(crops, views, STUDENT, CHUNK_ROWS)
                pairs = 2 + 2 * len(student) // 3  # the published local loss is not divided by them
                total, loss = total * pairs, local * pairs
            else:
                masks = given["ibot/masks"].bool()
                weight = Inputs.of([], masks).weight_M
                student = given[f"ibot/student_logits_{step}"].clone().requires_grad_()
                loss = losses.ibot_loss(Projected(student, eye), p, weight, len(masks), STUDENT, CHUNK_ROWS)
                total = loss
            total.backward()
            centring.update()
            found |= {
                f"{kind}/{name}/teacher_prob_{step}": p.rows(),
                f"{kind}/{name}/loss_{step}": loss.detach(),
                f"{kind}/{name}/grad_{step}": student.grad,
            }
    found[f"{kind}/center/center_final"] = centre.value_K
save_file({name: value.contiguous() for name, value in found.items()}, Path(folder) / f"{rank}.safetensors")
