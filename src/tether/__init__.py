"""Tether: preference training (DPO and its family) with the reference model as a first-class object.

from tether import DPOConfig, DPOTrainer
"""

import typing as _typing

if _typing.TYPE_CHECKING:
    from tether.cli.scripts import DatasetMixtureConfig as DatasetMixtureConfig
    from tether.cli.scripts import ModelConfig as ModelConfig
    from tether.cli.scripts import ScriptArguments as ScriptArguments
    from tether.cli.scripts import TrlParser as TrlParser
    from tether.cli.scripts import get_dataset as get_dataset
    from tether.cli.scripts import get_kbit_device_map as get_kbit_device_map
    from tether.cli.scripts import get_peft_config as get_peft_config
    from tether.cli.scripts import get_quantization_config as get_quantization_config
    from tether.config.dpo_config import DPOConfig as DPOConfig
    from tether.data import DataCollatorForPreference as DataCollatorForPreference
    from tether.data import DataCollatorForVisionPreference as DataCollatorForVisionPreference
    from tether.data import PairCollator as PairCollator
    from tether.data import batch_of as batch_of
    from tether.data import tokenize_pairs as tokenize_pairs
    from tether.losses import LOSSES as LOSSES
    from tether.losses import LossOptions as LossOptions
    from tether.reference import BemaReference as BemaReference
    from tether.reference import ExplicitReference as ExplicitReference
    from tether.reference import FreeReference as FreeReference
    from tether.reference import GivenReference as GivenReference
    from tether.reference import ImplicitReference as ImplicitReference
    from tether.reference import Placement as Placement
    from tether.reference import PrecomputedReference as PrecomputedReference
    from tether.reference import Reference as Reference
    from tether.reference import ReferenceIdentity as ReferenceIdentity
    from tether.reference import SynchronizedReference as SynchronizedReference
    from tether.reference import Traits as Traits
    from tether.reference import WrappingReference as WrappingReference
    from tether.scoring import score as score
    from tether.store import LogProbStore as LogProbStore
    from tether.trainer.callbacks import BEMACallback as BEMACallback
    from tether.trainer.callbacks import SyncRefModelCallback as SyncRefModelCallback
    from tether.trainer.dpo_trainer import DPOTrainer as DPOTrainer
    from tether.trainer.run_folder import last_checkpoint as last_checkpoint
    from tether.types import PairBatch as PairBatch
    from tether.types import PairScores as PairScores
    from tether.types import Response as Response
    from tether.types import ResponseLogProbs as ResponseLogProbs
    from tether.types import TokenScores as TokenScores

__version__ = "0.1.0"

# Loaded at first use: `tether --help` should not wait for torch and transformers.
_HOMES = {
    "DatasetMixtureConfig": "tether.cli.scripts",
    "ModelConfig": "tether.cli.scripts",
    "ScriptArguments": "tether.cli.scripts",
    "TrlParser": "tether.cli.scripts",
    "get_dataset": "tether.cli.scripts",
    "get_kbit_device_map": "tether.cli.scripts",
    "get_peft_config": "tether.cli.scripts",
    "get_quantization_config": "tether.cli.scripts",
    "DPOConfig": "tether.config.dpo_config",
    "DataCollatorForPreference": "tether.data",
    "DataCollatorForVisionPreference": "tether.data",
    "PairCollator": "tether.data",
    "batch_of": "tether.data",
    "tokenize_pairs": "tether.data",
    "LOSSES": "tether.losses",
    "LossOptions": "tether.losses",
    "BemaReference": "tether.reference",
    "ExplicitReference": "tether.reference",
    "FreeReference": "tether.reference",
    "GivenReference": "tether.reference",
    "ImplicitReference": "tether.reference",
    "Placement": "tether.reference",
    "PrecomputedReference": "tether.reference",
    "Reference": "tether.reference",
    "ReferenceIdentity": "tether.reference",
    "SynchronizedReference": "tether.reference",
    "Traits": "tether.reference",
    "WrappingReference": "tether.reference",
    "score": "tether.scoring",
    "LogProbStore": "tether.store",
    "BEMACallback": "tether.trainer.callbacks",
    "SyncRefModelCallback": "tether.trainer.callbacks",
    "DPOTrainer": "tether.trainer.dpo_trainer",
    "last_checkpoint": "tether.trainer.run_folder",
    "PairBatch": "tether.types",
    "PairScores": "tether.types",
    "Response": "tether.types",
    "ResponseLogProbs": "tether.types",
    "TokenScores": "tether.types",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> _typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'tether' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)  # what completion shows; without this, the names that are not loaded yet are missing
