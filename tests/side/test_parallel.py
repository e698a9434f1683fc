"""Layers split over two processes against the same layers whole."""

from functools import partial

import pytest
import torch
import torch.distributed as dist

from flash_attn.modules.embedding import ParallelGPT2Embeddings
from flash_attn.modules.mha import MHA, ParallelMHA
from flash_attn.modules.mlp import ParallelGatedMlp, ParallelMLP
from flash_attn.ops.fused_dense import FusedMLP, ParallelFusedMLP
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
from flash_attn.utils import distributed
from tests.support.processes import WORLD, in_two_processes

DIM = 16


def same(actual, truth):
    torch.testing.assert_close(actual, truth, rtol=1e-4, atol=1e-5)


def part(x, rank, dim=0):
    return x.chunk(WORLD, dim)[rank]


def check_collectives(rank, group):
    x = torch.arange(6.0).view(2, 3) + 10 * rank
    x.requires_grad_()
    whole = distributed.all_gather(x, group)
    assert whole.shape == (4, 3) and torch.equal(part(whole, rank), x)
    weight = torch.randn(4, 3)
    (dx,) = torch.autograd.grad(whole, x, weight)
    same(dx, part(WORLD * weight, rank))
    summed = distributed.reduce_scatter(x, group)
    assert torch.equal(summed, part(2 * torch.arange(6.0).view(2, 3) + 10, rank))
    (dx,) = torch.autograd.grad(summed, x, part(weight[:2], rank))
    same(dx, weight[:2])
    total = distributed.all_reduce(x, group)
    assert torch.equal(total, 2 * torch.arange(6.0).view(2, 3) + 10)
    assert torch.equal(torch.autograd.grad(total, x, weight[:2])[0], weight[:2])
    raw, handle = distributed.all_gather_raw(x.detach(), group, async_op=True)
    handle.wait()
    assert torch.equal(raw, whole)
    with pytest.raises(ValueError, match="3, must be divisible by world_size 2"):
        distributed.reduce_scatter_raw(torch.ones(3), group)


def check_marks(rank, group):
    model = torch.nn.Linear(2, 2)
    with torch.no_grad():
        model.weight.fill_(rank)
        model.bias.fill_(rank)
    model.weight._shared_params = True
    distributed.sync_shared_params(model, group)
    assert model.weight.unique().tolist() == [0.0] and model.bias.unique().tolist() == [float(rank)]
    model.bias._sequence_parallel = True
    model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.full((2,), rank + 1.0)
    distributed.allreduce_sequence_parallel_grad(model, group)
    assert model.bias.grad.tolist() == [3.0, 3.0] and torch.equal(model.weight.grad, torch.ones(2, 2))


def check_loss(rank, group):
    logits, labels = torch.randn(9, 14), torch.randint(14, (9,))
    labels[3] = -100
    for smoothing, square in ((0.0, 0.0), (0.2, 0.01)):
        options = dict(label_smoothing=smoothing, lse_square_scale=square, logit_scale=0.7)
        whole, local = logits.clone().requires_grad_(), part(logits, rank, 1).clone().requires_grad_()
        truth, truth_z = cross_entropy_loss(whole, labels, **options)
        losses, z_losses = cross_entropy_loss(local, labels, process_group=group, **options)
        same(losses, truth)
        same(z_losses, truth_z)
        weight = torch.randn(9)
        (expected,) = torch.autograd.grad(truth, whole, weight)
        same(torch.autograd.grad(losses, local, weight)[0], part(expected, rank, 1))


def check_layer(rank, group, sequence_parallel, x, layer, whole):
    """Forward and the gradient of x; whole(x) is the truth, differentiable."""
    dist.broadcast(x, 0)  # the ranks' generators part where only one of them has a bias to draw
    truth_x = x.clone().requires_grad_()
    truth = whole(truth_x)
    dout = torch.randn_like(truth)
    dist.broadcast(dout, 0)
    (expected,) = torch.autograd.grad(truth, truth_x, dout)
    local = (part(x, rank) if sequence_parallel else x).clone().requires_grad_()
    out = layer(local)
    same(out, part(truth, rank) if sequence_parallel else truth)
    (dx,) = torch.autograd.grad(out, local, part(dout, rank) if sequence_parallel else dout)
    same(dx, part(expected, rank) if sequence_parallel else expected)


def gathered(layer, group, name):
    """Weights of both ranks, (WORLD, ...); a bias that only the first has counts as 0 elsewhere."""
    fc = layer.get_submodule(name)
    bias = torch.zeros(fc.out_features) if fc.bias is None else fc.bias.detach()
    return [distributed.all_gather_raw(t[None].contiguous(), group)[0] for t in (fc.weight.detach(), bias)]


