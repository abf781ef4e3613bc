"""The DeepSpeed configuration that follows from ours (`bitscale config --deepspeed FILE`)."""

import copy
from typing import Any

from bitscale.config import Config


def deepspeed_config(cfg: Config, dp_size: int) -> dict[str, Any]:
    """DeepSpeed's JSON for `cfg` on `dp_size` data-parallel ranks, under `engine.deepspeed`."""
    per_pass = cfg.train.micro_batch_size * dp_size
    derived: dict[str, Any] = {
        "train_batch_size": cfg.train.global_batch_size,
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
        "gradient_accumulation_steps": cfg.train.global_batch_size // per_pass,
        "gradient_clipping": cfg.optim.clip,
        "bf16": {"enabled": cfg.train.dtype == "bf16"},
        # Micro-batch gradients add up in fp32 whatever the compute dtype.
        "data_types": {"grad_accum_dtype": "fp32"},
        # DeepSpeed's default reduces (and at stage 1 rounds even on one rank) in bf16.
        "communication_data_type": "fp32",
        "zero_optimization": {"stage": cfg.engine.zero_stage},
        # A client AdamW is torch's own: no extension is compiled at start-up.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    if cfg.parallel.pp > 1:
        # DeepSpeed's defaults split what travels between stages over tensor-parallel ranks as if
        # each held the whole: silently wrong with sequence parallelism. Blocks checkpoint their
        # activations themselves.
        derived["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    return _merge(derived, cfg.engine.deepspeed)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = copy.deepcopy(value)
    return merged
