"""Divergences from hidden states against those of the logits, at the stated cost."""

import pytest
import torch
import torch.nn.functional as F
from support.compare import assert_as_accurate, relative_error
from support.matmuls import MatmulAudit
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import QuantizedWeight, kl_divergence, linear_kl_divergence, linear_token_stats

TOKENS, WIDTH, REF_WIDTH, VOCAB = 11, 6, 4, 37
NAMES = ("hidden", "weight", "bias", "ref_hidden", "ref_weight", "ref_bias")
SHAPES = (
    (TOKENS, WIDTH),
    (VOCAB, WIDTH),
    (VOCAB,),
    (TOKENS, REF_WIDTH),
    (VOCAB, REF_WIDTH),
    (VOCAB,),
)
MEASURES = [
    {"direction": "reverse"},
    {"direction": "forward"},
    {"direction": "jsd", "beta": 0.1},
]
MASK = torch.ones(TOKENS, dtype=torch.bool)
MASK[[0, 4, 10]] = False
TRANSFORMS = {
    "plain": {},
    "all": {"softcap": 3.0, "scale": 0.5, "temperature": torch.linspace(0.5, 2, TOKENS)},
}


def inputs(needs=NAMES, dtype=torch.float64, ref_dtype=None) -> dict[str, Tensor]:
    """Arguments of linear_kl_divergence, with garbage in the hidden states off the mask."""
    tensors = {}
    for name, shape in zip(NAMES, SHAPES, strict=True):
        own = ref_dtype if ref_dtype and name.startswith("ref_") else dtype
        tensors[name] = torch.randn(*shape).to(own)
    tensors["hidden"][0], tensors["ref_hidden"][4] = torch.nan, torch.inf
    for name in needs:
        tensors[name].requires_grad_()
    return tensors


def from_logits(tensors: dict[str, Tensor], mask: Tensor = MASK, **options) -> Tensor:
    """Compute the eager equivalent, garbage taken out."""
    sides = [
        F.linear(tensors[name].where(mask.unsqueeze(-1), 0.0), tensors[weight], tensors.get(bias))
        for name, weight, bias in (NAMES[:3], NAMES[3:])
    ]
    return kl_divergence(*sides, mask=mask, impl="eager", **options)


