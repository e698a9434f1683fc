"""A function in two processes on the CPU, a group of gloo between them."""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def _in_group(rank: int, work: Callable[..., None], rendezvous: Path, arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD)
    work(rank, *arguments)
    dist.destroy_process_group()


def in_two_processes(work: Callable[..., None], folder: Path, *arguments: object) -> None:
    """work(rank, *arguments) for the ranks 0 and 1; folder is where they meet.

    A child of the fork server ends without the interpreter's finalization, as one that is spawned does not. In that a
    thread of gloo that still holds the last collective's tensor cannot take the interpreter's lock to give it back and
    ends by pthread_exit, whose unwinding through C++ aborts the process (torch 2.13 on a busy machine, one run in
    hundreds).
    """
    rendezvous = folder / "rendezvous"
    mp.start_processes(_in_group, (work, rendezvous, arguments), nprocs=WORLD, start_method="forkserver")
