"""Compiles the Triton kernels for GPUs that are not here, with the argument hints a real launch
gives.

The host code itself decides the arguments: `compiling(arch)` replaces a kernel's launcher by one
that compiles what would have been launched, on meta tensors, so that nothing is said twice.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from fastalex.kernels import conv_relu_backward
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from tests.support.static_ledger import amd_facts, cubin_facts

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


def compile_launch(arch: str, kernel: JITFunction, arguments: tuple, options: dict):
    """The compiled kernel of one launch: 16-byte pointers, and integers that are multiples of 16
    marked as such.
    """
    signature, constants, hints = {}, {}, {}
    for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        specialised = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            hints[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialised and value % 16 == 0:
                hints[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=hints)
    return triton.compile(source, target=TARGETS[arch], options=options)


def facts(arch: str, compiled) -> dict:
    target = TARGETS[arch]
    threads = compiled.metadata.num_warps * target.warp_size
    if target.backend == "hip":
        return amd_facts(compiled.asm["amdgcn"], threads, compiled.metadata.shared)
    return cubin_facts(compiled.asm["cubin"], threads, compiled.metadata.shared)


@contextlib.contextmanager
def compiling(arch: str, only: str):
    """Inside, a launch of the kernel named `only` compiles for `arch`, into the list yielded;
    others do nothing.
    """
    compiled: list = []

    def run(self, *arguments, grid, warmup, **options):
        if self.__name__ == only:
            compiled.append(compile_launch(arch, self, arguments, options))

    run_before, architecture_before = JITFunction.run, conv_relu_backward.architecture
    JITFunction.run, conv_relu_backward.architecture = run, lambda device: arch
    try:
        yield compiled
    finally:
        JITFunction.run, conv_relu_backward.architecture = run_before, architecture_before
