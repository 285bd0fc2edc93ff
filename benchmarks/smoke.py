"""The first two minutes on a GPU: does a model of MiniLM's shape run there at all, and does it compute what torch does?

    python benchmarks/smoke.py [--once | --sanitize]

`--once` runs the kernels once each, forward and backward, for a memory checker to watch. `--sanitize` has NVIDIA's
checker watch that, and does nothing else; it may take longer than as the end of the whole.
"""

from __future__ import annotations

import argparse
import copy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from environment import environment
from torch import Tensor

import fastbert
from fastbert.backend import first_device, use_backend
from fastbert.config import EncoderConfig
from fastbert.model.body import BertModel
from fastbert.packing import Packing
from fastbert.testing import assert_close

MINILM = EncoderConfig(
    vocab_size=30522, hidden_size=384, num_layers=6, num_heads=12, intermediate_size=1536, max_positions=512
)
LENGTHS = (70, 1, 129, 33)
SANITIZER_SECONDS, ALONE_SECONDS = 60, 420


def model_of(config: EncoderConfig, device: torch.device) -> BertModel:
    """With weights large enough that attention looks at something."""
    torch.manual_seed(0)
    model = BertModel(config).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


def inputs_of(config: EncoderConfig, device: torch.device) -> dict[str, Any]:
    """Packed, of these lengths."""
    packing = Packing.from_lengths(LENGTHS, device=device)
    return {"input_ids": torch.randint(config.vocab_size, (packing.tokens,), device=device), "packing": packing}


def by_torch(model: BertModel, given: dict[str, Any]) -> Tensor:
    """The last hidden states, packed, without our kernels."""
    with use_backend("torch"):
        return model(**given).last_hidden_state


def by_kernels(model: BertModel, given: dict[str, Any]) -> Tensor:
    """The same; a kernel that can't run is an error."""
    with use_backend("triton"):
        return model(**given).last_hidden_state


def forward(config: EncoderConfig, device: torch.device) -> None:
    """In half precision and float32, call by call and as a CUDA graph, beside torch and float64."""
    model, given = model_of(config, device), inputs_of(config, device)
    with torch.no_grad():
        exact = by_torch(copy.deepcopy(model).double(), given)
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            ours = copy.deepcopy(model).to(dtype)
            plain = by_torch(ours, given)
            assert_close(by_kernels(ours, given), plain, exact, factor=3.0, what=f"forward in {dtype}")
            if device.type == "cuda":
                graphed = fastbert.graphed(copy.deepcopy(ours))
                for turn in range(3):
                    assert_close(by_kernels(graphed, given), plain, exact, factor=3.0, what=f"graph in {dtype}, {turn}")


def train(config: EncoderConfig, device: torch.device) -> None:
    """A step: the gradients of every parameter beside torch's and float64's, by a random upstream gradient."""
    given = inputs_of(config, device)
    model = model_of(config, device)
    dout = torch.randn(given["packing"].tokens, config.hidden_size, device=device)
    found = []
    for one, run in (
        (copy.deepcopy(model).half(), by_kernels),
        (copy.deepcopy(model).half(), by_torch),
        (copy.deepcopy(model).double(), by_torch),
    ):
        out = run(one, given)
        out.backward(dout.to(out.dtype) / 64)
        found.append({name: parameter.grad for name, parameter in one.encoder.named_parameters()})
    ours, plain, exact = found
    for name, gradient in ours.items():
        theirs, judge = plain[name], exact[name]
        if ".key.bias" not in name:  # whose gradient is 0 but for rounding
            assert gradient is not None and theirs is not None and judge is not None
            assert_close(gradient, theirs, judge, factor=4.0, what=f"gradient of {name}")


def once(config: EncoderConfig, device: torch.device) -> None:
    """Each kernel, forward and backward, in half precision, with dropout; the numbers are not looked at."""
    model = model_of(config, device).half().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    by_kernels(model, inputs_of(config, device)).float().square().mean().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()


def sanitize(seconds: float) -> str:
    """`once` under NVIDIA's checker of memory, where that is installed; in words how it went."""
    checker = shutil.which("compute-sanitizer")
    if checker is None:
        return "compute-sanitizer is not installed: no look at memory"
    command = [checker, "--error-exitcode", "9", sys.executable, str(Path(__file__)), "--once"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"compute-sanitizer had found nothing after {seconds:.0f} s"
    if done.returncode:
        raise AssertionError(f"compute-sanitizer: status {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-1000:]}")
    return "compute-sanitizer found nothing"


def main() -> int:
    """The command; its exit status is 0 if all is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    alone = parser.add_mutually_exclusive_group()
    alone.add_argument("--once", action="store_true")
    alone.add_argument("--sanitize", action="store_true")
    options = parser.parse_args()
    if options.sanitize:
        print(sanitize(ALONE_SECONDS), flush=True)
        return 0
    device = first_device()
    if options.once:
        once(MINILM, device)
        return 0
    for name, value in environment().items():
        print(f"{name}: {value}", flush=True)
    forward(MINILM, device)
    print("forward: as torch", flush=True)
    train(MINILM, device)
    print("training step: as torch", flush=True)
    print(sanitize(SANITIZER_SECONDS), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
