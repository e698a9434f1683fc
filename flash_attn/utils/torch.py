"""torch.amp's custom_fwd and custom_bwd for CUDA: upstream's import path and meaning."""

from functools import partial

from torch import amp

custom_fwd = partial(amp.custom_fwd, device_type="cuda")
custom_bwd = partial(amp.custom_bwd, device_type="cuda")
