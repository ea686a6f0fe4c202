"""What an editor accepts and marks, for mypy to read (`make check`, `tests/config/test_typing.py`); nothing runs it.

mypy is strict about unused ignores: a wrong value that it came to accept would be an error here.
"""

from tether import DataCollatorForPreference, DPOConfig, LossOptions

DPOConfig("out", loss_type="sigmoid", truncation_mode="keep_end", bad_rows="drop")
DPOConfig("out", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.1], f_divergence_type="forward_kl")
DPOConfig("out", ref_dtype="bfloat16", ref_store_mode="lazy")
DPOConfig("out", ref_dtype=None)
DataCollatorForPreference(0, truncation_mode="keep_end")
LossOptions(f_divergence_type="js_divergence")

DPOConfig("out", loss_type="sigmoid_nrm")  # type: ignore[arg-type]
DPOConfig("out", loss_type=["sigmoid", "stf"])  # type: ignore[list-item]
DPOConfig("out", truncation_mode="keep_strat")  # type: ignore[arg-type]
DPOConfig("out", bad_rows="skip")  # type: ignore[arg-type]
DPOConfig("out", f_divergence_type="reverse")  # type: ignore[arg-type]
DPOConfig("out", ref_store_mode="filled")  # type: ignore[arg-type]
DPOConfig("out", ref_dtype="bf16")  # type: ignore[arg-type]
DataCollatorForPreference(0, truncation_mode="keep_strat")  # type: ignore[arg-type]
LossOptions(f_divergence_type="reverse")  # type: ignore[arg-type]
