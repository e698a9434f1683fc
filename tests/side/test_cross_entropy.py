"""The loss against PyTorch's own in float64, feature by feature and together."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from flash_attn.losses.cross_entropy import CrossEntropyLoss
from flash_attn.ops.triton import cross_entropy as module
from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

IGNORED = -100


def problem(seed, rows, classes, dtype):
    torch.manual_seed(seed)
    logits = (3 * torch.randn(rows, classes)).to(dtype).requires_grad_()
    labels = torch.randint(classes, (rows,))
    labels[torch.rand(rows) < 0.2] = IGNORED
    return logits, labels


def truth(logits, labels, smoothing, scale, square):
    """(losses, z_losses, gradient of the weighted losses) in float64."""
    x = logits.detach().double().requires_grad_()
    losses = F.cross_entropy(scale * x, labels, label_smoothing=smoothing, reduction="none")
    z_losses = torch.where(labels == IGNORED, 0.0, square * (scale * x).logsumexp(1).square())
    losses = losses + z_losses
    return losses, z_losses, x


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("smoothing, scale, square", list(itertools.product((0.0, 0.9), (1.0, 0.7), (0.0, 0.01))))
@pytest.mark.parametrize("inplace", [False, True])
def test_losses_and_gradients_match_float64(seed, monkeypatch, dtype, smoothing, scale, square, inplace):
    monkeypatch.setattr(module, "ELEMENTS_AT_A_TIME", 200)  # several chunks of rows, the last one shorter
    logits, labels = problem(seed, 17, 53, dtype)
    weight = torch.randn(17, dtype=torch.float64)
    losses_ref, z_ref, x = truth(logits, labels, smoothing, scale, square)
    (dx,) = torch.autograd.grad(losses_ref, x, weight)
    before = logits.detach().clone()

    losses, z_losses = cross_entropy_loss(
        logits,
        labels,
        label_smoothing=smoothing,
        logit_scale=scale,
        lse_square_scale=square,
        inplace_backward=inplace,
    )
    (dlogits,) = torch.autograd.grad(losses, logits, weight.to(losses.dtype))

    assert losses.dtype == z_losses.dtype == torch.promote_types(dtype, torch.float32)
    assert not z_losses.requires_grad
    eps = torch.finfo(losses.dtype).eps
    torch.testing.assert_close(losses.double(), losses_ref, rtol=16 * eps, atol=64 * eps)
    torch.testing.assert_close(z_losses.double(), z_ref, rtol=16 * eps, atol=64 * eps)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(dlogits.double(), dx, rtol=rounding, atol=64 * eps + torch.finfo(dtype).smallest_normal)
    assert dlogits[labels == IGNORED].count_nonzero() == 0
    assert (dlogits.data_ptr() == logits.data_ptr()) == inplace
    assert inplace or torch.equal(logits, before)


def test_precomputed_lse_is_used_and_recomputed_where_it_cannot_be(seed):
    logits, labels = problem(seed, 9, 31, torch.float32)
    lse = logits.detach().logsumexp(1)
    plain = cross_entropy_loss(logits, labels)[0]
    assert torch.equal(cross_entropy_loss(logits, labels, precomputed_lse=lse)[0], plain)
    shifted = cross_entropy_loss(logits, labels, precomputed_lse=lse + 1)[0]
    torch.testing.assert_close(shifted, plain + (labels != IGNORED))
    with_scale = cross_entropy_loss(logits, labels, precomputed_lse=lse + 1, logit_scale=0.5)[0]
    assert torch.equal(with_scale, cross_entropy_loss(logits, labels, logit_scale=0.5)[0])


def test_labels_that_name_no_class_are_ignored(seed):
    logits, labels = problem(seed, 5, 7, torch.float32)
    labels[:] = torch.tensor([7, -1, 2, 1 << 40, 6])
    losses, _ = cross_entropy_loss(logits, labels, label_smoothing=0.1)
    (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    assert losses[[0, 1, 3]].count_nonzero() == 0 and dlogits[[0, 1, 3]].count_nonzero() == 0
    kept = F.cross_entropy(logits[[2, 4]], labels[[2, 4]], label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(losses[[2, 4]], kept)


def test_an_ignored_row_of_nan_leaves_no_trace(seed):
    logits, labels = problem(seed, 4, 6, torch.float32)
    labels[:] = torch.tensor([1, IGNORED, 2, 3])
    with torch.no_grad():
        logits[1] = torch.nan
    losses, z_losses = cross_entropy_loss(logits, labels, lse_square_scale=0.1)
    (dlogits,) = torch.autograd.grad(losses.sum(), logits)
    assert losses.isfinite().all() and z_losses.isfinite().all() and dlogits.isfinite().all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("return_z_loss", [False, True])
def test_module_reduces_as_pytorch_does(seed, reduction, return_z_loss):
    logits, labels = problem(seed, 13, 29, torch.float32)
    criterion = CrossEntropyLoss(
        reduction=reduction, label_smoothing=0.1, lse_square_scale=0.01, return_z_loss=return_z_loss
    )
    result = criterion(logits, labels)
    plain = F.cross_entropy(logits, labels, label_smoothing=0.1, reduction=reduction)
    z = torch.where(labels == IGNORED, 0.0, 0.01 * logits.logsumexp(1).square())
    z = {"mean": z.sum() / (labels != IGNORED).sum(), "sum": z.sum(), "none": z}[reduction]
    if return_z_loss:
        torch.testing.assert_close(result[1], z.detach())
        result = result[0]
    torch.testing.assert_close(result, plain + z)


def test_non_contiguous_logits_and_int32_labels(seed):
    logits, labels = problem(seed, 9, 40, torch.float32)
    expected = cross_entropy_loss(logits, labels)[0]
    strided = logits.detach().t().contiguous().t()
    torch.testing.assert_close(cross_entropy_loss(strided, labels.int())[0], expected)


def test_backward_keeps_no_wider_copy_of_the_logits(seed):
    logits, labels = problem(seed, 8, 64, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cross_entropy_loss(logits, labels, label_smoothing=0.1)
    assert [x.shape for x in saved if x.numel() > 8] == [logits.shape]
    assert saved[0].data_ptr() == logits.data_ptr()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(labels=torch.zeros(3, dtype=torch.long)), r"labels must have shape \(batch,\) = \(4,\), got \(3,\)"),
        (dict(labels=torch.zeros(4)), "int64 or int32, got torch.float32"),
        (dict(logits=torch.zeros(4, 5, 6)), r"\(4, 5, 6\)"),
        (dict(logits=torch.zeros(4, 5, dtype=torch.long)), "int64"),
        (dict(precomputed_lse=torch.zeros(5)), r"precomputed_lse must have shape \(batch,\) = \(4,\), got \(5,\)"),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = dict(logits=torch.zeros(4, 5), labels=torch.zeros(4, dtype=torch.long)) | change
    with pytest.raises(ValueError, match=words):
        cross_entropy_loss(**arguments)


def test_unknown_reduction_is_named():
    with pytest.raises(ValueError, match="'median'"):
        CrossEntropyLoss(reduction="median")
