"""What DeepSpeed asks about tensor parallelism, in the form of Megatron-LM's old "mpu" module."""

from typing import cast

import torch.distributed as dist

from bitscale.mesh import Mesh


class ModelParallelUnit:
    """A mesh whose tensor-parallel ranks share the model; without a pipeline these are all the
    model-parallel ranks there are."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_rank(self) -> int:
        return self._mesh.dp_rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.dp_size

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, self._mesh.dp_group)

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, self._mesh.tp_group)

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group
