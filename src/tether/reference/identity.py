"""The identity of a reference: a digest of everything that changes its answers.

Knows tensors and configs, no kind of reference. Weights are digested by name, shape, dtype and content, under the
plain model's names, so that a base under an adapter has the same identity as the base alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from xxhash import xxh3_128

from tether.distributed import gather, is_sharded, local_shard, on_main_process
from tether.errors import ReferenceModelError
from tether.models.finite import is_finite

# Entries of a model config that do not change what the model computes.
_COSMETIC = frozenset(
    """
    _name_or_path architectures transformers_version dtype torch_dtype use_cache return_dict tokenizer_class prefix
    pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id id2label label2id problem_type
    output_hidden_states output_attentions output_router_logits router_aux_loss_coef keys_to_ignore_at_inference
    chunk_size_feed_forward is_encoder_decoder task_specific_params finetuning_task _attn_implementation
    _attn_implementation_autoset initializer_range initializer_factor attention_dropout hidden_dropout resid_pdrop
    embd_pdrop attn_pdrop dropout activation_dropout layerdrop hidden_dropout_prob attention_probs_dropout_prob
    classifier_dropout summary_first_dropout
    """.split()  # noqa: SIM905
)


@dataclass(frozen=True)
class ReferenceIdentity:
    """What distinguishes one reference from another.

    Attributes:
        kind: Its kind in one word (`explicit`, `implicit`, ...); for people, not in `digest`.
        weights: Digest of the weights that matter and of the config that shapes the forward.
        compute_dtype: Dtype the products run in (the autocast dtype where autocast is on).
        scoring_version: Version of the scoring engine.
        base: Digest of the base weights alone; like the next two, it only shows where two `weights` differ.
        config: Digest of the config alone.
        adapter: Digest of the adapter's tensors and configuration; empty without one that shapes the answers.
    """

    kind: str
    weights: str
    compute_dtype: str
    scoring_version: int
    base: str = field(default="", compare=False)
    config: str = field(default="", compare=False)
    adapter: str = field(default="", compare=False)

    @classmethod
    def named(cls, name: str) -> ReferenceIdentity:
        """Of a reference without weights to digest (a server, an ensemble): by its name alone.

        If the model behind the name changes, the name must change too.

        Example:
            >>> ReferenceIdentity.named("reward-team/dpo-v3").kind
            'named'
        """
        return cls(kind="named", weights=f"named:{name}", compute_dtype="float32", scoring_version=0)

    @property
    def digest(self) -> str:
        """The key of stored log-probs: equal exactly when the same numbers would be computed."""
        fields = (self.weights, self.compute_dtype, self.scoring_version)
        return hashlib.blake2b(json.dumps(fields).encode(), digest_size=16).hexdigest()

    def describe(self) -> dict[str, Any]:
        return asdict(self)


def identity_digests(
    digests: Mapping[str, bytes], config: Any, adapter: Collection[str] = (), adapter_config: Any = None
) -> dict[str, str]:
    """The digests of an identity: `weights` of everything, and those of base, config and adapter.

    Args:
        digests: Of all tensors that shape the answers (`digest_tensors`).
        config: The transformers config.
        adapter: The names among them that belong to an adapter.
        adapter_config: The configuration of that adapter, as JSON-able data.
    """
    base = {name: digest for name, digest in digests.items() if name not in adapter}
    of_adapter = {name: digests[name] for name in adapter}
    has_adapter = bool(of_adapter) or adapter_config is not None
    return {
        "weights": digest_weights(digests, config, adapter_config),
        "base": _digest_named(base, None),
        "config": _digest_named({}, _forward_config(config)),
        "adapter": _digest_named(of_adapter, adapter_config) if has_adapter else "",
    }


def digest_tensors(tensors: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Digest of each named tensor: its dtype, shape and content.

    Sharded tensors are gathered one at a time and digested on the main process; then every process must take part.

    Raises:
        ReferenceModelError: If a weight is NaN or infinite; names it.
    """
    if any(map(is_sharded, tensors.values())):
        return on_main_process(_digest_tensor, tensors)
    # Threads would gain nothing at memory's speed, and torch fails now and then where two begin at once after a fork.
    return {name: _digest_tensor(name, tensor) for name, tensor in tensors.items()}


def digest_weights(digests: Mapping[str, bytes], config: Any, extra: Any = None) -> str:
    """Digest of a model's tensors, from theirs, and of the config that shapes the forward.

    Args:
        digests: Of weights and persistent buffers, under the plain model's names.
        config: The transformers config.
        extra: Anything else that changes the answer (the adapter's configuration), as JSON-able data.
    """
    return _digest_named(digests, [_forward_config(config), extra])


def _digest_named(digests: Mapping[str, bytes], data: Any) -> str:
    total = hashlib.blake2b(digest_size=16)
    total.update(json.dumps(data, sort_keys=True, default=_plain).encode())
    for name in sorted(digests):
        total.update(f"{name}:".encode() + digests[name])
    return total.hexdigest()


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Refuses weights that are NaN or infinite; every process must take part where some are sharded.

    Raises:
        ReferenceModelError: Names the first of them.
    """
    if any(map(is_sharded, tensors.values())):
        on_main_process(_check_finite, tensors)
        return
    for name, tensor in tensors.items():
        _check_finite(name, tensor)


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers of a plain model, each storage once."""
    state = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}  # not detached: a detached shard does not look sharded


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the distinct storages behind some tensors, or behind this process's shards of them."""
    storages = [local_shard(tensor).untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _check_finite(name: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and not is_finite(tensor):
        raise ReferenceModelError(
            problem=f"Cannot use this model: its weight `{name}` has NaN or infinite values.",
            details="Every log-prob computed with it would be NaN, for the policy and for the reference.",
            instead="Load the weights again, or find what broke them (a diverged run, a damaged file, fp16 overflow).",
        )


def _digest_tensor(name: str, tensor: Tensor) -> bytes:
    tensor = gather(tensor)
    _check_finite(name, tensor)
    # Twenty times as fast as blake2b, which saves seconds with 8 B parameters. It guards against mix-ups, not attacks.
    digest = xxh3_128(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.digest()


def _plain(value: Any) -> Any:
    # The order of a set of names differs from process to process.
    return sorted(value, key=str) if isinstance(value, set | frozenset) else str(value)


def _names_a_gguf_file(key: str, entry: Any) -> bool:
    """Whether an entry only tells which file the weights were read from; packed or not, their own digests differ."""
    return key == "quantization_config" and isinstance(entry, dict) and entry.get("quant_method") == "gguf"


def _forward_config(config: Any) -> dict[str, Any]:
    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                str(key): strip(entry)
                for key, entry in value.items()
                if key not in _COSMETIC and not _names_a_gguf_file(key, entry)
            }
        return value

    stripped = strip(config.to_dict())
    assert isinstance(stripped, dict)
    return stripped
