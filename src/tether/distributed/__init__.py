"""Several processes, and sharded weights: the only place that knows DDP, FSDP2 and DeepSpeed.

`processes` reduces sums and verdicts, `shards` reads sharded tensors, `models` shards a second model as the policy is
sharded. Everything also works in one process and with full tensors.
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
    names_of_all,
    num_processes,
    of_main,
    raising_together,
    reduced,
)
from tether.distributed.shards import (
    device_of,
    exchanged,
    forget_gathered,
    full_shape,
    gather,
    gather_shard,
    has_shards,
    is_fsdp,
    is_sharded,
    local_shard,
    modules_of,
    on_main_process,
    plain_class,
    shard_like,
)

__all__ = [
    "Sharding",
    "any_process",
    "autocast_dtype",
    "cast_as_training_will",
    "check_alike",
    "copy_of_sharded",
    "device_of",
    "exchanged",
    "forget_gathered",
    "full_shape",
    "gather",
    "gather_shard",
    "has_shards",
    "is_distributed",
    "is_fsdp",
    "is_main_process",
    "is_sharded",
    "local_shard",
    "modules_of",
    "names_of_all",
    "num_processes",
    "of_main",
    "on_main_process",
    "plain_class",
    "raising_together",
    "reduced",
    "shard_like",
    "sharding_of",
    "twin_of_fsdp",
]
