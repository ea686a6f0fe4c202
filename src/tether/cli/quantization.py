"""`load_in_4bit` and `load_in_8bit` of a recipe, as a quantization config.

Knows options only; loads nothing.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from transformers import BitsAndBytesConfig

from tether.errors import MissingPackageError

if TYPE_CHECKING:
    from tether.cli.options import ScriptOptions
    from tether.cli.scripts import ModelConfig


def quantization_of(script: ScriptOptions | ModelConfig) -> BitsAndBytesConfig | None:
    """How the model's weights are quantized when they are loaded, as in TRL's script; None if they are not.

    Products are computed in the recipe's `dtype`.

    Raises:
        MissingPackageError: Without bitsandbytes.
    """
    if not (script.load_in_4bit or script.load_in_8bit):
        return None
    if find_spec("bitsandbytes") is None:
        raise MissingPackageError(
            problem=f"Cannot use `load_in_{4 if script.load_in_4bit else 8}bit`: it needs bitsandbytes, which is not "
            "installed.",
            instead="Install it (`pip install bitsandbytes`), or write `use_peft: true` with `dtype: bfloat16`, which "
            "also saves memory.",
        )
    if script.load_in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    options: dict[str, Any] = {"bnb_4bit_compute_dtype": script.dtype} if script.dtype not in (None, "auto") else {}
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=script.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=script.use_bnb_nested_quant,
        bnb_4bit_quant_storage=script.bnb_4bit_quant_storage,
        **options,
    )
