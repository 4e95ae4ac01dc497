"""Distillation from the likeliest words of a teacher, by the kernel and by the eager backend,
against formulas in 60 digits.
"""

import pytest
import torch
from support.compare import assert_as_accurate, assert_gradients_as_accurate
from support.topk_formulas import DIRECTIONS, RESTS, exact_rows, plain_rows
from torch import Tensor, autograd

import fastrlhf
from fastrlhf import kl_divergence, topk_kl_divergence

IMPLS = ["eager", "triton"]
BACKENDS = pytest.mark.parametrize("impl", IMPLS)
CLOSE = {"rtol": 1e-10, "atol": 1e-14}  # of what is fp64
ALL_DIRECTIONS = pytest.mark.parametrize("direction", DIRECTIONS)
ALL_RESTS = pytest.mark.parametrize("rest", RESTS)
TRANSFORMS = {
    "plain": {},
    "all": {"softcap": 5.0, "scale": 0.7, "temperature": torch.linspace(0.6, 2, 5).double()},
}


def problem(
    rows: int = 5, vocab: int = 37, words: int = 4, dtype: torch.dtype = torch.float64,
    apart: float = 1.0, spread: float = 2.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits of a student, and the likeliest words of a teacher that is so far apart."""
    logits = (spread * torch.randn(rows, vocab, dtype=torch.float64)).to(dtype)
    teacher = logits.double() + apart * torch.randn(rows, vocab, dtype=torch.float64)
    logprobs, ids = teacher.log_softmax(-1).topk(words)
    wide = torch.promote_types(dtype, torch.float32)
    return logits, logprobs.to(wide), ids


def evaluate(
    logits: Tensor, logprobs: Tensor, ids: Tensor, g: Tensor | None = None, **options
) -> tuple[Tensor, Tensor]:
    """Values, and the gradient of Σ g·value."""
    x = logits.detach().clone().requires_grad_()
    device = logits.device
    values = topk_kl_divergence(x, logprobs.to(device), ids.to(device), **options)
    upstream = torch.ones_like(values) if g is None else g.to(values)
    return values.detach(), autograd.grad(values, x, upstream)[0]


def on(device, options: dict) -> dict:
    return {n: x.to(device) if isinstance(x, Tensor) else x for n, x in options.items()}


@ALL_DIRECTIONS
@ALL_RESTS
def test_values_and_gradients_match_the_oracle(direction, rest, device) -> None:
    logits, logprobs, ids = problem()
    mask, g = torch.tensor([1, 1, 0, 1, 1]), torch.tensor([1.0, -2, torch.nan, 0.5, 3])
    # Tokens with fewer words, by either sign, and whatever the other tensor holds there.
    ids[0, 1], logprobs[0, 1] = -1, torch.nan
    logprobs[1, :2], ids[1, :2] = -torch.inf, 0
    ids[3], logits[2] = -1, torch.nan
    ids[2, 0], ids[2, 1], logprobs[2] = 10**9, -7, torch.nan
    upstream = torch.where(mask != 0, g, 0.0).double().unsqueeze(1)
    some = torch.tensor([0, 1, 3, 4])
    for transform in TRANSFORMS.values():
        options = {"direction": direction, "beta": 0.3, **RESTS[rest], **transform}
        exact, of_exact = exact_rows(logits, logprobs, ids, mask, **options)
        of_some = {n: x[some] if isinstance(x, Tensor) else x for n, x in options.items()}
        for impl in IMPLS:
            values, gradient = evaluate(
                logits.to(device), logprobs, ids, g, mask=mask.to(device), impl=impl,
                **on(device, options),
            )  # fmt: skip
            torch.testing.assert_close(values.cpu(), exact, **CLOSE)
            torch.testing.assert_close(gradient.cpu(), of_exact * upstream, **CLOSE)
            # Without a mask, where all that is there is a number.
            values, _ = evaluate(
                logits[some].to(device), logprobs[some], ids[some], impl=impl,
                **on(device, of_some),
            )  # fmt: skip
            torch.testing.assert_close(values.cpu(), exact[some], **CLOSE)


def test_the_compiled_backend_takes_the_eager_way_forward() -> None:
    sides = problem()
    found, expected = (topk_kl_divergence(*sides, impl=impl) for impl in ("compiled", "eager"))
    assert torch.equal(found, expected)


@ALL_DIRECTIONS
@ALL_RESTS
def test_errors_are_those_of_the_plain_formula(direction, rest, device) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits, logprobs, ids = problem(rows=3, vocab=101, words=7, dtype=dtype)
        options = {"direction": direction, "beta": 0.2, **RESTS[rest]}
        exact = exact_rows(logits, logprobs, ids, **options)
        x = logits.clone().requires_grad_()
        plain = plain_rows(x, logprobs, ids, **options)
        of_plain = autograd.grad(plain.sum(), x)
        for impl in IMPLS:
            found = evaluate(logits.to(device), logprobs, ids, impl=impl, **options)
            assert found[0].dtype == torch.float32 and found[1].dtype == dtype
            assert_as_accurate(found[0], plain, exact[0], size=1.0)
            assert_gradients_as_accurate(found[1:], of_plain, exact[1:])


@pytest.mark.parametrize("impl", ["eager", "triton"])
@ALL_DIRECTIONS
def test_nearly_equal_distributions_keep_their_places(impl, direction, device) -> None:
    for rest in ("tail", "renormalized"):
        options = {"direction": direction, **RESTS[rest]}
        logits, logprobs, ids = problem(vocab=50, words=30, dtype=torch.float32, apart=1e-3)
        exact, _ = exact_rows(logits, logprobs, ids, **options)
        values, _ = evaluate(logits.to(device), logprobs, ids, impl=impl, **options)
        plain = plain_rows(logits, logprobs, ids, **options)
        ours, theirs = ((x.cpu().double() - exact).abs().max() for x in (values, plain))
        assert (values >= 0).all() and ours <= 0.1 * theirs
        # Of one distribution with itself, the rounding of the log-probs is all there is.
        same = logits.double().log_softmax(-1).float().gather(-1, ids)
        values, _ = evaluate(logits.to(device), same, ids, impl=impl, **options)
        assert (values >= 0).all() and values.max() <= 0.1 * theirs


@BACKENDS
@ALL_DIRECTIONS
def test_a_student_who_is_nearly_certain(impl, direction, device) -> None:
    # Next to a word that has all but e^-40, the others have their places right, and a gradient.
    logits = 1e-3 * torch.randn(2, 101)
    logits[:, 7] = torch.tensor([45.0, 20.0])
    ids = torch.tensor([[7, 3], [7, 5]])
    logprobs = torch.tensor([[0.6, 0.1], [0.9, 0.05]]).log()
    options = {"direction": direction}
    exact = exact_rows(logits, logprobs, ids, **options)
    found = evaluate(logits.to(device), logprobs, ids, impl=impl, **options)
    x = logits.clone().requires_grad_()
    plain = plain_rows(x, logprobs, ids, **options)
    assert_as_accurate(found[0], plain, exact[0])
    ours, right = found[1].cpu().double(), exact[1]
    (theirs,) = autograd.grad(plain.sum(), x)
    assert right.abs().min() > 0
    # Entry by entry, of the places that each has; the plain formula has none of the likeliest's.
    lost, by_plain = (((y.double() - right) / right).abs() for y in (ours, theirs))
    assert lost.max() <= 2 * by_plain[:, 8:].max() + 64 * torch.finfo(torch.float32).eps


@BACKENDS
def test_large_logits_that_differ_by_little(impl, device) -> None:
    logits, logprobs, ids = problem(vocab=60, words=5)
    # Eighths, which fp32 has exactly next to 1e4.
    small = (8 * logits).round() / 8
    large = (small + 1e4).float()
    expected = evaluate(small, logprobs, ids, impl="eager")
    found = evaluate(large.to(device), logprobs, ids, impl=impl)
    of_small = evaluate(small.float(), logprobs, ids, impl="eager")
    assert_as_accurate(found[0], of_small[0], expected[0], size=1.0)
    assert_gradients_as_accurate(found[1:], of_small[1:], expected[1:])


@BACKENDS
@ALL_DIRECTIONS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_words_are_the_whole_vocabulary(impl, direction, dtype, device) -> None:
    logits, logprobs, ids = problem(vocab=33, words=33, dtype=dtype)
    options = {"direction": direction}
    exact = exact_rows(logits, logprobs, ids, tail=False, renormalize=True, **options)
    found = evaluate(logits.to(device), logprobs, ids, impl=impl, **options)
    plain = plain_rows(logits, logprobs, ids, tail=False, renormalize=True, **options)
    assert_as_accurate(found[0], plain, exact[0], size=1.0)
    assert found[1].isfinite().all()
    if not direction.startswith("skewed"):
        teacher = torch.zeros_like(logits).scatter(1, ids, logprobs)
        x = logits.clone().requires_grad_()
        values = kl_divergence(x, teacher, impl="eager", **options)
        assert_as_accurate(found[0], values, exact[0], size=1.0)
        of_full = autograd.grad(values.sum(), x)
        assert_gradients_as_accurate(found[1:], of_full, exact[1:])


@BACKENDS
def test_one_word_and_a_vocabulary_of_one(impl, device) -> None:
    logits, logprobs, ids = problem(words=1)
    exact = exact_rows(logits, logprobs, ids, direction="reverse")
    found = evaluate(logits.to(device), logprobs, ids, direction="reverse", impl=impl)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-11, atol=1e-14)
    one = torch.randn(3, 1, device=device)
    zeros = torch.zeros(3, 1)
    for direction in DIRECTIONS:
        found = evaluate(one, zeros, zeros.long(), direction=direction, impl=impl)
        assert not found[0].any() and not found[1].any()


@BACKENDS
def test_a_rest_that_is_no_more_than_rounding(impl, device) -> None:
    logits = torch.randn(4, 20, device=device)
    # Of the teacher's, two words are all but 1e-12; they add up to 1 in fp32, or to more by a bit.
    ids = torch.tensor([[3, 4]]).expand(4, -1)
    logprobs = torch.tensor([[0.5, 0.5], [0.25, 0.75], [1.0, 1e-9], [0.5, 0.5000001]]).log()
    logits[1, :3], logits[1, 5:] = -torch.inf, -torch.inf  # no rest either
    for direction in DIRECTIONS:
        values, gradient = evaluate(logits, logprobs, ids, direction=direction, impl=impl)
        assert values.isfinite().all() and gradient.isfinite().all()
    # The student has no rest, and the teacher does.
    some = torch.full((4, 2), 0.25).log()
    forward, gradient = evaluate(logits, some, ids, direction="forward", impl=impl)
    assert forward.isinf().tolist() == [False, True, False, False] and not gradient.isnan().any()
    for direction in DIRECTIONS[1:]:
        values, gradient = evaluate(logits, some, ids, direction=direction, impl=impl)
        assert values.isfinite().all() and gradient.isfinite().all()


@BACKENDS
@ALL_RESTS
def test_what_the_student_rules_out(impl, rest, device) -> None:
    logits, logprobs, ids = problem(vocab=12)
    logits[0, ids[0, 1]] = -torch.inf  # a word
    others = [v for v in range(12) if v not in ids[1].tolist()]
    logits[1, others[:3]] = -torch.inf  # some of the others
    logits[2] = -torch.inf  # everything: no distribution
    for direction in DIRECTIONS:
        options = {"direction": direction, **RESTS[rest]}
        values, gradient = evaluate(logits.to(device), logprobs, ids, impl=impl, **options)
        exact, of_exact = exact_rows(logits, logprobs, ids, torch.arange(5) != 2, **options)
        some = torch.tensor([0, 1, 3, 4])
        torch.testing.assert_close(values.cpu()[some], exact[some], rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(gradient.cpu()[some], of_exact[some], rtol=1e-10, atol=1e-14)
        assert values[2] == (torch.inf if direction == "forward" else 0) and not gradient[2].any()
        assert exact[0].isinf() == (direction == "forward")


@BACKENDS
def test_the_order_of_words_does_not_matter(impl, device) -> None:
    logits, logprobs, ids = problem(vocab=5000, words=64, dtype=torch.float32)
    order = torch.randperm(64)
    first = evaluate(logits.to(device), logprobs, ids, impl=impl)
    second = evaluate(logits.to(device), logprobs[:, order], ids[:, order].int(), impl=impl)
    padded = evaluate(
        logits.to(device), torch.cat((torch.full((5, 3), torch.nan), logprobs), 1),
        torch.cat((torch.full((5, 3), -1), ids), 1), impl=impl,
    )  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(padded, first, rtol=1e-5, atol=1e-7)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_has_the_same_bits_alone_and_in_any_batch(impl, dtype, device) -> None:
    rows = 500 if device.type == "cuda" else 4
    logits, logprobs, ids = problem(rows, vocab=9001, words=20, dtype=dtype)
    batch, again = (evaluate(logits.to(device), logprobs, ids, impl=impl) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(batch, again, strict=True))
    one = slice(rows - 1, rows)
    alone = evaluate(logits[one].to(device), logprobs[one], ids[one], impl=impl)
    assert all(torch.equal(a, b[one]) for a, b in zip(alone, batch, strict=True))


@BACKENDS
def test_layouts_do_not_matter(impl, device) -> None:
    logits, logprobs, ids = problem(rows=6, vocab=33)
    shaped = [x.view(2, 3, -1).to(device) for x in (logits, logprobs, ids)]
    expected = evaluate(logits.to(device), logprobs, ids, direction="jsd", impl=impl)
    longer = torch.zeros(2, 4, 33, dtype=torch.float64, device=device)
    longer[:, :3] = shaped[0]
    for x in (shaped[0], longer[:, :3], shaped[0].mT.contiguous().mT, shaped[0].flip(0).flip(0)):
        y = x.detach().requires_grad_()
        values = topk_kl_divergence(y, *shaped[1:], direction="jsd", impl=impl)
        torch.testing.assert_close(values.view(-1), expected[0])
        (gradient,) = autograd.grad(values.sum(), y)
        torch.testing.assert_close(gradient.reshape(6, -1), expected[1])


@BACKENDS
@pytest.mark.parametrize("layout", ["whole", "positions"])
def test_the_backward_may_overwrite_the_logits(impl, layout, device) -> None:
    logits, logprobs, ids = problem(rows=6)
    expected = evaluate(logits.to(device), logprobs, ids, impl=impl, softcap=5.0)
    leaf = logits.view(2, 3, -1).to(device).requires_grad_()
    x = leaf * 1.0
    if layout == "positions":
        x = torch.cat((x, x[:, :1]), dim=1)[:, :-1]
    values = topk_kl_divergence(
        x, logprobs.view(2, 3, -1).to(device), ids.view(2, 3, -1).to(device),
        inplace_backward=True, impl=impl, softcap=5.0,
    )  # fmt: skip
    (gradient,) = autograd.grad(values.sum(), leaf)
    assert torch.equal(gradient.view(6, -1), expected[1])
    assert torch.equal(x.detach(), gradient)


@BACKENDS
def test_nothing_to_do(impl, device) -> None:
    logits, logprobs, ids = problem()
    values, gradient = evaluate(logits[:0].to(device), logprobs[:0], ids[:0], impl=impl)
    assert values.shape == (0,) and gradient.shape == (0, 37)
    mask = torch.zeros(5, dtype=torch.bool, device=device)
    values, gradient = evaluate(logits.to(device), logprobs, ids, mask=mask, impl=impl)
    assert not values.any() and not gradient.any()


def test_a_divergence_is_at_most_that_of_the_whole_vocabulary() -> None:
    logits, _, _ = problem(rows=20)
    teacher = logits + torch.randn_like(logits)
    for words in (1, 5, 20):
        logprobs, ids = teacher.log_softmax(-1).topk(words)
        for direction in DIRECTIONS[:3]:
            part = topk_kl_divergence(logits, logprobs, ids, direction=direction)
            whole = kl_divergence(logits, teacher, direction=direction)
            assert ((part >= 0) & (part <= whole)).all()


def test_shares_of_a_mixture_end_in_the_two_kls() -> None:
    logits, *teacher = problem()

    def values(**options):
        return topk_kl_divergence(logits, *teacher, **options)

    for rest in RESTS.values():
        forward, reverse = (values(direction=name, **rest) for name in DIRECTIONS[:2])
        for beta, expected in ((0, forward), (1, reverse)):
            assert torch.equal(values(direction="jsd", beta=beta, **rest), expected)
        torch.testing.assert_close(values(direction="skewed_forward", skew=0, **rest), forward)
        torch.testing.assert_close(values(direction="skewed_reverse", skew=0, **rest), reverse)
        assert not values(direction="skewed_reverse", skew=1, **rest).any()


@pytest.mark.parametrize(
    ("direction", "impl"), [*((name, "eager") for name in DIRECTIONS), ("forward", "triton")]
)
def test_derivatives_of_both_orders(direction, impl, device) -> None:
    logits, logprobs, ids = (x.to(device) for x in problem(rows=2, vocab=7, words=3))
    ids[1, 0] = -1
    for rest in RESTS.values() if impl == "eager" else (RESTS["tail"],):
        options = {"direction": direction, "softcap": 5.0, "temperature": 0.7, **rest}

        def values(x, options=options):
            return topk_kl_divergence(x, logprobs, ids, impl=impl, **options)

        x = logits.requires_grad_()
        assert autograd.gradcheck(values, (x,), fast_mode=True, rtol=1e-6, atol=1e-7)
        assert autograd.gradgradcheck(values, (x,), fast_mode=True, rtol=1e-6, atol=1e-7)


def test_a_second_derivative_where_the_words_are_all_there_are() -> None:
    logits, logprobs, ids = problem(rows=2, vocab=4, words=4)

    def values(x):
        return topk_kl_divergence(x, logprobs, ids, direction="reverse")

    assert autograd.gradgradcheck(values, (logits.requires_grad_(),), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("direction", ["forward", "skewed_reverse"])
def test_transforms_of_torch_func(direction) -> None:
    logits, logprobs, ids = problem()
    mask = torch.tensor([1, 0, 1, 1, 1])

    def value(x, lp=logprobs, words=ids, keep=mask):
        return topk_kl_divergence(x, lp, words, direction=direction, mask=keep).sum()

    x = logits.clone().requires_grad_()
    (expected,) = autograd.grad(value(x), x)
    torch.testing.assert_close(torch.func.grad(value)(logits), expected)
    one_by_one = torch.func.vmap(torch.func.grad(value))(logits, logprobs, ids, mask)
    torch.testing.assert_close(one_by_one, expected)
    v = torch.randn_like(logits)
    torch.testing.assert_close(torch.func.jvp(value, (logits,), (v,))[1], (expected * v).sum())
    losses = topk_kl_divergence(x, logprobs, ids, direction=direction)
    rows = torch.eye(5, dtype=torch.float64)
    many = autograd.grad(losses, x, rows, is_grads_batched=True, retain_graph=True)[0]
    one = autograd.grad(losses[3], x)[0]
    torch.testing.assert_close(many[3], one)


@pytest.mark.parametrize(("impl", "inplace"), [("eager", True), ("triton", False)])
def test_a_training_step_compiles_whole(impl, inplace, device) -> None:
    torch.compiler.reset()
    _, logprobs, ids = (x.to(device) for x in problem())
    hidden = torch.randn(5, 8, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(37, 8, dtype=torch.float64, device=device)

    def step(hidden):
        values = topk_kl_divergence(
            hidden @ weight.T, logprobs, ids, direction="jsd", softcap=20.0,
            inplace_backward=inplace, impl=impl,
        )  # fmt: skip
        return values.mean()

    expected = autograd.grad(step(hidden), hidden)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(autograd.grad(compiled(hidden), hidden), expected)


@BACKENDS
def test_the_operator_passes_opcheck(impl, device) -> None:
    logits, _, ids = (x.to(device) for x in problem(dtype=torch.float32))
    keep = torch.tensor([True, False, True, True, True], device=device)
    temperature = torch.linspace(0.5, 2, 5, device=device)
    operator = torch.ops.fastrlhf.bucket_logits.default
    for transform in ((None, 0.7, None, 1.0), (temperature, 1.0, 5.0, 0.5)):
        arguments = logits.requires_grad_(), ids.sort(-1)[0], keep, *transform, False, impl
        torch.library.opcheck(operator, arguments)


def test_trl_compares_a_students_own_words_so(monkeypatch) -> None:
    pytest.importorskip("trl", reason="needs trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdpo.loss_utils import compute_topk_self_distillation_loss

    logits, _, _ = problem()
    teacher = logits + torch.randn_like(logits)
    ids = logits.topk(6).indices
    logprobs = teacher.log_softmax(-1).gather(-1, ids)
    for alpha, options in (
        (0.0, {"direction": "forward"}), (1.0, {"direction": "reverse"}),
        (0.25, {"direction": "jsd", "beta": 0.25}),
    ):  # fmt: skip
        for add_tail, rest in ((True, RESTS["tail"]), (False, RESTS["renormalized"])):
            runs = []
            for function in (
                lambda x, alpha=alpha, add_tail=add_tail: compute_topk_self_distillation_loss(
                    x, teacher, distillation_topk=6, distillation_alpha=alpha,
                    distillation_add_tail=add_tail,
                ),
                lambda x, given=options | rest: topk_kl_divergence(x, logprobs, ids, **given),
            ):  # fmt: skip
                x = logits.clone().requires_grad_()
                values = function(x)
                runs.append((values, autograd.grad(values.sum(), x)[0]))
            for theirs, ours in zip(*runs, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def test_trl_compares_the_words_of_a_server_so(monkeypatch) -> None:
    pytest.importorskip("trl", reason="needs trl")
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.server_distillation import server_distillation_trainer as trl

    logits, logprobs, ids = problem()
    # As its collator fills up.
    logprobs[1, 2:], ids[1, 2:] = -torch.inf, 0
    there = logprobs > -torch.inf
    student = logits.log_softmax(-1).gather(-1, ids).where(there, -torch.inf)
    for beta, options in ((0, {"direction": "forward"}), (0.3, {"direction": "jsd", "beta": 0.3})):
        both = (trl._add_tail_bucket(x, there) for x in (student, logprobs))
        (log_s, mask), (log_t, _) = both
        theirs = trl._jsd_divergence(log_s, log_t, beta, mask).sum(-1)
        ours = topk_kl_divergence(logits, logprobs, ids, **options)
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


LOGITS, LOGPROBS, IDS = torch.zeros(2, 3, 5), torch.full((2, 3, 2), -2.0), torch.tensor([1, 3])
IDS = IDS.expand(2, 3, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"logits": torch.zeros(2, 3, 0)}, ValueError, "^logits: "),
        ({"logits": torch.zeros(2, 3, 5).long()}, TypeError, "^logits: "),
        ({"teacher_logprobs": LOGPROBS[..., :1]}, ValueError, r"^teacher_logprobs: .*\(2, 3, 2\)"),
        ({"teacher_logprobs": IDS}, TypeError, "^teacher_logprobs: "),
        ({"teacher_logprobs": LOGPROBS.clone().requires_grad_()}, ValueError, "without gradient"),
        ({"teacher_logprobs": LOGPROBS + 2}, ValueError, "^teacher_logprobs: .*got 2;.*logits"),
        ({"teacher_logprobs": LOGPROBS.to("meta")}, ValueError, "^teacher_logprobs: .*on cpu"),
        ({"teacher_ids": IDS.float()}, TypeError, "^teacher_ids: "),
        ({"teacher_ids": IDS[:, :2]}, ValueError, r"^teacher_ids: .*\(2, 3, k\)"),
        ({"teacher_ids": IDS[..., :0]}, ValueError, r"^teacher_ids: .*k > 0"),
        ({"teacher_ids": IDS[0, 0]}, ValueError, r"^teacher_ids: "),
        ({"teacher_ids": IDS + 2}, ValueError, r"^teacher_ids: expected words in \[0, 5\).*got 5"),
        ({"teacher_ids": IDS - 3}, ValueError, r"^teacher_ids: expected words in \[0, 5\).*got -2"),
        ({"teacher_ids": IDS * 0 + 4}, ValueError, "^teacher_ids: .*once, got 4 twice for token 0"),
        ({"mask": torch.ones(2)}, ValueError, "^mask: "),
        ({"direction": "kl"}, ValueError, "^direction: .*skewed_forward"),
        ({"tail": 1}, TypeError, "^tail: "),
        ({"renormalize": None}, TypeError, "^renormalize: "),
        ({"renormalize": True}, ValueError, "^renormalize: .*tail"),
        ({"beta": 1.5}, ValueError, "^beta: "),
        ({"skew": -0.1}, ValueError, "^skew: "),
        ({"skew": "0.1"}, TypeError, "^skew: "),
        ({"temperature": 0.0}, ValueError, "^temperature: "),
        ({"temperature": torch.zeros(2, 3)}, ValueError, "^temperature: "),
        ({"softcap": 0.0}, ValueError, "^softcap: "),
        ({"scale": -1.0}, ValueError, "^scale: "),
        ({"inplace_backward": 1}, TypeError, "^inplace_backward: "),
        ({"impl": "cuda"}, ValueError, "^impl: "),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(changes, error, message) -> None:
    good = {"logits": LOGITS, "teacher_logprobs": LOGPROBS, "teacher_ids": IDS}
    with pytest.raises(error, match=message):
        fastrlhf.topk_kl_divergence(**good | changes)


def test_without_skew_it_is_the_divergence_even_of_a_row_of_nothing() -> None:
    logits = torch.full((1, 6), -torch.inf)
    teacher, ids = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[1, 4]])
    skewed = topk_kl_divergence(logits, teacher, ids, direction="skewed_forward", skew=0.0)
    assert torch.equal(skewed, topk_kl_divergence(logits, teacher, ids, direction="forward"))
