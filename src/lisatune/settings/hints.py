"""What users of other tools type, and the name that we use."""

from __future__ import annotations

# TRL and transformers, axolotl, LLaMA-Factory, ms-swift, LMFlow, unsloth
OUR_NAME: dict[str, str] = {
    **dict.fromkeys(
        ("model_name_or_path", "base_model", "model_name", "model_id_or_path", "pretrained_model"), "model"
    ),
    **dict.fromkeys(
        ("dataset", "datasets", "dataset_name", "dataset_path", "data_path", "data_files", "train_file", "train_data"),
        "data",
    ),
    **dict.fromkeys(("output_dir", "output_path", "save_dir", "out_dir"), "output"),
    **dict.fromkeys(("flash_attn", "flash_attention", "attn_impl"), "attn_implementation"),
    **dict.fromkeys(("finetuning_type", "tuner_type", "train_type", "sft_type", "adapter", "peft_type"), "method"),
    **dict.fromkeys(("lisa_activated_layers", "lisa_n_layers", "lisa_layers", "n_layers", "gamma"), "num_active"),
    **dict.fromkeys(
        ("lisa_interval_steps", "lisa_step_interval", "lisa_interval", "switch_block_every"), "interval_steps"
    ),
    **dict.fromkeys(("lisa_layers_attribute", "layers_attribute"), "decoder_name"),
    **dict.fromkeys(
        ("cutoff_len", "max_seq_length", "max_seq_len", "sequence_len", "block_size", "model_max_length"), "max_length"
    ),
    **dict.fromkeys(
        ("early_stopping_patience", "early_stopping_steps", "patience", "early_stop_patience"), "early_stopping"
    ),
    **dict.fromkeys(("load_best_model_at_end", "save_best", "load_best"), "keep_best"),
    **dict.fromkeys(("lr", "max_lr", "peak_lr"), "learning_rate"),
    **dict.fromkeys(("bf16", "fp16", "torch_dtype", "tf32", "precision", "pure_bf16", "mixed_precision"), "dtype"),
    **dict.fromkeys(
        ("micro_batch_size", "batch_size", "train_batch_size", "per_gpu_train_batch_size"),
        "per_device_train_batch_size",
    ),
    **dict.fromkeys(("grad_accum", "accumulation_steps", "gradient_accumulation"), "gradient_accumulation_steps"),
    **dict.fromkeys(("num_epochs", "epochs", "n_epochs"), "num_train_epochs"),
    **dict.fromkeys(("steps", "max_iters", "num_steps", "total_steps"), "max_steps"),
    **dict.fromkeys(("lr_scheduler", "scheduler", "lr_schedule"), "lr_scheduler_type"),
    **dict.fromkeys(("warmup", "num_warmup_steps", "warmup_iters"), "warmup_steps"),
    **dict.fromkeys(("warmup_proportion", "warmup_fraction"), "warmup_ratio"),
    **dict.fromkeys(("lr_scheduler_args", "scheduler_kwargs", "scheduler_specific_kwargs"), "lr_scheduler_kwargs"),
    **dict.fromkeys(("cosine_min_lr_ratio", "min_lr", "lr_min", "lr_end"), "lr_scheduler_kwargs"),
    **dict.fromkeys(("optimizer", "optimizer_type", "customized_optim", "use_customized_optim"), "optim"),
    **dict.fromkeys(("clip_grad", "gradient_clipping", "grad_clip", "clip_grad_norm"), "max_grad_norm"),
    **dict.fromkeys(("beta1",), "adam_beta1"),
    **dict.fromkeys(("beta2",), "adam_beta2"),
    **dict.fromkeys(
        ("log_with", "use_wandb", "use_tensorboard", "use_swanlab", "use_mlflow", "use_comet"), "report_to"
    ),
    **dict.fromkeys(
        (
            "wandb_project",
            "project_name",
            "swanlab_project",
            "trackio_project",
            "mlflow_experiment_name",
            "comet_project_name",
        ),
        "project",
    ),
    **dict.fromkeys(("wandb_name", "wandb_run_name", "experiment_name", "tracker_run_name"), "run_name"),
    **dict.fromkeys(("log_every", "log_steps", "log_interval"), "logging_steps"),
    **dict.fromkeys(("save_strategy", "saves_per_epoch", "save_interval", "checkpoint_every"), "save_steps"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy", "evals_per_epoch", "eval_interval"), "eval_steps"),
    **dict.fromkeys(("val_set_size", "val_size", "validation_split_percentage", "split_dataset_ratio"), "eval_rows"),
    **dict.fromkeys(
        ("eval_dataset", "test_datasets", "val_dataset", "validation_file", "eval_dataset_path"), "eval_data"
    ),
    **dict.fromkeys(
        ("train_on_inputs", "train_on_input", "train_on_prompt", "train_on_source"), "completion_only_loss"
    ),
    **dict.fromkeys(("mask_history", "assistant_only_loss", "roles_to_train", "train_on_eos", "loss_scale"), "loss_on"),
    **dict.fromkeys(
        (
            "shuffle_dataset",
            "shuffle_merged_datasets",
            "disable_shuffling",
            "dataset_shuffle",
            "train_dataloader_shuffle",
        ),
        "shuffle",
    ),
    **dict.fromkeys(("sample_packing", "neat_packing", "group_texts", "pack"), "packing"),
    **dict.fromkeys(
        ("template", "conversation_template", "chat_template_path", "chat_template_jinja"), "chat_template"
    ),
    **dict.fromkeys(("truncation_mode", "truncation_strategy", "truncation"), "excess_length_strategy"),
    **dict.fromkeys(
        ("message_property_mappings", "field_messages", "field", "column_mapping", "formatting"), "columns"
    ),
    **dict.fromkeys(("role_mapping", "tags", "message_field_role"), "roles"),
    **dict.fromkeys(("split", "train_split", "dataset_train_split"), "dataset_split"),
    **dict.fromkeys(("subset", "dataset_config_name", "config_name"), "dataset_config"),
    **dict.fromkeys(("preprocessing_num_workers", "num_proc", "dataset_processes", "num_workers"), "dataset_num_proc"),
    **dict.fromkeys(("tokenized_path", "cache_dir", "cached_dataset", "packing_cache"), "dataset_prepared_path"),
    **dict.fromkeys(("interleave_probs", "mix_strategy", "probs"), "data"),
    **dict.fromkeys(("lora_rank", "r", "rank", "peft_r"), "lora_r"),
    **dict.fromkeys(("alpha", "peft_alpha"), "lora_alpha"),
    **dict.fromkeys(("lora_target", "target_modules", "lora_target_linear"), "lora_target_modules"),
    **dict.fromkeys(("use_rslora", "use_dora"), "lora_use_rslora or lora_use_dora"),
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "zero_stage"), "dp_shard_size"),
    **dict.fromkeys(("activation_checkpointing", "use_gradient_checkpointing"), "gradient_checkpointing"),
    **dict.fromkeys(("compile",), "torch_compile"),
    **dict.fromkeys(("random_seed", "data_seed"), "seed"),
    **dict.fromkeys(("dataset_dir",), "data"),
    **dict.fromkeys(("logging_dir",), "output"),
    **dict.fromkeys(("device_map",), "device"),
    **dict.fromkeys(("seq_length", "seq_len", "max_prompt_length", "max_completion_length"), "max_length"),
    **dict.fromkeys(("badam_switch_interval", "switch_interval"), "interval_steps"),
    **dict.fromkeys(("freeze_trainable_layers",), "num_active"),
    **dict.fromkeys(
        ("dataset_text_field", "dataset_prompt_field", "text_column", "prompt_column", "response_column"), "columns"
    ),
    **dict.fromkeys(("stage", "rlhf_type", "rl", "rlhf"), "task"),
    **dict.fromkeys(("pref_beta", "rl_beta", "dpo_beta", "kto_beta", "orpo_beta"), "beta"),
}
# what has no setting here, and why or what to do instead
ADVICE: dict[str, str] = {
    "use_lisa": "LISA is the default: method=lisa",
    "resume_from_checkpoint": "add --resume instead",
    "auto_resume_from_checkpoints": "add --resume instead",
    **dict.fromkeys(
        ("metric_for_best_model", "greater_is_better"),
        "the best has the highest mean score on eval_tasks, or without them the lowest loss of the first held-out set",
    ),
    "early_stopping_threshold": "each evaluation that is better counts: leave it out",
    "overwrite_output_dir": "nothing is overwritten: choose another output",
    "overwrite_cache": "a cache is used only for the very same data and settings",
    **dict.fromkeys(
        ("load_in_4bit", "load_in_8bit", "quantization_bit", "quant_bits", "qlora", "quantization_config"),
        "weights are trained whole: to save memory see lisatune plan --gpu-memory 24GiB",
    ),
    **dict.fromkeys(("do_train", "remove_unused_columns", "strict"), "it is not needed: leave it out"),
    **dict.fromkeys(
        ("use_liger_kernel", "liger_kernel", "enable_liger_kernel", "liger_cross_entropy"),
        "the loss never holds all logits at once, and torch_compile=true fuses the small kernels of a layer: leave it out",
    ),
    **dict.fromkeys(
        ("train_sampling_strategy", "group_by_modality_length"),
        "set group_by_length=true, shuffle=false, or leave it out",
    ),
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_token"), "nothing is uploaded: upload the run's folder model/ yourself"
    ),
    **dict.fromkeys(
        (
            "eos_token",
            "pad_token",
            "special_tokens",
            "added_tokens",
            "resize_vocab",
            "tokenizer_name",
            "tokenizer_name_or_path",
        ),
        "tokens are those of the model's own tokenizer",
    ),
    **dict.fromkeys(
        ("chat_template_kwargs", "enable_thinking"),
        "give each row a column chat_template_kwargs, as {enable_thinking: false}",
    ),
    **dict.fromkeys(
        ("max_samples", "max_train_samples", "num_train_samples"),
        "all rows are used: give a smaller file, or set max_steps",
    ),
}


def hint_for(name: str) -> str:
    """A hint at our name for a setting of another tool; nothing if it is of none that we know.

    Example:
        >>> hint_for("cutoff_len")
        "; its name here is 'max_length'"
    """
    plain = name.lstrip("-").replace("-", "_").lower()
    if plain in ADVICE:
        return f"; {ADVICE[plain]}"
    return f"; its name here is '{OUR_NAME[plain]}'" if plain in OUR_NAME else ""
