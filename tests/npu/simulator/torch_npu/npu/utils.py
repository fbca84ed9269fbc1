"""torch.npu.utils of the simulated device."""


def is_support_inf_nan() -> bool:
    """As on Atlas A2 and A3: an overflow gives inf."""
    return True
