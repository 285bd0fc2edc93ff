"""Evidence about the kernels that needs no GPU: machine code, traffic, launches and wasted work, as one JSON.

    python benchmarks/static/evidence.py [--arch sm_90 ...] [--only REGEX] [--json FILE]

docs/static.md says what each figure means. The same tree and the same Triton give the same file, byte for byte.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import triton

sys.path.append(str(Path(__file__).resolve().parent))
import cases
import main_loop
import rivals
import tiles
from offline import ARCHS, Launch, offline

from fastbert.kernels.target import KNOWN

INTERPRETED = Path(__file__).resolve().with_name("interpreted.py")

# A100, H100, MI300X.
MAIN_ARCHS = ("sm_80", "sm_90", "gfx942")

Evidence = dict[str, Any]


def unit_of(launch: Launch) -> int:
    """Units of work in one trip of the main loop of one of our kernels: scores of attention, else result elements.

    Of a product they are result elements for each 64 of the depth; of the table of tiles its entries.
    """
    constexprs = launch.constexprs
    if launch.kernel.startswith("linear"):
        return constexprs["BLOCK_M"] * constexprs["BLOCK_N"] * constexprs["BLOCK_K"] // 64
    if launch.kernel.startswith("attention"):
        return constexprs["BLOCK_M"] * constexprs["BLOCK_N"]
    if launch.kernel.startswith("tile_table"):
        return constexprs["BLOCK"]
    if launch.kernel.startswith("rotary"):
        return constexprs["ROWS"] * 3 * constexprs["HEAD_DIM"]
    block = constexprs["BLOCK"]
    return constexprs["ROWS"] * min(block, constexprs.get("HIDDEN", block))


def kernels(arch: str, only: str) -> dict[str, Any]:
    """Figures of each kernel that the main cases launch on `arch`, by the case's name and the kernel's."""
    target = KNOWN[arch]
    found: dict[str, Any] = {}
    with offline(target) as launches:
        for case in cases.main(target):
            if re.search(only, case.name):
                case.run()
                for launch in launches:
                    name = f"{case.name}: {launch.kernel.removesuffix('_kernel')}"
                    if name not in found:  # the sums for three tables are one kernel
                        found[name] = main_loop.of_launch(launch, target, unit_of(launch))
                launches.clear()
    return found


def interpreted(only: str, *, rivals: bool = False) -> dict[str, Any]:
    """Traffic and launches, or the bytes of the rivals' calls, from a process where Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(INTERPRETED), only, *(["--rivals"] if rivals else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def collect(archs: tuple[str, ...] = MAIN_ARCHS, only: str = "") -> Evidence:
    """All evidence about our own kernels, or that whose names match `only`."""
    # Fresh processes: Triton's compiler is not safe to fork.
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        by_arch = pool.map(kernels, archs, itertools.repeat(only))
        counted = pool.submit(interpreted, only)
        return {
            "triton": triton.__version__,
            "kernels": dict(zip(archs, by_arch, strict=True)),
            "tiles": {
                arch: {name: figures for name, figures in tiles.waste(arch).items() if re.search(only, name)}
                for arch in archs
            },
            **counted.result(),
        }


def dump(evidence: Evidence) -> str:
    """Its JSON: sorted, so that the same evidence is the same text."""
    return json.dumps(evidence, indent=1, sort_keys=True) + "\n"


def write(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def compared(archs: tuple[str, ...]) -> dict[str, Any]:
    """Figures of the rivals' kernels that are installed, of ours for the same calls, and the comparison of the two."""
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), multiprocessing.get_context("spawn")) as pool:
        moved = pool.submit(interpreted, "", rivals=True)
        by_arch = dict(zip(archs, pool.map(rivals.compare, archs, itertools.repeat(unit_of)), strict=True))
        counted = moved.result()
    return {
        "versions": rivals.versions(),
        "kernels": {arch: found["kernels"] for arch, found in by_arch.items()},
        "rows": {arch: rivals.table_of(found["rows"], counted) for arch, found in by_arch.items()},
    }


def rival_table(rows: dict[str, Any]) -> list[str]:
    """Lines of text: a contender of a row each."""
    lines = [f"{'':40} {'':24} instr  over minimum bytes  ours lower in"]
    for row, by_whose in sorted(rows.items()):
        for whose, found in sorted(by_whose.items(), key=lambda item: (item[0] != "fastbert", item[0])):
            verdict = (
                f"{found['lower'] or 'neither'}: {found['reason']}" if "reason" in found else found.get("lower", "")
            )
            lines.append(
                f"{row:40} {whose:24} {found['instructions']:6.2f} {found['bytes'] / found['minimum']:18.3f}  {verdict}"
            )
    return lines


def kernel_table(by_name: dict[str, Any]) -> list[str]:
    """Lines of text: a kernel each. The last column is predicted, and only for the targets whose rates we know."""
    lines = [f"{'':80} regs spill shared /SM  instr   math tensor access bits      ps (predicted)"]
    for name, found in sorted(by_name.items()):
        per_unit, widths = found["per_unit"], found["global_bits"]
        access = " ".join(f"{count}x{bits}" for bits, count in sorted(widths.items(), key=lambda item: int(item[0])))
        predicted = found.get("predicted")
        time = f"{predicted['picoseconds_per_unit']:7.3f} {predicted['bound']}" if predicted else ""
        lines.append(
            f"{name:80} {found['registers']:4} {found['spills']:5} {found['shared']:6} "
            f"{found['programs_per_multiprocessor']:3} {per_unit['all']:6.2f} {per_unit['math']:6.2f} "
            f"{per_unit.get('tensor', 0):6.2f} {access:16} {time}"
        )
    return lines


def table(evidence: Evidence) -> str:
    """All of it as text; docs/static.md explains the columns."""
    lines = []
    for arch, by_name in evidence["kernels"].items():
        lines += [f"{arch}: for a unit of work (a score, an element of the result)", *kernel_table(by_name), ""]
    for arch, by_name in evidence.get("rivals", {}).get("kernels", {}).items():
        lines += [f"{arch}, beside rivals: {evidence['rivals']['versions']}", *kernel_table(by_name), ""]
    for arch, rows in evidence.get("rivals", {}).get("rows", {}).items():
        lines += [f"{arch}, ours against rivals", *rival_table(rows), ""]
    sections = {section: evidence[section] for section in ("traffic", "launches")}
    sections |= {f"tiles, {arch}": by_name for arch, by_name in evidence["tiles"].items()}
    for section, by_name in sections.items():
        lines += [section, *(f"{name:80} {_in_words(found)}" for name, found in sorted(by_name.items())), ""]
    return "\n".join(lines)


def _in_words(found: dict[str, Any]) -> str:
    return ", ".join(f"{figure} {value}" for figure, value in found.items() if not isinstance(value, dict))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Collect the static evidence about the kernels.")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="a target, may be repeated; default: the main 3")
    parser.add_argument("--only", default="", metavar="REGEX", help="what has such a name, and no rivals")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    archs = tuple(arguments.arch or MAIN_ARCHS)
    evidence = collect(archs, arguments.only)
    if not arguments.only:
        evidence["rivals"] = compared(archs)
        missing = set(rivals.PACKAGES) - set(evidence["rivals"]["versions"])
        for package in sorted(missing):
            print(
                f"{package} is not there: its kernels are left out; docs/static.md says how to get it", file=sys.stderr
            )
    print(table(evidence))
    if arguments.json:
        write(arguments.json, dump(evidence))


if __name__ == "__main__":
    main()
