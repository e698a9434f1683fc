"""GPTLMHeadModel split over two processes against the whole one."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from flash_attn.errors import InvalidArgument, UnsupportedProblem
from flash_attn.models.gpt import GPTLMHeadModel, shard_state_dict_tp
from flash_attn.models.gpt2_checkpoints import GPT2_NAMES
from flash_attn.models.state_dict import change, inverse, rename
from flash_attn.utils.distributed import allreduce_sequence_parallel_grad
from tests.models import plain
from tests.models.plain import VOCABULARY, gpt_config
from tests.support.processes import WORLD, in_two_processes

MODELS = {
    "gpt-2": dict(max_position_embeddings=12),
    "norms behind": dict(max_position_embeddings=12, prenorm=False, activation_function="relu"),
    "gates, uneven groups of heads, rotary, head of its own": dict(
        num_attention_heads=6,
        n_head_kv=3,
        activation_function="swiglu",
        n_inner=11,
        rms_norm=True,
        rotary_emb_fraction=1.0,
        tie_word_embeddings=False,
        lm_head_bias=True,
        norm_head=True,
    ),
    "side by side, fused, ALiBi": dict(
        parallel_block=True,
        fused_mlp=True,
        fused_bias_fc=True,
        fused_dropout_add_ln=True,
        use_flash_attn=True,
        use_alibi=True,
    ),
}


def check(rank, group, fields, sequence_parallel, seed):
    config = gpt_config(**fields, sequence_parallel=sequence_parallel)
    whole = GPTLMHeadModel(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    state_dict = plain.state_dict_like(shapes, seed)
    if getattr(config, "tie_word_embeddings", True):
        state_dict["lm_head.weight"] = state_dict["transformer.embeddings.word_embeddings.weight"]
    plain.loaded(whole, state_dict)
    split = plain.loaded(
        GPTLMHeadModel(config, process_group=group), shard_state_dict_tp(state_dict, config, WORLD, rank)
    )

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCABULARY, (2, 7), generator=generator)
    truth, logits = whole(ids).logits, split(ids).logits
    weights = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    mine, my_weights = (x.chunk(WORLD, -1)[rank] for x in (truth, weights))
    if sequence_parallel:
        mine, my_weights = mine.flatten(0, 1), my_weights.flatten(0, 1)
    plain.same(logits, mine)

    (truth * weights).sum().backward()
    (logits * my_weights).sum().backward()
    if sequence_parallel:
        allreduce_sequence_parallel_grad(split, group)
    gradients = {name: x.grad for name, x in whole.named_parameters(remove_duplicate=False)}
    expected = shard_state_dict_tp(gradients, config, WORLD, rank)
    actual = {name: x.grad for name, x in split.named_parameters(remove_duplicate=False)}
    assert actual.keys() == expected.keys()
    for name in expected:
        plain.same(actual[name], expected[name])

    prompt = ids[:, :4]
    if sequence_parallel:
        with pytest.raises(InvalidArgument, match="not supported in a generation"):
            split.generate(prompt, 6)
        return
    output = split.generate(prompt, 9, return_dict_in_generate=True, output_scores=True)
    expected_output = whole.generate(prompt, 9, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.sequences, expected_output.sequences)
    plain.same(torch.stack(output.scores), torch.stack(expected_output.scores))


def check_from_pretrained(rank, group, seed):
    """Every rank reads its part of a checkpoint of GPT-2 in the working directory."""
    config = gpt_config(max_position_embeddings=12, sequence_parallel=False)
    shapes = {name: tuple(tensor.shape) for name, tensor in GPTLMHeadModel(config).state_dict().items()}
    state_dict = plain.state_dict_like(shapes, seed)
    state_dict["lm_head.weight"] = state_dict["transformer.embeddings.word_embeddings.weight"]
    checkpoint = rename(state_dict, inverse(GPT2_NAMES), ("lm_head.",))
    for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
        change(checkpoint, f"h.#.{name}.weight", torch.Tensor.t)
    if rank == 0:
        Path("gpt2-tiny").mkdir()
        torch.save(checkpoint, "gpt2-tiny/pytorch_model.bin")
    dist.barrier(group)
    options = dict(process_group=group, dtype=torch.float64, world_size=WORLD, rank=rank)
    model = GPTLMHeadModel.from_pretrained("gpt2-tiny", config, **options)
    expected = shard_state_dict_tp(state_dict, config, WORLD, rank)
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def check_refusals(group):
    squared = dict(activation_function="sqrelu", fused_dense_sqrelu_dense=True)
    for fields in (dict(word_embed_proj_dim=8), dict(attn_dwconv=True), squared):
        with pytest.raises(UnsupportedProblem):
            GPTLMHeadModel(gpt_config(**fields), process_group=group)


def work(rank, folder, seed):
    os.chdir(folder)
    group = dist.group.WORLD
    for index, fields in enumerate(MODELS.values()):
        for sequence_parallel in (True, False):
            torch.manual_seed(seed + index)
            check(rank, group, fields, sequence_parallel, seed + index)
    check_from_pretrained(rank, group, seed)
    check_refusals(group)


def test_two_processes_compute_what_one_does(tmp_path, seed):
    in_two_processes(work, tmp_path, tmp_path, seed)
