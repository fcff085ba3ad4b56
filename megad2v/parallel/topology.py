"""The grid of ranks: data parallel x tensor parallel. It is also the `mpu` that DeepSpeed asks for.

Tensor-parallel ranks are neighbours (rank = data index x tensor size + tensor index), so that they sit on one node.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@dataclass(frozen=True)
class Axis:
    """One dimension of the grid, as this rank sees it."""

    rank: int
    size: int
    group: dist.ProcessGroup | None = None
    """The ranks along it; None: all ranks. Nothing is sent along an axis of size 1."""


class Topology:
    """`data`: ranks that hold the same slice of every layer and see other samples; `tensor`: ranks that hold the other
    slices and see the same samples. Making one with tensor_size > 1 is collective.
    """

    def __init__(self, tensor_size: int, device_type: str) -> None:
        """Raises ValueError where `tensor_size` does not divide the number of ranks."""
        rank, size = dist.get_rank(), dist.get_world_size()
        if size % tensor_size:
            raise ValueError(f"{size} ranks cannot form tensor-parallel groups of {tensor_size}")
        if tensor_size == 1:
            self.data, self.tensor = Axis(rank, size), Axis(0, 1)
            return
        mesh = init_device_mesh(device_type, (size // tensor_size, tensor_size), mesh_dim_names=("data", "tensor"))
        self.data, self.tensor = (
            Axis(mesh.get_local_rank(name), mesh.size(number), mesh.get_group(name))
            for number, name in enumerate(("data", "tensor"))
        )

    # --- The names that DeepSpeed calls, Megatron's.

    def get_data_parallel_rank(self) -> int:
        """This rank's index among the ranks with the same slices."""
        return self.data.rank

    def get_data_parallel_world_size(self) -> int:
        """Number of ranks with the same slices."""
        return self.data.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks with the same slices: what ZeRO partitions over."""
        return self.data.group

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank's index among the slices of one layer."""
        return self.tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        """Number of slices of one layer."""
        return self.tensor.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        """Ranks that hold the slices of one layer: gradient norms are summed over them."""
        return self.tensor.group

    get_model_parallel_rank = get_tensor_model_parallel_rank
    get_model_parallel_world_size = get_tensor_model_parallel_world_size
    get_model_parallel_group = get_tensor_model_parallel_group
