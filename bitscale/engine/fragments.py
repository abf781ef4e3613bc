"""One view on optimizer state for every ZeRO stage: fragments.

ZeRO scatters each parameter's fp32 master weight and Adam moments over the data-parallel ranks,
in a different way per stage. A `Fragment` is the contiguous flat range of one named parameter
that this rank holds, as writable views. Checkpoints, resumption and the transition's
optimizer-state policies are written against fragments and so work at every stage. Together the
ranks' fragments with `saved_here` cover each element of each parameter exactly once.

This file, ternary_gather.py and ternary_zero3.py know DeepSpeed's internal layout (measured with
0.19.8), and no other does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitscale.mesh import Mesh
from bitscale.model.collectives import ParameterShard, shard_of

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """Flat range [start, start + numel) of parameter `name`, or of this rank's tensor-parallel part
    of it, fp32, held by this rank."""

    name: str
    start: int
    master: Tensor  # [numel] view on the fp32 master weight
    exp_avg: Tensor  # [numel] view on the first moment
    exp_avg_sq: Tensor | None  # [numel] view on the second; None: the optimizer has one moment
    step: Tensor  # step count, scalar; shared by the fragments of one optimizer tensor
    saved_here: bool = True  # False: a replica that another rank saves
    # The part of the whole parameter whose flat range this is; None: of the parameter itself.
    shard: ParameterShard | None = None

    @property
    def numel(self) -> int:
        return self.master.numel()

    def moments(self) -> dict[str, Tensor]:
        """The moments that the optimizer keeps, by name: some or all of MOMENTS, in that order."""
        views = {"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return {kind: view for kind, view in views.items() if view is not None}


def create_state(
    wrapper: Any, optimizer: torch.optim.Optimizer, stage: int, moments: Sequence[str]
) -> None:
    """Give every optimizer tensor zero `moments` and step 0.

    torch creates this state in the first step, too late for a checkpoint to be restored into it;
    DeepSpeed's BF16_Optimizer creates it at start-up by a step on zero gradients, which leaves
    the step count at 1 and so the bias correction of the first updates wrong.
    """
    # Stage 3 lends the optimizer one tensor at a time; between steps its groups are empty.
    tensors = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    for tensor in wrapper.fp32_partitioned_groups_flat if stage == 3 else tensors:
        if not optimizer.state[tensor]:
            device = tensor.device if optimizer.defaults.get("fused") else None
            optimizer.state[tensor] = {
                "step": torch.tensor(0.0, dtype=torch.float32, device=device),
                **{moment: torch.zeros_like(tensor) for moment in moments},
            }
    for state in optimizer.state.values():
        state["step"].zero_()
        for moment in moments:
            state[moment].zero_()


def fragments(
    model: nn.Module,
    wrapper: Any,
    optimizer: torch.optim.Optimizer,
    *,
    stage: int,
    mesh: Mesh,
) -> Iterator[Fragment]:
    """This rank's fragments, in parameter order.

    Args:
        wrapper: DeepSpeed's optimizer object; `optimizer`: the torch optimizer inside it.
    """
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if stage == 0:
            # Every rank holds every parameter; they take turns in saving them.
            turn = index % mesh.world_size == mesh.rank
            fragment: Fragment | None = _replicated(name, parameter, optimizer, turn)
        elif stage == 3:
            fragment = _stage3(name, parameter, wrapper, optimizer)
        elif getattr(parameter, "_hp_mapping", None) is not None:
            fragment = _stage12(name, parameter, optimizer)
        else:
            fragment = None
        if fragment is not None:
            saved_here = fragment.saved_here and is_counted_here(parameter, mesh)
            yield replace(fragment, shard=shard_of(parameter), saved_here=saved_here)


def is_counted_here(parameter: nn.Parameter, mesh: Mesh) -> bool:
    """Whether this tensor-parallel rank, of those that hold the same values, answers for them."""
    shard = shard_of(parameter)
    if shard is None:
        return mesh.tp_rank == 0
    num_parts = -(-shard.whole[shard.dim] // (shard.end - shard.start))
    # Key/value heads that several neighbours hold have fewer parts than ranks.
    return num_parts >= mesh.tp_size or mesh.tp_rank % mesh.kv_replicas == 0


def _replicated(
    name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, saved_here: bool
) -> Fragment:
    state = optimizer.state[parameter]
    fragment = _fragment(name, 0, parameter, state, lambda tensor: tensor.data.view(-1))
    return replace(fragment, saved_here=saved_here)


def _stage12(name: str, parameter: Any, optimizer: torch.optim.Optimizer) -> Fragment:
    mapping = parameter._hp_mapping
    (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
    address = mapping.get_hp_fragment_address()
    state = optimizer.state[flat]

    def view(tensor: Tensor) -> Tensor:
        return tensor.data.narrow(0, address.start, address.numel)

    return _fragment(name, mapping.lp_fragment_address.start, flat, state, view)


def _stage3(
    name: str, parameter: Any, wrapper: Any, optimizer: torch.optim.Optimizer
) -> Fragment | None:
    sub_group, offset, partition = wrapper.grad_position[wrapper.get_param_id(parameter)]
    start = parameter.ds_tensor.ds_numel * torch.distributed.get_rank(parameter.ds_process_group)
    numel = min(partition, parameter.ds_numel - start)  # the last partitions are padded
    if numel <= 0:
        return None
    flat = wrapper.fp32_partitioned_groups_flat[sub_group]
    state = optimizer.state[flat]

    def view(tensor: Tensor) -> Tensor:
        return tensor.data.narrow(0, offset, numel)

    return _fragment(name, start, flat, state, view)


def _fragment(
    name: str,
    start: int,
    master: Tensor,
    state: dict[str, Tensor],
    view: Callable[[Tensor], Tensor],
) -> Fragment:
    """`view` cuts the fragment out of the optimizer's tensor and of its moments alike."""
    second = state.get("exp_avg_sq")
    return Fragment(
        name,
        start,
        view(master),
        view(state["exp_avg"]),
        None if second is None else view(second),
        state["step"],
    )


def publish_masters(model: nn.Module, wrapper: Any, stage: int) -> None:
    """Make the compute weights of every rank follow its masters (a collective)."""
    if stage == 3:
        wrapper._partition_all_parameters()
        for sub_group in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(sub_group)
        if wrapper.persistent_parameters:  # small ones, kept gathered between steps
            wrapper.persistent_parameters[0].all_gather(wrapper.persistent_parameters)
    elif stage > 0:
        wrapper.update_lp_params()
