"""The convolution engine as a stand-alone library, built with ninja and called through ctypes.

No torch extension is involved, so that every instruction set can be tested side by side in one
process, with any number of threads, and planted NaN around each buffer.
"""

import ctypes
import subprocess
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from filelock import FileLock

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cpu" / "conv"
BUILD = ROOT / "build" / "conv_library"
COMMON = "-std=c++20 -O3 -fno-math-errno -ffp-contract=fast -fPIC -Wno-maybe-uninitialized -MMD"
ISA_FLAGS = {
    "portable": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c",
}
ISA_CODES = {"portable": 0, "avx2": 1, "avx512": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
PRECISIONS = {"highest": 0, "high": 1, "medium": 2}
ENGINES = {"auto": 0, "direct": 1, "winograd": 2}
PASSES = {"forward": 0, "input_gradient": 1, "weight_gradient": 2}


def available_isas() -> list[str]:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    isas = ["portable"]
    if {"avx2", "fma", "f16c"} <= flags:
        isas.append("avx2")
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags:
        isas.append("avx512")
    return isas


def _ninja_file() -> str:
    lines = [
        f"flags = {COMMON}",
        "rule compile",
        "  command = g++ $flags $isa -c $in -o $out -MF $out.d",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        "  command = g++ -shared -pthread -o $out $in",
    ]
    objects = []
    once = [
        SOURCES.parent / "linear.cpp",
        *SOURCES.glob("*.cpp"),
        *(ROOT / "tests" / "support").glob("conv_*.cpp"),
    ]
    for source in sorted(once):
        objects.append(f"{source.stem}.o")
        lines.append(f"build {objects[-1]}: compile {source}")
    for isa, flags in ISA_FLAGS.items():
        for source in sorted((SOURCES / "kernels").glob("*.cpp")):
            objects.append(f"{isa}_{source.stem}.o")
            lines.append(f"build {objects[-1]}: compile {source}")
            lines.append(f"  isa = {flags} -DFASTALEX_ISA={isa}")
    lines.append(f"build libconv.so: link {' '.join(objects)}")
    return "\n".join(lines) + "\n"


@cache
def library() -> ctypes.CDLL:
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / ".lock"):
        (BUILD / "build.ninja").write_text(_ninja_file())
        subprocess.run(["ninja", "-C", str(BUILD), "-j2", "--quiet"], check=True)
    lib = ctypes.CDLL(str(BUILD / "libconv.so"))
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t
    signatures = {
        "conv_plan": (pointer, [integer] * 9 + [pointer]),
        "conv_free": (None, [pointer]),
        "conv_packed_bytes": (size, [pointer]),
        "conv_scratch_bytes": (size, [pointer]),
        "conv_predicted": (ctypes.c_double, [pointer]),
        "conv_engine": (integer, [pointer]),
        "conv_explain": (None, [pointer, ctypes.c_char_p, size]),
        "conv_buffer": (pointer, [size]),
        "conv_buffer_free": (None, [pointer]),
        "conv_set_threads": (None, [integer]),
        "conv_pack": (ctypes.c_double, [pointer] * 4),
        "conv_forward": (ctypes.c_double, [pointer] * 10 + [ctypes.c_int64]),
        "conv_input_gradient": (ctypes.c_double, [pointer] * 11),
        "conv_weight_gradient": (ctypes.c_double, [pointer] * 11),
        "linear_plan": (pointer, [integer] * 2 + [ctypes.c_int64] + [integer] * 4),
        "linear_free": (None, [pointer]),
        "linear_forward_scratch_bytes": (size, [pointer]),
        "linear_backward_scratch_bytes": (size, [pointer]),
        "linear_forward": (ctypes.c_double, [pointer] * 6),
        "linear_backward": (ctypes.c_double, [pointer] * 9),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def _strides(tensor: torch.Tensor) -> ctypes.Array:
    return (ctypes.c_int64 * 4)(*tensor.stride())


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@dataclass
class Shape:
    """A convolution; `input` is (batch, channels, height, width)."""

    input: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return (self.filters, self.input[1] // self.groups, *self.kernel)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                self.input[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True
            )
        ]
        return (self.input[0], self.filters, size[0], size[1])

    @property
    def arguments(self) -> dict:
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def flops(self) -> float:
        n, k, h, w = self.output_shape
        _, c, kh, kw = self.weight_shape
        return 2.0 * n * k * h * w * c * kh * kw


