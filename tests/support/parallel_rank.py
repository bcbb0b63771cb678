"""One rank of tests/test_parallel.py: ``torchrun -m tests.support.parallel_rank SPLIT FOLDER``."""

from __future__ import annotations

import copy
import pathlib
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from fastalex.models.processes import Hybrid, Replicas, TowerProcesses
from tests.test_parallel import batch, gradients, small_network, step


def main() -> None:
    split, folder = sys.argv[1], pathlib.Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, targets = batch()
    if split == "hybrid":
        net = module = Hybrid(small_network())
        images, targets = images.chunk(ranks)[rank], targets.chunk(ranks)[rank]
    elif split == "data":
        net = module = Replicas(small_network())
        images, targets = images.chunk(ranks)[rank], targets.chunk(ranks)[rank]
    elif split == "towers":
        net = module = TowerProcesses(small_network())
    else:  # two pairs of towers, each on half of the images
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tower"))
        module = TowerProcesses(small_network(), mesh.get_group("tower"))
        net = DistributedDataParallel(module, process_group=mesh.get_group("data"))
        images, targets = images.chunk(2)[rank // 2], targets.chunk(2)[rank // 2]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    loss = step(net, images, targets)
    found = {"loss": loss, "gradients": gradients(module), "bytes_received": module.bytes_received}
    optimizer.step()
    found["model"] = copy.deepcopy(module.merged_state_dict())
    found["optimizer"] = copy.deepcopy(module.merged_optimizer_state(optimizer))
    # Back into a rank that went on: everything as it was.
    before = {name: value.clone() for name, value in module.state_dict().items()}
    step(net, images, targets)
    optimizer.step()
    module.load_merged_state_dict(found["model"])
    module.load_merged_optimizer_state(optimizer, found["optimizer"])
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    again = module.merged_optimizer_state(optimizer)
    for index, kept in found["optimizer"]["state"].items():
        assert torch.equal(again["state"][index]["momentum_buffer"], kept["momentum_buffer"])
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
