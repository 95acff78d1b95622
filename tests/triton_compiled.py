"""Run without TRITON_INTERPRET: the Triton kernels, compiled and not run, for three generations of
GPUs."""
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sprout_lab.kernels import bitlinear, normgate, scan, ternary

KIB_PER_BLOCK = {75: 64, 80: 163, 90: 227}      # shared memory by compute capability
LARGEST = 4096                                  # the largest block needs the most shared memory
TYPES = {"eps": "fp32", "codes": "*i8", "packed": "*u8", "reset": "*u8"}
SIZES = {"T", "D", "CHUNK", "ROWS", "M", "O", "SIZE"}


def kernels():
    "(kernel, its constants, warps)"
    for reset in (True, False):
        yield scan._scan_kernel, dict(HAS_H0=True, HAS_RESET=reset, BLOCK=128), 4
        yield scan._backward_kernel, dict(HAS_H0=True, HAS_RESET=reset, BLOCK=128), 4
        yield scan._chunk_kernel, dict(REVERSE=reset, HAS_RESET=True, BLOCK=128), 4
    for kernel in (bitlinear._quantize_rows_kernel, bitlinear._norm_backward_kernel,
                   normgate._forward_kernel, normgate._backward_kernel):
        yield kernel, dict(BLOCK=LARGEST), 16
    yield normgate._silu_gate_kernel, dict(BLOCK=512), 4
    yield normgate._silu_gate_backward_kernel, dict(BLOCK=512), 4
    yield ternary._ternary_kernel, dict(BLOCK_O=16), 4


def signature(kernel, constants):
    "The arguments' types by their names; what has none is a pointer to float32."
    types = dict(TYPES, x="*i8", y="*i32") if kernel is ternary._ternary_kernel else TYPES
    kinds = {**dict.fromkeys(SIZES, "i32"), **types, **dict.fromkeys(constants, "constexpr")}
    return {name: kinds.get(name, "*fp32") for name in kernel.arg_names}


count = 0
for kernel, constants, warps in kernels():
    source = ASTSource(kernel, signature(kernel, constants), constants)
    for capability, kib in KIB_PER_BLOCK.items():
        target = GPUTarget("cuda", capability, 32)
        compiled = triton.compile(source, target=target, options=dict(num_warps=warps))
        shared = compiled.metadata.shared
        assert shared <= kib * 1024, (kernel.__name__, capability, shared)
        assert ".entry" in compiled.asm["ptx"]
        count += 1
print(f"compiled with triton {triton.__version__}: {count} programs for "
      f"sm_{', sm_'.join(map(str, KIB_PER_BLOCK))}")
