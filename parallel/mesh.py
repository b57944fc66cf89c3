"""The ranks of a job, and the mesh that names them: axis "dp" across sequences, axis "sp" along a sequence."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


def launched_ranks() -> int:
    """How many ranks the launcher (torchrun) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def processes(device_type: str) -> Iterator[torch.device]:
    """Join the ranks that the launcher started, or be the only one, until the end of the block. Yields this rank's device.

    Args:
        device_type: ``"cpu"`` (gloo) or ``"cuda"`` (NCCL), whose device is the one of this rank's number on its node.
    """
    device = torch.device(device_type)
    if device_type == "cuda":
        # More ranks than GPUs share them: NCCL refuses unless it was told to take them for separate hosts.
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    backend = "nccl" if device_type == "cuda" else "gloo"
    bound = device if device_type == "cuda" else None
    if "RANK" in os.environ:
        dist.init_process_group(backend, device_id=bound)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, device_id=bound)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def build_mesh(device_type: str, sp_size: int) -> DeviceMesh:
    """All ranks as a mesh of the axes ("dp", "sp"): the ranks that share a sequence are consecutive, so on one node first.

    Raises:
        ValueError: where `sp_size` does not divide the number of ranks.
    """
    world = dist.get_world_size()
    if sp_size < 1 or world % sp_size:
        raise ValueError(f"sp_size={sp_size} does not divide the {world} ranks")
    return init_device_mesh(device_type, (world // sp_size, sp_size), mesh_dim_names=("dp", "sp"))


def all_ranks(mesh: DeviceMesh) -> dist.ProcessGroup:
    """One group of all the mesh's ranks: what gradients are summed over. A mesh of two axes spans the job."""
    for alone, other in (("dp", "sp"), ("sp", "dp")):
        if mesh[alone].size() == 1:
            return mesh[other].get_group()
    assert mesh.size() == dist.get_world_size()
    world = dist.group.WORLD
    assert world is not None
    return world


def all_ranks_apart(mesh: DeviceMesh) -> DeviceMesh:
    """All the mesh's ranks on one axis, with a group of their own: what it carries does not wait behind the states.

    Raises:
        ValueError: where they are not all ranks of the job, of which all take part.
    """
    if mesh.size() != dist.get_world_size():
        raise ValueError(f"expected a mesh of all {dist.get_world_size()} ranks, given {mesh.size()}")
    return DeviceMesh.from_group(dist.new_group(), mesh.device_type, mesh_dim_names=("ranks",))
