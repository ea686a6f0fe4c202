"""Several processes, and sharded weights: the only place that knows DDP, FSDP2 and DeepSpeed.

`processes` reduces sums and verdicts, `shards` reads sharded tensors, `models` shards a second model like the policy.
Everything also works in one process and for whole tensors.
"""

from tether.distributed.models import (
    Sharding,
    autocast_dtype,
    cast_as_training_will,
    copy_of_sharded,
    sharding_of,
    twin_of_fsdp,
)
from tether.distributed.processes import (
    any_process,
    check_alike,
    is_distributed,
    is_main_process,
    num_processes,
    reduced,
    together,
    union,
)
from tether.distributed.shards import (
    exchanged,
    forget_gathered,
    has_shards,
    is_fsdp,
    is_sharded,
    local_part,
    on_main_process,
    part_like,
    plain_class,
    whole,
    whole_of_part,
    whole_shape,
)

__all__ = [
    "Sharding",
    "any_process",
    "autocast_dtype",
    "cast_as_training_will",
    "check_alike",
    "copy_of_sharded",
    "exchanged",
    "forget_gathered",
    "has_shards",
    "is_distributed",
    "is_fsdp",
    "is_main_process",
    "is_sharded",
    "local_part",
    "num_processes",
    "on_main_process",
    "part_like",
    "plain_class",
    "reduced",
    "sharding_of",
    "together",
    "twin_of_fsdp",
    "union",
    "whole",
    "whole_of_part",
    "whole_shape",
]
