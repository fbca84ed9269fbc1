"""What accelerators multiply matrices with at most, as their makers state it: what MFU is a share of."""

import re

# TFLOP/s, without sparsity, with float32 sums: in float16 or bfloat16, in TF32 and in float32; None where the device has
# no unit for it. By what is in the device's name: the first pattern that is found counts.
PEAKS = {
    r"Ascend910B1": (414, None, 104),
    r"Ascend910B2": (376, None, 94),
    r"Ascend910B3": (313, None, 78),
    r"Ascend910B4": (280, None, 70),
    r"Ascend910_93": (376, None, 94),  # one of the two dies of a 910C: each is a device
    r"Ascend910": (256, None, None),  # of 2019, sold with 220 to 320 by clock and number of cores
    r"B200": (2250, 1125, 75),
    r"H200|H100 80GB HBM3|H100 SXM|H800": (989.4, 494.7, 66.9),
    r"H100 NVL": (835, 417, 60),
    r"H100": (756, 378, 51.2),  # PCIe
    r"H20\b": (148, 74, 44),
    r"A100\b|A800\b": (312, 156, 19.5),
    r"\bA40\b": (149.7, 74.8, 37.4),
    r"\bA30\b": (165, 82, 10.3),
    r"\bA10\b": (125, 62.5, 31.2),
    r"L40S": (362, 183, 91.6),
    r"L40\b": (181, 90.5, 90.5),
    r"\bL4\b": (121, 60, 30.3),
    r"V100-PCIE": (112, None, 14),
    r"V100": (125, None, 15.7),
    r"\bT4\b": (65, None, 8.1),
    r"RTX 6000 Ada": (364, 182, 91.1),
    r"RTX A6000": (154.8, 77.4, 38.7),
    r"RTX 5090": (209.5, 104.8, 104.8),
    r"RTX 4090": (165.2, 82.6, 82.6),
    r"RTX 3090": (71, 35.6, 35.6),
}
UNITS = ("half", "tf32", "float32")


def stated_tflops(name: str, unit: str) -> float | None:
    """The peak of a device of this name, for one of UNITS; None if it is not in the table.

    TF32 without such a unit is float32.
    """
    peaks = next((peaks for pattern, peaks in PEAKS.items() if re.search(pattern, name)), None)
    if peaks is None:
        return None
    of_unit = dict(zip(UNITS, peaks, strict=True))
    return of_unit["float32"] if unit == "tf32" and of_unit["tf32"] is None else of_unit[unit]
