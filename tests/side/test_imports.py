"""What clients import from here exists, and importing all of it is light."""

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# What a client of upstream 2.8.3 may import from each module; docs/modules.md is checked against it.
NAMES = {
    "losses.cross_entropy": "CrossEntropyLoss",
    "ops.triton.cross_entropy": "CrossEntropyLoss cross_entropy_loss",
    "ops.triton.layer_norm": (
        "LayerNormFn LayerNormLinearFn RMSNorm layer_norm_fn layer_norm_linear_fn layer_norm_ref rms_norm_fn rms_norm_ref"
    ),
    "ops.triton.k_activations": (
        "cosh gelu gelu_approx gelu_approx_grad gelu_grad leaky_relu leaky_relu_grad relu relu_grad squared_relu "
        "squared_relu_grad tanh"
    ),
    "ops.triton.linear": "triton_dgrad_act triton_linear_act",
    "ops.triton.mlp": "FusedDenseSqreluDense FusedDenseSqreluDenseFunc fused_dense_sqrelu_dense_function",
    "ops.activations": (
        "bias_gelu bias_gelu_back bias_gelu_impl fast_gelu_impl gelu_bwd gelu_fwd relu_bwd sqrelu_bwd sqrelu_fwd swiglu "
        "swiglu_bwd swiglu_fwd"
    ),
    "ops.fused_dense": (
        "ColumnParallelLinear FusedDense FusedDenseFunc FusedMLP FusedMLPFunc ParallelFusedMLP RowParallelLinear "
        "fused_dense_func fused_mlp_func"
    ),
    "ops.layer_norm": (
        "DropoutAddLayerNorm DropoutAddLayerNormFn DropoutAddLayerNormParallelResidualFn DropoutAddLayerNormSubsetFn "
        "dropout_add_layer_norm dropout_add_layer_norm_parallel_residual dropout_add_layer_norm_subset layer_norm"
    ),
    "ops.rms_norm": (
        "DropoutAddRMSNorm RMSNorm dropout_add_rms_norm dropout_add_rms_norm_parallel_residual dropout_add_rms_norm_subset "
        "rms_norm"
    ),
    "modules.mha": (
        "CrossAttention FlashCrossAttention FlashSelfAttention LinearResidual MHA ParallelMHA SelfAttention "
        "_update_kv_cache flash_attn_with_kvcache get_alibi_slopes"
    ),
    "modules.mlp": "FusedMLP GatedMlp Mlp ParallelFusedMLP ParallelGatedMlp ParallelMLP",
    "modules.block": "Block ParallelBlock",
    "modules.embedding": (
        "BertEmbeddings ColumnParallelEmbedding GPT2Embeddings ParallelGPT2Embeddings VocabParallelEmbedding"
    ),
    "layers.patch_embed": "PatchEmbed",
    "models.gpt": (
        "GPTLMHeadModel GPTModel GPTPreTrainedModel combine_state_dicts_tp create_block create_mixer_cls create_mlp_cls "
        "remap_state_dict_hf_gpt2 remap_state_dict_megatron shard_state_dict_tp"
    ),
    "models.llama": (
        "config_from_checkpoint config_from_hf_checkpoint config_from_meta_checkpoint inv_remap_state_dict_hf_llama "
        "llama_config_to_gpt2_config remap_state_dict_hf_llama remap_state_dict_meta_llama state_dicts_from_checkpoint"
    ),
    "models.gpt_neox": "gpt_neox_config_to_gpt2_config remap_state_dict_hf_gpt_neox",
    "models.gptj": "gptj_config_to_gpt2_config remap_state_dict_hf_gptj",
    "models.opt": "opt_config_to_gpt2_config remap_state_dict_hf_opt",
    "models.falcon": "falcon_config_to_gpt2_config remap_state_dict_hf_falcon",
    "models.bigcode": "bigcode_config_to_gpt2_config inv_remap_state_dict_hf_bigcode remap_state_dict_hf_bigcode",
    "models.baichuan": "baichuan_config_to_gpt2_config remap_state_dict_hf_baichuan",
    "models.btlm": "btlm_config_to_gpt2_config remap_state_dict_hf_btlm",
    "models.bert": (
        "BertEncoder BertForPreTraining BertLMPredictionHead BertModel BertPooler BertPreTrainedModel BertPreTrainingHeads "
        "BertPredictionHeadTransform create_block create_mixer_cls create_mlp_cls inv_remap_state_dict remap_state_dict"
    ),
    "models.vit": (
        "VisionTransformer create_block create_mixer_cls create_mlp_cls init_weights_vit_timm vit_base_patch16_224"
    ),
    "utils.benchmark": (
        "benchmark_all benchmark_backward benchmark_combined benchmark_forward benchmark_fwd_bwd benchmark_memory "
        "pytorch_profiler"
    ),
    "utils.distributed": (
        "all_gather all_gather_raw all_reduce all_reduce_raw allreduce_sequence_parallel_grad get_dim_for_local_rank "
        "reduce_scatter reduce_scatter_raw sync_shared_params"
    ),
    "utils.generation": (
        "DecodingCGCache GenerationMixin InferenceParams allocate_inference_cache capture_graph decode decode_speculative "
        "modify_logits_for_top_k_filtering modify_logits_for_top_p_filtering sample sample_speculative update_graph_cache"
    ),
    "utils.library": "triton_op",
    "utils.pretrained": "state_dict_from_pretrained",
    "utils.testing": "attention_ref construct_chunk_mask construct_local_mask generate_qkv generate_random_padding_mask",
    "utils.torch": "custom_bwd custom_fwd",
    "flash_attn_triton": (
        "FlashAttnFunc FlashAttnKVPackedFunc FlashAttnQKVPackedFunc flash_attn_func flash_attn_kvpacked_func "
        "flash_attn_qkvpacked_func"
    ),
}


