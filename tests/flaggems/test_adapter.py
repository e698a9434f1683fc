"""The backend `flaggems` on a stand-in for the package: what it hands over, what it refuses, and that results are right."""

import sys

import pytest
import torch

import flash_attn
from flash_attn import backends, flash_attn_flaggems_backend, reference
from flash_attn.backends import flaggems
from flash_attn.backward import flaggems_flash_attn_backward, flaggems_flash_attn_varlen_backward
from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.hardware import CPU, Hardware
from flash_attn.problem import AttentionProblem
from tests.support import calls
from tests.support.cases import BF16, CASES, FP16, FP32, Case
from tests.support.gems_standin import StandIn, forget
from tests.support.inputs import make_inputs
from tests.support.tolerance import expected

NPU = Hardware("npu", "", 1, 0)


@pytest.fixture(params=["dense operator", "packed operator only"])
def package(request, monkeypatch):
    """A stand-in on the CPU, with FlagGems' dense operator usable or not."""
    standin = StandIn()
    monkeypatch.setattr(flaggems, "_package", lambda: (standin, None))
    if request.param == "dense operator":
        monkeypatch.setattr(flaggems, "DENSE_DEVICES", ("cpu",))
    forget()
    with backends.use("flaggems"):
        yield standin
    forget()


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "flag_gems", None)
    flaggems._package.cache_clear()
    forget()
    yield
    flaggems._package.cache_clear()
    forget()


def refusal(case):
    """What the backend says of a case, None where it must compute it."""
    if case.dtype == FP32:
        return "float16 and bfloat16, not float32"
    return "dropout keeps fewer weights" if case.dropout_p else None


ACCEPTED = [case for case in CASES if refusal(case) is None]
REFUSED = [case for case in CASES if refusal(case) is not None]


def test_the_list_of_cases_holds_both_kinds():
    assert len(ACCEPTED) > 30 and len(REFUSED) > 20


@pytest.mark.parametrize("case", ACCEPTED, ids=str)
def test_results_are_right(package, case, seed):
    inputs = make_inputs(case, "cpu", seed)
    results, _ = calls.forward(case, inputs, seed)
    assert results["out"].stride() == torch.empty_like(inputs.q).stride()
    assert results["lse"].is_contiguous()
    expected(case, inputs).check(**results)


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused_cases_say_why(package, case, seed):
    inputs = make_inputs(case, "cpu", seed)
    with pytest.raises(UnsupportedProblem, match=refusal(case)) as caught:
        calls.public(case, inputs, inputs.q, inputs.k, inputs.v)
    assert list(caught.value.reasons) == ["flaggems"]
    assert package.calls == []


ROUTES = [
    (Case("full", FP16, 64, 2, 2, (200,), (90,)), "dense"),
    (Case("causal-short", FP16, 64, 2, 2, (100,), (90,), causal=True), "dense"),
    (Case("causal-aligned", FP16, 64, 2, 2, (256,), (90,), causal=True), "dense"),
    (Case("causal-partial-block", FP16, 64, 2, 2, (130,), (130,), causal=True), "packed"),
    (Case("band", BF16, 64, 2, 2, (128,), (128,), window=(9, 5)), "dense"),
    (Case("band-wider-than-keys", BF16, 64, 2, 2, (128,), (40,), window=(9, 60)), "packed"),
    (Case("left", BF16, 64, 2, 2, (128,), (128,), window=(9, -1)), "packed"),
    (Case("right", BF16, 64, 2, 2, (128,), (128,), window=(-1, 9)), "packed"),
    (Case("alibi", BF16, 64, 2, 2, (128,), (128,), alibi="h"), "dense"),
    (Case("causal-alibi", BF16, 64, 2, 2, (128,), (128,), causal=True, alibi="h"), "packed"),
]


