"""Let interpreted kernels compute as an NVIDIA GPU does, where the machine code differs from NumPy.

The interpreter rounds every product and every sum, has exact exponentials and divisions, and passes
NaN through a maximum. In the PTX of the kernels (Triton 3.6, sm_90) instead

- a product and the sum that takes it are one `fma`, rounded once: `a·b - a·b` need not be 0;
- `ex2.approx.ftz.f32` is off by two units in the last place, and flushes subnormal numbers to 0;
- `div.full.f32` multiplies by an approximate reciprocal: x / x need not be 1;
- the logarithm is off by a unit, and flushes subnormal numbers to 0;
- `max.f32` and `min.f32` return the other number where one is NaN.

Which products are fused is the compiler's choice. Here every product is that can be: of `a·b + c·d`
the first, or the last.

As a plugin it changes all tests of a run. Those that compare with fp64 at twice the error of the
plain formula may then fail by little, for the plain formula is still NumPy's or PyTorch's.

    TRITON_INTERPRET=1 PYTHONPATH=tests python -m pytest -p support.gpu_arithmetic tests
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_SMALLEST_NORMAL = np.finfo(np.float32).tiny
_FACTORS = "factors"  # of a product that was just computed, and that no sum has taken
_quietly = np.errstate(all="ignore")  # as hardware is about infinities and NaN


def _in_the_last_place(x: np.ndarray) -> np.ndarray:
    """Change fp32 numbers by -1, 0 or 1 unit in the last place, which one depends on their bits.

    What is exact by nature stays so: 0, infinities, NaN and powers of 2.
    """
    bits = x.view(np.int32)
    scrambled = (bits.astype(np.uint32) * np.uint32(2654435761)) >> np.uint32(16)
    steps = (scrambled % np.uint32(3)).astype(np.int32) - 1
    exact = (bits & 0x7FFFFF == 0) | ~np.isfinite(x)
    return np.where(exact, bits, bits + steps).astype(np.int32).view(np.float32)


def _flushed(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0.0), x), x)


@_quietly
def exp2(x: np.ndarray) -> np.ndarray:
    """Compute 2^x as the hardware does."""
    if x.dtype != np.float32:
        return np.exp2(x)
    return _flushed(_in_the_last_place(np.exp2(_flushed(x))))


@_quietly
def log(x: np.ndarray) -> np.ndarray:
    """Compute ln x as libdevice does with subnormal numbers flushed."""
    if x.dtype != np.float32:
        return np.log(x)
    return _in_the_last_place(np.log(_flushed(x)))


@_quietly
def divide(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Compute x / y by an approximate reciprocal of 24 bits, at any exponent."""
    if x.dtype != np.float32 or y.dtype != np.float32:
        return np.divide(x, y)
    fraction, exponent = np.frexp(y)
    reciprocal = _in_the_last_place(np.divide(np.float32(1.0), fraction)).astype(np.float64)
    reciprocal = np.where(np.isinf(y), 1 / y, np.ldexp(reciprocal, -exponent))
    return (x * reciprocal).astype(np.float32)


@_quietly
def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Compute a·b + c, rounded once."""
    if a.dtype == np.float32:
        return (a.astype(np.float64) * b + c).astype(np.float32)
    product, error = _exact_product(a, b)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    correction = lost + error
    return np.where(np.isfinite(correction), total + correction, total)


def _exact_product(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dekker's product: its rounded value, and what rounding lost."""

    def halves(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        high = x * 134217729.0
        high = high - (high - x)
        return high, x - high

    product = a * b
    (a1, a2), (b1, b2) = halves(a), halves(b)
    return product, a2 * b2 - (((product - a1 * b1) - a2 * b1) - a1 * b2)


def _is_float(*handles: TensorHandle) -> bool:
    return all(handle.data.dtype in (np.float32, np.float64) for handle in handles)


def _multiply(builder: Any, lhs: TensorHandle, rhs: TensorHandle) -> TensorHandle:
    out = builder.binary_op(lhs, rhs, np.multiply)
    if _is_float(lhs, rhs, out):
        out.set_attr(_FACTORS, (lhs.data, rhs.data))
    return out


def _sum(
    op: Callable, sign: int, fuses_last: bool, builder: Any, lhs: TensorHandle, rhs: TensorHandle
) -> TensorHandle:
    """Add `sign` times the second number to the first; `op` does so without fusing."""
    if not _is_float(lhs, rhs):
        return builder.binary_op(lhs, rhs, op)
    if _FACTORS in rhs.attr and (fuses_last or _FACTORS not in lhs.attr):
        a, b = rhs.attr[_FACTORS]
        out = TensorHandle(fused(sign * a, b, lhs.data), lhs.dtype.scalar)
        if not np.any(lhs.data):  # a negated product is one still
            out.set_attr(_FACTORS, (sign * a, b))
        return out
    if _FACTORS in lhs.attr:
        return TensorHandle(fused(*lhs.attr[_FACTORS], sign * rhs.data), lhs.dtype.scalar)
    return builder.binary_op(lhs, rhs, op)


def _keeping_factors(original: Callable, position: int) -> Callable:
    """A product is still one after a change of its shape."""

    def changed(builder: Any, *arguments: Any) -> TensorHandle:
        def of(handle: TensorHandle) -> TensorHandle:
            return original(builder, *arguments[:position], handle, *arguments[position + 1 :])

        handle = arguments[position]
        out = of(handle)
        if _FACTORS in handle.attr:
            a, b = (np.broadcast_to(x, np.shape(handle.data)) for x in handle.attr[_FACTORS])
            out.set_attr(_FACTORS, tuple(of(TensorHandle(x, handle.dtype)).data for x in (a, b)))
        return out

    return changed


def install(set_attribute: Callable[..., Any], *, fuses_last: bool = False) -> None:
    """Change the interpreter by `set_attribute`, such as `monkeypatch.setattr`."""

    def of_two(op: Callable) -> Callable:
        return lambda builder, lhs, rhs: builder.binary_op(lhs, rhs, op)

    def of_one(op: Callable) -> Callable:
        return lambda builder, arg: builder.unary_op(arg, op)

    for name, computed in {
        "create_fmul": _multiply,
        "create_fadd": lambda *arguments: _sum(np.add, 1, fuses_last, *arguments),
        "create_fsub": lambda *arguments: _sum(np.subtract, -1, fuses_last, *arguments),
        "create_fdiv": of_two(divide),
        "create_maxnumf": of_two(np.fmax),
        "create_minnumf": of_two(np.fmin),
        "create_exp2": of_one(exp2),
        "create_log": of_one(log),
        "create_expand_dims": _keeping_factors(InterpreterBuilder.create_expand_dims, 0),
        "create_broadcast": _keeping_factors(InterpreterBuilder.create_broadcast, 0),
        "create_splat": _keeping_factors(InterpreterBuilder.create_splat, 1),
    }.items():
        set_attribute(InterpreterBuilder, name, computed)


def pytest_configure() -> None:
    """As a plugin."""
    install(setattr)
