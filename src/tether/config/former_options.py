"""Former options and arguments of TRL, transformers and Tether, and what each is called today.

For scripts and recipes alike. Loads no torch.
"""

from __future__ import annotations

# What to write instead, in Python spelling.
FORMER: dict[str, str] = {
    "adafactor": "`optim='adafactor'`",
    "base_model_attribute_name": "nothing: the model inside is found by itself",
    "dispatch_batches": "`accelerator_config={'dispatch_batches': ...}`",
    "evaluate_during_training": "`eval_strategy='steps'`",
    "evaluation_strategy": "`eval_strategy`",
    "force_use_ref_model": "`ref_model`, with the model that is the reference",
    "fp16_backend": "`fp16`, alone",
    "fp16_opt_level": "nothing: it was apex's",
    "fsdp_min_num_params": "`fsdp_config={'min_num_params': ...}`",
    "fsdp_transformer_layer_cls_to_wrap": "`fsdp_config={'transformer_layer_cls_to_wrap': ...}`",
    "generate_during_eval": "nothing: evaluation scores the held-out pairs",
    "group_by_length": "`train_sampling_strategy='group_by_length'`",
    "half_precision_backend": "`fp16` or `bf16`, alone",
    "include_inputs_for_metrics": "`include_for_metrics=['inputs']`",
    "include_tokens_per_second": "`include_num_input_tokens_seen='non_padding'`",
    "is_encoder_decoder": "nothing: the model is a decoder",
    "jit_mode_eval": "nothing: transformers no longer traces models",
    "label_pad_token_id": "nothing: rows have no padding",
    "logging_dir": "the environment variable TENSORBOARD_LOGGING_DIR",
    "max_completion_length": "`max_length`, for prompt and response together",
    "max_prompt_length": "`max_length`, for prompt and response together",
    "max_target_length": "`max_length`, for prompt and response together",
    "model_adapter_name": "nothing: the adapter beside the weights is the one that goes on training",
    "mp_parameters": "nothing: it was SageMaker's",
    "no_cuda": "`use_cpu=True`",
    "overwrite_output_dir": "nothing: a run writes to its folder, and goes on from there when it is resumed",
    "padding_value": "nothing: rows have no padding",
    "past_index": "nothing: it was for models with a memory",
    "per_gpu_eval_batch_size": "`per_device_eval_batch_size`",
    "per_gpu_train_batch_size": "`per_device_train_batch_size`",
    "push_to_hub_model_id": "`hub_model_id`",
    "push_to_hub_organization": "`hub_model_id='organization/name'`",
    "push_to_hub_token": "`hub_token`",
    "ray_scope": "nothing: build a trainer for each trial",
    "ref_adapter_name": "nothing: the reference of a continued adapter is the adapter as it was",
    "ref_model_init_kwargs": "`ref_model`, with the model that was loaded with them",
    "ref_model_sync_rule": "`ref_model_mixup_alpha=1` for hard, and in Python BEMACallback(update_ref_model=True) for "
    "bema; soft is what a sync does",
    "rpo_alpha": "`loss_type=['sigmoid', 'sft']`, with the alpha as the second of `loss_weights`",
    "save_safetensors": "nothing: weights are saved as safetensors",
    "sharded_ddp": "`fsdp`",
    "split_batches": "`accelerator_config={'split_batches': ...}`",
    "tools": "nothing: each row may have its own, in a column of that name",
    "torch_dtype": "`model_init_kwargs={'dtype': 'bfloat16'}`",
    "torchdynamo": "`torch_compile_backend`",
    "tpu_metrics_debug": "`debug='tpu_metrics_debug'`",
    "tpu_num_cores": "nothing: the launcher starts the processes",
    "use_ipex": "nothing: torch itself runs on these devices",
    "use_legacy_prediction_loop": "nothing: there is one loop",
    "use_liger_loss": "nothing: only the logits of responses are made, and never all at once",
    "use_logits_to_keep": "nothing: only the logits of responses are made, and never all at once",
    "use_mps_device": "nothing: Apple's device is used where it is",
    "use_num_logits_to_keep": "nothing: only the logits of responses are made, and never all at once",
    "warmup_ratio": "`warmup_steps`: below 1, it is a share of all steps",
    "xpu_backend": "`ddp_backend`",
}

# Arguments of `DPOTrainer` that are no options of `DPOConfig` either.
FORMER_ARGUMENTS: dict[str, str] = {
    "model_init": "`model`, made beforehand",
    "tokenizer": "`processing_class`",
}
