"""Runs the Hopper kernels on the CPU: their own Python, with tensors for registers and threads for partitions.

with interpreted(num_programs=3, seed=seed):
    out = hopper.forward(problem, operands).out

One partition runs at a time. Where it waits, another one or a copy that is under way goes on, in an order drawn from the seed;
if none can, the kernel would hang on a GPU and `Deadlock` is raised. Copies land, leave and products read at the latest moment
that the kernel allows, and shared memory is NaN before, so that a slot which is reused too early shows in the results. Every
address outside its allocation raises. Layouts mean nothing here, nor do registers and the order of sums.
"""

import contextlib
import importlib
import pkgutil
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from triton.runtime.jit import JITCallable

from flash_attn import dispatch, hardware, kernels, random_bits
from flash_attn.backends import hopper
from flash_attn.backends.launcher import Launcher
from flash_attn.hardware import Hardware

SHARED_MEMORY = 227 * 1024


class Deadlock(AssertionError):
    """Every partition waits for another one."""


class Layout:
    """Any layout: all are the same to a tensor that lies in no registers."""

    def __getattr__(self, name: str) -> "Layout":
        return self

    def __call__(self, *_: Any, **__: Any) -> "Layout":
        return self


LAYOUT = Layout()


class Tile(torch.Tensor):
    """A tensor in registers."""

    type = SimpleNamespace(layout=LAYOUT)  # type: ignore[assignment]

    def to(self, dtype: torch.dtype) -> Any:
        return word(self) if dtype == torch.uint32 else super().to(dtype)


class Word(Tile):
    """Unsigned numbers of 32 bits, in 64."""

    def __add__(self, other: Any) -> "Word":
        return word(super().__add__(other))

    def __mul__(self, other: Any) -> "Word":
        return word(super().__mul__(other))

    def __lshift__(self, other: Any) -> "Word":
        return word(super().__lshift__(other))


def word(x: Any) -> Word:
    return (torch.as_tensor(x).as_subclass(torch.Tensor).long() & random_bits.MASK).as_subclass(Word)


