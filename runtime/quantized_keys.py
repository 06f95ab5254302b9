"""Keys of a `quantization_config` that change nothing about how its weights are read.

They say how the weights were made, which of them, or how to run them: the tensors themselves show
which are quantised, and activations are never quantised here.
"""

from __future__ import annotations

SILENT_KEYS: dict[str, frozenset[str]] = {
    "any": frozenset(("modules_to_not_convert", "quant_method", "version")),
    "auto-round": frozenset(
        (
            "amp",
            "autoround_version",
            "batch_size",
            "block_name_to_quantize",
            "dataset",
            "enable_minmax_tuning",
            "enable_norm_bias_tuning",
            "enable_quanted_input",
            "gradient_accumulate_steps",
            "iters",
            "low_cpu_mem_usage",
            "low_gpu_mem_usage",
            "lr",
            "minmax_lr",
            "nsamples",
            "scale_dtype",
            "seqlen",
            "supported_types",
            "to_quant_block_names",
            "train_bs",
        )
    ),
    "awq": frozenset(
        (
            "backend",
            "do_fuse",
            "exllama_config",
            "fuse_max_seq_len",
            "modules_to_fuse",
        )
    ),
    "compressed-tensors": frozenset(
        (
            "global_compression_ratio",
            "ignore",
            "ignored_layers",
            "kv_cache_scheme",
            "quantization_status",
        )
    ),
    "fp8": frozenset(("activation_scheme", "ignored_layers", "modules_to_convert")),
    "gptq": frozenset(
        (
            "act_group_aware",
            "backend",
            "batch_size",
            "block_name_to_quantize",
            "cache_block_outputs",
            "damp_auto_increment",
            "damp_percent",
            "dataset",
            "exllama_config",
            "lm_head",
            "max_input_length",
            "meta",
            "model_file_base_name",
            "model_name_or_path",
            "model_seqlen",
            "module_name_preceding_first_block",
            "modules_in_block_to_quantize",
            "mse",
            "offload_to_disk",
            "offload_to_disk_path",
            "pad_token_id",
            "quantizer",
            "static_groups",
            "tokenizer",
            "true_sequential",
            "use_cuda_fp16",
            "use_exllama",
        )
    ),
    "mxfp4": frozenset(("dequantize",)),
}
