"""The peak rate of a device is known, or none at all."""

import pytest

from megatron_step.engine.peak import dense_peak_flops


@pytest.mark.parametrize(
    ("device", "bf16", "fp32"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12, 66.9e12),
        ("NVIDIA H100 PCIe", 756.0e12, 51.2e12),
        ("NVIDIA GB200", 2500e12, 80e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("Tesla V100-SXM2-16GB", None, 15.7e12),
        ("NVIDIA GeForce RTX 9999", None, None),
    ],
)
def test_peaks_by_name(device: str, bf16: float | None, fp32: float | None) -> None:
    assert dense_peak_flops(device, "bf16") == (pytest.approx(bf16) if bf16 else None)
    assert dense_peak_flops(device, "fp32") == (pytest.approx(fp32) if fp32 else None)