def in_memory(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.uint32 else dtype


def philox(seed: int, *counter: Any) -> tuple[Word, ...]:
    numbers = [word(x).as_subclass(torch.Tensor) for x in (*counter, seed, seed >> 32)]
    return tuple(map(word, random_bits.philox_4x32(tuple(numbers[:4]), tuple(numbers[4:]))))  # type: ignore[arg-type]


def tile(x: torch.Tensor) -> Any:
    """A tensor as the kernels see it; whole numbers without dimensions are plain ones."""
    if x.dim() == 0 and not x.dtype.is_floating_point:
        return x.item()
    return x.as_subclass(Tile)


class Pointer:
    """An address, or a tensor of addresses, in the memory of one tensor."""

    def __init__(self, memory: torch.Tensor, offset: Any = 0) -> None:
        self.memory = memory
        self.offset = offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, elements: Any) -> "Pointer":
        return Pointer(self.memory, self.offset + elements)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(offsets, which of them are accessed)."""
        offsets = torch.as_tensor(self.offset).as_subclass(torch.Tensor)
        inside = torch.ones_like(offsets, dtype=torch.bool) if mask is None else torch.as_tensor(mask)
        offsets, inside = torch.broadcast_tensors(offsets, inside.as_subclass(torch.Tensor))
        accessed = offsets[inside]
        if accessed.numel() and (accessed.min() < 0 or accessed.max() >= self.memory.numel()):
            raise IndexError(f"elements {accessed.min()} to {accessed.max()} of {self.memory.numel()}")
        return offsets, inside


def pointer_to(x: torch.Tensor) -> Pointer:
    memory = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    return Pointer(memory, x.storage_offset())


def load(pointer: Pointer, mask: Any = None, other: Any = 0) -> Any:
    offsets, inside = pointer.places(mask)
    values = pointer.memory[torch.where(inside, offsets, 0)]
    return tile(torch.where(inside, values, torch.as_tensor(other, dtype=values.dtype)))


def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
    offsets, inside = pointer.places(mask)
    values = torch.as_tensor(value, dtype=pointer.memory.dtype).as_subclass(torch.Tensor).expand(offsets.shape)
    pointer.memory[offsets[inside]] = values[inside]


def atomic(combine: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def change(pointer: Pointer, value: Any, sem: str = "") -> Any:
        machine().pause()
        old = load(pointer)
        store(pointer, combine(old, value))
        return old

    return change


class Shared:
    """A tensor in shared memory, or a view of one."""

    layout = LAYOUT

    def __init__(self, memory: torch.Tensor) -> None:
        self.memory = memory
        self.dtype, self.shape = memory.dtype, memory.shape

    def index(self, i: int) -> "Shared":
        assert 0 <= i < len(self.memory), f"slot {i} of {len(self.memory)}"
        return Shared(self.memory[i])

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        return Shared(self.memory.narrow(dim, start, length))

    def permute(self, order: Sequence[int]) -> "Shared":
        return Shared(self.memory.permute(*order))

    def reshape(self, shape: Sequence[int]) -> "Shared":
        return Shared(self.memory.view(*shape))

    def boxes(self, shape: Sequence[int]) -> "Boxes":
        """A swizzled tile as so many boxes: groups of columns, each row by row."""
        count, *_, rows, _one, columns = shape
        groups = self.memory.split(columns, -1)
        boxes = [Shared(part) for group in groups for part in group.split(rows, -3)]
        assert len(boxes) == count
        return Boxes(boxes)

    def load(self, layout: Layout) -> Any:
        return self.memory.clone().as_subclass(Tile)

    def store(self, value: torch.Tensor) -> None:
        self.memory.copy_(value)


class Boxes:
    """Parts of a tile."""

    def __init__(self, boxes: list[Shared]) -> None:
        self.boxes = boxes

    def index(self, i: int) -> Shared:
        assert 0 <= i < len(self.boxes), f"box {i} of {len(self.boxes)}"
        return self.boxes[i]


class Barrier:
    """An mbarrier: a phase ends when as many have arrived as it was made for, and no announced byte is missing."""

    def __init__(self) -> None:
        self.count = self.missing = self.bytes = self.phases = 0

    def arrive(self) -> None:
        assert self.missing > 0, "more arrivals than the barrier waits for"
        self.missing -= 1
        self.end_phase()

    def end_phase(self) -> None:
        if self.missing == 0 and self.bytes == 0:
            self.phases += 1
            self.missing = self.count

    def passed(self, parity: int) -> bool:
        return self.phases % 2 != parity


class Barriers:
    def __init__(self, count: int) -> None:
        self.barriers = [Barrier() for _ in range(count)]

    def index(self, i: int) -> Barrier:
        assert 0 <= i < len(self.barriers), f"barrier {i} of {len(self.barriers)}"
        return self.barriers[i]


class Descriptor:
    """A tensor map."""

    layout = LAYOUT

    def __init__(self, host: Any) -> None:
        self.pointer = pointer_to(host.base)
        self.shape, self.strides = host.shape, host.strides
        self.dtype = host.base.dtype
        nbytes = self.dtype.itemsize * torch.Size(host.block_shape).numel()
        self.block_type = SimpleNamespace(shape=list(host.block_shape), nbytes=nbytes)

    def box(self, coordinates: Sequence[int]) -> tuple[Pointer, torch.Tensor]:
        """(addresses of a box, which of them lie in the tensor); addresses wrap as 64-bit numbers do."""
        offsets, inside = torch.zeros((), dtype=torch.int64), torch.ones((), dtype=torch.bool)
        for first, count, size, stride in zip(
            coordinates, self.block_type.shape, self.shape, self.strides, strict=True
        ):
            places = first + torch.arange(count)
            offsets = offsets[..., None] + places * stride
            inside = inside[..., None] & (places >= 0) & (places < size)
        return self.pointer + offsets, inside


class Product:
    """A tensor-core product that was issued; its operands are read when it is computed."""

    type = SimpleNamespace(layout=LAYOUT)

    def __init__(self, left: Any, right: Shared, acc: Any) -> None:
        self.left, self.right, self.acc = left, right, acc
        self.value: Any = None

    def compute(self) -> None:
        left = self.left.memory if isinstance(self.left, Shared) else self.left.as_subclass(torch.Tensor)
        acc = self.acc.value if isinstance(self.acc, Product) else self.acc
        self.value = acc + (left.float() @ self.right.memory.float()).as_subclass(Tile)


class Partition:
    """One thread of the interpreter, which stands for all threads of a partition."""

    def __init__(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        self.function, self.arguments = function, arguments
        self.ready: Callable[[], bool] = lambda: True
        self.go = threading.Semaphore(0)
        self.products: list[Product] = []
        self.stores: list[Callable[[], None]] = []


class Machine:
    """One program on one multiprocessor."""

    def __init__(self, program: int, num_programs: int, order: random.Random) -> None:
        self.program, self.num_programs, self.order = program, num_programs, order
        self.copies: list[Callable[[], None]] = []
        self.turns: dict[int, int] = {}
        self.shared_memory = 0
        self.running: list[Partition] = []
        self.present: Partition | None = None
        self.failure: BaseException | None = None
        self.done = threading.Semaphore(0)

    def specialize(self, partitions: Sequence[tuple[Any, Sequence[Any]]], _warps: Any, _registers: Any) -> None:
        self.running = [Partition(function, arguments) for function, arguments in partitions]
        threads = [threading.Thread(target=self.work, args=(each,)) for each in self.running]
        for thread in threads:
            thread.start()
        self.hand_over()
        self.done.acquire()
        for thread in threads:
            thread.join()
        if self.failure is not None:
            raise self.failure
        while self.copies:
            self.copies.pop()()

    def work(self, partition: Partition) -> None:
        partition.go.acquire()
        try:
            if self.failure is None:
                partition.function(*partition.arguments)
                self.wait_for_stores(0)
        except BaseException as failure:  # noqa: BLE001, raised again by the thread that started this one
            self.failure = self.failure or failure
        self.running.remove(partition)
        self.hand_over()

    def hand_over(self) -> None:
        """Let whoever can go on do so."""
        if self.failure is not None:
            for partition in self.running:
                partition.go.release()
            if not self.running:
                self.done.release()
            return
        if not self.running:
            self.done.release()
            return
        while True:
            if self.copies and self.order.random() < 0.3:
                self.copies.pop(self.order.randrange(len(self.copies)))()
            ready = [partition for partition in self.running if partition.ready()]
            if ready:
                self.present = self.order.choice(ready)
                self.present.go.release()
                return
            if not self.copies:
                self.failure = Deadlock("every partition waits")
                return self.hand_over()
            self.copies.pop(self.order.randrange(len(self.copies)))()

    def pause(self, until: Callable[[], bool] = lambda: True) -> None:
        """Let others go on, at least until a condition holds."""
        me = self.present
        if me is None:
            return
        me.ready = until
        self.hand_over()
        me.go.acquire()
        if self.failure is not None:
            raise Deadlock("another partition failed")
        me.ready = lambda: True

    def wait_for_stores(self, pending: int) -> None:
        assert self.present is not None
        while len(self.present.stores) > pending:
            self.present.stores.pop(0)()

    def multiply(self, left: Any, right: Shared, acc: Any, use_acc: bool = True, is_async: bool = False) -> Product:
        assert self.present is not None and is_async
        zeros = torch.zeros(left_shape(left)[0], right.memory.shape[1]).as_subclass(Tile)
        self.present.products.append(Product(left, right, acc if use_acc else zeros))
        return self.present.products[-1]

    def await_products(self, pending: int, deps: Sequence[Any]) -> Any:
        assert self.present is not None
        self.pause()
        while len(self.present.products) > pending:
            self.present.products.pop(0).compute()
        found = [x.value if isinstance(x, Product) and x.value is not None else x for x in deps]
        return found[0] if len(found) == 1 else tuple(found)

    def allocate(self, dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        if layout == "barriers":
            return Barriers(shape[0])
        filling = float("nan") if dtype.is_floating_point else -(2**30)
        memory = torch.full(tuple(shape), filling, dtype=in_memory(dtype))
        self.shared_memory += memory.numel() * memory.itemsize
        assert self.shared_memory <= SHARED_MEMORY
        return Shared(memory)

    def start_load(self, descriptor: Descriptor, coordinates: Sequence[int], barrier: Barrier, buffer: Shared) -> None:
        buffer.memory.fill_(float("nan"))
        assert buffer.memory.shape == torch.Size(descriptor.block_type.shape)

        def land() -> None:
            pointer, inside = descriptor.box(coordinates)
            buffer.memory.copy_(load(pointer, inside))
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.end_phase()

        self.copies.append(land)

    def start_store(self, descriptor: Descriptor, coordinates: Sequence[int], buffer: Shared) -> None:
        assert self.present is not None

        def leave() -> None:
            pointer, inside = descriptor.box(coordinates)
            store(pointer, buffer.memory, inside)

        self.present.stores.append(leave)

    def await_turn(self, barrier: int, _threads: int) -> None:
        self.pause(lambda: self.turns.get(barrier, 0) > 0)
        self.turns[barrier] -= 1

    def give_turn(self, barrier: int, _threads: int) -> None:
        self.turns[barrier] = self.turns.get(barrier, 0) + 1
        assert self.turns[barrier] == 1, "a turn was given twice"


def left_shape(x: Any) -> torch.Size:
    return x.memory.shape if isinstance(x, Shared) else x.shape


_machine: Machine | None = None


def machine() -> Machine:
    assert _machine is not None
    return _machine


def wait(barrier: Barrier, phase: int, pred: Any = True) -> None:
    if pred:
        machine().pause(lambda: barrier.passed(phase))


def arrive(barrier: Barrier, count: int = 1, pred: Any = True) -> None:
    if pred:
        assert count == 1
        barrier.arrive()
        machine().pause()


def expect(barrier: Barrier, nbytes: int) -> None:
    barrier.bytes += nbytes
    barrier.arrive()


def initialise(barrier: Barrier, count: int) -> None:
    barrier.count = barrier.missing = count


def elementwise(scalars: Callable[..., Any], tensors: Callable[..., Any]) -> Callable[..., Any]:
    """A function of numbers or tiles."""

    def apply(*operands: Any) -> Any:
        if not any(isinstance(x, torch.Tensor) for x in operands):
            return scalars(*operands)
        kind = next(x.dtype for x in reversed(operands) if isinstance(x, torch.Tensor))
        return tile(tensors(*[x if isinstance(x, torch.Tensor) else torch.tensor(x, dtype=kind) for x in operands]))

    return apply


def where(condition: Any, yes: Any, no: Any) -> Any:
    if not isinstance(condition, torch.Tensor):
        return yes if condition else no
    chosen = torch.where(condition, yes, no)
    return word(chosen) if isinstance(yes, Word) else tile(chosen)


def cast(x: Any, dtype: torch.dtype) -> Any:
    if dtype == torch.uint32:
        return word(x)
    if isinstance(x, torch.Tensor):
        return tile(x.to(dtype))
    return float(x) if dtype.is_floating_point else int(x)


def language() -> SimpleNamespace:
    """What the kernels know as `gl` and `tl`."""
    dtypes = {name: getattr(torch, name) for name in ("float32", "int32", "int64", "uint32")}
    layouts = ("SliceLayout", "BlockedLayout", "DotOperandLayout", "SwizzledSharedLayout", "NVMMASharedLayout",
               "NVMMADistributedLayout", "DistributedLinearLayout")  # fmt: skip
    return SimpleNamespace(
        **dtypes,
        **dict.fromkeys(layouts, LAYOUT),
        constexpr=lambda value: value,
        static_range=range,
        static_assert=assert_,
        assume=assert_,
        program_id=lambda axis: machine().program,
        num_programs=lambda axis: machine().num_programs,
        num_warps=lambda: 4,
        warp_specialize=lambda *arguments: machine().specialize(*arguments),
        allocate_shared_memory=lambda *arguments: machine().allocate(*arguments),
        load=load,
        store=store,
        atomic_add=atomic(lambda old, value: old + value),
        atomic_max=atomic(max),
        zeros=lambda shape, dtype, layout=None: tile(torch.zeros(shape, dtype=dtype)),
        full=lambda shape, value, dtype, layout=None: tile(torch.full(shape, value, dtype=in_memory(dtype))),
        arange=lambda start, end, layout=None: tile(torch.arange(start, end)),
        convert_layout=lambda x, layout: x,
        expand_dims=lambda x, axis: x.unsqueeze(axis),
        where=where,
        cast=cast,
        philox=philox,
        cdiv=lambda x, y: -(-x // y),
        minimum=elementwise(min, torch.minimum),
        maximum=elementwise(max, torch.maximum),
        abs=torch.abs,
        sum=lambda x, axis: tile(x.sum(axis)),
        max=lambda x, axis: tile(x.amax(axis)),
        math=SimpleNamespace(exp2=elementwise(lambda x: 2.0**x, torch.exp2), log2=torch.log2),
    )


def assert_(condition: Any) -> None:
    assert condition


def plain(value: Any) -> Any:
    """A module's global as the interpreter wants it."""
    if isinstance(value, JITCallable) or type(value).__name__ in ("ConstexprFunction", "InterpretedFunction"):
        return value.fn
    return value.value if type(value).__name__ == "constexpr" else value


