"""What the figures depend on: the machine, the versions, the commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

from fastbert.backend import first_device
from fastbert.cpu.machine import Machine, host
from fastbert.kernels import target

ROOT = Path(__file__).resolve().parent.parent
RIVALS = (
    "transformers",
    "sentence-transformers",
    "optimum-onnx",
    "optimum-intel",
    "onnxruntime",
    "openvino",
    "ctranslate2",
    "torchao",
    "flash-attn",
    "xformers",
    "liger-kernel",
)


def environment() -> dict[str, str]:
    """Names and versions, all of them strings; "not installed" and "unknown" where there are none."""
    packages = ("torch", "triton", "numpy", *RIVALS)
    return {
        "device": device_name(first_device()),
        "gpu target": _target(),
        "cpu name": _cpu(),
        "cores": str(cores()),
        "threads": str(torch.get_num_threads()),
        "cpu capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "commit": _commit(),
    }


def device_name(device: torch.device) -> str:
    """ "cpu", or the GPU's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def cores() -> int:
    """Those this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _target() -> str:
    device = first_device()
    if device.type != "cuda":
        return "no GPU"
    arch = target.of(device).arch
    if arch in target.KNOWN:
        return arch
    known = ", ".join(name for name in target.KNOWN if name != "interpreter")
    return f"{arch}: not one that the launch choices were made for ({known})"


def _cpu() -> str:
    """Its name and, where we have kernels for it, what LLVM calls its kind: "AMD EPYC" alone says too little."""
    machine = host()
    return f"{_cpu_name()} ({machine.cpu})" if isinstance(machine, Machine) else _cpu_name()


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Its hash, with "+" where files that git follows have changed since."""
    try:
        head = _git("rev-parse", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()
