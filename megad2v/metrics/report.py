"""The start-up report: what runs, on what, with how much memory."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import megad2v
from megad2v.config.parts import JOINT, loss_weight, modalities
from megad2v.config.schema import Config
from megad2v.models.layers import APEX_LAYER_NORM


def versions(modalities: Sequence[str]) -> dict[str, str]:
    """Versions of what computes and of what decodes `modalities`, and the project's git revision where it runs from a
    checkout."""
    return {
        "megad2v": megad2v.__version__,
        "git": git_revision(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        **{what: decoder for modality in modalities for what, decoder in _decoder(modality).items()},
    }


def _decoder(modality: str) -> dict[str, str]:
    if modality == "vision":
        import PIL

        pillow = "pillow-simd" if ".post" in PIL.__version__ else "Pillow"
        return {"image decoder": f"{pillow} {PIL.__version__}"}
    if modality == "text":  # read as it is
        return {}
    import soundfile  # there, since it has read the shards

    return {"audio decoder": f"soundfile {soundfile.__version__} ({soundfile.__libsndfile_version__})"}


@lru_cache(maxsize=1)  # of what runs, not of what lies there by the time of a later checkpoint; two processes, once
def git_revision() -> str:
    """Short revision of the checkout this package lies in, "-dirty" where it has changes; "unknown" elsewhere."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        tracked = ["git", "-C", str(here), "ls-files", "--error-unmatch", Path(__file__).name]
        subprocess.run(tracked, check=True, capture_output=True, timeout=10)
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def memory_estimate(
    student: int, teacher: int, *, stage: int, ranks: int, low_precision: bool, resident: bool = False
) -> float:
    """Bytes of model state on one rank (activations come on top): weights in the compute dtype, float32
    gradients, master, two moments and teacher average, teacher forward copy; split as in the ZeRO paper.

    `student` and `teacher` are the parameters of one tensor-parallel rank, `ranks` the data-parallel ones that ZeRO
    splits them over; `resident`: the teacher's forward copy is whole whatever the stage.
    """
    width = 2 if low_precision else 4
    masters = (12 * student + 4 * teacher) / ranks
    weights = width * student / (ranks if stage == 3 else 1)
    copy = width * teacher / (ranks if stage == 3 and not resident else 1)
    gradients = 4 * student / (ranks if stage >= 2 else 1)
    return masters + weights + copy + gradients


def start_up_report(
    *,
    modalities: Sequence[str],
    world: Any,
    precision: str,
    stage: int,
    student: int,
    teacher: int,
    memory: float,
    recipe: str,
    run: Path,
    peak: str,
) -> list[str]:
    """Lines for people, printed once by the main rank. `memory` in bytes, as of `memory_estimate`."""
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else _cpu_name()
    norm = "apex fused" if APEX_LAYER_NORM is not None and world.device.type == "cuda" else "torch"
    ranks = f"ranks {world.size}" + (
        f" (data {world.data.size} x tensor {world.tensor.size})" if world.tensor.size > 1 else ""
    )
    software = (f"{name} {version}" for name, version in versions(modalities).items() if name != "megad2v")
    return [
        f"megad2v {'  '.join(software)}",
        f"host {socket.gethostname()}  {ranks}  device {device}  threads {torch.get_num_threads()}",
        f"recipe {recipe}  precision {precision}  ZeRO {stage}  attention torch SDPA  layer norm {norm}  peak {peak}",
        f"parameters: student {student:,}  teacher {teacher:,}  model state about {memory / 2**20:,.0f} MiB per rank",
        f"run directory {run}",
    ]


def joint_report(config: Config) -> list[str]:
    """How a joint run's modalities share one encoder; nothing of a run of one modality."""
    if config.modality != JOINT:
        return []
    factors = (f"{modality} {loss_weight(config, modality):g}" for modality in modalities(config))
    return [
        f"joint: one modality to an update, norms {config.joint.norms}, factors on the gradient {', '.join(factors)}"
    ]


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.split(':', 1)[1].strip()} ({os.cpu_count()} cores)"
    except OSError:
        pass
    return f"{platform.processor() or platform.machine()} ({os.cpu_count()} cores)"


def peak_memory(device: torch.device) -> tuple[float, str]:
    """(bytes, of what) at the highest so far in this process."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device)), "device memory"
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0, "resident memory"
