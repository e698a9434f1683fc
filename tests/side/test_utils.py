"""The small helpers: collectives' shares, operators, weights, timers."""

import json

import pytest
import torch

from flash_attn.utils import benchmark
from flash_attn.utils.distributed import get_dim_for_local_rank
from flash_attn.utils.library import triton_op
from flash_attn.utils.pretrained import state_dict_from_pretrained
from flash_attn.utils.testing import generate_qkv, generate_random_padding_mask
from flash_attn.utils.torch import custom_bwd, custom_fwd


@pytest.mark.parametrize("dim, world_size, multiple_of, shares", [(12, 4, 1, [3] * 4), (14, 4, 2, [4, 4, 4, 2])])
def test_shares_of_a_dimension(dim, world_size, multiple_of, shares):
    assert [get_dim_for_local_rank(dim, world_size, rank, multiple_of) for rank in range(world_size)] == shares


@pytest.mark.parametrize("options", [{}, dict(schema="(Tensor x, float y) -> Tensor"), dict(allow_decomposition=False)])
def test_triton_op_defines_an_operator(options):
    name = f"flash_attn_side_test::scale_{len(options)}_{'schema' in options}"

    @triton_op(name, mutates_args=(), **options)
    def scale(x: torch.Tensor, y: float) -> torch.Tensor:
        return x * y

    x = torch.randn(3)
    assert torch.equal(scale(x, 2.0), 2 * x)
    torch.library.opcheck(scale, (x, 2.0), test_utils=("test_schema", "test_faketensor"))


def test_autocast_decorators_leave_the_cpu_alone():
    class Double(torch.autograd.Function):
        @staticmethod
        @custom_fwd
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        @custom_bwd
        def backward(ctx, grad):
            return 2 * grad

    x = torch.ones(2, requires_grad=True)
    Double.apply(x).sum().backward()
    assert torch.equal(x.grad, torch.full((2,), 2.0))


def test_weights_from_one_file_and_from_shards(tmp_path, seed):
    torch.manual_seed(seed)
    parts = {"a.bin": {"w": torch.randn(2, 3)}, "b.bin": {"b": torch.randn(3)}}
    whole = {**parts["a.bin"], **parts["b.bin"]}
    for name, part in parts.items():
        torch.save(part, tmp_path / name)
    index = {"weight_map": {"w": "a.bin", "b": "b.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for _ in range(2):
        loaded = state_dict_from_pretrained(str(tmp_path), dtype=torch.float16)
        assert loaded.keys() == whole.keys()
        assert all(torch.equal(loaded[name], whole[name].half()) for name in whole)
        torch.save(whole, tmp_path / "pytorch_model.bin")
        (tmp_path / "a.bin").unlink(missing_ok=True)


def test_a_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match="has none of"):
        state_dict_from_pretrained(str(tmp_path))


def test_timers_run_what_they_time(capsys):
    calls = []

    def fn(x, scale=1.0):
        calls.append(torch.is_autocast_enabled("cpu"))
        return x @ x * scale, None

    x = torch.randn(4, 4, requires_grad=True)
    timings = benchmark.benchmark_all(fn, x, repeats=3, desc="product", scale=2.0)
    assert len(timings) == 3 and all(measurement.median > 0 for _, measurement in timings)
    assert "product - Forward + Backward pass" in capsys.readouterr().out
    assert len(calls) >= 3 + 1 + 3 and not any(calls) and x.grad is not None
    benchmark.benchmark_forward(fn, x, repeats=2, verbose=False, amp=True, amp_dtype=torch.bfloat16)
    assert calls[-1] and capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"\(4, 4\), got \(2,\)"):
        benchmark.benchmark_backward(fn, x, grad=torch.ones(2), verbose=False)


