"""DeepSpeed JSONs as real projects write them: trainers' templates, examples and files written by hand."""

from __future__ import annotations

_AUTO_BATCH = """
  "train_batch_size": "auto", "train_micro_batch_size_per_gpu": "auto",
  "gradient_accumulation_steps": "auto", "gradient_clipping": "auto"
"""
_AUTO_FP16 = """
  "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000,
           "initial_scale_power": 16, "hysteresis": 2, "min_loss_scale": 1}
"""
_AUTO_ADAM = """
  "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}}
"""
_AUTO_ZERO3 = """
  "stage": 3, "overlap_comm": true, "contiguous_gradients": true, "sub_group_size": 1e9,
  "reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
  "stage3_max_live_parameters": 1e9, "stage3_max_reuse_distance": 1e9
"""

TEMPLATES = {
    "trainer, ZeRO-2 with offload": f"""{{
      {_AUTO_FP16}, {_AUTO_ADAM}, {_AUTO_BATCH},
      "scheduler": {{"type": "WarmupLR", "params":
        {{"warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}}},
      "zero_optimization": {{"stage": 2, "offload_optimizer": {{"device": "cpu", "pin_memory": true}},
        "allgather_partitions": true, "allgather_bucket_size": 2e8, "overlap_comm": true, "reduce_scatter": true,
        "reduce_bucket_size": 2e8, "contiguous_gradients": true}},
      "steps_per_print": 2000, "wall_clock_breakdown": false
    }}""",
    "trainer, ZeRO-3 with both offloads": f"""{{
      {_AUTO_FP16}, "bf16": {{"enabled": "auto"}}, {_AUTO_ADAM}, {_AUTO_BATCH},
      "scheduler": {{"type": "WarmupDecayLR", "params": {{"last_batch_iteration": -1, "total_num_steps": "auto",
        "warmup_min_lr": "auto", "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}}},
      "zero_optimization": {{{_AUTO_ZERO3}, "stage3_gather_16bit_weights_on_model_save": true,
        "offload_optimizer": {{"device": "cpu", "pin_memory": true}},
        "offload_param": {{"device": "cpu", "pin_memory": true}}}}
    }}""",
    "trainer, a start at a learning rate of 0": f"""{{
      "bf16": {{"enabled": "auto"}}, {_AUTO_ADAM}, {_AUTO_BATCH},
      "scheduler": {{"type": "WarmupDecayLR", "params": {{"total_num_steps": "auto",
        "warmup_min_lr": 0, "warmup_max_lr": "auto", "warmup_num_steps": "auto"}}}},
      "zero_optimization": {{"stage": 1}}
    }}""",
    "trainer, everything auto": f"""{{
      "bf16": "auto", "fp16": "auto", {_AUTO_BATCH}, "optimizer": {{"type": "AdamW", "params": "auto"}},
      "scheduler": {{"type": "WarmupLR", "params": "auto"}}, "zero_optimization": {{"stage": 2, "overlap_comm": "auto"}}
    }}""",
    "launch tool, ZeRO-3 without optimizer": f"""{{
      "bf16": {{"enabled": true}}, {_AUTO_BATCH}, "zero_optimization": {{{_AUTO_ZERO3},
        "stage3_gather_16bit_weights_on_model_save": "auto",
        "offload_optimizer": {{"device": "none"}}, "offload_param": {{"device": "none"}}}},
      "steps_per_print": null, "zero_force_ds_cpu_optimizer": false
    }}""",
    "fine-tuning tool, no ZeRO": f"""{{
      {_AUTO_BATCH}, "zero_allow_untested_optimizer": true, {_AUTO_FP16}, "bf16": {{"enabled": "auto"}},
      "zero_optimization": {{"stage": 0, "allgather_partitions": true, "allgather_bucket_size": 5e8,
        "overlap_comm": false, "reduce_scatter": true, "reduce_bucket_size": 5e8, "contiguous_gradients": true,
        "round_robin_gradients": true}}
    }}""",
    "fine-tuning tool, ZeRO-3": f"""{{
      {_AUTO_BATCH}, "zero_allow_untested_optimizer": true, {_AUTO_FP16}, "bf16": {{"enabled": "auto"}},
      "zero_optimization": {{{_AUTO_ZERO3}, "stage3_gather_16bit_weights_on_model_save": true}}
    }}""",
    "fine-tuning tool, ZeRO-3 in bfloat16": f"""{{
      "zero_force_ds_cpu_optimizer": false, "zero_allow_untested_optimizer": true,
      "zero_optimization": {{"stage": 3, "offload_param": {{"device": "cpu", "pin_memory": true}},
        "overlap_comm": true, "contiguous_gradients": true, "sub_group_size": 0, "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0,
        "gather_16bit_weights_on_model_save": true}},
      "bf16": {{"enabled": true}}, "fp16": {{"enabled": "auto", "auto_cast": false, "loss_scale": 0,
        "initial_scale_power": 32, "loss_scale_window": 1000, "hysteresis": 2, "min_loss_scale": 1}},
      {_AUTO_BATCH}, "wall_clock_breakdown": false
    }}""",
    "chat example, all numbers written out": """{
      "train_batch_size": 64, "train_micro_batch_size_per_gpu": 4, "steps_per_print": 10,
      "zero_optimization": {"stage": 3, "offload_param": {"device": "none"}, "offload_optimizer": {"device": "none"},
        "stage3_param_persistence_threshold": 1e4, "stage3_max_live_parameters": 3e7,
        "stage3_prefetch_bucket_size": 3e7, "memory_efficient_linear": false},
      "bf16": {"enabled": true}, "gradient_clipping": 1.0, "prescale_gradients": false, "wall_clock_breakdown": false,
      "hybrid_engine": {"enabled": false, "max_out_tokens": 512, "inference_tp_size": 1,
        "release_inference_cache": false, "pin_parameters": true, "tp_gather_partition_size": 8}
    }""",
    "example, its own scheduler": """{
      "train_batch_size": 32, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0,
      "optimizer": {"type": "Adam", "params": {"lr": 2e-5, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
      "scheduler": {"type": "WarmupLR", "params":
        {"warmup_min_lr": 0, "warmup_max_lr": 2e-5, "warmup_num_steps": 3, "warmup_type": "linear"}},
      "wall_clock_breakdown": false, "zero_optimization": {"stage": 1}
    }""",
    "example, a cosine with some auto values": f"""{{
      {_AUTO_BATCH}, "bf16": {{"enabled": true}}, "zero_optimization": {{"stage": 2}},
      "optimizer": {{"type": "AdamW", "params": {{"lr": "auto", "betas": ["auto", "auto"], "weight_decay": 0.1}}}},
      "scheduler": {{"type": "WarmupCosineLR", "params": {{"total_num_steps": "auto", "warmup_num_steps": "auto",
        "warmup_min_ratio": "auto", "cos_min_ratio": 0.1}}}},
      "activation_checkpointing": {{"partition_activations": false, "cpu_checkpointing": false,
        "contiguous_memory_optimization": false, "number_checkpoints": null}}
    }}""",
    "tutorial, ZeRO-3 on NVMe": f"""{{
      {_AUTO_BATCH}, "bf16": {{"enabled": "auto"}}, "zero_optimization": {{{_AUTO_ZERO3},
        "offload_optimizer": {{"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": true, "buffer_count": 4,
          "fast_init": false}},
        "offload_param": {{"device": "nvme", "nvme_path": "/local_nvme", "pin_memory": true, "buffer_count": 5,
          "buffer_size": 1e8, "max_in_cpu": 1e9}}}},
      "aio": {{"block_size": 262144, "queue_depth": 32, "intra_op_parallelism": 1, "single_submit": false,
        "overlap_events": true}}
    }}""",
    "tutorial, ZeRO++": f"""{{
      {_AUTO_BATCH}, "bf16": {{"enabled": true}}, "zero_optimization": {{"stage": 3, "reduce_bucket_size": 1e7,
        "reduce_scatter": true, "zero_quantized_weights": true, "zero_hpz_partition_size": 8,
        "zero_quantized_gradients": true, "contiguous_gradients": true, "overlap_comm": true}}
    }}""",
    "written by hand, with comments": """{
      # our cluster
      train_micro_batch_size_per_gpu: 2,
      "bf16": {"enabled": "true"}, "fp16": {"enabled": 0},  // the cards know bfloat16
      "zero_optimization": {"stage": 2, "overlap_comm": true, "reduce_bucket_size": 5e7,},
      "tensorboard": {"enabled": false, "output_path": "logs/", "job_name": "sft"},
      "flops_profiler": {"enabled": false, "profile_step": 1, "detailed": true},
      "comms_logger": {"enabled": false, "verbose": false, "prof_all": true},
      "_comment": "ask the platform team"
    }""",
}
"""JSON text by description, for a node of eight GPUs."""
