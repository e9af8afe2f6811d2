"""Where the weights of a model lie: whole in each process, in parts that processes gather (FSDP2), or out of reach.

`fully_shard` gathers a layer's weights whenever the layer runs, forward and backward, so that everything computed there
is whole. All other ways to hold a part of the weights are refused, each by its marks.
"""

import torch.distributed
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from posterity.errors import InputError


def is_sharded(model: nn.Module) -> bool:
    """Return whether the processes gather the weights for each pass (FSDP2), and so must run every pass together."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def is_first_process() -> bool:
    """Return whether this process has rank 0, or is alone."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def reshard(model: nn.Module) -> None:
    """Let every process hold its own part of the weights alone, which are then the parameters of the modules (FSDP2).

    After a pass without a backward pass the outermost weights are still whole: what is changed at them, or not changed,
    would not be that of the parameters which training knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def refuse_layout(model: nn.Module) -> None:
    """Raise InputError, with the reason, if a forward pass of the model here would not run on the whole weights."""
    modules, parameters = list(model.modules()), list(model.parameters())
    sharded = is_sharded(model)
    if any(type(module).__module__.partition(".")[0] == "transformer_lens" for module in modules):
        raise InputError(
            "TransformerLens has put its own attention in place of the model's: load the model again with "
            "AutoModelForCausalLM.from_pretrained"
        )
    if any(hasattr(x, "ds_id") for x in parameters):
        raise InputError(
            "DeepSpeed ZeRO-3 holds its weights in parts: use ZeRO stage 2, or torch.distributed.fsdp.fully_shard"
        )
    if not sharded and any(getattr(module, "_is_fsdp_managed_module", False) for module in modules):
        raise InputError(
            "FSDP around it gathers its weights out of its sight (FullyShardedDataParallel): shard the model itself "
            "with torch.distributed.fsdp.fully_shard"
        )
    if parallelism := _model_parallelism(model, modules, parameters, sharded):
        raise InputError(
            f"{parallelism}, and each process holds a part of it: load it whole in each process, over the devices of "
            "one process (device_map), or shard it with torch.distributed.fsdp.fully_shard"
        )


def _model_parallelism(model: nn.Module, modules: list[nn.Module], parameters: list[nn.Parameter], fsdp: bool) -> str:
    """Return how processes share the work of one forward pass; nothing if each does all of it."""
    if any(getattr(module, "_is_expert_parallel", False) for module in modules):
        return "it runs with expert parallelism"
    if getattr(getattr(model, "_pp_stage", None), "pp_size", 1) > 1:
        return "it runs with pipeline parallelism"
    if (getattr(model, "_tp_size", None) or 1) > 1 or any(_shards(x) > int(fsdp) for x in parameters):
        return "it runs with tensor parallelism (DTensor weights)"
    return ""


def _shards(x: Tensor) -> int:
    """Return over how many dimensions of a mesh of processes a tensor is split."""
    if not isinstance(x, DTensor):
        return 0
    sizes = zip(x.placements, x.device_mesh.shape, strict=True)
    return sum(size > 1 and not placement.is_replicate() for placement, size in sizes)