@pytest.mark.parametrize("mode, least", [("full", 40), ("random", 20), ("third", 13)])
@pytest.mark.parametrize("zero_lengths", [False, True])
def test_padding_masks(seed, mode, least, zero_lengths):
    torch.manual_seed(seed)
    mask = generate_random_padding_mask(40, 11, "cpu", mode, zero_lengths)
    lengths = mask.sum(1)
    assert torch.equal(mask, torch.arange(40) < lengths[:, None])
    empty = torch.tensor([zero_lengths and (i % 5 == 0) for i in range(11)])
    assert torch.equal(lengths == 0, empty) and lengths[~empty].min() >= least
    with pytest.raises(ValueError, match="'half'"):
        generate_random_padding_mask(4, 2, "cpu", "half")


@pytest.mark.parametrize("masked", [False, True])
def test_packed_inputs_pad_back_to_what_they_were(seed, masked):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    mask = torch.arange(5) < torch.tensor([[3], [5]]) if masked else None
    keep = mask[..., None, None] if masked else 1
    qv = torch.randn(2, 5, 4, 3)
    results = generate_qkv(q, k, v, mask, mask, qv)
    packed_q, packed_k, packed_v, packed_qv, cu_q, cu_k, used_q, used_k, max_q, max_k = results[:10]
    *padded, padded_qv, pad, _pad_dq, pad_dk = results[10:]
    lengths = [0, 3, 8] if masked else [0, 5, 10]
    assert cu_q.tolist() == cu_k.tolist() == lengths and max_q == max_k == 5 and cu_q.dtype == torch.int32
    assert torch.equal(pad(packed_q), q * keep) and torch.equal(pad_dk(packed_k), k * keep)
    assert torch.equal(pad(packed_v), v * keep)
    assert all(torch.equal(leaf, x) and leaf.is_leaf for leaf, x in zip(padded, (q, k, v), strict=True))
    assert torch.equal(pad(packed_qv), qv * keep) and padded_qv.equal(qv) and not packed_qv.requires_grad
    for used in (used_q, used_k):
        assert used.tolist() == [3, 5] if masked else used is None
    without = generate_qkv(q, k, v, mask, mask)
    assert len(without) == 17 and without[3] is without[13] is None
    kv_form = generate_qkv(q, k, v, mask, mask, kvpacked=True)
    assert torch.equal(kv_form[-1](kv_form[1]), torch.stack([k, v], 2) * (keep[:, :, None] if masked else 1))
    packed, cu, longest, whole, _, pad_dqkv = generate_qkv(q, k, v, mask, mask, qkvpacked=True)
    assert torch.equal(pad_dqkv(packed), whole * (keep[:, :, None] if masked else 1))
    assert cu.tolist() == lengths and longest == 5
    with pytest.raises(ValueError, match="exclude each other"):
        generate_qkv(q, k, v, kvpacked=True, qkvpacked=True)
    with pytest.raises(ValueError, match="alike"):
        generate_qkv(q, k[:, :4], v[:, :4], qkvpacked=True)


def test_unused_tokens_keep_their_room(seed):
    torch.manual_seed(seed)
    q, k, v = torch.randn(3, 2, 5, 4, 8)
    mask = torch.arange(5) < torch.tensor([[3], [2]])
    unused = torch.arange(5) == torch.tensor([[3], [4]])
    results = generate_qkv(q, k, v, mask, mask, query_unused_mask=unused, key_unused_mask=unused)
    assert results[4].tolist() == results[5].tolist() == [0, 4, 7] and results[8:10] == (4, 4)
    assert results[6].tolist() == results[7].tolist() == [3, 2]
    for packed, x in zip(results[:3], (q, k, v), strict=True):
        assert torch.equal(results[-1](packed), x * (mask | unused)[..., None, None])
    for form in ("kvpacked", "qkvpacked"):
        with pytest.raises(ValueError, match="go without qv, key_unused_mask"):
            generate_qkv(q, k, v, mask, mask, qv=q, key_unused_mask=unused, **{form: True})
    with pytest.raises(ValueError, match="need their padding masks"):
        generate_qkv(q, k, v, key_unused_mask=unused)