def check_mlps(rank, group, sequence_parallel):
    x = torch.randn(4, 3, DIM)
    options = dict(sequence_parallel=sequence_parallel)
    silu = torch.nn.functional.silu
    for layer in (
        ParallelMLP(DIM, 8, activation=silu, process_group=group, **options),
        ParallelGatedMlp(DIM, group, 8, activation=silu, multiple_of=4, **options),
        ParallelFusedMLP(DIM, 8, activation="relu", process_group=group, **options),
    ):
        (w1, b1), (w2, b2) = (gathered(layer, group, name) for name in ("fc1", "fc2"))

        def whole(x, layer=layer, w1=w1, b1=b1, w2=w2, b2=b2):
            out = b2.sum(0)
            for r in range(WORLD):
                y = x @ w1[r].T + b1[r]
                if isinstance(layer, ParallelGatedMlp):
                    y, gate = y.chunk(2, -1)
                    y = y * silu(gate)
                else:
                    y = silu(y) if isinstance(layer, ParallelMLP) else y.relu()
                out = out + y @ w2[r].T
            return out

        check_layer(rank, group, sequence_parallel, x, layer, whole)
    if sequence_parallel:
        torch.manual_seed(0)
        mlp = FusedMLP(DIM, 8)  # the same weights on both ranks: every rank adds the whole result
        same(mlp(part(x, rank), process_group=group), part(WORLD * mlp(x), rank))


def check_mha(rank, group, sequence_parallel, nheads_k, flash):
    alibi = dict(use_alibi=True) if flash else dict(rotary_emb_dim=4)
    options = dict(num_heads_kv=nheads_k, causal=True, use_flash_attn=flash, **alibi)
    layer = ParallelMHA(DIM, 4, group, sequence_parallel=sequence_parallel, **options)
    whole = MHA(DIM, 4, **options)
    (w, b), (wo, bo) = (gathered(layer, group, name) for name in ("Wqkv", "out_proj"))
    q_dim, kv_dim = layer.num_heads_per_rank * 4, layer.num_heads_kv_per_rank * 4
    with torch.no_grad():
        for target, parts in ((whole.Wqkv.weight, w), (whole.Wqkv.bias, b)):
            split = [each.split((q_dim, kv_dim, kv_dim)) for each in parts]
            target.copy_(torch.cat([split[r][i] for i in range(3) for r in range(WORLD)]))
        whole.out_proj.weight.copy_(torch.cat(list(wo), dim=1))
        whole.out_proj.bias.copy_(bo.sum(0))
    x = torch.randn(4, 3, DIM)
    check_layer(rank, group, sequence_parallel, x, layer, whole)
    if sequence_parallel:
        flat = layer(part(x.flatten(0, 1), rank), seqlen=3)
        same(flat, part(whole(x).flatten(0, 1), rank))
    assert layer.allocate_inference_cache(2, 5).shape == (2, 5, 2, layer.num_heads_kv_per_rank, 4)


def check_embeddings(rank, group, sequence_parallel):
    layer = ParallelGPT2Embeddings(DIM, 10, 6, group, sequence_parallel=sequence_parallel)
    words = distributed.all_gather_raw(layer.word_embeddings.weight.detach(), group)[0]
    positions = distributed.all_gather_raw(layer.position_embeddings.weight.detach()[None], group)[0]
    ids = torch.randint(10, (4, 5))
    truth = words[ids] + torch.cat(list(positions), dim=1)[:5]
    same(layer(ids), part(truth, rank) if sequence_parallel else truth)
    truth = truth.flatten(0, 1)
    same(layer(ids, combine_batch_seqlen_dim=True), part(truth, rank) if sequence_parallel else truth)
    with pytest.raises(ValueError, match=r"embedding_dim \(5\) must be divisible by world_size \(2\)"):
        ParallelGPT2Embeddings(5, 10, 6, group)
    with pytest.raises(NotImplementedError, match="padding_idx, got 1"):
        ParallelGPT2Embeddings(DIM, 10, 6, group, padding_idx=1)


def work(rank, seed):
    group = dist.group.WORLD
    checks = [check_collectives, check_marks, check_loss]
    for sequence_parallel in (True, False):
        checks.append(partial(check_mlps, sequence_parallel=sequence_parallel))
        checks.append(partial(check_embeddings, sequence_parallel=sequence_parallel))
        for nheads_k, flash in ((4, False), (2, True), (2, False)):
            options = dict(sequence_parallel=sequence_parallel, nheads_k=nheads_k, flash=flash)
            checks.append(partial(check_mha, **options))
    for index, check in enumerate(checks):
        torch.manual_seed(seed + index)
        check(rank, group)


def test_two_processes_compute_what_one_does(tmp_path, seed):
    in_two_processes(work, tmp_path, seed)