def replacements() -> Iterator[tuple[Any, dict[str, Any]]]:
    """(module, its globals that differ) of the kernels and of what they are built from."""
    gl = language()
    barriers = SimpleNamespace(
        wait=wait, arrive=arrive, expect=expect, init=initialise, MBarrierLayout=lambda: "barriers"
    )
    names = {
        "gl": gl,
        "tl": gl,
        "mbarrier": barriers,
        "tma": SimpleNamespace(store_wait=lambda pending: machine().wait_for_stores(pending)),
        "warpgroup_mma": lambda *operands, **words: machine().multiply(*operands, **words),
        "warpgroup_mma_wait": lambda pending, deps: machine().await_products(pending, deps),
        "fence_async_shared": lambda: None,
        "start_load": lambda *arguments: machine().start_load(*arguments),
        "reinterpret": lambda buffer, _dtype, shape, _layout: buffer.boxes(shape),
        "start_store": lambda *arguments: machine().start_store(*arguments),
        "await_turn": lambda *arguments: machine().await_turn(*arguments),
        "give_turn": lambda *arguments: machine().give_turn(*arguments),
        "speaks_ptx": lambda: False,
    }
    for module in modules("hopper") + modules("algebra"):
        changed = {name: names.get(name, plain(value)) for name, value in vars(module).items()}
        yield module, {name: value for name, value in changed.items() if value is not vars(module)[name]}


