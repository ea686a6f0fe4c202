"""The training loop of transformers with a reference in it, and what scripts written for TRL expect around it."""

from tether.config.dpo_config import DPOConfig
from tether.trainer.callbacks import BEMACallback
from tether.trainer.dpo_trainer import DPOTrainer

__all__ = ["BEMACallback", "DPOConfig", "DPOTrainer"]
