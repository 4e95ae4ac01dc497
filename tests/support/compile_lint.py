"""Compile kernels as their launchers would launch them, for a GPU that is not there, and read the
machine code.

`captured_launches` runs launchers on meta tensors and records each launch; `compile_launch`
compiles one for a target and reports what the compiler's own tools say of the binary: registers,
stack (spills) and the widths of loads and stores. It needs the kernels as Triton's compiler sees
them, so a process without TRITON_INTERPRET.
"""

import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import (
    JITFunction,
    compute_cache_key,
    create_function_from_signature,
)

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "i1",
}
_LAUNCH_OPTIONS = ("num_warps", "num_stages", "num_ctas", "debug", "sanitize_overflow")


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, its arguments by name and its launch options."""

    kernel: JITFunction
    arguments: dict
    options: dict


@dataclass(frozen=True)
class Binary:
    """What the compiler made of a launch; stack bytes are spills, widths are bits."""

    registers: int
    stack: int
    load_bits: tuple[int, ...]
    store_bits: tuple[int, ...]
    asserts: bool
    assembly: str


@contextmanager
def captured_launches(monkeypatch):
    """Record the launches made inside, instead of making them."""
    launches = []

    def record(kernel, *args, grid, warmup, **kwargs):
        options = {name: kwargs.pop(name) for name in _LAUNCH_OPTIONS if name in kwargs}
        names = [parameter.name for parameter in kernel.params]
        launches.append(Launch(kernel, dict(zip(names, args, strict=False)) | kwargs, options))

    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", record)
        yield launches


def compile_launch(launch: Launch, target: str) -> Binary:
    """Compile a launch and report on the binary."""
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or (isinstance(value, int) and value == 1 and specialized):
            signature[parameter.name] = "constexpr"
            constants[(position,)] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _TYPES[value.dtype]
            attributes[(position,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and specialized:
                attributes[(position,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = parameter.annotation_type or "fp32"
    source = ASTSource(launch.kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=launch.options)
    return _read_cuda(compiled) if target.startswith("sm") else _read_hip(compiled)


def _read_cuda(compiled) -> Binary:
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        assembly = _run(tools / "cuobjdump", "-sass", file.name)
    registers = int(re.search(r"REG:(\d+)", usage).group(1))
    stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    spills = len(re.findall(r"\b(?:STL|LDL)\b", assembly))
    return Binary(
        registers,
        stack if spills else 0,
        _widths(r"LDG\.E(\S*)", assembly),
        _widths(r"STG\.E(\S*)", assembly),
        "__assertfail" in compiled.asm["ptx"],
        assembly,
    )


def _widths(pattern: str, assembly: str) -> tuple[int, ...]:
    def bits(suffix: str) -> int:
        for name, width in (("128", 128), ("64", 64), ("U16", 16), ("S16", 16), ("U8", 8)):
            if f".{name}" in suffix:
                return width
        return 32

    return tuple(bits(suffix) for suffix in re.findall(pattern, assembly))


def _read_hip(compiled) -> Binary:
    assembly = compiled.asm["amdgcn"]
    number = lambda name: int(re.search(rf"\.{name}:\s*(\d+)", assembly).group(1))  # noqa: E731
    spills = number("private_segment_fixed_size")
    widths = {"dwordx4": 128, "dwordx2": 64, "dword": 32, "ushort": 16, "short": 16}

    def bits(kind: str) -> tuple[int, ...]:
        return tuple(
            widths.get(name, 8) for name in re.findall(rf"(?:global|buffer)_{kind}_(\w+)", assembly)
        )

    asserts = "fprintf_stderr" in compiled.asm["llir"]
    return Binary(number("vgpr_count"), spills, bits("load"), bits("store"), asserts, assembly)


def _run(*command) -> str:
    return subprocess.run(
        [str(c) for c in command], check=True, capture_output=True, text=True
    ).stdout


def cache_key(launch: Launch) -> str:
    """Triton's own key of the binary that a launch takes: what it specialises on, and how."""
    kernel = launch.kernel
    backend = make_backend(TARGETS["sm_90"])
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    _, specialization, options = bind(**launch.arguments, **launch.options)
    return compute_cache_key({}, specialization, options)


def launch_key(launch: Launch) -> tuple:
    """What tells compilations apart: the kernel, its options and the specialised arguments."""
    described = []
    for parameter in launch.kernel.params:
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            described.append(str(getattr(value, "__name__", value)))
        elif isinstance(value, torch.Tensor):
            described.append(str(value.dtype))
        elif isinstance(value, int):
            plain = parameter.do_not_specialize
            described.append((abs(value) < 2**31, not plain and (value == 1, value % 16 == 0)))
    return launch.kernel.__name__, tuple(launch.options.items()), tuple(described)
