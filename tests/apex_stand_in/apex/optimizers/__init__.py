from apex.optimizers.npu_fused_adamw import NpuFusedAdamW

__all__ = ["NpuFusedAdamW"]
