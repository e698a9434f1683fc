"""Launch configurations of the rotary kernel, which is bound by memory: enough bytes in flight, enough programs."""

import functools
from typing import NamedTuple

from flash_attn.hardware import Hardware
from flash_attn.launch import pinned_config


class RotaryConfig(NamedTuple):
    """Tile and launch shape of one program."""

    block_m: int  # tokens
    block_h: int  # heads, one after the other under the same cosines
    num_warps: int


def rotary_config(width: int, tokens: int, nheads: int, hardware: Hardware) -> RotaryConfig:
    """The configuration for `tokens` tokens of `nheads` heads in tiles `width` wide (a power of two)."""
    return pinned_config("rotary") or _choose(width, min(tokens, MANY), min(nheads, MANY), hardware.num_sms)


ELEMENTS_PER_THREAD = 16  # two loads of 16 bytes in fp16
ELEMENTS = 32 * 4 * ELEMENTS_PER_THREAD  # of a program of four warps
HEADS = 4
MANY = 1 << 16  # beyond this many tokens or heads every choice is the same


@functools.lru_cache(maxsize=4096)
def _choose(width: int, tokens: int, nheads: int, num_sms: int) -> RotaryConfig:
    """The largest tile, halved until every multiprocessor has a program."""
    block_m = min(ELEMENTS // width, power_of_two(tokens))
    block_h = min(HEADS, power_of_two(nheads))
    while block_h > 1 and _programs(tokens, nheads, block_m, block_h) < num_sms:
        block_h //= 2
    while block_m > 1 and _programs(tokens, nheads, block_m, block_h) < num_sms:
        block_m //= 2
    return RotaryConfig(block_m, block_h, max(1, block_m * width // (32 * ELEMENTS_PER_THREAD)))


def _programs(tokens: int, nheads: int, block_m: int, block_h: int) -> int:
    return -(-tokens // block_m) * -(-nheads // block_h)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << max(0, n - 1).bit_length()
