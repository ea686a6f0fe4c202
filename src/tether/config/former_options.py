"""Former options of TRL, transformers and Tether, and what each is called today.

For scripts (`DPOConfig`) and recipes alike. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Mapping

# What to write instead, in Python spelling.
FORMER: Mapping[str, str] = {
    "evaluation_strategy": "`eval_strategy`",
    "force_use_ref_model": "`ref_model`, with the model that is the reference",
    "generate_during_eval": "nothing: evaluation scores the held-out pairs",
    "group_by_length": "`train_sampling_strategy='group_by_length'`",
    "label_pad_token_id": "nothing: rows have no padding",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "max_completion_length": "`max_length`, for prompt and response together",
    "max_prompt_length": "`max_length`, for prompt and response together",
    "model_adapter_name": "nothing: the adapter beside the weights is the one that goes on training",
    "no_cuda": "`use_cpu=True`",
    "overwrite_output_dir": "nothing: a run writes to its folder, and goes on from there when it is resumed",
    "padding_value": "nothing: rows have no padding",
    "ref_adapter_name": "nothing: the reference of a continued adapter is the adapter as it was",
    "ref_model_sync_rule": "`ref_model_mixup_alpha=1` for hard, and in Python BEMACallback(update_ref_model=True) "
    "for bema; soft is what a sync does",
    "rpo_alpha": "`loss_type=['sigmoid', 'sft']`, with the alpha as the second of `loss_weights`",
    "save_safetensors": "nothing: weights are saved as safetensors",
    "torch_dtype": "`model_init_kwargs={'dtype': 'bfloat16'}`",
    "use_logits_to_keep": "nothing: only the logits of responses are made, and never all at once",
    "warmup_ratio": "`warmup_steps`: below 1, it is a share of all steps",
}