@pytest.mark.parametrize("case, operator", ROUTES, ids=lambda x: x.name if isinstance(x, Case) else x)
@pytest.mark.parametrize("package", ["dense operator"], indirect=True)
def test_the_dense_operator_gets_what_it_computes_correctly(package, case, operator, seed):
    inputs = make_inputs(case, "cpu", seed)
    results, _ = calls.forward(case, inputs, seed)
    assert package.operators == [operator]
    expected(case, inputs).check(**results)


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.7])
@pytest.mark.parametrize("causal", [False, True])
def test_any_scale(package, scale, causal, seed):
    """FlagGems masks before it scales, and takes 0 for the default."""
    case = Case("scale", FP16, 32, 4, 2, (40,), (30,), causal=causal)
    inputs = make_inputs(case, "cpu", seed)
    words = dict(softmax_scale=scale, causal=causal, return_attn_probs=True)
    out, lse, _ = flash_attn.flash_attn_func(inputs.q, inputs.k, inputs.v, **words)
    wanted = reference.attention(inputs.q, inputs.k, inputs.v, softmax_scale=scale, window=case.interval)
    torch.testing.assert_close(out, wanted[0].half(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, wanted[1].float(), rtol=1e-4, atol=1e-4)
    assert package.calls[0][1]["scale" if package.operators == ["dense"] else "softmax_scale"] > 0.0


@pytest.mark.parametrize("headdim, padded", [(1, 32), (16, 32), (40, 64), (111, 128), (160, 192), (256, 256)])
@pytest.mark.parametrize("package", ["dense operator"], indirect=True)
def test_dense_head_dims_are_padded_to_what_flaggems_takes(package, headdim, padded, seed):
    case = Case("pad", FP16, headdim, 2, 1, (33,), (20,))
    inputs = make_inputs(case, "cpu", seed)
    results, _ = calls.forward(case, inputs, seed)
    assert package.calls[0][1]["query"].shape[-1] == padded
    expected(case, inputs).check(**results)


def paged(seed, batch_size=3, nheads=4, nheads_k=2, headdim=32, page=8, max_pages=4, seqlens_q=(1, 1, 1)):
    """(q, k pages, v pages, cu_seqlens_q, block table, keys in use, k and v as packed sequences)."""
    q = calls.randn(sum(seqlens_q), nheads, headdim, dtype=FP16, device="cpu", seed=seed)
    num_pages = batch_size * max_pages + 2
    k, v = (calls.randn(num_pages, page, nheads_k, headdim, dtype=FP16, device="cpu", seed=seed + i) for i in (1, 2))
    generator = torch.Generator().manual_seed(seed)
    table = torch.randperm(num_pages, generator=generator)[: batch_size * max_pages].view(batch_size, max_pages).int()
    used = torch.tensor([max_pages * page, 0, 11][:batch_size], dtype=torch.int32)
    rows = [x[table[b].long()].flatten(0, 1)[: used[b]] for x in (k, v) for b in range(batch_size)]
    ends = torch.tensor([0, *seqlens_q]).cumsum(0).int()
    return q, k, v, ends, table, used, torch.cat(rows[:batch_size]), torch.cat(rows[batch_size:])


def run_paged(q, k, v, ends, table, used, longest_q=None, **words):
    longest = int(ends.diff().max()) if longest_q is None else longest_q
    cu_seqlens_k = torch.cat([used.new_zeros(1), used.cumsum(0).int()])
    given = dict(words)
    lengths = (ends, cu_seqlens_k, longest, table.shape[1] * k.shape[1])
    return flash_attn_flaggems_backend._flash_attn_varlen_forward(q, k, v, *lengths, block_table=table, **given)[:2]


@pytest.mark.parametrize("words", [{}, dict(causal=True), dict(window_size_left=5, window_size_right=0)], ids=str)
@pytest.mark.parametrize("seqlens_q", [(1, 1, 1), (3, 0, 5), (1, 0, 1)])
@pytest.mark.parametrize("lengths", ["cu_seqlens_k", "seqused_k"])
def test_paged_keys(package, words, seqlens_q, lengths, seed):
    *operands, k_packed, v_packed = paged(seed, seqlens_q=seqlens_q)
    used = operands[5]
    out, lse = run_paged(*operands, **words, **({"seqused_k": used} if lengths == "seqused_k" else {}))
    left = words.get("window_size_left")
    window = (left, 0 if words else None)
    cu_seqlens_k = torch.cat([used.new_zeros(1), used.cumsum(0).int()])
    wanted = reference.attention_varlen(operands[0], k_packed, v_packed, operands[3], cu_seqlens_k, window=window)
    torch.testing.assert_close(out, wanted[0].half(), rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, wanted[1].float(), rtol=1e-4, atol=1e-4)
    assert package.operators == ["packed"]
    assert package.calls[0][1]["k"] is operands[1], "a cache must not be copied"


def test_groups_of_one_query_share_their_keys(package, seed):
    """Heads of a group become rows of one sequence: FlagGems gets as many heads as the keys have."""
    run_paged(*paged(seed)[:6])
    arguments = package.calls[0][1]
    assert arguments["q"].shape == (6, 2, 32) and arguments["max_seqlen_q"] == 2
    assert arguments["cu_seqlens_q"].tolist() == [0, 2, 4, 6]


def test_bad_contents_stay_in_bounds(package, seed):
    """The stand-in asserts that every page, length and row it is given exists."""
    q, k, v, ends, table, used, *_ = paged(seed, seqlens_q=(2, 2, 2))
    table[0, 0], table[1, 1] = -1, 10**6
    run_paged(q, k, v, ends + torch.tensor([0, 0, 0, 99], dtype=torch.int32), table, used + 50, 2)
    run_paged(q, k, v, ends - 3, table, used - 50, 2)
    flash_attn.flash_attn_varlen_func(q, q, q, ends + 5, ends - 5, 2, 2)
    assert len(package.calls) == 3


def test_rows_outside_every_sequence_can_be_blanked(package, seed):
    q = calls.randn(9, 2, 32, dtype=FP16, device="cpu", seed=seed)
    ends = torch.tensor([2, 4, 7], dtype=torch.int32)
    forward = flash_attn_flaggems_backend._flash_attn_varlen_forward
    out, lse, *_ = forward(q, q, q, ends, ends, 3, 3, causal=True, zero_tensors=True)
    outside = torch.tensor([0, 1, 7, 8])
    assert not out[outside].any() and (lse[:, outside] == -torch.inf).all()
    assert out[2:7].isfinite().all() and lse[:, 2:7].isfinite().all()


def accepted(**changes):
    numbers = dict(batch_size=2, seqlen_q=64, seqlen_k=64, nheads=4, nheads_k=2, headdim=64)
    return AttentionProblem(**{**dict(layout="dense", dtype="float16"), **numbers, **changes})


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(dtype="float32"), "float16 and bfloat16, not float32"),
        (dict(dropout=True), "no backward can rebuild its mask"),
        (dict(layout="paged", leftpad_k=True), "no left padding"),
        (dict(layout="varlen", seqused_k=True), "for paged keys only"),
        (dict(layout="paged", headdim=60), "multiples of 8 from 16 as head dimension, not 60"),
        (dict(layout="paged", headdim=8), "multiples of 8 from 16 as head dimension, not 8"),
        (dict(layout="varlen", batch_size=65536), "up to 65536 sequences"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_problems_outside_the_domain(package, changes, words):
    assert flaggems.unsupported(accepted(), CPU) is None
    assert words in flaggems.unsupported(accepted(**changes), CPU)


def test_refusals_that_only_tensors_show(package, monkeypatch, seed):
    q, k, v, ends, table, used, *_ = paged(seed)
    cache = torch.stack([k, v], 1)  # pages of k and v in turn
    with pytest.raises(UnsupportedProblem, match="takes pages to follow one another"):
        run_paged(q, cache[:, 0], cache[:, 1], ends, table, used)
    with pytest.raises(UnsupportedProblem, match="reads v with the strides of k"):
        run_paged(q, k, v.transpose(1, 2).contiguous().transpose(1, 2), ends, table, used)
    monkeypatch.setattr(flaggems, "MAX_OFFSET", 1023)
    x = torch.zeros(2, 8, 2, 32, dtype=FP16)
    flash_attn.flash_attn_func(x, x, x)
    package.calls.clear()
    with pytest.raises(UnsupportedProblem, match="addresses in 32 bits, and k reaches over 1056 elements"):
        flash_attn.flash_attn_func(x, *(torch.zeros(1, 33, 1, 32, dtype=FP16).expand(2, 33, 1, 32),) * 2)
    assert package.calls == []


@pytest.mark.parametrize("shape", [(0, 4, 2, 16), (2, 0, 2, 16)])
def test_nothing_is_launched_without_a_pair(package, shape):
    x = torch.zeros(shape, dtype=FP16)
    full = torch.zeros(shape[0], 5, 2, 16, dtype=FP16)
    out, lse, _ = flash_attn.flash_attn_func(full, x, x, return_attn_probs=True)
    assert not out.any() and (lse == -torch.inf).all() and lse.shape == (shape[0], 2, 5)
    assert package.calls == []


def test_gradients_come_from_another_backend(package, seed):
    case = Case("gradients", FP16, 64, 4, 2, (40,), (70,), causal=True, softcap=3.0)
    inputs = make_inputs(case, "cpu", seed)
    results, _ = calls.forward_and_backward(case, inputs, seed)
    assert len(package.calls) == 1
    expected(case, inputs).check(**results)
    (forward,) = flash_attn.dispatch._plans.values()
    (backward,) = forward.backward_plans.values()
    assert forward.backend.name == "flaggems" and backward.backend.name != "flaggems"


def test_explain_names_who_computes_gradients(package):
    verdict = backends.explain(accepted(), CPU)["flaggems"]
    assert verdict.startswith("could run it, gradients by ") and flaggems.forward_only in verdict


def test_the_automatic_choice_on_other_hardware(package):
    package.device = "npu"
    with backends.use(None):
        assert backends.select_backend(accepted(), NPU).name == "flaggems"
        assert backends.select_backend(accepted(dropout=True), NPU).name != "flaggems"
        assert backends.choose_backward_backend(accepted(), NPU, None).name != "flaggems"


def test_tensors_elsewhere_than_flaggems(package):
    package.device = "npu"
    assert "runs on npu here, and these tensors are on cpu" in flaggems.unsupported(accepted(), CPU)


def test_its_compiled_operators_are_not_used(package):
    package.config.use_c_extension = True
    assert "USE_C_EXTENSION" in flaggems.unsupported(accepted(), CPU)


def test_without_the_package(absent):
    q = torch.zeros(1, 4, 2, 16, dtype=FP16)
    forward = flash_attn_flaggems_backend._flaggems_flash_attn_forward
    with pytest.raises(UnsupportedProblem, match="FlagGems is not installed; `pip install flag_gems` adds it"):
        forward(q, q, q)
    assert "not installed" in backends.explain(accepted(), CPU)["flaggems"]


def test_a_package_whose_import_fails(monkeypatch, tmp_path):
    """FlagGems adds folders to the path, and raises RuntimeError where it finds no device."""
    (tmp_path / "flag_gems").mkdir()
    (tmp_path / "flag_gems" / "__init__.py").write_text(
        "import sys; sys.path.append('vendors')\nraise RuntimeError('No device were \\n detected')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flag_gems", raising=False)
    flaggems._package.cache_clear()
    assert flaggems.unsupported(accepted(), CPU) == "importing FlagGems fails: No device were detected"
    assert "vendors" not in sys.path
    flaggems._package.cache_clear()


def test_entry_points_agree_with_the_public_functions(package, seed):
    case = Case("names", FP16, 32, 2, 2, (20, 20), (20, 20), causal=True, softcap=2.0, strides="packed")
    inputs = make_inputs(case, "cpu", seed)
    q, k, v = inputs.q, inputs.k, inputs.v
    words = dict(causal=True, softcap=2.0)
    module = flash_attn_flaggems_backend
    wanted = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **words)
    ends = torch.tensor([0, 20, 40], dtype=torch.int32)
    packed = [x.reshape(40, 2, 32) for x in (q, k, v)]
    with backends.use("reference"):  # the entry points ask for FlagGems whatever is in force
        dense = module._flaggems_flash_attn_forward(q, k, v, **words)
        qkv = module._flash_attn_qkvpacked_forward(torch.stack([q, k, v], 2), **words)
        kv = module._flash_attn_kvpacked_forward(q, torch.stack([k, v], 2), **words)
        varlen = module._flash_attn_varlen_forward(*packed, ends, ends, 20, 20, **words)
    assert len(package.calls) == 5
    for out, lse, scores, rng_state in (dense, qkv, kv):
        calls.assert_equal((out, lse), wanted[:2])
        assert scores.numel() == 0 and rng_state.tolist() == [0, 0]
    calls.assert_near(varlen[0].view_as(q), wanted[0])
    calls.assert_near(varlen[1].view(2, 2, 20).transpose(0, 1), wanted[1])


