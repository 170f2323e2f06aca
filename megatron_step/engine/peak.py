"""Dense peak rates of accelerators, for the model FLOPs utilisation (MFU)."""

# Name, bf16 and fp32 rates in TFLOP/s from the vendors' data sheets, without sparsity: tensor cores for bf16, vector
# units for fp32, since TF32 is off by default. The first name that a device's name contains counts.
_PEAKS = (
    ("GB200", 2500.0, 80.0),
    ("B200", 2250.0, 75.0),
    ("H200", 989.4, 66.9),
    ("GH200", 989.4, 66.9),
    ("H100 PCIe", 756.0, 51.2),
    ("H100 NVL", 835.5, 60.0),
    ("H100", 989.4, 66.9),
    ("H800", 989.4, 66.9),
    ("A100", 312.0, 19.5),
    ("A800", 312.0, 19.5),
    ("L40S", 362.0, 91.6),
    ("A6000", 154.8, 38.7),
    ("V100", 0.0, 15.7),
)


def dense_peak_flops(device_name: str, precision: str) -> float | None:
    """Dense peak rate of a device in FLOP/s at `training.precision`; None if it is not known."""
    for name, bf16, fp32 in _PEAKS:
        if name in device_name:
            peak = bf16 if precision == "bf16" else fp32
            return peak * 1e12 if peak else None
    return None
