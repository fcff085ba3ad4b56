"""Arithmetic of a step, and the device's peak, for model FLOPs utilisation."""

from __future__ import annotations

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from megad2v.config.schema import Config
from megad2v.modalities.build import blank_inputs, build_student

# Dense matrix throughput from NVIDIA's data sheets, FLOP/s, by the name torch reports.
_PEAK_BF16 = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "A40": 150e12, "L40S": 362e12,
              "RTX 4090": 165e12}  # fmt: skip


def flops_per_sample(config: Config, positions: int) -> float:
    """Floating-point operations that training spends on one sample of `positions` patches or frames: student forward
    and backward (3 forwards) and the teacher's forward, counted by torch on the meta device. The head, a few per cent
    at most, is left out; a front end that the teacher shares runs forward once."""
    with torch.device("meta"):
        student = build_student(config)
        inputs = blank_inputs(config, positions)
        with FlopCounterMode(display=False) as whole, torch.no_grad():
            student.features(inputs)
        with FlopCounterMode(display=False) as front, torch.no_grad():
            student.front_end(inputs, None)
    shared = front.get_total_flops() if config.teacher.scope == "encoder" else 0
    return 4.0 * whole.get_total_flops() - shared


def peak_flops(device: torch.device, precision: str) -> tuple[float | None, str]:
    """(peak FLOP/s of one device, where the number is from). CPUs are measured by a matrix product."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, peak in _PEAK_BF16.items():
            if part in name and precision == "bf16":
                return peak, f"data sheet, {part} bf16 dense"
        return None, f"no data-sheet number here for {name} in {precision}"
    size = 1024
    a, b = torch.randn(size, size), torch.randn(size, size)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best, "measured: float32 matrix product at start-up"
