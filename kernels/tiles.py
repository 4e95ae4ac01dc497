"""Device functions that two or more kernels use.

Everything here works on tiles or scalars of the accumulation type (fp32, or fp64 for fp64 inputs).
The elementary functions exist because the fast hardware forms lose what the losses need: `log(1 +
u)` and `exp(x) - 1` are wrong by orders of magnitude where u and x are small, and libdevice, which
has good ones, cannot run under the interpreter.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Launch options of a small kernel whose `tl.device_assert` must hold in every launch, not only in
# debug mode: an index out of range must not pass in silence, and here checking it costs no
# synchronisation. Checks for integer overflow, which debug mode would add, are left out.
ASSERTING = {"debug": True, "sanitize_overflow": False}


@triton.jit
def exp(x):
    """e^x, through the exponential that the hardware has."""
    return tl.exp2(x * LOG2E)


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation: Taylor's series in Horner form near 0."""
    terms: tl.constexpr = 16 if x.dtype == tl.float64 else 8
    series = x * 0.0 + 1.0
    for i in tl.static_range(terms):
        series = 1.0 + series * x * (1.0 / (terms + 1 - i))
    return tl.where(tl.abs(x) < 0.5, x * series, exp(x) - 1.0)


@triton.jit
def expm1_minus_near_0(x):
    """e^x - 1 - x for |x| < 1/2: x²/2 by Taylor's series in Horner form."""
    terms: tl.constexpr = 16 if x.dtype == tl.float64 else 8
    series = x * 0.0 + 1.0
    for i in tl.static_range(terms):
        series = 1.0 + series * x * (1.0 / (terms + 2 - i))
    return 0.5 * x * x * series


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x without cancellation."""
    return tl.where(tl.abs(x) < 0.5, expm1_minus_near_0(x), exp(x) - 1.0 - x)


@triton.jit
def log1p(u):
    """ln(1 + u) for u >= -1/2 without cancellation: 2 artanh(u / (2 + u)), a series up to u = 1."""
    terms: tl.constexpr = 18 if u.dtype == tl.float64 else 9
    ratio = u / (2.0 + u)
    square = ratio * ratio
    series = ratio * 0.0
    for i in tl.static_range(terms):
        series = series * square + 1.0 / (2 * (terms - i) - 1)
    return tl.where(u <= 1.0, 2.0 * ratio * series, tl.log(1.0 + u))


@triton.jit
def log_sigmoid(x):
    """Ln σ(x) = -softplus(-x), accurate in both tails."""
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """σ(x) from the exponential that cannot overflow."""
    small = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def tanh(x):
    """Tanh and its derivative 1 - tanh², each with relative accuracy in every range."""
    decay = exp(-2.0 * tl.abs(x))
    shrink = expm1(-2.0 * tl.abs(x))
    magnitude = -shrink / (2.0 + shrink)
    return tl.where(x < 0, -magnitude, magnitude), 4.0 * decay / ((1.0 + decay) * (1.0 + decay))


@triton.jit
def stored(x, dtype: tl.constexpr):
    """Convert what a kernel stores. From fp64 to 16 bits by way of fp32: the interpreter makes
    garbage of the direct way to bf16.
    """
    if x.dtype == tl.float64 and dtype.primitive_bitwidth < 32:
        return x.to(tl.float32).to(dtype)
    else:
        return x.to(dtype)


@triton.jit
def row_start(row, inner, stride_outer, stride_inner):
    """Offset of a row of an (outer, inner, V) view; rows count in int64, so offsets pass 2^31."""
    return (row // inner) * stride_outer + (row % inner) * stride_inner


@triton.jit
def capped_logits(x, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """softcap·tanh(scale·x / softcap), the effective logits but for the temperature; and its
    slope.
    """
    if HAS_SOFTCAP:
        saturation, slope = tanh(x * scale / softcap)
        return softcap * saturation, slope * scale
    else:
        return x * scale, scale


@triton.jit
def row_temperature(
    token_temperature, temperature, row, mask, acc: tl.constexpr, PER_TOKEN: tl.constexpr
):
    """Temperature of one row, or of a tile of rows: the row's own or the common one."""
    if PER_TOKEN:
        return tl.load(token_temperature + row, mask=mask, other=1.0).to(acc)
    else:
        return tl.full((), temperature, acc)