@pytest.mark.parametrize("name, shape", [("qkv", (1, 4, 2, 2, 16)), ("kv", (1, 4, 3, 2, 16)), ("qkv", (1, 4, 2, 16))])
def test_packed_operands_of_a_wrong_shape(name, shape):
    x = torch.zeros(shape, dtype=FP16)
    module = flash_attn_flaggems_backend
    with pytest.raises(InvalidArgument, match=f"{name} must have shape"):
        module._flash_attn_qkvpacked_forward(x) if name == "qkv" else module._flash_attn_kvpacked_forward(x, x)


@pytest.mark.parametrize("layout", ["dense", "varlen"])
def test_gradients_under_flaggems_name(package, layout, seed):
    """From FlagGems' own out and softmax_lse, rows without keys included."""
    seqlens = ((40,), (25,)) if layout == "dense" else ((40, 0, 7), (25, 9, 7))
    case = Case("names", FP16, 32, 4, 2, *seqlens, layout, causal=True)
    inputs = make_inputs(case, "cpu", seed)
    results, _ = calls.forward(case, inputs, seed)
    function = flaggems_flash_attn_backward if layout == "dense" else flaggems_flash_attn_varlen_backward
    tensors = (inputs.dout, inputs.q, inputs.k, inputs.v, results["out"], results["lse"])
    dq, dk, dv = function(*tensors, *calls.lengths(case, inputs), causal=True)
    expected(case, inputs).check(**results, dq=dq, dk=dk, dv=dv)
