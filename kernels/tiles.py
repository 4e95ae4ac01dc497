"""Device functions that two or more kernels use.

Everything here works on tiles or scalars of the accumulation type (fp32, or fp64 for fp64 inputs).
The elementary functions exist because the fast hardware forms lose what the losses need: `log(1 +
u)` and `exp(x) - 1` are wrong by orders of magnitude where u and x are small, and libdevice, which
has good ones, cannot run under the interpreter.

All kernels of this folder use it, and `rows.py`, which is the next to read.
"""

import math

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Launch options of a small kernel whose `tl.device_assert` must hold in every launch, not only in
# debug mode: an index out of range must not pass in silence, and here checking it costs no
# synchronisation. Checks for integer overflow, which debug mode would add, are left out.
ASSERTING = {"debug": True, "sanitize_overflow": False}


@triton.jit
def extent(cu_seqlens, sequence, tokens, PACKED: tl.constexpr):
    """Where the tokens of a sequence stand: the row, the first place in it, and that after the
    last. Rows (B, T) have one a sequence, packed tokens (1, N) lie between cumulative lengths.
    """
    if PACKED:
        start = tl.load(cu_seqlens + sequence)
        stop = tl.load(cu_seqlens + sequence + 1)
        # Lengths that do not fit are an error elsewhere, and must not reach beyond the tokens here.
        start, stop = tl.maximum(start, 0), tl.minimum(stop, tokens)
        return sequence * 0, start, stop
    else:
        return sequence, 0, tokens


@triton.jit
def quotient(x, y):
    """Divide a few numbers of a row, rounded once. In fp32, `/` is a quick division, off by up to
    two units in the last place, which would be an error of lse where logits have an offset.
    """
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def exp(x):
    """e^x, through the exponential that the hardware has."""
    return tl.exp2(x * LOG2E)


@triton.constexpr_function
def _inverse_factorial(n):
    return 1.0 / math.factorial(n)


@triton.jit
def _exp_series(x, first: tl.constexpr):
    """Σ x^k / (first + k)!, k from 0 on, for |x| < 1/2: times x^first, Taylor's series of e^x from
    that term on.
    """
    degree: tl.constexpr = 14 if x.dtype == tl.float64 else 7
    series = x * 0.0 + _inverse_factorial(first + degree)
    for i in tl.static_range(degree):
        series = series * x + _inverse_factorial(first + degree - 1 - i)
    return series


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation: Taylor's series near 0."""
    return tl.where(tl.abs(x) < 0.5, x * _exp_series(x, 1), exp(x) - 1.0)


@triton.jit
def expm1_minus_near_0(x):
    """e^x - 1 - x for |x| < 1/2."""
    return x * x * _exp_series(x, 2)


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x without cancellation."""
    return tl.where(tl.abs(x) < 0.5, expm1_minus_near_0(x), exp(x) - 1.0 - x)


@triton.jit
def log1p_surplus_near_0(u):
    """The surplus u - ln(1 + u) for -1/2 <= u <= 1, by ln(1 + u) = 2 artanh(u / (2 + u))."""
    terms: tl.constexpr = 17 if u.dtype == tl.float64 else 7
    ratio = u / (2.0 + u)
    square = ratio * ratio
    series = ratio * 0.0
    for i in tl.static_range(terms):
        series = series * square + 1.0 / (2 * (terms - i) + 1)
    return ratio * (u - 2.0 * square * series)


@triton.jit
def log1p_near_0(u):
    """Compute ln(1 + u) for -1/2 <= u <= 1 without cancellation."""
    return u - log1p_surplus_near_0(u)


@triton.jit
def log1p(u):
    """Compute ln(1 + u) for u >= -1/2 without cancellation."""
    return tl.where(u <= 1.0, log1p_near_0(u), tl.log(1.0 + u))


@triton.jit
def log_sigmoid(x):
    """Compute ln σ(x) = -softplus(-x), accurate in both tails."""
    return tl.minimum(x, 0.0) - log1p(exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    """σ(x) from the exponential that cannot overflow."""
    small = exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _tanh_near_0(x):
    """Tanh of |x| < 0.6. In fp32 by a polynomial in x², as many terms as its accuracy needs: it was
    interpolated at Chebyshev's points, and is off by 1e-8 of the value at most.
    """
    if x.dtype == tl.float64:
        shrink = expm1(-2.0 * x)
        return -shrink / (2.0 + shrink)
    else:
        square = x * x
        series = square * -0.00626911968 + 0.0211109594
        series = series * square - 0.0538739488
        series = series * square + 0.133329153
        series = series * square - 0.333333313
        return x + x * square * series


@triton.jit
def tanh(x):
    """Tanh and its derivative 1 - tanh², each with relative accuracy in every range."""
    decay = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    complement = 2.0 * decay / (1.0 + decay)  # 1 - tanh|x|
    magnitude = tl.where(tl.abs(x) < 0.6, _tanh_near_0(tl.abs(x)), 1.0 - complement)
    return tl.where(x < 0, -magnitude, magnitude), complement * (2.0 - complement)


@triton.jit
def stored(x, dtype: tl.constexpr):
    """Convert what a kernel stores. From fp64 to 16 bits by way of fp32: the interpreter makes
    garbage of the direct way to bf16.
    """
    if x.dtype == tl.float64 and dtype.primitive_bitwidth < 32:
        return x.to(tl.float32).to(dtype)
    else:
        return x.to(dtype)