def modules(package: str) -> list[Any]:
    prefix = f"{kernels.__name__}.{package}"
    found = pkgutil.iter_modules(importlib.import_module(prefix).__path__, f"{prefix}.")
    return [importlib.import_module(each.name) for each in found]


def argument(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return pointer_to(x)
    if type(x) is tuple:
        return tuple(map(argument, x))
    return Descriptor(x) if type(x).__name__ == "TensorDescriptor" else x


@contextlib.contextmanager
def interpreted(num_programs: int, seed: int) -> Iterator[None]:
    """Inside the block the Hopper backend takes tensors on the CPU; `num_programs` stands for the multiprocessors."""
    order = random.Random(seed)

    def launch(launcher: Launcher, *tensors: Any, numbers: tuple[int, ...] = ()) -> None:
        global _machine
        arguments = [argument(x) for x in launcher.build(tensors)]
        for i, kind in enumerate(launcher.kinds):
            if kind is not None and arguments[i] is not None:
                arguments[i] = kind(*arguments[i])
        for program in range(launcher.num_programs):
            _machine = Machine(program, launcher.num_programs, order)
            plain(launcher.kernel)(*arguments, *numbers, **launcher.constants)
        _machine = None

    here = Hardware("cuda", "sm_90", num_programs, SHARED_MEMORY)
    modules("portable")  # one that is loaded inside the block would keep what is replaced there
    replaced = list(replacements())
    with contextlib.ExitStack() as stack:
        for module, changed in replaced:
            stack.enter_context(mock.patch.multiple(module, **changed) if changed else contextlib.nullcontext())
        stack.enter_context(mock.patch.object(hardware, "of", lambda device: here))
        stack.enter_context(mock.patch.object(dispatch, "_plans", {}))
        stack.enter_context(mock.patch.object(hopper, "tile_counter", lambda device: torch.zeros(2, dtype=torch.int32)))
        stack.enter_context(mock.patch.object(Launcher, "__call__", launch))
        yield
