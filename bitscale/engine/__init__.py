"""Config -> DeepSpeed."""

from bitscale.engine.ds_config import deepspeed_config
from bitscale.engine.fragments import Fragment
from bitscale.engine.train_engine import StepResult, TrainEngine

__all__ = ["Fragment", "StepResult", "TrainEngine", "deepspeed_config"]
