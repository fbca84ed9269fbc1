"""A stand-in for Ascend's apex, to test against on a CPU. It is not Ascend's code, nor NVIDIA's.

It was written from the documentation of NVIDIA's amp (https://nvidia.github.io/apex/amp.html), the README of Ascend's
apex and the signatures there (https://gitee.com/ascend/apex): amp.initialize, scale_loss, master_params, state_dict,
load_state_dict, clip_optimizer_grad_norm_fused and optimizers.NpuFusedAdamW. It trains, in plain torch. Where Ascend's
apex goes on in silence after its combined gradients were dropped, this one stops.

Two environment variables steer it:

    APEX_STAND_IN_LOG        a file that takes a line of JSON for each call
    APEX_STAND_IN_OVERFLOW   after which backward passes, counted from 1, a gradient is infinite: "3" or "3,4"
"""
