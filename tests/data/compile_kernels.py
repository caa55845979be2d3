"""Compile every kernel for real GPUs, down to machine code, on a machine that has none: the interpreter cannot test it.

The launching code runs as ever; where it would launch a kernel, the kernel is compiled for the arguments it is given.
"""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
import triton
from tests.contracts.attention_cases import Shape, make_case
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from pagedkv import paged_attention
from pagedkv.data import gpu, gpu_device, gpu_launch, gpu_move, gpu_tuning
from pagedkv.data.gpu_shapes import Device

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
capability = 0


def compile_instead(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    bound = inspect.signature(kernel.fn).bind(*args, **{k: v for k, v in kwargs.items() if k not in OPTIONS})
    signature, constants, attributes = {}, {}, {}
    for i, (name, given) in enumerate(bound.arguments.items()):
        whole = None
        if kernel.params[i].is_constexpr or given is None:
            signature[name], constants[name] = "constexpr", given
        elif isinstance(given, torch.Tensor):
            signature[name], whole = "*" + TYPES[given.dtype], given.data_ptr()
        elif isinstance(given, float):
            signature[name] = "fp32"
        else:
            signature[name], whole = "i32", None if kernel.params[i].do_not_specialize else given
        if whole is not None and whole % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    options = {name: kwargs[name] for name in OPTIONS if name in kwargs}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    shared = compiled.metadata.shared
    limit = 227 << 10 if capability >= 90 else 99 << 10
    print(f"sm_{capability} {kernel.__name__}: {len(compiled.asm['cubin'])} bytes, {shared} bytes of shared memory")
    assert shared <= limit, (kernel, kwargs)


def attend(dtype: torch.dtype, **changes: Any) -> None:
    sequences = [(3000, 1, 0, 0), (2500, 200, 4, 33)]
    case = make_case(Shape(sequences, dtype=dtype, group=4, **{"head_dim": 128, "v_head_dim": 128, **changes}))
    paged_attention(case.queries, case.keys, case.values, **case.options, backend="triton")


def write(dtype: torch.dtype) -> None:
    pool, new = torch.zeros(4, 16, 8, 128).to(dtype), torch.zeros(5, 8, 128, dtype=torch.bfloat16)
    scales = torch.zeros(4, 16, 8) if dtype.itemsize == 1 else None
    gpu_move.write_tokens(pool, pool.clone(), new, new, torch.arange(5), scales, scales)


def attend_quantised(dtype: torch.dtype) -> None:
    case = make_case(Shape([(3000, 1, 0, 0), (70, 50, 0, 0)], group=4, head_dim=128, v_head_dim=128))
    scales = torch.ones(case.keys.shape[:3])
    pools = (torch.zeros(case.keys.shape).to(dtype) for _ in range(2))
    options = {**case.options, "key_scales": scales, "value_scales": scales}
    paged_attention(case.queries.bfloat16(), *pools, **options, backend="triton")


def main() -> None:
    global capability
    JITFunction.run = compile_instead
    for module in (gpu, gpu_device):
        module.require_runnable = lambda name, device: None
    for module in (gpu_launch, gpu_tuning):
        module.device_of = lambda device: Device("none", 132, 227 << 10 if capability >= 90 else 99 << 10, capability)
        module.is_interpreted = lambda: False
    gpu_tuning.is_capturing = lambda device: True
    gpu_launch._precision = lambda device: "tf32x3"
    capability = 90
    attend(torch.bfloat16)
    attend_quantised(torch.int8)
    attend_quantised(torch.float8_e4m3fn)
    for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn):
        write(dtype)
    gpu_move.copy_blocks((torch.zeros(2, 2, 6, 16, 8),), np.array([[0, 1], [1, 2]]))
    capability = 80
    attend(torch.float16, sinks=True, head_dim=80, v_head_dim=33, options={"window": 100, "softcap": 30.0})
    attend(torch.float32)


if __name__ == "__main__":
    main()
