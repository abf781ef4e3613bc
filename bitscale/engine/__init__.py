"""Config -> DeepSpeed."""

from bitscale.engine.ds_config import deepspeed_config
from bitscale.engine.fragments import Fragment
from bitscale.engine.pipeline_engine import PipelineEngine, make_engine
from bitscale.engine.train_engine import StepResult, TrainEngine

__all__ = [
    "Fragment",
    "PipelineEngine",
    "StepResult",
    "TrainEngine",
    "deepspeed_config",
    "make_engine",
]
