"""The module that upstream compiles: positional signatures, the public functions' results, outputs given by the caller."""

import inspect
import math

import pytest
import torch

import flash_attn_2_cuda
from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.errors import InvalidArgument
from tests.support import calls
from tests.support.cases import BF16, FP32, Case
from tests.support.inputs import make_inputs

NUMBERS = "p scale causal wl wr softcap"
POSITIONS = {  # API.md 1.3, one word an argument
    "fwd": f"q k v out_ alibi {NUMBERS} return_softmax gen",
    "varlen_fwd": (
        "q k v out_ cu_q cu_k seqused_k leftpad_k block_table alibi max_q max_k p scale zero_tensors causal wl wr softcap "
        "return_softmax gen num_splits"
    ),
    "bwd": f"dout q k v out lse dq_ dk_ dv_ alibi {NUMBERS} deterministic gen rng_state",
    "varlen_bwd": (
        "dout q k v out lse dq_ dk_ dv_ cu_q cu_k alibi max_q max_k p scale zero_tensors causal wl wr softcap "
        "deterministic gen rng_state"
    ),
    "fwd_kvcache": (
        "q kcache vcache k_ v_ seqlens_k_ cos_ sin_ cache_batch_idx_ leftpad_k block_table alibi out_ scale causal wl wr "
        "softcap interleaved num_splits"
    ),
}
WORDS = {  # what each of those words is called here
    "alibi": "alibi_slopes_",
    "p": "p_dropout",
    "scale": "softmax_scale",
    "causal": "is_causal",
    "wl": "window_size_left",
    "wr": "window_size_right",
    "gen": "gen_",
    "cos_": "rotary_cos_",
    "sin_": "rotary_sin_",
    "interleaved": "is_rotary_interleaved",
    "cu_q": "cu_seqlens_q",
    "cu_k": "cu_seqlens_k",
    "leftpad_k": "leftpad_k_",
    "block_table": "block_table_",
    "max_q": "max_seqlen_q",
    "max_k": "max_seqlen_k",
    "lse": "softmax_lse",
}
DENSE = Case("dense", BF16, 64, 4, 2, (33, 33), (65, 65), causal=True, window=(40, 0), alibi="bh", strides="packed")
DROPOUT = Case("dropout", FP32, 64, 4, 2, (33, 33), (65, 65), dropout_p=0.3, alibi="h")
VARLEN = Case("varlen", BF16, 64, 4, 2, (33, 0, 65), (65, 7, 20), "varlen", causal=True, softcap=3.0)
VARLEN_DROPOUT = Case("varlen-dropout", FP32, 64, 4, 4, (33, 65), (65, 20), "varlen", dropout_p=0.3)
CASES = [DENSE, DROPOUT, VARLEN, VARLEN_DROPOUT]


@pytest.fixture
def device(request):
    with calls.running_on(request.param) as device:
        yield device


everywhere = pytest.mark.parametrize("device", calls.places("cpu", "gpu"), indirect=True)


@pytest.mark.parametrize("name", POSITIONS)
def test_positions(name):
    found = inspect.signature(getattr(flash_attn_2_cuda, name)).parameters
    assert list(found) == [WORDS.get(word, word) for word in POSITIONS[name].split()]


def fwd(case, inputs, out=None, return_softmax=False, generator=None):
    q, k, v = inputs.q, inputs.k, inputs.v
    scale, masks = case.headdim**-0.5, (case.causal, *case.window, case.softcap, return_softmax, generator)
    if case.layout == "dense":
        return flash_attn_2_cuda.fwd(q, k, v, out, inputs.alibi_slopes, case.dropout_p, scale, *masks)
    cu_q, cu_k, max_q, max_k = calls.lengths(case, inputs)
    return flash_attn_2_cuda.varlen_fwd(
        q,
        k,
        v,
        out,
        cu_q,
        cu_k,
        None,
        None,
        None,
        inputs.alibi_slopes,
        max_q,
        max_k,
        case.dropout_p,
        scale,
        False,
        *masks,
    )


def bwd(case, inputs, out, lse, rng_state, gradients=(None, None, None)):
    tensors = (inputs.dout, inputs.q, inputs.k, inputs.v, out, lse, *gradients)
    scale, masks = case.headdim**-0.5, (case.causal, *case.window, case.softcap, False, None, rng_state)
    if case.layout == "dense":
        return flash_attn_2_cuda.bwd(*tensors, inputs.alibi_slopes, case.dropout_p, scale, *masks)
    cu_q, cu_k, max_q, max_k = calls.lengths(case, inputs)
    return flash_attn_2_cuda.varlen_bwd(
        *tensors, cu_q, cu_k, inputs.alibi_slopes, max_q, max_k, case.dropout_p, scale, False, *masks
    )


@everywhere
@pytest.mark.parametrize("case", CASES, ids=str)
def test_results_are_those_of_the_public_functions(case, device, seed):
    inputs = make_inputs(case, device, seed)
    wanted, _ = calls.forward_and_backward(case, inputs, seed)
    torch.manual_seed(seed)
    out, lse, scores, rng_state = fwd(case, inputs)
    assert scores.numel() == 0 and rng_state.shape == (2,) and rng_state.dtype == torch.int64
    dq, dk, dv, softmax_d = bwd(case, inputs, out, lse, rng_state)
    calls.assert_equal((out, lse, dq, dk, dv), [wanted[x] for x in ("out", "lse", "dq", "dk", "dv")])
    padded = (2, 4, 128) if case.layout == "dense" else (4, sum(case.seqlens_q) + 128 * case.batch_size)
    assert softmax_d.shape == padded and softmax_d.dtype == FP32