@dataclass
class Plan:
    shape: Shape
    direction: str = "forward"
    isa: str = "avx512"
    threads: int = 2
    engine: str = "auto"
    tile: int = 0
    dtype: torch.dtype = torch.float32
    precision: str = "high"
    relu: bool = True
    by_image: bool = False
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        s, lib = self.shape, library()
        n, c, h, w = s.input
        sizes = [n, s.groups, c, h, w, s.filters, *s.kernel, *s.stride, *s.padding, *s.dilation]
        self.handle = lib.conv_plan(
            ISA_CODES[self.isa],
            PASSES[self.direction],
            self.threads,
            ENGINES[self.engine],
            self.tile,
            DTYPES[self.dtype],
            PRECISIONS[self.precision],
            int(self.relu),
            int(self.by_image),
            (ctypes.c_int * 14)(*sizes),
        )
        self.packed = lib.conv_buffer(lib.conv_packed_bytes(self.handle) + 64)
        self.scratch = lib.conv_buffer(lib.conv_scratch_bytes(self.handle) + 64)
        # What a run does not write must not matter.
        ctypes.memset(self.packed, 0xFF, lib.conv_packed_bytes(self.handle) + 64)
        ctypes.memset(self.scratch, 0xFF, lib.conv_scratch_bytes(self.handle) + 64)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            lib = library()
            lib.conv_free(self.handle)
            lib.conv_buffer_free(self.packed)
            lib.conv_buffer_free(self.scratch)

    @property
    def chosen(self) -> str:
        return {1: "direct", 2: "winograd"}[library().conv_engine(self.handle)]

    def explain(self) -> str:
        text = ctypes.create_string_buffer(8192)
        library().conv_explain(self.handle, text, len(text))
        return text.value.decode()

    def assert_canaries(self) -> None:
        """The 64 bytes behind each buffer still hold what they were filled with."""
        lib = library()
        for data, size in (
            (self.packed, lib.conv_packed_bytes(self.handle)),
            (self.scratch, lib.conv_scratch_bytes(self.handle)),
        ):
            assert ctypes.string_at(data + size, 64) == b"\xff" * 64

    def pack(self, weight: torch.Tensor) -> float:
        return library().conv_pack(self.handle, _pointer(weight), _strides(weight), self.packed)

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> float:
        return library().conv_forward(
            self.handle,
            *(_pointer(x), _strides(x), _pointer(weight), _strides(weight), _pointer(bias)),
            *(self.packed, _pointer(out), _strides(out), self.scratch, out[:1].numel()),
        )

    def input_gradient(
        self,
        grad: torch.Tensor,
        output: torch.Tensor | None,
        weight: torch.Tensor,
        out: torch.Tensor,
    ) -> float:
        mask = grad if output is None else output
        return library().conv_input_gradient(
            self.handle,
            *(_pointer(grad), _strides(grad), _pointer(output), _strides(mask)),
            *(_pointer(weight), _strides(weight), self.packed),
            *(_pointer(out), _strides(out), self.scratch),
        )

    def weight_gradient(
        self,
        grad: torch.Tensor,
        output: torch.Tensor | None,
        x: torch.Tensor,
        out: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> float:
        mask = grad if output is None else output
        return library().conv_weight_gradient(
            self.handle,
            *(_pointer(grad), _strides(grad), _pointer(output), _strides(mask)),
            *(_pointer(x), _strides(x), _pointer(out), _strides(out)),
            *(_pointer(bias), self.scratch),
        )


@dataclass
class LinearPlan:
    rows: int
    inputs: int
    outputs: int
    isa: str = "avx512"
    threads: int = 2
    dtype: torch.dtype = torch.float32
    relu: bool = True
    handle: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lib = library()
        self.handle = lib.linear_plan(
            *(ISA_CODES[self.isa], DTYPES[self.dtype], self.rows, self.inputs, self.outputs),
            *(int(self.relu), self.threads),
        )
        self.sizes = (
            lib.linear_forward_scratch_bytes(self.handle),
            lib.linear_backward_scratch_bytes(self.handle),
        )
        self.buffers = tuple(lib.conv_buffer(size + 64) for size in self.sizes)
        for data, size in zip(self.buffers, self.sizes, strict=True):
            ctypes.memset(data, 0xFF, size + 64)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            library().linear_free(self.handle)
            for buffer in self.buffers:
                library().conv_buffer_free(buffer)

    def assert_canaries(self) -> None:
        for data, size in zip(self.buffers, self.sizes, strict=True):
            assert ctypes.string_at(data + size, 64) == b"\xff" * 64

    def forward(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
    ) -> float:
        return library().linear_forward(
            self.handle, *map(_pointer, (x, weight, bias, out)), self.buffers[0]
        )

    def backward(
        self,
        grad: torch.Tensor,
        output: torch.Tensor | None,
        x: torch.Tensor,
        weight: torch.Tensor,
        results: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    ) -> float:
        return library().linear_backward(
            self.handle, *map(_pointer, (grad, output, x, weight, *results)), self.buffers[1]
        )
