"""The fused vocabulary head against the plain formula, and the head against transformers' own."""

import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForMaskedLM

from stair.encoders import MaskedLMHead
from stair.head import VocabularyHead
from stair.kernels import backward, fused, reduction, vocabulary_max, vocabulary_max_reference

TYPES = (torch.float64, torch.float32, torch.bfloat16)


FORMS = [
    *((fused._Packed, sparse, look_up) for sparse in (True, False) for look_up in (True, False)),
    (fused._Padded, False, False),
]


@contextmanager
def formed(form, sparse, look_up):
    """Fixes what the function else chooses from the numbers and the device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward, "_GATHER_COST", dict.fromkeys(TYPES, 0 if sparse else 10**9))
        patch.setattr(reduction, "_LOOK_UP_BELOW", 0 if look_up else 10**9)
        patch.setattr(fused, "_form", lambda device, compute: form)
        yield


@pytest.fixture(params=FORMS, ids=lambda form: f"{form[0].__name__}-{form[1]}-{form[2]}")
def form(request):
    with formed(*request.param):
        yield


def inputs(B, T, D, V, keep=0.6, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (
        torch.randn(*s, dtype=dtype, generator=g).requires_grad_() for s in ((B, T, D), (V, D), (V,))
    )
    return hidden, torch.rand(B, T, generator=g) < keep, weight, bias


def gradients(function, hidden, mask, weight, bias):
    out = function(hidden, mask, weight, bias)
    seed = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, torch.autograd.grad((out * seed).sum(), (hidden, weight, bias))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    B=st.integers(1, 6),
    T=st.integers(1, 9),
    D=st.integers(1, 5),
    V=st.integers(1, 200),
    keep=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    seed=st.integers(0, 9999),
    form=st.sampled_from(FORMS),
)
def test_fused_head_equals_the_plain_formula_in_float64(B, T, D, V, keep, seed, form):
    arguments = inputs(B, T, D, V, keep, seed)
    with formed(*form):
        got = gradients(vocabulary_max, *arguments)
    want = gradients(vocabulary_max_reference, *arguments)
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=1e-12)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_gradcheck(form):
    hidden, mask, weight, bias = inputs(3, 4, 3, 7)
    assert gradcheck(lambda h, w, b: vocabulary_max(h, mask, w, b), (hidden, weight, bias))


def test_a_row_without_tokens_is_zero_and_has_no_gradient(form):
    hidden, mask, weight, bias = inputs(3, 4, 3, 7, keep=1.0)
    mask[1] = False
    out, (grad_hidden, *_) = gradients(vocabulary_max, hidden, mask, weight, bias)
    assert (out[1] == 0).all() and (grad_hidden[1] == 0).all() and (out[0] > 0).any()


def test_ties_go_to_the_first_position_and_sum_to_the_plain_gradient(form):
    hidden, mask, weight, bias = inputs(2, 1, 3, 7, keep=1.1)
    tied = hidden.detach().repeat(1, 3, 1).requires_grad_()
    out, (grad, *_) = gradients(vocabulary_max, tied, mask.repeat(1, 3), weight, bias)
    want, (grad_once, *_) = gradients(vocabulary_max_reference, hidden, mask, weight, bias)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(grad[:, :1], grad_once)
    assert (grad[:, 1:] == 0).all()


@pytest.mark.parametrize("at", ["hidden", "weight", "bias"])
def test_what_is_no_number_reaches_the_embedding_and_the_gradient(form, at):
    # rows of different lengths: none has the last slot but one
    hidden, _, weight, bias = inputs(3, 5, 4, 7)
    given = {"hidden": hidden, "weight": weight, "bias": bias}
    mask = torch.arange(5) < torch.tensor([[1], [5], [3]])
    with torch.no_grad():
        given[at].view(-1)[0] = float("nan")
    out, grads = gradients(vocabulary_max, given["hidden"], mask, given["weight"], given["bias"])
    assert out[0, 0].isnan() and (at == "hidden" or out[:, 0].isnan().all())
    assert all(grad.isnan().any() for grad in grads[1:])


def test_more_positions_than_a_byte_counts(form):
    arguments = inputs(2, 300, 3, 5, keep=0.9)
    got, want = (gradients(f, *arguments) for f in (vocabulary_max, vocabulary_max_reference))
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b)


def test_words_outside_the_ranges_stay_zero_and_get_no_gradient(form):
    hidden, mask, weight, bias = inputs(3, 4, 3, 9, keep=1.1)
    out = vocabulary_max(hidden, mask, weight, bias, active_ranges=((2, 4), (6, 9)))
    whole = vocabulary_max_reference(hidden, mask, weight, bias)
    keep = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1, 1])
    torch.testing.assert_close(out, whole * keep)
    grad = torch.autograd.grad(out.sum(), weight)[0]
    assert (grad[keep == 0] == 0).all() and (grad[keep == 1] != 0).any()


def test_a_second_derivative_is_refused():
    hidden, mask, weight, bias = inputs(2, 3, 2, 4)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(vocabulary_max(hidden, mask, weight, bias).sum(), hidden, create_graph=True)


def test_wrong_shapes_are_named():
    hidden, mask, weight, bias = inputs(2, 3, 2, 4)
    with pytest.raises(ValueError, match=r"hidden \(2, 3, 2\), mask \(2, 2\)"):
        vocabulary_max(hidden, mask[:, :2], weight, bias)


def test_under_bf16_autocast_what_is_lost_is_the_rounding_of_inputs_and_logits(form):
    hidden, mask, weight, bias = (value.detach() for value in inputs(4, 5, 64, 300, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = vocabulary_max(hidden, mask, weight, bias)
    assert out.dtype == torch.float32
    rounded = hidden.bfloat16().float(), mask, weight.bfloat16().float(), bias
    want = vocabulary_max_reference(*rounded)
    # given the rounded inputs only the logit is rounded, to 8 bits; bias, logarithm and ReLU are fp32
    logit = (want.expm1() - bias).abs()
    assert ((out.expm1() - want.expm1()).abs() <= logit * 2**-8 + 1e-4).all()
    assert (out - want).abs().max() > 0
    # the inputs' rounding: logits of spread 8 are off by some 0.05
    assert (out - vocabulary_max_reference(hidden, mask, weight, bias)).abs().max() < 0.1


def test_recomputed_or_compiled_around_the_gradients_are_the_same():
    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 6).double()
    hidden, mask, weight, bias = inputs(3, 4, 6, 50)

    def tower(rows):
        return vocabulary_max(torch.nn.functional.gelu(layer(rows)), mask, weight, bias)

    def results(run):
        out = run(hidden)
        return [out, *torch.autograd.grad(out.square().sum(), [hidden, weight, bias, *layer.parameters()])]

    want = results(tower)
    # one graph: what is active is known from the numbers, and the head is one operator of torch
    graph = torch.compile(tower, backend="aot_eager", fullgraph=True)
    for run in (lambda rows: checkpoint(tower, rows, use_reentrant=False), graph):
        for a, b in zip(results(run), want, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


def test_the_operator_keeps_what_torch_asks_of_operators():
    hidden, mask, weight, bias = inputs(3, 4, 6, 50)
    torch.library.opcheck(fused._project, (hidden, mask, weight, weight.detach(), bias, [0, 20, 30, 50]))


def test_the_norm_of_the_head_takes_its_statistics_in_fp32():
    torch.manual_seed(0)
    head = VocabularyHead(8, torch.nn.Parameter(torch.randn(20, 8)), [])
    rows = (torch.randn(3, 5, 8) + 30).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        got = head._normalised(rows)
    want = head.norm(rows.float())
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, atol=1e-2, rtol=2**-8)


def bert(vocabulary_size=40):
    torch.manual_seed(1)
    config = BertConfig(vocab_size=vocabulary_size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = BertForMaskedLM(config).eval()
    torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model


def test_head_equals_berts_own_masked_lm_head_then_log_and_max():
    model = bert()
    transform = model.cls.predictions.transform
    published = MaskedLMHead(transform.dense, transform.LayerNorm, model.get_output_embeddings().bias)
    never = [0, 5, 6]
    head = VocabularyHead(16, model.bert.embeddings.word_embeddings.weight, never, published)
    ids = torch.randint(7, 40, (3, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] + [0] * 5]).bool()
    hidden = model.bert(ids, attention_mask=mask.long()).last_hidden_state
    logits = model(ids, attention_mask=mask.long()).logits
    want = torch.log1p(torch.relu(logits)).masked_fill(~mask[..., None], 0).amax(1)  # log before max
    want[:, never] = 0
    torch.testing.assert_close(head(hidden, mask), want, atol=1e-5, rtol=1e-5)


def test_own_words_alone_equal_the_whole_head_times_the_mask_in_value_and_gradient():
    torch.manual_seed(0)
    head = VocabularyHead(8, torch.nn.Parameter(torch.randn(20, 8)), [0, 1, 2])
    hidden = torch.randn(2, 5, 8, requires_grad=True)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]]).bool()
    own = torch.tensor([[1, 7, 9, 7, 2], [2, 19, 3, 0, 0]])  # doubles, special tokens, padding
    allowed = torch.zeros(2, 20).scatter(1, own, 1.0)
    seed = torch.randn(2, 20)
    results = []
    for out in (head(hidden, mask, own, math.inf), head(hidden, mask) * allowed):
        results.append((out, *torch.autograd.grad((out * seed).sum(), [hidden, *head.parameters()])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    assert (results[0][0][0] > 0).nonzero().flatten().tolist() != []


@pytest.mark.parametrize("margin", [math.inf, 0, 1.5])
def test_own_words_with_a_leak_go_below_zero_by_its_slope_and_no_others_do(margin):
    torch.manual_seed(0)
    head = VocabularyHead(8, torch.nn.Parameter(torch.randn(20, 8)), [0, 1, 2])
    with torch.no_grad():
        head.bias[7:10] = torch.tensor([-9.0, -9.0, 9.0])  # 7 and 8 are off, 9 is on
    hidden = torch.randn(3, 5, 8, requires_grad=True)
    mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0], [0] * 5]).bool()
    own = torch.tensor(
        [[1, 7, 9, 7, 2], [2, 19, 3, 0, 0], [7, 8, 9, 2, 1]]
    )  # doubles, specials; a row without positions
    logits = torch.stack(
        [head.norm(torch.nn.functional.gelu(head.dense(row))) @ head.word_embeddings.T for row in hidden]
    )
    logits = logits.masked_fill(~mask[..., None], -1e4).amax(1) + head.bias
    held = torch.zeros(3, 20, dtype=torch.bool).scatter(1, own, True)
    held[:, :3] = False
    lowered = torch.where(held, logits, logits - margin)
    want = torch.log1p(torch.relu(lowered)) + 0.25 * logits.clamp(max=0) * held
    want = want * (torch.arange(20) > 2) * mask.any(1, keepdim=True)
    got = head(hidden, mask, own, margin, negative_slope=0.25)
    assert got[0, 7] < 0 < got[0, 9] and got[1, 7:9].min() >= 0 and (got[2] == 0).all()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    seed = torch.randn(3, 20)
    leaves = [hidden, *head.parameters()]
    for a, b in zip(*(torch.autograd.grad((out * seed).sum(), leaves) for out in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
