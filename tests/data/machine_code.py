"""What the machine code of a compiled kernel tells without a device to run it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import Any

from triton import knobs

# An address, perhaps a predicate, an operation and its operands: what cuobjdump prints of a cubin.
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")
PRODUCTS = ("HMMA", "HGMMA", "UTCHMMA")
Instructions = list[tuple[int, str, str]]


def facts_of(compiled: Any) -> dict[str, Any]:
    """Return sizes of a compiled kernel, and counts of operations in its loop over whole tiles, if it has one."""
    instructions = [(int(at, 16), name, rest) for at, name, rest in INSTRUCTION.findall(dumped(compiled, "-sass"))]
    loop = main_loop(instructions)
    waits = [re.search(r"SB\d, (0x[0-9a-f]+)", rest) for _, name, rest in loop if name == "DEPBAR.LE"]
    return {
        "shared": compiled.metadata.shared,
        "registers": int(re.findall(r"REG:(\d+)", dumped(compiled, "-res-usage"))[-1]),
        "threads": 32 * compiled.metadata.num_warps,
        "spills": count(instructions, "LDL", "STL"),
        "wide_loads": count(instructions, "LDG.E.128"),
        "wide_stores": count(instructions, "STG.E.128"),
        "loop": len(loop),
        "loop_spills": count(loop, "LDL", "STL"),
        "loop_wide_copies": count(loop, "LDGSTS.E.BYPASS.128"),
        "loop_copies": count(loop, "LDGSTS"),
        "loop_wide_loads": count(loop, "LDG.E.128", "LDG.E.64"),
        "loop_warp_products": count(loop, "HMMA"),
        "loop_group_products": count(loop, "HGMMA"),
        "loop_pending_copies": [int(wait[1], 16) for wait in waits if wait],
    }


def dumped(compiled: Any, option: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main_loop(instructions: Instructions) -> Instructions:
    """Return the shortest loop with products in it: that over border tiles has the same ones, and masks."""
    loops = []
    for at, name, rest in instructions:
        target = re.search(r"0x([0-9a-f]+)", rest) if name == "BRA" else None
        if target and int(target[1], 16) < at:
            loop = [one for one in instructions if int(target[1], 16) <= one[0] <= at]
            if count(loop, *PRODUCTS):
                loops.append(loop)
    return min(loops, key=len, default=[])


def count(instructions: Instructions, *prefixes: str) -> int:
    return sum(name.startswith(prefixes) for _, name, _ in instructions)