def gradients(values: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a sum with coefficients of both signs, of whatever needs one."""
    wanted = {name: x for name, x in tensors.items() if x.requires_grad}
    loss = (values * torch.linspace(-1, 2, values.numel()).view(values.shape)).sum()
    return dict(zip(wanted, autograd.grad(loss, list(wanted.values())), strict=True))


def assert_like_the_logits(
    tensors: dict[str, Tensor], needs, expected, of_logits, **options
) -> None:
    given = {name: x.detach().requires_grad_(name in needs) for name, x in tensors.items()}
    values = linear_kl_divergence(**given, mask=MASK, **options)
    torch.testing.assert_close(values, expected, rtol=1e-10, atol=1e-12)
    found = gradients(values, given)
    assert set(found) == set(needs)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, of_logits[name], rtol=1e-9, atol=1e-11)
        if "hidden" in name:
            assert not gradient[~MASK].any()


def test_every_combination_of_gradients_is_that_of_the_logits() -> None:
    tensors, options = inputs(), MEASURES[2] | TRANSFORMS["all"]
    expected = from_logits(tensors, **options)
    of_logits = gradients(expected, tensors)
    for bits in range(1, 2 ** len(NAMES)):
        needs = [name for i, name in enumerate(NAMES) if bits >> i & 1]
        assert_like_the_logits(tensors, needs, expected, of_logits, **options)


@pytest.mark.parametrize("options", MEASURES, ids=lambda options: options["direction"])
@pytest.mark.parametrize("chunk_size", [1, 3, None])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_any_chunk_size_and_transform(options, chunk_size, transform) -> None:
    tensors, options = inputs(), options | TRANSFORMS[transform]
    expected = from_logits(tensors, **options)
    of_logits = gradients(expected, tensors)
    for needs in (("hidden",), ("hidden", "ref_hidden"), NAMES):
        assert_like_the_logits(
            tensors, needs, expected, of_logits, chunk_size=chunk_size, **options
        )


@pytest.mark.parametrize("options", MEASURES, ids=lambda options: options["direction"])
def test_kernels_give_the_same(options, device) -> None:
    tensors, options = inputs(), options | TRANSFORMS["all"]
    expected = from_logits(tensors, **options)
    of_logits = gradients(expected, tensors)
    for needs in (("hidden",), NAMES):
        moved = {n: x.detach().to(device).requires_grad_(n in needs) for n, x in tensors.items()}
        values = linear_kl_divergence(
            **moved, mask=MASK.to(device), chunk_size=4, impl="triton",
            **options | {"temperature": options["temperature"].to(device)},
        )  # fmt: skip
        torch.testing.assert_close(values.cpu(), expected, rtol=1e-10, atol=1e-12)
        found = gradients(values.cpu(), moved)
        for name in needs:
            torch.testing.assert_close(found[name].cpu(), of_logits[name], rtol=1e-9, atol=1e-11)


def mutants(tensors: dict[str, Tensor]) -> dict[str, dict]:
    """Mistakes that a comparison must see, as other options or other tensors."""
    swapped = {f"ref_{name}": tensors[name] for name in NAMES[:3]}
    swapped |= {name: tensors[f"ref_{name}"] for name in NAMES[:3]}
    options = {"direction": "jsd", "beta": 0.1, "temperature": 0.7}
    return {
        "sides": {**swapped, **options},
        "beta": {**tensors, **options, "beta": 0.9},
        "temperature": {**tensors, **options, "temperature": 1.0},
        "no bias": {**tensors, **options, "bias": torch.zeros(VOCAB)},
        "mask": {**tensors, **options, "mask": MASK.roll(1) & MASK},
    }


def test_the_comparison_rejects_mutants() -> None:
    tensors = inputs(())
    expected = from_logits(tensors, direction="jsd", beta=0.1, temperature=0.7)
    for wrong in mutants(tensors).values():
        found = linear_kl_divergence(**{"mask": MASK, **wrong})
        assert relative_error(found, expected) > 1e-3


def test_other_shapes_and_no_bias() -> None:
    tensors = {name: x for name, x in inputs(()).items() if "bias" not in name}
    flat = linear_kl_divergence(**tensors, mask=MASK)
    torch.testing.assert_close(flat, from_logits(tensors))
    # The same tokens as (B, T), strided, with a mask of numbers.
    batch = dict(tensors)
    for name in ("hidden", "ref_hidden"):
        batch[name] = torch.stack([tensors[name]] * 3, dim=1).transpose(0, 1).flip(-1)
        weight = name.replace("hidden", "weight")
        batch[weight] = tensors[weight].flip(-1)
        batch[name].requires_grad_(), batch[weight].requires_grad_()
    strided = linear_kl_divergence(**batch, mask=MASK.float().expand(3, -1))
    torch.testing.assert_close(strided, flat.expand(3, -1))
    for name, gradient in gradients(strided, batch).items():
        assert gradient.shape == batch[name].shape and gradient.isfinite().all()
    one = linear_kl_divergence(*(x[1:2] if "hidden" in n else x[:1] for n, x in tensors.items()))
    assert one.item() == 0


def test_a_vocabulary_masked_by_the_bias_makes_no_nan() -> None:
    tensors = inputs(("hidden", "weight", "ref_hidden", "ref_weight"))
    for name in ("bias", "ref_bias"):
        tensors[name][::3] = -torch.inf
    for options in MEASURES:
        values = linear_kl_divergence(**tensors, mask=MASK, **options)
        expected = from_logits(tensors, **options)
        torch.testing.assert_close(values, expected)
        found, of_logits = (gradients(x, tensors) for x in (values, expected))
        for name in found:
            torch.testing.assert_close(found[name], of_logits[name])


def test_small_slopes_in_fp16_keep_their_accuracy(monkeypatch) -> None:
    # Slopes of 1e-7, which a loss scaled for fp16 shows.
    hidden = torch.randn(16, 8).half()
    ref, weight = hidden + 1e-3 * torch.randn(16, 8).half(), 0.01 * torch.randn(30, 8).half()

    def d_hidden(function, dtype):
        x = hidden.to(dtype).requires_grad_()
        values = function(x, weight.to(dtype), ref.to(dtype), weight.to(dtype))
        return autograd.grad(2.0**16 * values.sum(), x)[0]

    def plain(x, w, y, v):
        wide = torch.promote_types(x.dtype, torch.float32)
        return kl_divergence(F.linear(x.to(wide), w.to(wide)), F.linear(y.to(wide), v.to(wide)))

    exact = d_hidden(plain, torch.float64)
    theirs = relative_error(d_hidden(plain, torch.float16), exact)
    assert relative_error(d_hidden(linear_kl_divergence, torch.float16), exact) <= 2 * theirs
    # The mutant: slopes in the dtype of the hidden states.
    monkeypatch.setattr(
        "fastrlhf.ops.linear_divergence.room_for_slopes",
        lambda hidden, alone: torch.zeros_like(hidden),
    )
    assert relative_error(d_hidden(linear_kl_divergence, torch.float16), exact) > 10 * theirs


@pytest.mark.parametrize("needs", [("hidden", "ref_hidden"), NAMES])
def test_nothing_to_do(needs) -> None:
    tensors = inputs(needs)
    empty = {name: x[:0] if "hidden" in name else x for name, x in tensors.items()}
    for values in (
        linear_kl_divergence(**empty),
        linear_kl_divergence(**tensors, mask=torch.zeros_like(MASK)),
    ):
        assert not values.any()
        for name, gradient in gradients(values, tensors).items():
            assert gradient.shape == tensors[name].shape and not gradient.any()


def test_whatever_upstream_gradient_reaches_a_masked_token_does_no_harm() -> None:
    upstream = torch.where(MASK, torch.ones(TOKENS), torch.nan)
    for needs in (("hidden", "ref_hidden"), NAMES):
        tensors = inputs(needs)
        values = linear_kl_divergence(**tensors, mask=MASK, chunk_size=3)
        for gradient in autograd.grad(values @ upstream.double(), [tensors[n] for n in needs]):
            assert gradient.isfinite().all() and gradient.any()


DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float64, torch.float16),
]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("options", MEASURES, ids=lambda options: options["direction"])
def test_errors_are_at_most_twice_those_of_fp32_logits(options, dtypes, trained) -> None:
    needs = NAMES if trained else ("hidden", "ref_hidden")
    tensors = inputs(needs, *dtypes)
    runs = []
    for kind in (None, torch.float32, torch.float64):
        # One upcast of the leaves, through which the gradients come back in their own dtype.
        given = {n: x.detach().requires_grad_(n in needs) for n, x in tensors.items()}
        if kind is torch.float64:
            given = {n: x.detach().double().requires_grad_(n in needs) for n, x in given.items()}
        if kind is None:
            values = linear_kl_divergence(**given, mask=MASK, **options)
            assert values.dtype == torch.promote_types(torch.promote_types(*dtypes), torch.float32)
        else:
            up = {n: x.to(torch.promote_types(x.dtype, kind)) for n, x in given.items()}
            values = from_logits(up, **options)
        runs.append({"values": values.detach(), **gradients(values, given)})
    ours, eager, exact = runs
    for name in exact:
        rounding = torch.finfo(ours[name].dtype).eps
        assert relative_error(ours[name], exact[name]) <= (
            2 * relative_error(eager[name], exact[name]) + rounding
        ), name
        assert name == "values" or ours[name].dtype == tensors[name].dtype


WIDE = {"tokens": 64, "width": 32, "vocab": 1000}


def matmuls(needs=(), *, grad: bool = True, alike: bool = True) -> float:
    """Matmuls of forward and backward in units of G, one head on the half of the tokens that is not
    masked.
    """
    tokens, width, vocab = WIDE.values()
    shapes = ((tokens, width), (vocab, width), (vocab,)) * 2
    tensors = {
        n: torch.randn(s).requires_grad_(n in needs) for n, s in zip(NAMES, shapes, strict=True)
    }
    mask = torch.arange(tokens) % 2 == 0
    weights = torch.ones(tokens) if alike else torch.rand(tokens)
    with MatmulAudit() as audit, torch.set_grad_enabled(grad):
        values = linear_kl_divergence(**tensors, mask=mask, chunk_size=8)
        if needs and grad:
            (values * weights).sum().backward()
    # One weight gradient, or eight rows of logits: no (n, V), let alone (N, V).
    assert audit.largest <= vocab * width
    return audit.operations / (2 * tokens // 2 * vocab * width)


@pytest.mark.parametrize(
    ("needs", "cost", "more_if_not_alike"),
    [
        ((), 2, 0),
        (("hidden",), 3, 0),
        (("ref_hidden",), 3, 0),
        (("hidden", "ref_hidden"), 4, 0),
        # A trained head, if tokens do not all weigh the same: both logits again, and its gradient.
        (("weight",), 2 + 1, 2 + 1),
        (("bias",), 2, 2),
        (("hidden", "weight"), 2 + 2, 2 + 1),
        (("hidden", "bias"), 2 + 1, 2),
        (("hidden", "weight", "bias"), 2 + 2, 2 + 1),
        (("hidden", "ref_weight"), 2 + 2, 2 + 1),
        (NAMES, 2 + 4, 2 + 2),
    ],
)
def test_as_many_matmuls_as_stated_on_the_tokens_of_the_mask(
    needs, cost, more_if_not_alike
) -> None:
    assert matmuls(needs) == pytest.approx(cost, rel=1e-6)
    if needs:
        assert matmuls(needs, alike=False) == pytest.approx(cost + more_if_not_alike, rel=1e-6)


@pytest.mark.parametrize("needs", [("hidden",), ("hidden", "ref_hidden"), NAMES])
def test_values_alone_cost_what_they_cost_where_nothing_is_recorded(needs) -> None:
    assert matmuls(needs, grad=False) == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("needs", [("hidden",), NAMES])
def test_the_workspace_does_not_grow_with_the_tokens(needs) -> None:
    largest = []
    for tokens in (32, 128):
        shapes = ((tokens, 4), (5000, 4), (5000,)) * 2
        tensors = {
            n: torch.randn(s).requires_grad_(n in needs) for n, s in zip(NAMES, shapes, strict=True)
        }
        with MatmulAudit() as audit:
            linear_kl_divergence(**tensors, chunk_size=16).sum().backward()
        largest.append(audit.largest)
    assert largest[0] == largest[1] == 16 * 5000


@pytest.mark.parametrize("needs", [("hidden",), ("weight",), NAMES])
def test_a_second_derivative_is_refused(needs) -> None:
    tensors = inputs(needs)
    values = linear_kl_divergence(**tensors, mask=MASK)
    with pytest.raises(RuntimeError, match=r"^linear_kl_divergence: .*kl_divergence"):
        autograd.grad(values.sum(), [tensors[name] for name in needs], create_graph=True)


def test_first_derivatives_by_finite_differences() -> None:
    tensors = inputs()
    with torch.no_grad():  # finite differences cannot step from NaN
        tensors["hidden"][0], tensors["ref_hidden"][4] = 0.0, 0.0
    for options in MEASURES:

        def values(*given, options=options):
            named = dict(zip(NAMES, given, strict=True))
            return linear_kl_divergence(**named, mask=MASK, softcap=4.0, chunk_size=4, **options)

        assert autograd.gradcheck(values, list(tensors.values()), fast_mode=True)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(trained, dtype) -> None:
    needs = NAMES if trained else ("hidden", "ref_hidden")
    tensors = inputs(needs)
    for name, x in tensors.items():
        kind = dtype if "hidden" in name else torch.float32
        tensors[name] = x.detach().to(kind).requires_grad_(name in needs)
    with torch.autocast("cpu", torch.bfloat16):
        found = linear_kl_divergence(**tensors, mask=MASK)
    assert found.dtype == torch.float32
    exact = {
        n: (x.detach() if "bias" in n else x.detach().bfloat16())
        .double()
        .requires_grad_(n in needs)
        for n, x in tensors.items()
    }
    expected = from_logits(exact)
    plain = from_logits({n: x.float() for n, x in exact.items()})
    assert_as_accurate(found, plain, expected)
    of_logits = gradients(expected, exact)
    for name, gradient in gradients(found, tensors).items():
        assert gradient.dtype == tensors[name].dtype
        # Those of hidden states are rounded to bf16: twice where they wait for their coefficient.
        bound = 8e-3 if "hidden" in name else 1e-5
        assert relative_error(gradient, of_logits[name]) < bound


def test_fp64_is_left_alone_by_autocast() -> None:
    tensors = inputs()
    plain = linear_kl_divergence(**tensors, mask=MASK)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_kl_divergence(**tensors, mask=MASK), plain)


def test_the_same_bits_twice() -> None:
    tensors = inputs(dtype=torch.float32)
    runs = []
    for _ in range(2):
        values = linear_kl_divergence(**tensors, mask=MASK, chunk_size=3)
        runs.append([values, *gradients(values, tensors).values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_one_model_on_both_sides_is_no_distance_away() -> None:
    hidden = torch.randn(5, WIDTH, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    for options in MEASURES:
        values = linear_kl_divergence(hidden, weight, hidden, weight, **options)
        assert values.abs().max() < 1e-14
        for gradient in autograd.grad(values.sum(), (hidden, weight)):
            assert gradient.abs().max() < 1e-13


def test_a_tied_head_gets_the_gradients_of_both_uses() -> None:
    tensors = inputs(("hidden",))
    weight = torch.randn(VOCAB, WIDTH, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(TOKENS, WIDTH, dtype=torch.float64)
    both = {"hidden": tensors["hidden"], "weight": weight, "ref_hidden": ref, "ref_weight": weight}
    found, expected = linear_kl_divergence(**both, mask=MASK), from_logits(both)
    for a, b in zip(
        gradients(found, both).values(), gradients(expected, both).values(), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_a_quantized_reference() -> None:
    codes = torch.randint(-127, 128, (VOCAB, 8), dtype=torch.int8)
    scales = torch.rand(VOCAB) * 0.01
    quantized = QuantizedWeight(codes, scales, 8, None, torch.float32)
    hidden = torch.randn(5, WIDTH, requires_grad=True)
    weight = torch.randn(VOCAB, WIDTH, requires_grad=True)
    ref = torch.randn(5, 8)
    runs = []
    for head in (quantized, codes.float() * scales[:, None]):
        values = linear_kl_divergence(hidden, weight, ref, head)
        runs.append([values, *autograd.grad(values.sum(), (hidden, weight))])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b)


# The compiler looks at what tensors hold where it leaves the graph and comes back.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_step_gives_the_same() -> None:
    torch.compiler.reset()
    tensors = inputs(("hidden", "weight"))

    def step(hidden, weight):
        given = tensors | {"hidden": hidden, "weight": weight}
        return linear_kl_divergence(**given, mask=MASK, chunk_size=4).sum()

    sides = tensors["hidden"], tensors["weight"]
    compiled = torch.compile(step, backend="aot_eager")
    for a, b in zip(
        autograd.grad(compiled(*sides), sides), autograd.grad(step(*sides), sides), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden": torch.zeros(TOKENS, WIDTH + 1)}, ValueError, "^hidden: "),
        ({"hidden": torch.zeros(TOKENS, WIDTH).long()}, TypeError, "^hidden: "),
        ({"weight": None}, TypeError, "^weight: "),
        ({"weight": torch.zeros(VOCAB, WIDTH).bfloat16()}, TypeError, "^weight: "),
        ({"bias": torch.zeros(VOCAB + 1)}, ValueError, "^bias: "),
        ({"ref_hidden": torch.zeros(TOKENS, REF_WIDTH + 1)}, ValueError, "^ref_hidden: "),
        ({"ref_hidden": torch.zeros(TOKENS + 1, REF_WIDTH)}, ValueError, "^ref_hidden: .*11.*12"),
        ({"ref_hidden": torch.zeros(TOKENS, REF_WIDTH).int()}, TypeError, "^ref_hidden: "),
        ({"ref_hidden": torch.tensor(1.0)}, ValueError, "^ref_hidden: "),
        ({"ref_hidden": None}, TypeError, "^ref_hidden: "),
        ({"ref_weight": torch.zeros(VOCAB)}, ValueError, "^ref_weight: "),
        ({"ref_weight": torch.zeros(VOCAB + 1, REF_WIDTH)}, ValueError, "^ref_weight: .*37.*38"),
        ({"ref_weight": torch.zeros(VOCAB, REF_WIDTH).half()}, TypeError, "^ref_weight: "),
        ({"ref_weight": None}, TypeError, "^ref_weight: "),
        ({"ref_bias": torch.zeros(VOCAB - 1)}, ValueError, "^ref_bias: "),
        ({"ref_bias": torch.zeros(VOCAB).int()}, TypeError, "^ref_bias: "),
        ({"mask": torch.ones(3)}, ValueError, r"^mask: .*\(11,\).*\(3,\)"),
        ({"mask": [1] * TOKENS}, TypeError, "^mask: "),
        ({"mask": torch.ones(TOKENS, device="meta")}, ValueError, "^mask: .*device of hidden"),
        ({"direction": "kl"}, ValueError, "^direction: "),
        ({"beta": 2.0}, ValueError, "^beta: "),
        ({"temperature": 0.0}, ValueError, "^temperature: "),
        ({"temperature": torch.zeros(TOKENS)}, ValueError, "^temperature: "),
        ({"softcap": -1.0}, ValueError, "^softcap: "),
        ({"scale": 0.0}, ValueError, "^scale: "),
        ({"chunk_size": 0}, ValueError, "^chunk_size: "),
        ({"chunk_size": 1.5}, TypeError, "^chunk_size: "),
        ({"impl": "cuda"}, ValueError, "^impl: "),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message) -> None:
    arguments = {
        "hidden": torch.zeros(TOKENS, WIDTH), "weight": torch.zeros(VOCAB, WIDTH),
        "ref_hidden": torch.zeros(TOKENS, REF_WIDTH), "ref_weight": torch.zeros(VOCAB, REF_WIDTH),
        **changes,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        fastrlhf.linear_kl_divergence(**arguments)


@pytest.mark.parametrize("trained", ["hidden", "heads"])
@pytest.mark.parametrize("direction", ["reverse", "forward", "jsd"])
@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 3.0, "scale": 1.5, "ref_softcap": None, "ref_scale": 0.25},
        {"ref_softcap": 2.0},
        {"scale": 0.5, "ref_scale": 1.0},
        {"softcap": 3.0, "ref_scale": 2.0},
    ],
)
def test_each_side_has_a_scale_and_a_softcap(options, direction, trained) -> None:
    torch.manual_seed(0)
    sides = [torch.randn(7, 8), 3 * torch.randn(37, 8), torch.randn(7, 6), 3 * torch.randn(37, 6)]
    sides = [x.double() for x in sides]
    for i, x in enumerate(sides):
        x.requires_grad_(trained == "heads" or i % 2 == 0)
    mask = torch.arange(7) != 3

    def logits(hidden, weight, softcap, scale):
        raw = scale * (hidden @ weight.T)
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    full = {"softcap": None, "scale": 1.0} | options
    full = {"ref_softcap": full["softcap"], "ref_scale": full["scale"]} | full
    want = fastrlhf.kl_divergence(
        logits(*sides[:2], full["softcap"], full["scale"]),
        logits(*sides[2:], full["ref_softcap"], full["ref_scale"]),
        direction=direction, mask=mask, temperature=0.7,
    )  # fmt: skip
    found = fastrlhf.linear_kl_divergence(
        *sides, direction=direction, mask=mask, temperature=0.7, chunk_size=2, **options
    )
    torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12)
    inputs = [x for x in sides if x.requires_grad]
    for a, b in zip(
        torch.autograd.grad(found.sum(), inputs), torch.autograd.grad(want.sum(), inputs),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_what_is_no_softcap_or_scale_of_the_reference_is_named() -> None:
    sides = torch.randn(2, 4), torch.randn(5, 4), torch.randn(2, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"^ref_softcap: "):
        fastrlhf.linear_kl_divergence(*sides, ref_softcap=0.0)
    with pytest.raises(ValueError, match=r"^ref_scale: "):
        fastrlhf.linear_kl_divergence(*sides, ref_scale=-1.0)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("options", MEASURES, ids=lambda o: o["direction"])
def test_the_entropy_comes_from_the_same_logits(options, transform) -> None:
    tensors, transform = inputs(), TRANSFORMS[transform]
    values = linear_kl_divergence(**tensors, mask=MASK, **options, **transform)
    with MatmulAudit() as audit:
        found, entropies = linear_kl_divergence(
            **tensors, mask=MASK, **options, **transform, entropy=True
        )
    with MatmulAudit() as alone:
        linear_kl_divergence(**tensors, mask=MASK, **options, **transform)
    assert torch.equal(found, values) and audit.operations == alone.operations
    assert not entropies.requires_grad and not entropies[~MASK].any()
    targets = torch.where(MASK, 0, -100)
    own = {name: tensors[name] for name in ("hidden", "weight", "bias")}
    stats = linear_token_stats(**own, targets=targets, entropy=True, **transform)
    torch.testing.assert_close(entropies, stats.entropy.detach())
    found.sum().backward()
    assert tensors["weight"].grad is not None


def test_an_entropy_is_refused_under_transforms() -> None:
    tensors = inputs(())
    hidden = tensors.pop("hidden")

    def loss(x: Tensor) -> Tensor:
        return linear_kl_divergence(x, **tensors, mask=MASK, entropy=True)[0].sum()

    with pytest.raises(RuntimeError, match=r"linear_kl_divergence\(entropy=True\)"):
        torch.func.grad(loss)(hidden)
