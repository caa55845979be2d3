"""Compile every kernel for real GPUs, down to machine code, on a machine that has none: the interpreter cannot test it.

The launching code runs as ever; where it would launch a kernel, Triton compiles it for the arguments it is given.
Prints a line of JSON for each; with ``--all`` for more types and sizes.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tests.contracts.attention_cases import Shape, make_case
from tests.data.machine_code import facts_of
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from pagedkv import paged_attention
from pagedkv.data import attention, gpu, gpu_device, gpu_kernels
from pagedkv.data.gpu_device import Config, Device, Heads, shared_bytes

SHARED_BYTES = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


RUN = JITFunction.run


@dataclass
class Compiler:
    """Stands in for Triton's driver and for a launch: compiles for ``capability`` what would be launched."""

    capability: int = 90
    what: str = ""

    @property
    def device(self) -> Device:
        return Device("none", 132, SHARED_BYTES[self.capability], self.capability)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def compile(self, kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled = RUN(kernel, *args, grid=grid, warmup=True, **kwargs)
        facts = {"what": self.what, "kernel": kernel.__name__, "capability": self.capability, **facts_of(compiled)}
        if "SIZES" in kwargs:
            facts |= self.expected(kwargs["SIZES"], kwargs["RULES"], kwargs, args)
        print(json.dumps(facts))

    def expected(
        self, sizes: gpu_kernels.Sizes, rules: gpu_kernels.Rules, options: dict[str, Any], args: tuple[Any, ...]
    ) -> dict[str, Any]:
        config = Config(sizes.tile_m, sizes.tile_n, options["num_warps"], options["num_stages"])
        items = 4 if rules.compute.primitive_bitwidth == 32 else 2
        pool = next(arg for arg in args if isinstance(arg, gpu_kernels.Memory))
        heads = Heads(sizes.group, sizes.head_dim, sizes.v_head_dim, items, pool.key_blocks.element_size(), 1)
        expected = shared_bytes(config, heads, self.device)
        return {"expected_shared": expected, "allowed_shared": self.device.shared_bytes, "is_long": rules.search}

    def attend(self, what: str, dtype: torch.dtype, capability: int = 90, **changes: Any) -> None:
        """Compile for sequences of one query token and for long ones."""
        self.what, self.capability = what, capability
        sequences = [(3000, 1, 0, 0), (2500, 200, 4, 33)]
        sizes = {"num_kv_heads": 8, "group": 4, "head_dim": 128, "v_head_dim": 128}
        case = make_case(Shape(sequences, dtype=dtype, **{**sizes, **changes}))
        paged_attention(case.queries, case.keys, case.values, **case.options, backend="triton")

    def write(self, what: str, dtype: torch.dtype) -> None:
        self.what = what
        pool, new = torch.zeros(4, 16, 8, 128).to(dtype), torch.zeros(5, 8, 128, dtype=torch.bfloat16)
        scales = torch.zeros(4, 16, 8) if dtype.itemsize == 1 else None
        gpu_kernels.write_tokens(pool, pool.clone(), new, new, torch.arange(5), scales, scales)


def main() -> None:
    compiler = Compiler()
    driver.set_active(compiler)
    JITFunction.run = lambda kernel, *args, **kwargs: compiler.compile(kernel, *args, **kwargs)
    for module in (attention, gpu_device):
        module.require_runnable = lambda name, device: None
    gpu.device_of = lambda device: compiler.device
    gpu.is_interpreted = lambda: False
    gpu._precision = lambda device: "tf32x3"
    compiler.attend("bfloat16", torch.bfloat16)
    compiler.attend("int8", torch.int8, query_dtype=torch.bfloat16, num_kv_heads=2)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        compiler.write(f"write {dtype}", dtype)
    compiler.what = "copy"
    gpu_kernels.copy_blocks((torch.zeros(2, 2, 6, 16, 64),), np.array([[0, 1], [1, 2]]))
    features = {"sinks": True, "head_dim": 80, "v_head_dim": 33, "options": {"window": 100, "softcap": 30.0}}
    compiler.attend("features", torch.float16, 80, **features)
    if "--all" not in sys.argv:
        return
    compiler.write("write int8", torch.int8)
    for capability in (90, 89):
        compiler.attend("fp8", torch.float8_e4m3fn, capability, query_dtype=torch.bfloat16, layout="HND")
        compiler.attend("float32", torch.float32, capability, num_kv_heads=1)
        for dim in (64, 256):
            compiler.attend(f"heads of {dim}", torch.bfloat16, capability, head_dim=dim, v_head_dim=dim)


if __name__ == "__main__":
    main()