@pytest.mark.parametrize("module", NAMES)
def test_names_exist(module):
    loaded = import_module(f"flash_attn.{module}")
    assert [name for name in NAMES[module].split() if not hasattr(loaded, name)] == []


@pytest.mark.parametrize("module", NAMES)
def test_the_document_lists_them(module):
    rows = [
        line for line in (ROOT / "docs/modules.md").read_text().splitlines() if f"| `flash_attn.{module}` |" in line
    ]
    assert len(rows) == 1
    assert [name for name in NAMES[module].split() if f"`{name}`" not in rows[0]] == []


OPTIONAL = {"triton", "transformers", "safetensors", "sentencepiece", "timm", "flag_gems", "liger_kernel"}


def modules_after(imports):
    """The names in sys.modules of a process that has done nothing else."""
    code = f"import sys; {imports}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_all_of_it_is_light():
    assert modules_after("; ".join(f"import flash_attn.{module}" for module in NAMES)) & OPTIONAL == set()


def test_importing_the_package_loads_none_of_the_models():
    loaded = modules_after("import flash_attn")
    assert "flash_attn" in loaded and not [name for name in loaded if name.startswith("flash_attn.models")]


@pytest.mark.parametrize(
    "module, name, function",
    [
        ("ops.triton.layer_norm", "LayerNormFn", "layer_norm_fn"),
        ("ops.triton.layer_norm", "LayerNormLinearFn", "layer_norm_linear_fn"),
        ("ops.triton.mlp", "FusedDenseSqreluDenseFunc", "fused_dense_sqrelu_dense_function"),
        ("ops.fused_dense", "FusedDenseFunc", "fused_dense_func"),
        ("flash_attn_triton", "FlashAttnFunc", "flash_attn_func"),
        ("flash_attn_triton", "FlashAttnQKVPackedFunc", "flash_attn_qkvpacked_func"),
        ("flash_attn_triton", "FlashAttnKVPackedFunc", "flash_attn_kvpacked_func"),
    ],
)
def test_functions_answer_to_the_names_of_upstreams_autograd_functions(module, name, function):
    loaded = import_module(f"flash_attn.{module}")
    assert getattr(loaded, name).apply is getattr(loaded, function)