@everywhere
@pytest.mark.parametrize("case", [DENSE, VARLEN], ids=str)
def test_tensors_given_are_filled_and_returned(case, device, seed):
    inputs = make_inputs(case, device, seed)
    wanted = fwd(case, inputs)
    given = torch.full_like(inputs.q, math.nan)
    out, lse, _, rng_state = fwd(case, inputs, given)
    assert out is given
    calls.assert_equal((given, lse), wanted[:2])
    gradients = [torch.full_like(x, math.nan) for x in (inputs.q, inputs.k, inputs.v)]
    results = bwd(case, inputs, out, lse, rng_state, gradients)
    assert all(a is b for a, b in zip(results, gradients, strict=False))
    calls.assert_equal(gradients, bwd(case, inputs, out, lse, rng_state)[:3])


@everywhere
@pytest.mark.parametrize("case", [DROPOUT, VARLEN_DROPOUT], ids=str)
def test_scores_and_a_generator(case, device, seed):
    """The generator given is drawn from, not the default one; S_dmask is that of the public functions."""
    inputs = make_inputs(case, device, seed)
    default = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    first, second = (
        fwd(case, inputs, return_softmax=True, generator=torch.Generator(device).manual_seed(seed)) for _ in range(2)
    )
    calls.assert_equal(first, second)
    after = torch.cuda.get_rng_state() if device.type == "cuda" else torch.get_rng_state()
    assert torch.equal(default, after)
    keep = calls.keep_of(case, first[3])
    keep = keep[0][0] if case.layout == "varlen" else keep[0]
    part = first[2][0, :, : case.seqlens_q[0], : case.seqlens_k[0]]
    assert torch.equal((part > 0)[part != 0], keep[part != 0])


@pytest.mark.parametrize("case", [DENSE, VARLEN], ids=str)
def test_scores_need_dropout(case, seed):
    inputs = make_inputs(case, "cpu", seed)
    with pytest.raises(InvalidArgument, match=r"return_softmax is only supported when p_dropout > 0.0"):
        fwd(case, inputs, return_softmax=True)


@pytest.mark.parametrize("case", [DENSE, VARLEN], ids=str)
@pytest.mark.parametrize("change", ["dtype", "shape"])
def test_an_output_that_does_not_fit(case, change, seed):
    inputs = make_inputs(case, "cpu", seed)
    out = torch.empty_like(inputs.q, dtype=FP32) if change == "dtype" else torch.empty_like(inputs.q[..., :32])
    with pytest.raises(
        InvalidArgument, match="Output must have the same dtype" if change == "dtype" else "out must have"
    ):
        fwd(case, inputs, out)


@everywhere
def test_pages_and_used_lengths_by_position(device, seed):
    """seqused_k, leftpad_k and block_table reach their own arguments."""
    q, k = (calls.randn(n, 2, 64, dtype=BF16, device=device, seed=seed + n) for n in (40, 96))
    cu_q, cu_k = calls.int32([0, 16, 40], device), calls.int32([0, 48, 96], device)
    used, leftpad = calls.int32([40, 30], device), calls.int32([3, 9], device)
    table = calls.int32([[5, 0, 1], [3, 4, 2]], device)
    pages = k.unflatten(0, (-1, 16))
    words = (24, 48, 0.0, 0.125, False, True, -1, -1, 0.0, False, None)
    out = flash_attn_2_cuda.varlen_fwd(q, pages, pages, None, cu_q, cu_k, used, leftpad, table, None, *words)[0]
    kept = torch.cat(
        [pages[table[b].long()].flatten(0, 1)[low:high] for b, (low, high) in enumerate([(3, 40), (9, 30)])]
    )
    wanted = flash_attn_varlen_func(q, kept, kept, cu_q, calls.int32([0, 37, 58], device), 24, 48, causal=True)
    calls.assert_near(out, wanted)


def test_num_splits_changes_nothing(seed):
    inputs = make_inputs(VARLEN, "cpu", seed)
    cu_q, cu_k, max_q, max_k = calls.lengths(VARLEN, inputs)
    arguments = (inputs.q, inputs.k, inputs.v, None, cu_q, cu_k, None, None, None, None, max_q, max_k)
    words = (0.0, 0.125, False, True, -1, -1, 0.0, False, None)
    calls.assert_equal(
        flash_attn_2_cuda.varlen_fwd(*arguments, *words)[0], flash_attn_2_cuda.varlen_fwd(*arguments, *words, 4)[0]
    )


def test_the_dense_function_by_position(seed):
    q, k, v = (calls.randn(2, 20, 2, 16, dtype=FP32, device=torch.device("cpu"), seed=seed + i) for i in range(3))
    slopes = torch.tensor([0.1, 0.3])
    out = flash_attn_2_cuda.fwd(q, k, v, None, slopes, 0.0, 0.3, False, 5, 4, 2.0, False, None)[0]
    wanted = flash_attn_func(q, k, v, softmax_scale=0.3, window_size=(5, 4), softcap=2.0, alibi_slopes=slopes)
    calls.assert_equal(out, wanted)
