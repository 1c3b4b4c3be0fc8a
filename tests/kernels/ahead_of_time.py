"""Compile every Triton kernel for GPUs that are not here, and say what each would take of them.

    python tests/kernels/ahead_of_time.py cuda:80 [--only EXPRESSION] [--processes 2]

Prints a JSON list, one entry for each specimen: registers per thread, what spills, shared memory, and whether the
products use the matrix units. Runs by itself, without TRITON_INTERPRET: kernels that were decorated for the
interpreter cannot be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import types
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

TARGETS = {"cuda:80": ("cuda", 80, 32), "cuda:90": ("cuda", 90, 32), "hip:gfx942": ("hip", "gfx942", 64)}
"""Backend, architecture and threads of a warp: NVIDIA A100 and H100, AMD MI300."""

KINDS = {"cuda:80": "ampere", "cuda:90": "hopper", "hip:gfx942": "cdna"}
"""What block sizes are looked up by; see `molora.kernels.triton.tiles`."""

MATRIX = re.compile(r"mma\.sync|wgmma\.mma_async|v_mfma")


SPECIMENS: list[Any] = []
"""Filled before the pool is forked: its processes are told numbers."""


def load_specimens(target: str) -> list[Any]:
    """All specimens of the package, without the seconds that `import molora` takes to register the PEFT method."""
    package = types.ModuleType("molora")
    package.__path__ = [str(ROOT / "molora")]
    sys.modules["molora"] = package
    from molora.kernels.triton.multi_adapter_specimens import specimens as of_many
    from molora.kernels.triton.specimens import specimens as of_one

    return [*of_one(KINDS[target]), *of_many(KINDS[target])]


def compile_specimen(specimen: Any, target: str) -> dict[str, Any]:
    """Compile one kernel; the entry of its name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = specimen.kernel.arg_names
    constants = specimen.constexprs
    source = ASTSource(
        fn=specimen.kernel,
        signature={name: "constexpr" if name in constants else specimen.signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in specimen.divisible_by_16},
    )
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages, "enable_fp_fusion": True}
    started = time.perf_counter()
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    use = of_cubin(compiled.asm["cubin"]) if target.startswith("cuda") else of_amdgcn(compiled.asm["amdgcn"])
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    return {
        "name": specimen.name,
        "tile": {name: value for name, value in constants.items() if isinstance(value, int)},
        "num_warps": specimen.num_warps,
        "num_stages": specimen.num_stages,
        **use,
        "shared": compiled.metadata.shared,
        "matrix": sorted(set(MATRIX.findall(text))),
        "vector_loads": bool(re.search(r"cp\.async|ld\.global\.(\w+\.)*v[24]|(global|buffer)_load_dwordx[24]", text)),
        "seconds": round(time.perf_counter() - started, 2),
    }


def of_cubin(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, by the `cuobjdump` that Triton brings."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        shown = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", shown.stdout)
    if found is None:
        raise RuntimeError(f"cuobjdump names no resources: {shown.stdout}")
    # The kernels have no arrays of their own, so a thread's stack is what did not fit into registers.
    return {"registers": int(found[1]), "spilled": int(found[2]) + int(found[3])}


def of_amdgcn(text: str) -> dict[str, int]:
    """Registers and spilled registers of a thread, from the metadata at the end of the assembly."""

    def field(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"The assembly has no field .{name}")
        return int(found[1])

    return {"registers": field("vgpr_count"), "spilled": field("vgpr_spill_count") + field("sgpr_spill_count")}


def entry(work: tuple[int, str]) -> dict[str, Any]:
    """What a process of the pool does: the specimen of that number, an error as an entry of its own."""
    number, target = work
    specimen = SPECIMENS[number]
    try:
        return compile_specimen(specimen, target)
    except Exception as error:
        return {"name": specimen.name, "error": f"{type(error).__name__}: {str(error)[:2000]}"}


def main() -> None:
    """Compile and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--only", default="", help="specimens in whose name this regular expression is found")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    SPECIMENS.extend(load_specimens(arguments.target))
    chosen = [n for n, specimen in enumerate(SPECIMENS) if re.search(arguments.only, specimen.name)]
    with (
        tempfile.TemporaryDirectory() as cache,
        # Forked, so that each has the imports of this one.
        ProcessPoolExecutor(arguments.processes, get_context("fork")) as pool,
    ):
        os.environ["TRITON_CACHE_DIR"] = cache
        results = list(pool.map(entry, [(n, arguments.target) for n in chosen]))
    print(json.dumps(results))  # noqa: T201 - the answer, read by the test


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
