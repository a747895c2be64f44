"""The names of vLLM 0.32 that mean nothing here, each with what to use instead. Data for messages and the reference.

They are the public fields of `EngineArgs` and `SamplingParams` and the arguments of the methods of `LLM` and
`AsyncLLM`, which `tests/fixtures/vllm_names.json` lists, and what was much used in earlier versions. What means the
same in both is not here. Nothing is translated in silence.
"""

from collections.abc import Mapping

_NO_IMAGES = "leave it out: models take text only"
_LORA = "merge the adapter into the weights first: adapters are not supported yet"
_EXPERTS = "leave it out: how experts are computed cannot be chosen"
_GRAMMAR = "use structured_outputs=StructuredOutputsParams(...) of SamplingParams: llguidance is what keeps to it"
_REASONING = "leave it out: `LLM.chat` reads an answer into its parts, by the engine's reasoning_parser"
_LOGS = "leave it out: `LLM.metrics()` has counts and latencies, and decision_log writes a file"
_WATERMARK = "leave it out: texts carry no watermark"
_BEAMS = "use `LLM.beam_search`"


def _by_name(groups: Mapping[str, str]) -> dict[str, str]:
    """Turn what to do, with the names for which that is so, into what to do by name."""
    return {name: instead for instead, names in groups.items() for name in names.split()}


