"""What is installed here and what runs: `info`."""

from __future__ import annotations

import io
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from fastbert import installed
from fastbert.cli.options import Device, DType
from fastbert.errors import ArgumentError


def info(
    model: Annotated[Path | None, typer.Option(help="A checkpoint folder: also say what computes it, and why.")] = None,
    dtype: DType = None,
    device: Device = None,
) -> None:
    """Versions, devices, and which path runs on each device and why.

    \b
    fastbert info --model all-MiniLM-L6-v2 --dtype bf16
    """
    for option, given in (("--dtype", dtype), ("--device", device)):
        if given is not None and model is None:
            raise ArgumentError(option, "no --model", "one", "Add --model FOLDER.")

    import torch

    from fastbert import backend
    from fastbert.cpu.machine import amx_unused, lane
    from fastbert.tasks.loading import default_dtype

    print("versions")
    _row("python", platform.python_version())
    for package in ("fastbert", "torch", "triton", "llvmlite", "numpy", "tokenizers", "safetensors", "transformers"):
        _row(package, version_of(package))
    print("devices")
    name, instructions = _cpu()
    _row("cpu", f"{name}, {torch.get_num_threads()} threads, {instructions}")
    if (taken := lane()) is not None:
        _row("", f"FASTBERT_CPU={taken} is set; torch computes with {torch.backends.cpu.get_cpu_capability()}")
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        memory = properties.total_memory / 2**30
        _row(f"cuda:{i}", f"{properties.name}, {memory:.0f} GiB, {properties.multi_processor_count} multiprocessors")
        devices.append(torch.device("cuda", i))
    if len(devices) == 1:
        _row("gpu", f"none that this torch ({torch.__version__}) can use")
    print("paths")
    for one in devices:
        decision = backend.decide(one)
        _row(str(one), f"{decision.path}, because {decision.reason}")
        if one.type == "cpu" and (unused := amx_unused()) is not None:
            _row("", f"AMX is left alone, because {unused}")
        _row("", f"--dtype {default_dtype(one)} by default")
        for name, unserved, instead in (
            ("bf16", backend.bfloat16_unserved(one), "computes in float32"),
            ("fp16", backend.float16_unserved(one), "computes in float32"),
            ("int8", backend.int8_unserved(one), "is slower than fp32"),
        ):
            if one.type == "cuda" and name == "int8":
                _row("", "--dtype int8 is for CPUs")
            elif unserved is None:
                _row("", f"--dtype {name} multiplies in {name} here")
            else:
                _row("", f"--dtype {name} {instead} here, because {unserved}")

    from fastbert.ops.fastest import KINDS, choice

    print("products of floats on the CPU: by fastbert's own kernels, or by the oneDNN or the BLAS that torch brings")
    for kind in KINDS:
        chosen = choice(kind)
        times = ", ".join(f"{way} {ms:.3g} ms" for way, ms in chosen.milliseconds.items())
        _row(chosen.way, f"{kind.name}: {chosen.source}{times and f' ({times})'}")

    if model is not None:
        from fastbert.tasks.encode import TextEncoder

        loaded = TextEncoder.from_folder(model, dtype=dtype, device=device).model
        print(f"model {model}: the first of these that is not refused computes it, without a gradient")
        for name, reason in loaded.executors().items():
            _row(name, "serves" if reason is None else f"does not serve {reason}")


def _cpu() -> tuple[str, str]:
    """Its model and those of its instruction sets that matter to bf16 and int8."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), "instruction sets unknown (no /proc/cpuinfo)"
    fields = dict(_cpuinfo_fields(cpuinfo))
    flags = fields.get("flags", fields.get("Features", "")).split()
    relevant = (
        "avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8",
        "asimd", "bf16", "i8mm", "sve",
    )  # fmt: skip
    return fields.get("model name", platform.machine()), " ".join(flag for flag in relevant if flag in flags)


def _cpuinfo_fields(cpuinfo: str) -> Iterator[tuple[str, str]]:
    for line in io.StringIO(cpuinfo):
        name, _, value = line.partition(":")
        yield name.strip(), value.strip()


def version_of(package: str) -> str:
    """The version that is installed."""
    return installed.version(package) or "not installed"


def _row(name: str, value: str) -> None:
    print(f"  {name:<14}{value}")
