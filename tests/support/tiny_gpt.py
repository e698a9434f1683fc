"""A language model of two small blocks, made of the package's modules, that can generate."""

from types import SimpleNamespace

import torch

from flash_attn.modules.block import Block
from flash_attn.modules.embedding import GPT2Embeddings
from flash_attn.modules.mha import MHA
from flash_attn.utils.generation import GenerationMixin

VOCAB, DIM, NHEADS, LAYERS = 13, 32, 2, 2


class TinyGPT(torch.nn.Module, GenerationMixin):
    """Learned positions, or with rotary none but those."""

    def __init__(self, use_flash_attn=True, rotary=False, max_length=64):
        super().__init__()
        self.embeddings = GPT2Embeddings(DIM, VOCAB, 0 if rotary else max_length)
        options = dict(causal=True, use_flash_attn=use_flash_attn, rotary_emb_dim=DIM // NHEADS if rotary else 0)
        self.blocks = torch.nn.ModuleList(
            Block(DIM, lambda dim, layer=layer: MHA(dim, NHEADS, layer_idx=layer, **options)) for layer in range(LAYERS)
        )
        self.head = torch.nn.Linear(DIM, VOCAB)

    def forward(self, input_ids, position_ids=None, inference_params=None, num_last_tokens=0):
        x, residual = self.embeddings(input_ids, position_ids), None
        for block in self.blocks:
            x, residual = block(x, residual, mixer_kwargs=dict(inference_params=inference_params))
        return SimpleNamespace(logits=self.head((x + residual)[:, -num_last_tokens:]))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None, **kwargs):
        return {
            layer: block.mixer.allocate_inference_cache(batch_size, max_seqlen, dtype)
            for layer, block in enumerate(self.blocks)
        }
