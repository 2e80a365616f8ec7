"""PaddleNLP's argument names: their types, documented defaults, and what becomes of each here.

Five kinds: READ (translated by `paddlenlp.py`), INERT (cannot change a result here), PARALLEL (off in
one process), OFF (a method or behaviour that is refused when switched on), JOBS (arguments of other
scripts, refused by naming the job). Source: the fine-tuning scripts' arguments, versions 2.6.1 to
3.0.0b4. Where the published document and the code differ, the document's default stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


def names(text: str) -> frozenset[str]:
    """Names that stand in a text with white space between."""
    return frozenset(text.split())


# name: (type, documented default); None = no default
READ: dict[str, tuple[type, Any]] = {
    # model and precision
    "model_name_or_path": (str, None),
    "continue_training": (bool, True),
    "hidden_dropout_prob": (float, None),
    "attention_probs_dropout_prob": (float, None),
    "bf16": (bool, False),
    "fp16": (bool, False),
    "fp16_opt_level": (str, "O1"),
    "bf16_full_eval": (bool, False),
    "fp16_full_eval": (bool, False),
    "device": (str, None),
    "no_cuda": (bool, False),
    "lora": (bool, False),
    "lora_path": (str, None),
    "lora_rank": (int, 8),
    "rslora": (bool, False),
    "lora_plus_scale": (float, 1.0),
    "pissa": (bool, False),
    "lora_use_mixer": (bool, False),
    "use_mora": (bool, False),
    "prefix_tuning": (bool, False),
    "prefix_path": (str, None),
    "num_prefix_tokens": (int, 128),
    "vera": (bool, False),
    "vera_rank": (int, 8),
    "lokr": (bool, False),
    "lokr_path": (str, None),
    "lokr_dim": (int, 8),
    "reft": (bool, False),
    "layers": (str, "all"),
    "position": (str, "f7"),
    "intervention_type": (str, "LoreftIntervention"),
    "rank": (int, 8),
    "act_fn": (str, "linear"),
    "add_bias": (bool, False),
    "dropout": (float, 0.0),
    "neftune": (bool, False),
    "neftune_noise_alpha": (float, 5.0),
    # quantised base
    "weight_quantize_algo": (str, None),
    "weight_blocksize": (int, 64),
    "weight_double_quant": (bool, False),
    "weight_double_quant_block_size": (int, 256),
    # data
    "dataset_name_or_path": (str, None),
    "task_name": (str, None),
    "zero_padding": (bool, False),
    "greedy_zero_padding": (bool, False),
    "flash_mask": (bool, False),
    "src_length": (int, 1024),
    "max_length": (int, 2048),
    "lazy": (bool, False),
    "chat_template": (str, None),
    "autoregressive": (bool, False),
    # long sequences
    "use_long_sequence_strategies": (bool, False),
    "strategy_type": (str, None),
    "strategy_name": (str, None),
    "rope_scaling_factor": (float, 1.0),
    "use_pose_convert": (bool, False),
    # pre-training
    "input_dir": (str, None),
    "split": (str, "949,50,1"),
    "max_seq_length": (int, 1024),
    "tokenizer_name_or_path": (str, None),
    "num_hidden_layers": (int, None),
    "min_learning_rate": (float, 1e-5),
    # optimiser
    "learning_rate": (float, 5e-5),
    "weight_decay": (float, 0.0),
    "adam_beta1": (float, 0.9),
    "adam_beta2": (float, 0.999),
    "adam_epsilon": (float, 1e-8),
    "max_grad_norm": (float, 1.0),
    "optim": (str, "adamw"),
    "lr_scheduler_type": (str, "linear"),
    "warmup_ratio": (float, 0.0),
    "warmup_steps": (int, 0),
    "num_cycles": (float, 0.5),
    "lr_end": (float, 1e-7),
    "power": (float, 1.0),
    "decay_steps": (int, 0),
    # course of the run
    "do_train": (bool, None),
    "do_eval": (bool, False),
    "do_predict": (bool, False),
    "per_device_train_batch_size": (int, 8),
    "per_device_eval_batch_size": (int, 8),
    "gradient_accumulation_steps": (int, 1),
    "num_train_epochs": (float, 3.0),
    "max_steps": (int, -1),
    "seed": (int, 42),
    "recompute": (bool, False),
    "recompute_granularity": (str, "full"),
    "refined_recompute": (str, ""),
    # evaluation
    "evaluation_strategy": (str, "no"),
    "eval_steps": (int, None),
    "max_evaluate_steps": (int, -1),
    "eval_with_do_generation": (bool, False),
    "save_generation_output": (bool, False),
    "top_k": (int, 1),
    "top_p": (float, 1.0),
    # checkpoints and logs
    "output_dir": (str, None),
    "overwrite_output_dir": (bool, False),
    "resume_from_checkpoint": (str, None),
    "save_strategy": (str, "no"),
    "save_steps": (int, 500),
    "save_total_limit": (int, None),
    "load_best_model_at_end": (bool, False),
    "metric_for_best_model": (str, None),
    "greater_is_better": (bool, None),
    "logging_strategy": (str, "steps"),
    "logging_steps": (int, 500),
    "report_to": (list, None),
}

# where the code's default is another one than the published document's
CODE_DEFAULTS = {
    "learning_rate": "2e-5 from 3.0.0b3 on",
    "num_train_epochs": "1",
    "save_strategy": "steps",
}

ALIASES = {
    "intokens": "zero_padding",
    "task_name_or_path": "dataset_name_or_path",
    "lokr_rank": "lokr_dim",
    "shift_all_linear": "shift_all_linears",
    "use_shift_sparse_attention": "use_ssa",
    "eval_step": "eval_steps",  # PaddleNLP's parser takes unique beginnings; its own files use these two
    "save_step": "save_steps",
}
LEGACY = ("intokens", "task_name_or_path")  # spelt so only by versions without a default template

INERT = names("""
    use_fast_layer_norm fuse_attention_qkv fuse_attention_ffn use_quick_lora
    use_flash_attention use_fused_rms_norm use_fused_rope use_fused_linear use_fused_dropout_add
    use_fused_linear_cross_entropy fuse_sequence_parallel_allreduce recompute_use_reentrant
    no_recompute_layers pp_recompute_interval offload_recompute_inputs
    pad_to_multiple_of pad_to_max_length pad_token_id dataset_text_field dataset_num_proc
    dataset_batch_size eval_packing
    unified_checkpoint unified_checkpoint_config ckpt_quant_stage use_async_save ordered_save_group_size
    save_sharded_model load_sharded_model save_sharding_stage1_model_include_freeze_params force_reshard_pp
    ignore_save_lr_and_optim save_on_each_node pdc_download_ckpt pdc_download_timeout output_signal_dir to_static
    disable_tqdm run_name logging_dir logging_first_step log_on_each_node metrics_output_path
    skip_memory_metrics skip_profile_timer count_trained_tokens benchmark
    dataloader_num_workers distributed_dataloader lazy_data_processing remove_unused_columns label_names
    past_index prediction_loss_only eval_accumulation_steps local_rank flatten_param_grads
    release_grads offload_optim scale_loss amp_master_grad
    from_aistudio aistudio_repo_id aistudio_repo_private aistudio_repo_license aistudio_token
    ssa_group_size_ratio
    quant_type fp8_type skip_list_names weight_quant_method act_quant_method cachekv_quant_method
    search_alpha_min search_alpha_max search_scale_min search_scale_max ptq_step
    shift shift_all_linears shift_sampler shift_step smooth smooth_all_linears smooth_sampler smooth_step
    smooth_piecewise_search smooth_k_piece smooth_search_piece gptq_step auto_clip awq_step autoclip_step
    do_quant_debug test_sample use_fp8
    share_folder skip_warmup data_cache enable_linear_fused_grad_add parallel_mode
    """)

# settings of several processes, with the value at which each one is off
PARALLEL: dict[str, Any] = {
    "sharding": "",
    "sharding_degree": 1,
    "sharding_parallel_degree": 1,
    "sharding_parallel_mesh_dimension": "dp",
    "sharding_comm_buffer_size_MB": -1,
    "data_parallel_degree": 1,
    "tensor_parallel_degree": 1,
    "tensor_parallel_rank": 0,
    "tensor_parallel_output": False,
    "pipeline_parallel_degree": 1,
    "virtual_pp_degree": 1,
    "sep_parallel_degree": 1,
    "context_parallel_degree": 1,
    "sequence_parallel": False,
    "expert_parallel_degree": 1,
    "expert_tensor_parallel_degree": 1,
    "use_expert_parallel": False,
    "expert_max_capacity": 2**32,
    "expert_min_capacity": 1,
    "hybrid_parallel_topo_order": "pp_first",
    "split_inputs_sequence_dim": True,
    "ddp_find_unused_parameters": False,
    "data_parallel_config": "",
    "sequence_parallel_config": "",
    "tensor_parallel_config": "",
    "pipeline_parallel_config": "",
    "sharding_parallel_config": "",
}


@dataclass(frozen=True)
class Switch:
    """A key that is accepted at `off` and refused otherwise."""

    kind: type
    off: Any
    why: str
    do: str


_LATER = "is not there yet"
_QUANTISE = "fine-tune without it; compress the result with another tool for now"

OFF: dict[str, Switch] = {
    "data_impl": Switch(
        str, "mmap", "only memory-mapped token files are read", "write them with data_impl=mmap"
    ),
    "rslora_plus": Switch(
        bool, False, "fine-tuning never had it", "give rslora=true and lora_plus_scale"
    ),
    "rope_scaling_type": Switch(
        str,
        None,
        "no PaddleNLP version reads this key",
        "give use_long_sequence_strategies with a strategy_name",
    ),
    "use_ssa": Switch(bool, False, f"shifted sparse attention {_LATER}", "leave it out"),
    "do_ptq": Switch(bool, False, f"quantisation after training {_LATER}", _QUANTISE),
    "do_gptq": Switch(bool, False, f"GPTQ {_LATER}", _QUANTISE),
    "do_awq": Switch(bool, False, f"AWQ {_LATER}", _QUANTISE),
    "do_qat": Switch(bool, False, "quantisation-aware training is not supported", _QUANTISE),
    "load_quant_model": Switch(
        bool, False, f"reading PaddleNLP's quantised models {_LATER}", _QUANTISE
    ),
    "do_export": Switch(
        bool, False, f"static export {_LATER}", "the result is a Hugging Face folder; luthier merge"
    ),
    "autotuner_benchmark": Switch(
        bool, False, "it trains random weights for 5 steps", "leave it out; give max_steps=5"
    ),
    "save_to_aistudio": Switch(
        bool, False, "uploading is not supported", "upload the output folder"
    ),
    "ignore_data_skip": Switch(
        bool, False, "a resumed run always goes on at its place in the data", "leave it out"
    ),
    "ignore_load_lr_and_optim": Switch(
        bool,
        False,
        "a resumed run always restores its optimiser",
        "start a run from the model instead",
    ),
    "minimum_eval_times": Switch(int, None, "it is not supported", "give eval_steps"),
    "skip_data_intervals": Switch(
        list, None, "it is not supported", "remove the rows from the data"
    ),
    "dataloader_drop_last": Switch(
        bool, False, "the rows of an incomplete last batch are always trained", "leave it out"
    ),
    "amp_custom_black_list": Switch(
        list, None, "lists of operators name Paddle's", "leave it out: torch.autocast's lists hold"
    ),
    "amp_custom_white_list": Switch(
        list, None, "lists of operators name Paddle's", "leave it out: torch.autocast's lists hold"
    ),
    "enable_auto_parallel": Switch(bool, False, "it is Paddle's static planner", "leave it out"),
    "model_init_kwargs": Switch(str, None, "it is not supported", "edit the model's config.json"),
    "dataset_kwargs": Switch(str, None, "it is not supported", "leave it out"),
}

# jobs of other scripts: (name, their own arguments); the first whose arguments appear is named
JOBS: tuple[tuple[str, frozenset[str]], ...] = (
    (
        "training an embedding model",
        names("max_passage_len max_query_len group_size"),
    ),
    (
        "PPO",
        names("""
            actor_model_name_or_path reward_model_name_or_path critic_learning_rate critic_weight_decay
            critic_lr_scheduler_type critic_warmup_ratio critic_recompute ptx_datasets ptx_coeff kl_coeff
            clip_range_ratio clip_range_score clip_range_value update_iters per_device_prompt_batch_size
            num_return_sequences normalize_reward eval_mode offload_level
            """),
    ),
    (
        "training a reward model (RM)",
        names(
            "normalize_score_during_training normalizer_type normalizer_momentum regularization "
            "train_datasets eval_datasets"
        ),
    ),
    ("SimPO preference training", frozenset({"simpo_gamma"})),
    (
        "DPO preference training",
        names(
            "loss_type label_smoothing sft_loss_ratio pref_loss_ratio ref_model_update_steps "
            "reference_free dpo_beta dpo_loss_type dpo_label_smoothing dpo_sft_loss_ratio"
        ),
    ),
    (
        "preference training (DPO, KTO or RM)",
        names(
            "train_dataset_path dev_dataset_path max_seq_len max_prompt_len beta desirable_weight "
            "undesirable_weight use_attn_mask_start_row_indices"
        ),
    ),
    (
        "scoring C-Eval (run_quantization.py)",
        names(
            "do_ceval ceval_data_path constrained_decoding cot do_save_csv do_test few_shot n_times "
            "ntrain with_prompt"
        ),
    ),
    (
        "prediction or serving (predictor.py; here: luthier predict)",
        names("""
            model_prefix min_length temperature repetition_penalty decode_strategy dtype export_precache mode
            inference_model avx_model avx_type avx_cachekv_type batch_size use_fake_parameter block_attn block_size
            append_attn cachekv_int8 cachekv_int8_type total_max_length speculate_method
            speculate_max_draft_token_num speculate_max_ngram_size speculate_verify_window
            speculate_max_candidate_len model_type data_file output_file port flask_port base_port title sub_title
            """),
    ),
)

NAMES: frozenset[str] = frozenset().union(
    READ, ALIASES, INERT, PARALLEL, OFF, *(own for _, own in JOBS)
)
