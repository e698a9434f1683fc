"""Speed, host time and memory of flash_attn beside other implementations of attention, measured in one run."""