# Options of an engine. `__init__` of `LLM` has them all.
ENGINE: Mapping[str, str] = _by_name(
    {
        # Devices, processes and parallelism.
        "use topology: both=1xtp2 is one mesh of two devices, prefill=1,decode=1 keeps the phases apart": (
            "tensor_parallel_size pipeline_parallel_size prefill_context_parallel_size "
            "decode_context_parallel_size dcp_comm_backend dcp_q_replicate dcp_kv_cache_interleave_size "
            "cp_kv_cache_interleave_size enable_hc_sp enable_batch_sharded_sampling performance_mode"
        ),
        "use topology, such as both=2 or prefill=2,decode=2": "data_parallel_size",
        "use topology, such as prefill=1,decode=1": "kv_transfer_config",
        "use workers, which puts each mesh into a process of its own": "distributed_executor_backend",
        "use worker_timeout": "distributed_timeout_seconds cpu_distributed_timeout_seconds",
        "leave it out: an engine is one process, which drives all devices of a machine, or with workers its driver": (
            "worker_cls worker_extension_cls master_addr master_port nnodes node_rank "
            "data_parallel_rank data_parallel_start_rank "
            "data_parallel_size_local data_parallel_address data_parallel_rpc_port data_parallel_hybrid_lb "
            "data_parallel_external_lb data_parallel_multi_port_external_lb data_parallel_backend dp_sync_interval "
            "disable_nccl_for_dp_synchronization enable_nccl_comm_suspend enable_elastic_ep elastic_ep_max_dp_size "
            "enable_fault_tolerance fault_tolerance_config enable_shm_tensor_arena ray_workers_use_nsight"
        ),
        "use topology, such as both=1xtp4ep4": "enable_expert_parallel",
        "use devices": "device_ids",
        "use devices, or set JAX_PLATFORMS": "device",
        "start the program with numactl, which binds a process": "numa_bind numa_bind_nodes numa_bind_cpus",
        _EXPERTS: (
            "enable_ep_weight_filter moe_backend all2all_backend enable_eplb eplb_config expert_placement_strategy "
            "enable_dbo ubatch_size dbo_decode_token_threshold dbo_prefill_token_threshold enable_return_routed_experts"
        ),
        # Memory and the KV cache.
        "use memory_fraction, or kv_cache_bytes for an exact size": "gpu_memory_utilization",
        "use kv_cache_bytes": "kv_cache_memory_bytes num_gpu_blocks_override",
        "use page_size": "block_size",
        "leave it out: every token's scale is computed when it is stored": "calculate_kv_scales",
        "leave it out: all layers of a mesh store KV alike": "kv_cache_dtype_skip_layers",
        "leave it out: weights and KV stay on the devices": (
            "swap_space cpu_offload_gb cpu_offload_params offload_backend offload_group_size offload_num_in_group "
            "offload_prefetch_step offload_params kv_offloading_size kv_offloading_backend"
        ),
        "leave it out: prefixes are known by blake2b of all their tokens": "prefix_caching_hash_algo",
        "leave it out: finished prompts stay cached, in whole pages, until their memory is needed": (
            "prefix_cache_retention_interval prefix_match_unit"
        ),
        "leave it out: layers with a window have pages of their own": (
            "disable_hybrid_kv_cache_manager swa_bounded_replay"
        ),
        "close the engine, and make another one later": (
            "enable_sleep_mode sleep_mode_offload_cudagraph sleep_preserve_parameter_names enable_cumem_allocator"
        ),
        # Scheduling.
        "use prefill_buckets: the last one is the chunk size, in tokens of a step": (
            "max_num_batched_tokens max_num_scheduled_tokens enable_chunked_prefill long_prefill_token_threshold "
            "long_prefill_token_threshold_adaptive max_num_partial_prefills max_long_partial_prefills"
        ),
        "use max_num_seqs": "max_num_active_seqs",
        "bound them where they come from: an engine takes every request": "max_num_queued_reqs max_num_queued_tokens",
        "use policy: fcfs, or spf for the shortest prompt first": "scheduling_policy",
        "use policy, which may be an object of your own": "scheduler_cls",
        "leave it out: steps are always dispatched ahead": "async_scheduling prefill_schedule_interval",
        "leave it out: pages are given out as requests grow": "scheduler_reserve_full_isl watermark",
        "leave it out: a request moves to another mesh where one has room, and is computed again else": (
            "preemption_mode"
        ),
        "use decode_steps": "num_scheduler_steps",
        "use output_kind of SamplingParams, or decode_steps": "stream_interval",
        "leave it out: `close` aborts what runs": "shutdown_timeout",
        # Programs and kernels.
        "leave it out: every program is compiled at start-up, for the sizes in prefill_buckets and decode_buckets": (
            "enforce_eager compilation_config cuda_graph_sizes cudagraph_capture_sizes max_cudagraph_capture_size "
            "max_seq_len_to_capture optimization_level"
        ),
        "leave it out: the kernels are chosen by the device": (
            "disable_custom_all_reduce attention_backend attention_config disable_cascade_attn linear_backend "
            "sparse_indexer_topk_backend kernel_config enable_flashinfer_autotune ir_op_priority "
            "kv_sharing_fast_prefill use_fp64_gumbel"
        ),
        # The model's files.
        "leave it out: a checkpoint's own files say how its weights are stored": (
            "quantization_config allow_deprecated_quantization config_format hf_config_path "
            "safetensors_load_strategy safetensors_prefetch_num_threads safetensors_prefetch_block_size "
            "model_loader_extra_config ignore_patterns pt_load_map_location"
        ),
        "leave it out: files say how they store weights; there are no random ones, `LLM.update_params` replaces them": (
            "load_format"
        ),
        "leave it out: model is where the weights are": "model_weights",
        "use progress": "use_tqdm_on_load",
        "use hf_overrides": "rope_scaling rope_theta",
        "leave it out: attention windows are the model's": "disable_sliding_window",
        "leave it out: the defaults of SamplingParams are its own": "generation_config override_generation_config",
        "leave it out: the tokenizer is the one in the model's files": "tokenizer tokenizer_mode",
        "write it into the model's name, as in org/name@revision": "revision tokenizer_revision",
        "leave it out; token ids are prompts, and detokenize=False in SamplingParams makes no text": (
            "skip_tokenizer_init tokens_only"
        ),
        "leave it out: prompts are texts or token ids": "enable_prompt_embeds",
        "leave it out: no code of a model is ever run": "trust_remote_code code_revision model_class_overrides",
        "set HF_HOME, where the hub's library keeps its files": "download_dir",
        "set HF_TOKEN, which the hub's library reads": "hf_token",
        "leave it out: an engine has one model": "served_model_name",
        "put chat_template.jinja into the model's directory": "chat_template",
        "leave it out: families have one implementation each": "model_impl",
        "leave it out: tensors are read one at a time, whatever the model's size": "max_parallel_loading_workers",
        "use `LLM.update_params`": "weight_transfer_config",
        "leave it out: models of this kind are not supported": (
            "mamba_config mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size mamba_cache_mode mamba_backend "
            "mamba_ssu_algorithm mamba_cache_philox_rounds enable_mamba_cache_stochastic_rounding "
            "enable_mamba_shared_prefix_checkpoint use_replayssm replayssm_buffer_len gdn_prefill_backend "
            "kda_prefill_backend kda_decode_backend engram_config diffusion_config"
        ),
        # What is generated.
        "leave it out: outputs are tokens, texts and log-probabilities": "return_sampling_mask aux_output_config",
        "leave it out: trace_decode_token_ids of SamplingParams needs nothing else": "enable_trace_replay",
        "use allowed_token_ids, bad_words and logit_bias of SamplingParams": (
            "logits_processors logits_processor_pattern"
        ),
        _GRAMMAR: "structured_outputs_config guided_decoding_backend",
        _REASONING: "reasoning_parser_plugin reasoning_config",
        "leave it out: there is no speculative decoding yet; decode_steps runs several steps at a time, and "
        "`LLM.hidden_states` gives hidden states": (
            "speculative_config speculative_model num_speculative_tokens spec_method spec_model spec_tokens"
        ),
        _WATERMARK: "watermark_config",
        _LORA: (
            "enable_lora max_loras max_lora_rank lora_modules default_mm_loras fully_sharded_loras max_cpu_loras "
            "lora_dtype lora_target_modules enable_tower_connector_lora specialize_active_lora "
            "enable_mixed_moe_lora_format enable_moe_shared_loras max_lora_cls_labels"
        ),
        _NO_IMAGES: (
            "limit_mm_per_prompt mm_processor_kwargs allowed_local_media_path allowed_media_domains "
            "language_model_only enable_mm_embeds interleave_mm_strings media_io_kwargs mm_processor_cache_gb "
            "mm_processor_cache_type mm_hasher_algorithm mm_shm_cache_max_object_size_mb mm_encoder_only "
            "mm_encoder_tp_mode mm_encoder_attn_backend mm_encoder_attn_dtype mm_encoder_fp8_scale_path "
            "mm_encoder_fp8_scale_save_path mm_encoder_fp8_scale_save_margin skip_mm_profiling video_pruning_rate "
            "video_pruning_method mm_tensor_ipc mm_processor_device mm_ipc_gpu_memory_gb mm_device_do_normalize "
            "disable_chunked_mm_input enable_mm_processor_stats ec_transfer_config ec_manager_config"
        ),
        "leave it out: models generate, `LLM.embed` gives embeddings, `LLM.score` log-probabilities of texts": (
            "task runner convert pooler_config override_pooler_config"
        ),
        # The process.
        "leave it out: texts of a list are tokenised on every core": "renderer_num_workers",
        "leave it out: there are no plug-ins": "io_processor_plugin additional_config",
        "leave it out: no variable of vLLM's is read": "fail_on_environ_validation",
        _LOGS: (
            "disable_log_stats disable_log_requests enable_log_requests aggregate_engine_logging logging_config "
            "log_level log_config_file show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces "
            "per_request_spec_decode_metrics kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets "
            "cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics enable_logging_iteration_details "
            "jit_monitor_mode jit_monitor_verbose profiler_config kv_events_config"
        ),
    }
)
# Of these, what says how vLLM is deployed, and is left out: it changes neither answers nor memory here.
IGNORED = frozenset(
    """
    enforce_eager compilation_config cuda_graph_sizes cudagraph_capture_sizes max_cudagraph_capture_size
    max_seq_len_to_capture optimization_level disable_custom_all_reduce attention_backend enable_flashinfer_autotune
    disable_cascade_attn swap_space disable_log_stats disable_log_requests enable_log_requests
    aggregate_engine_logging show_hidden_metrics_for_version kv_cache_metrics cudagraph_metrics jit_monitor_mode
    jit_monitor_verbose enable_logging_iteration_details per_request_spec_decode_metrics enable_chunked_prefill
    async_scheduling max_parallel_loading_workers ray_workers_use_nsight renderer_num_workers served_model_name
    trust_remote_code safetensors_load_strategy use_fp64_gumbel
    disable_hybrid_kv_cache_manager performance_mode fail_on_environ_validation shutdown_timeout model_impl
    prefix_caching_hash_algo config_format enable_trace_replay
    """.split()  # noqa: SIM905
)
SAMPLING: Mapping[str, str] = _by_name(
    {
        "use n, and take the completion with the highest cumulative_logprob": "best_of",
        _BEAMS: "use_beam_search length_penalty early_stopping",
        "use structured_outputs=StructuredOutputsParams(...)": "guided_decoding",
        "use allowed_token_ids, bad_words and logit_bias": "logits_processors",
        "cut the prompt's token ids: `LLM.get_tokenizer()` makes them": "truncate_prompt_tokens",
        "leave it out: no supported tokenizer adds any": "spaces_between_special_tokens",
        "use enable_prefix_caching=False of LLM": "skip_reading_prefix_cache",
        "use max_tokens, or stop": "thinking_token_budget",
        "use repetition_penalty, presence_penalty or frequency_penalty": "repetition_detection",
        "leave it out: log-probabilities are a dict a token": "flat_logprobs",
        "use `LLM.score`, one continuation for each token": "prompt_logprob_token_ids",
        "use prompt_logprobs, which begin with the prompt": "prompt_logprob_start",
        "use output_kind, or decode_steps of LLM": "stream_interval",
        "leave it out: a request has a copy of its own, which is made in no time": "skip_clone",
        "leave it out: a stop string's beginning is held back by itself": "output_text_buffer_length",
        _EXPERTS: "routed_experts_prompt_start",
        _WATERMARK: "watermarking",
        "leave it out: there are no plug-ins": "extra_args",
    }
)
# Arguments of methods that start requests.
GENERATE: Mapping[str, str] = _by_name(
    {
        "give token ids as prompts": "prompt_token_ids",
        'give {"prompt": text, "prompt_token_ids": ids} as the prompt': "prompt_text",
        _LORA: "lora_request prompt_adapter_request",
        _GRAMMAR: "guided_options_request",
        "cut or encode the prompt yourself: `get_tokenizer()` has the tokenizer": "tokenization_kwargs",
        _NO_IMAGES: "mm_processor_kwargs multi_modal_data",
        "leave it out: the template's own form is found out": "chat_template_content_format",
        _LOGS: "trace_headers",
        "leave it out: requests go where they start first": "data_parallel_rank",
        "use session": "session_id",
        "leave it out: a prompt that starts as an earlier one is known by its tokens": "kv_hints",
        _REASONING: "reasoning_ended reasoning_parser_kwargs",
        "use sampling_params": "params",
        "leave it out: a request arrives when this is called": "arrival_time",
    }
)
# Methods of `LLM` and `AsyncLLM`.
METHODS: Mapping[str, str] = _by_name(
    {
        "models generate, and have no heads that classify": "classify reward",
        "close the engine, and make another one later": "sleep wake_up is_sleeping",
        "parameters are replaced by update_params, and neither functions nor methods are sent to workers": (
            "collective_rpc apply_model reload_weights load_model"
        ),
        "use update_params": (
            "init_weight_transfer_engine start_weight_update update_weights finish_weight_update "
            "shutdown_weight_transfer_engine"
        ),
        "merge the adapter into the weights first": "add_lora remove_lora list_loras pin_lora",
        "models take text only": "reset_mm_cache reset_encoder_cache transcribe",
        "use add_request and step": "enqueue enqueue_chat wait_for_completion",
        "read `engine.config`, which has lengths, buckets and modes": "vllm_config model_config get_vllm_config",
        "an engine has no processes of its own": "model_executor engine_core renderer",
        "use tokenizer": "set_tokenizer",
        "use metrics, metrics_text or get_metrics": "do_log_stats is_tracing_enabled",
    }
)
