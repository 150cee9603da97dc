"""Flags of LightLLM and vLLM that are no settings here: those that change nothing are taken, and answered with the
reason; those that ask for what is not there end the start with it, but for the values that ask for nothing.

Each is written with the placeholder of its argument, `...` behind it where it takes several; without one it takes none.
"""

from collections.abc import Iterator
from typing import NamedTuple


class PeerFlag(NamedTuple):
    unit: str
    reason: str
    values: tuple[str, ...] = ()
    """Of a flag that is taken: all that it has there, where they are few; of one that is refused: those that ask for
    nothing."""

    @property
    def several(self) -> bool:
        return self.unit.endswith("...")


_NO_EFFECT = {
    "code from a checkpoint is never executed": "trust_remote_code",
    "one fast tokenizer reads every kind of vocabulary; there is no slow one": (
        "tokenizer_mode MODE=auto|fast|slow|mistral"
    ),
    "prompts are always computed in chunks": "enable_chunked_prefill",
    "prompts are always computed in chunks; --batch_max_tokens makes them larger": (
        "disable_chunked_prefill, no_enable_chunked_prefill"
    ),
    "the KV cache is managed token by token": "block_size TOKENS, num_gpu_blocks_override BLOCKS",
    "what is paused is computed again, or found in the prefix cache": "swap_space GIB",
    "there are graphs for every number of rows": (
        "graph_max_batch_size ROWS, graph_split_batch_size ROWS, graph_grow_step_size ROWS,"
        " cudagraph_capture_sizes ROWS..., max_cudagraph_capture_size ROWS, cuda_graph_sizes ROWS..."
    ),
    "a graph serves every length": "graph_max_len_in_batch TOKENS, max_seq_len_to_capture TOKENS",
    "it is on unless --disable_dynamic_prompt_cache is given": "enable_prefix_caching",
    "it is a parameter of each request here": (
        "token_healing_mode, diverse_mode, return_all_prompt_logprobs, output_constraint_mode MODE,"
        " first_token_constraint_mode, seed SEED, return_tokens_as_token_ids"
    ),
    "a reward model is known by its architecture": "use_reward_model",
    "an answer has up to 20 alternatives of a token": "max_logprobs COUNT",
    "grammars are followed by llguidance": "guided_decoding_backend NAME",
    "it is always so": "enable_auto_tool_choice, enable_prompt_tokens_details, enable_request_id_headers",
    "--reasoning_parser alone says so": "enable_reasoning",
    "one event loop serves all connections": (
        "httpserver_workers COUNT, disable_frontend_multiprocessing, api_server_count COUNT"
    ),
    "processes of this server talk in one way": "zmq_mode MODE, distributed_executor_backend NAME",
    "workers on one machine find each other": "nccl_host HOST, nccl_port PORT",
    "devices exchange through NCCL": ("disable_custom_allreduce, enable_custom_allgather, disable_custom_all_reduce"),
    "kernels are Triton's, and tuned for the device": (
        "mode NAME..., enable_flashinfer_prefill, enable_flashinfer_decode, enable_fa3, sampling_backend NAME,"
        " attention_backend NAME,"
        " penalty_counter_mode MODE, compilation_config JSON, disable_cascade_attn, enable_prefill_microbatch_overlap,"
        " enable_decode_microbatch_overlap, enable_tpsp_mix_mode, enable_fused_shared_experts"
    ),
    "requests are let in at every iteration, see --schedule_policy": (
        "router_max_wait_tokens TOKENS, schedule_time_interval SECONDS, disable_aggressive_schedule"
    ),
    "the next iteration is always prepared while the device computes": "async_scheduling, no_async_scheduling",
    "a chat template shows whether it takes texts or lists of parts": (
        "chat_template_content_format FORM=auto|string|openai"
    ),
    "priorities always count, see --schedule_order too": "scheduling_policy POLICY",
    "figures are at /metrics": "disable_log_stats, log_stats_interval SECONDS, enable_server_load_tracking",
    "--access_log says whether requests are logged": (
        "disable_log_requests, enable_log_requests, no_enable_log_requests, disable_uvicorn_access_log,"
        " uvicorn_log_level LEVEL"
    ),
    "prompts are logged with --log_prompts only": "max_log_len CHARACTERS",
    "aiollm doctor looks at shared memory": "disable_shm_warning",
    "a worker that dies is started again, see --max_restarts": "health_monitor",
    "where there are API keys, /metrics takes one too": "enable_monitor_auth",
    "SIGHUP has the certificate read again": "enable_ssl_refresh",
    "a checkpoint's files show what it is": "load_way WAY, config_format FORMAT, model_impl NAME",
    "text is all that models take here": (
        "enable_mps, cache_capacity COUNT, visual_infer_batch_size COUNT, visual_gpu_ids ID..., visual_tp COUNT,"
        " visual_dp COUNT, visual_nccl_ports PORT..., limit_mm_per_prompt JSON, allowed_local_media_path FOLDER,"
        " language_model_only"
    ),
}
_NOT_HERE = {
    "groups of workers are not served: start a server for each, behind a proxy": (
        "dp COUNT=1, data_parallel_size COUNT=1, dp_balancer NAME=bs_balancer|round_robin, dp_prefill_wait_step STEPS=0"
    ),
    "one server runs on one machine, with its model split by --tp": (
        "nnodes COUNT=1, node_rank RANK=0, multinode_httpmanager_port PORT, multinode_router_gloo_port PORT,"
        " pipeline_parallel_size COUNT=1, enable_expert_parallel, ep_redundancy_expert_config_path FILE,"
        " auto_update_redundancy_expert"
    ),
    "one server computes prompts and outputs": (
        "run_mode MODE=normal, pd_master_ip HOST, pd_master_port PORT, pd_decode_rpyc_port PORT,"
        " select_p_d_node_strategy NAME, config_server_host HOST, config_server_port PORT,"
        " use_config_server_to_init_nccl"
    ),
    "there is no such quantisation; --data_type int8 has weights of 8 bits on a CPU": (
        "quant_type TYPE=none, quant_cfg FILE, quantization TYPE=none, kv_quant_calibration_config_path FILE,"
        " kv_cache_dtype TYPE=auto, calculate_kv_scales, vit_quant_type TYPE=none, vit_quant_cfg FILE"
    ),
    "models take text only": "enable_multimodal, enable_multimodal_audio",
    "there are no draft models": "mtp_mode MODE, mtp_draft_model_dir FOLDER, mtp_step COUNT=0, speculative_config JSON",
    "there are no adapters": "enable_lora, lora_modules NAME...",
    "TGI's interface is not served; /generate is LightLLM's": "use_tgi_api",
    "Prometheus fetches figures from /metrics, nothing is pushed": (
        "metric_gateway HOST, job_name NAME, grouping_key NAME..., push_interval SECONDS"
    ),
    "--max_total_token_num says the size of the KV cache in tokens, --mem_fraction that of all": (
        "kv_cache_memory_bytes BYTES"
    ),
    "weights stay where they are computed with": "cpu_offload_gb GIB=0, enable_sleep_mode",
    "the model's own config.json counts": (
        "hf_overrides JSON, rope_scaling JSON, rope_theta THETA, override_generation_config JSON, hf_config_path PATH"
    ),
    "a model comes with its tokenizer": "tokenizer PATH, tokenizer_revision REVISION",
    "AIOLLM_CACHE_DIR in the environment says where models are kept": "download_dir FOLDER",
    "no code is loaded": "tool_parser_plugin FILE, middleware NAME...",
}


def _flags(table: dict[str, str]) -> Iterator[tuple[str, PeerFlag]]:
    for reason, flags in table.items():
        for flag in flags.split(","):
            name, _, argument = flag.strip().partition(" ")
            unit, _, values = argument.partition("=")
            yield name, PeerFlag(unit, reason, tuple(values.split("|")) if values else ())


NO_EFFECT = dict(_flags(_NO_EFFECT))
NOT_HERE = dict(_flags(_NOT_HERE))
