"""What to write today for former options of TRL, transformers and Tether, and for options of other tools.

For scripts and recipes alike. Loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any

from tether.refusals import shown

# What to write instead, in Python spelling; `{}` is the value that was written.
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
    "torch_dtype": "`dtype={}`",
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

# Options of LLaMA-Factory, Axolotl, ms-swift and the alignment-handbook, and what to write instead.
# A key with a value is about that value alone.
_LENGTH, _ADAPTER, _ALL_WEIGHTS = (
    "`max_length={}`",
    "`lora_r`, with the adapter's rank",
    "nothing: without `lora_r` all weights are trained",
)
_IN_4_BITS, _NOT_HERE = (
    "`load_in_4bit=True`, and `lora_r` with the adapter's rank",
    "nothing: Tether trains the losses of `loss_type`",
)
_IS_DPO = "nothing: it is what Tether does"
_OF_MODEL, _OF_TOKENIZER = (
    "nothing: the model's own config has it",
    "nothing: the tokenizer's own chat template is used",
)
_BY_TRACKER = "the environment variable of the tracker, such as WANDB_PROJECT, in `env`"
_MIXTURE = "`datasets`, a list with the path, split and fraction of each"
_OF_ROWS = "nothing: rows are tokenized in each run"
OTHER_TOOLS: dict[str, str] = {
    "adapter": "`model`, with the folder of the adapter, or `lora_r`",
    "adapter=lora": _ADAPTER,
    "adapter=qlora": _IN_4_BITS,
    "adapter_name_or_path": "`model={}`: an adapter's folder names its base",
    "adapters": "`model`, with the folder of the adapter, which names its base",
    "attn_impl": "`attn_implementation={}`",
    "base_model": "`model={}`",
    "base_model_config": _OF_MODEL,
    "booster": "`attn_implementation`",
    "chat_template": _OF_TOKENIZER,
    "cutoff_len": _LENGTH,
    "dataset_dir": "the path of the file as `train_data`",
    "dataset_mixer": _MIXTURE,
    "dataset_mixture": _MIXTURE,
    "dataset_prepared_path": _OF_ROWS,
    "dataset_processes": "`dataset_num_proc={}`",
    "dataset_shuffle": "nothing: training takes the rows in an order drawn by `seed`",
    "dataset_splits": "`dataset_train_split` and `dataset_test_split`",
    "double_quantization": "`use_bnb_nested_quant={}`",
    "dpo_beta": "`beta={}`",
    "dpo_ftx": "`loss_type=['sigmoid', 'sft']`, with this number as the second of `loss_weights`",
    "dpo_label_smoothing": "`label_smoothing={}`",
    "dpo_loss_type": "`loss_type={}`",
    "dpo_use_weighting": "`use_weighting={}`",
    "eval_batch_size": "`per_device_eval_batch_size={}`",
    "eval_dataset": "`eval_data={}`",
    "evals_per_epoch": "`eval_steps`: below 1, it is a share of all steps",
    "finetuning_type": "`lora_r` for an adapter; without it all weights are trained",
    "finetuning_type=full": _ALL_WEIGHTS,
    "finetuning_type=lora": _ADAPTER,
    "flash_attention": "`attn_implementation='flash_attention_2'`",
    "flash_attn": "`attn_implementation`",
    "flash_attn=fa2": "`attn_implementation='flash_attention_2'`",
    "flash_attn=sdpa": "`attn_implementation='sdpa'`",
    "hf_hub_token": "`hub_token`",
    "load_from_cache_file": _OF_ROWS,
    "lora_bias": "nothing: biases are not trained beside an adapter",
    "lora_model_dir": "`model={}`: an adapter's folder names its base",
    "lora_rank": "`lora_r={}`",
    "lora_target": "`lora_target_modules={}`",
    "lora_target=all": "`lora_target_modules='all-linear'`",
    "lora_target_linear": "`lora_target_modules='all-linear'`",
    "lr_scheduler": "`lr_scheduler_type={}`",
    "max_samples": "`dataset_train_split='train[:{}]'`",
    "micro_batch_size": "`per_device_train_batch_size={}`",
    "model_type": _OF_MODEL,
    "modules_to_save": "`lora_modules_to_save={}`",
    "neftune_alpha": "`neftune_noise_alpha={}`",
    "num_epochs": "`num_train_epochs={}`",
    "optimizer": "`optim={}`",
    "overwrite_cache": _OF_ROWS,
    "packing": "nothing: rows have no padding wherever the model allows it",
    "pad_to_sequence_len": "nothing: rows have no padding",
    "plot_loss": "`report_to`, with a tracker that draws the curves, such as tensorboard",
    "pref_beta": "`beta={}`",
    "pref_ftx": "`loss_type=['sigmoid', 'sft']`, with this number as the second of `loss_weights`",
    "pref_loss": "`loss_type={}`",
    "pref_loss=kto_pair": _NOT_HERE,
    "pref_loss=orpo": _NOT_HERE,
    "pref_loss=simpo": _NOT_HERE,
    "preprocessing_batch_size": _OF_ROWS,
    "preprocessing_num_workers": "`dataset_num_proc={}`",
    "quantization_bit": "`load_in_4bit=True` or `load_in_8bit=True`",
    "quantization_bit=4": "`load_in_4bit=True`",
    "quantization_bit=8": "`load_in_8bit=True`",
    "quantization_method": "`load_in_4bit=True` or `load_in_8bit=True`, which are bitsandbytes",
    "quant_bits": "`load_in_4bit=True` or `load_in_8bit=True`",
    "quant_bits=4": "`load_in_4bit=True`",
    "quant_bits=8": "`load_in_8bit=True`",
    "quant_method": "`load_in_4bit=True` or `load_in_8bit=True`, which are bitsandbytes",
    "ref_adapters": "`ref_model`, with the adapter's folder",
    "ref_model_adapters": "`ref_model`, with the adapter's folder",
    "ref_model_quantization_bit": "nothing: the reference of a quantized base is that base",
    "rl": _NOT_HERE,
    "rl=dpo": _IS_DPO,
    "rl=ipo": "`loss_type='ipo'`",
    "rl_beta": "`beta={}`",
    "rlhf_type": _NOT_HERE,
    "rlhf_type=dpo": _IS_DPO,
    "sample_packing": "nothing: rows have no padding wherever the model allows it",
    "saves_per_epoch": "`save_steps`: below 1, it is a share of all steps",
    "sequence_len": _LENGTH,
    "shuffle_merged_datasets": "nothing: training takes the rows in an order drawn by `seed`",
    "simpo_gamma": _NOT_HERE,
    "special_tokens": "the tokens in the tokenizer's own folder, which `tokenizer` names",
    "split_dataset_ratio": "`eval_fraction={}`",
    "stage": _NOT_HERE,
    "stage=dpo": _IS_DPO,
    "strict": "nothing: an option that does not exist is always refused",
    "system": "a system message in each row",
    "target_modules": "`lora_target_modules={}`",
    "template": _OF_TOKENIZER,
    "test_datasets": "`eval_data`",
    "tokenized_path": _OF_ROWS,
    "tokenizer_config": "`tokenizer={}`",
    "tokenizer_name_or_path": "`tokenizer={}`",
    "tokenizer_type": _OF_MODEL,
    "train_on_inputs": "nothing: only responses are scored",
    "train_type": "`lora_r` for an adapter; without it all weights are trained",
    "train_type=full": _ALL_WEIGHTS,
    "train_type=lora": _ADAPTER,
    "tuner_type": "`lora_r` for an adapter; without it all weights are trained",
    "tuner_type=full": _ALL_WEIGHTS,
    "tuner_type=lora": _ADAPTER,
    "unfrozen_parameters": "nothing: all weights are trained, or an adapter",
    "use_flash_attention_2": "`attn_implementation='flash_attention_2'`",
    "use_unsloth": "nothing: Tether loads models with transformers",
    "val_dataset": "`eval_data={}`",
    "val_set_size": "`eval_fraction={}`",
    "val_size": "`eval_fraction={}`",
    "wandb_entity": _BY_TRACKER,
    "wandb_log_model": _BY_TRACKER,
    "wandb_name": "`run_name={}`",
    "wandb_project": _BY_TRACKER,
    "wandb_run_id": _BY_TRACKER,
    "wandb_watch": _BY_TRACKER,
    "xformers_attention": "`attn_implementation`",
}

# Names that people write from memory, and ours.
SYNONYMS: dict[str, str] = {
    "accumulation_steps": "`gradient_accumulation_steps={}`",
    "batch": "`per_device_train_batch_size={}`",
    "batch_size": "`per_device_train_batch_size={}`",
    "bs": "`per_device_train_batch_size={}`",
    "epochs": "`num_train_epochs={}`",
    "gguf_file": "`model_init_kwargs={'gguf_file': {}}`",
    "grad_acc_steps": "`gradient_accumulation_steps={}`",
    "grad_accum": "`gradient_accumulation_steps={}`",
    "grad_accum_steps": "`gradient_accumulation_steps={}`",
    "lr": "`learning_rate={}`",
    "train_batch_size": "`per_device_train_batch_size={}`",
    "use_lora": _ADAPTER,
    "use_lora=False": _ALL_WEIGHTS,
}

# Options of `tether train` that are not `DPOConfig`'s, and what Python has for them; `{}` is the value.
_SPLIT = "`dataset.train_test_split({})`, and its parts as `train_dataset` and `eval_dataset` of `DPOTrainer`"
IN_PYTHON: dict[str, str] = {
    "attn_implementation": "`model_init_kwargs={'attn_implementation': {}}`",
    "dataset_name": "`DPOTrainer(train_dataset=load_dataset({}, split='train'))`",
    "dataset_test_split": "`DPOTrainer(eval_dataset=load_dataset(..., split={}))`",
    "dataset_train_split": "`DPOTrainer(train_dataset=load_dataset(..., split={}))`",
    "datasets": "`DPOTrainer(train_dataset=datasets.concatenate_datasets([...]))`",
    "dtype": "`model_init_kwargs={'dtype': {}}`",
    "env": "`os.environ`",
    "eval_data": "`DPOTrainer(eval_dataset=...)`",
    "eval_fraction": _SPLIT,
    "load_in_4bit": "`DPOTrainer(quantization_config=BitsAndBytesConfig(load_in_4bit={}))`",
    "load_in_8bit": "`DPOTrainer(quantization_config=BitsAndBytesConfig(load_in_8bit={}))`",
    "lora_alpha": "`DPOTrainer(peft_config=LoraConfig(lora_alpha={}))`",
    "lora_dropout": "`DPOTrainer(peft_config=LoraConfig(lora_dropout={}))`",
    "lora_modules_to_save": "`DPOTrainer(peft_config=LoraConfig(modules_to_save={}))`",
    "lora_r": "`DPOTrainer(peft_config=LoraConfig(r={}))`",
    "lora_target_modules": "`DPOTrainer(peft_config=LoraConfig(target_modules={}))`",
    "model": "`DPOTrainer({})`",
    "model_name_or_path": "`DPOTrainer({})`",
    "ref_model": "`DPOTrainer(ref_model={})`",
    "test_split_size": _SPLIT,
    "tokenizer": "`DPOTrainer(processing_class=AutoTokenizer.from_pretrained({}))`",
    "train_data": "`DPOTrainer(train_dataset=...)`",
    "use_bnb_nested_quant": "`DPOTrainer(quantization_config=BitsAndBytesConfig(bnb_4bit_use_double_quant={}))`",
    "use_dora": "`DPOTrainer(peft_config=LoraConfig(use_dora={}))`",
    "use_peft": "`DPOTrainer(peft_config=LoraConfig(...))`",
    "use_rslora": "`DPOTrainer(peft_config=LoraConfig(use_rslora={}))`",
}


def written_today(
    name: str, value: Any = None, *, in_python: bool = False, known: Container[str] = ()
) -> tuple[str, str] | None:
    """Why there is no option of this name, and what to write instead; None for a name that nothing is known of.

    Args:
        name: The option.
        value: Its value; None if it is not known.
        in_python: Whether it was written for `DPOConfig` or `DPOTrainer`, which have not all options of a recipe.
        known: The options of a recipe that are known in Python too, such as those of a script's own command line.
    """
    if name in FORMER:
        why, text = "TRL 1.16 and transformers 5 have no such option any more", FORMER[name]
    elif name in OTHER_TOOLS:
        why, text = "it is another tool's option", OTHER_TOOLS.get(f"{name}={value}", OTHER_TOOLS[name])
    elif name in SYNONYMS:
        why, text = "it has another name here", SYNONYMS.get(f"{name}={value}", SYNONYMS[name])
    elif in_python and name in IN_PYTHON:
        why, text = "it is an option of `tether train`", f"`{name}={{}}`"
    else:
        return None
    text = text.replace("={}", "") if value is None else text.replace("{}", shown(value))
    if in_python:
        text = re.sub(r"`(\w+)(?:=([^`]*))?`", lambda found: _as_in_python(found, known), text)
    return why, f"Remove it{text.removeprefix('nothing')}." if text.startswith("nothing:") else f"Write {text}."


def _as_in_python(found: re.Match[str], known: Container[str]) -> str:
    name, value = found.groups()
    is_other = name in IN_PYTHON and name not in known
    return IN_PYTHON[name].replace("{}", value or "...") if is_other else found[0]
