"""What a compiled program moves, read from its text: how often each part runs, bytes of memory, bytes between devices.

XLA's own count (`compiled.cost_analysis()`) takes the body of a loop once. Here a loop counts as often as it turns.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Bytes of an element; packed halves of a byte count as one.
SIZES = {"pred": 1, "bf16": 2, "token": 0}
# What moves nothing by itself: names for parts of other values, the ends of what has begun, and control.
FREE = (
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "after-all",
    "custom-call",
)
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)|branch_computations=\{(.*?)\}"
)


class Instruction(NamedTuple):
    """A line of a computation. rest: what stands behind the operands. root: whether it is the computation's result."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    argument: str
    rest: str
    root: bool


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A program: its computations by name, and the name of the one where it begins."""

    computations: Mapping[str, Computation]
    entry: str


class Collective(NamedTuple):
    """An exchange between devices. sent: bytes that each device sends (ring). group: devices. times: a program runs it.

    between: whether devices of different slices take part.
    """

    kind: str
    sent: float
    group: int
    times: int
    between: bool


def parse(text: str) -> Module:
    """The module that a compiled program prints."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
            entry = name if line.startswith("ENTRY") else entry
            current = computations.setdefault(name, {})
        elif current is not None and (found := re.match(r"\s+(ROOT )?%([\w.-]+) = ", line)):
            instruction = _instruction(found[2], line[found.end() :], bool(found[1]))
            current[instruction.name] = instruction
    return Module(computations, entry)


def _instruction(name: str, text: str, root: bool) -> Instruction:
    op = re.search(r"(?:^| )([a-z][a-z\d-]*)\(", text)
    end = depth = 0
    for end in range(op.end() - 1, len(text)):
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        if not depth:
            break
    inside = text[op.end() : end]
    return Instruction(
        name, text[: op.start()], op[1], tuple(re.findall(r"%([\w.-]+)", inside)), inside, text[end + 1 :], root
    )


def size(shape: str, memory_only: bool = False) -> int:
    """Bytes of a shape, of all arrays of a tuple; memory_only: of those in the device's main memory (S(0))."""
    total = 0
    for dtype, dims, layout in ARRAY.findall(shape):
        if not (memory_only and re.search(r"S\([1-9]\)", layout)):
            bits = re.search(r"\d+", dtype)
            of_one = SIZES.get(dtype) if dtype in SIZES else max(int(bits[0]) // 8, 1)
            total += of_one * prod(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)
    return total


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs, once; of a loop its body."""
    names = []
    for one, several in CALLED.findall(instruction.rest):
        names += [one] if one else re.findall(r"%([\w.-]+)", several)
    return names


def turns(module: Module, loop: Instruction) -> int:
    """How often a loop runs its body: the number that its condition compares with; 1 if it has none."""
    known = re.search(r'known_trip_count[^}]*?"n":"(\d+)"', loop.rest)
    if known:
        return int(known[1])
    condition = module.computations[re.search(r"condition=%([\w.-]+)", loop.rest)[1]]
    numbers = [int(i.argument) for i in condition.values() if i.op == "constant" and i.shape.startswith("s32[]")]
    return max(numbers, default=1)


def scheduled(module: Module) -> dict[str, int]:
    """The computations whose instructions run one by one, and how often each runs: the entry, bodies, branches."""
    found: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        found[name] = found.get(name, 0) + times
        for instruction in module.computations[name].values():
            if instruction.op in ("while", "conditional", "call"):
                more = turns(module, instruction) if instruction.op == "while" else 1
                for inner in called(instruction):
                    visit(inner, times * more)

    visit(module.entry, 1)
    return found


def _all_within(module: Module, name: str) -> Iterator[tuple[str, Instruction]]:
    """The instructions of a scheduled computation and of all fusions in it, each with its computation."""
    for instruction in module.computations[name].values():
        yield name, instruction
        if instruction.op not in ("while", "conditional", "call"):
            for inner in called(instruction):
                yield from _all_within(module, inner)


def collectives(module: Module, devices: int, slices: int = 1) -> list[Collective]:
    """The exchanges of a program for so many devices, of which each slice holds as many, in order.

    A collective that is spread over several fusions (its channel appears in each) counts once.
    """
    found = []
    for name, times in scheduled(module).items():
        seen = set()
        for place, instruction in _all_within(module, name):
            kind = instruction.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", instruction.rest)
            if channel and channel[1] in seen:
                continue
            seen |= {channel[1]} if channel else set()
            kind = "reduce-scatter" if place.startswith("all-reduce-scatter") else kind
            given = sum(size(module.computations[place][o].shape) for o in instruction.operands)
            groups = members(instruction.rest, devices)
            n = max(map(len, groups))
            part = (n - 1) / n
            sent = given * {"all-gather": n - 1, "all-reduce": 2 * part, "collective-permute": 1}.get(kind, part)
            between = any(len({device * slices // devices for device in group}) > 1 for group in groups)
            found.append(Collective(kind, sent, n, times, between))
    return found


def members(rest: str, devices: int) -> list[Sequence[int]]:
    """The groups of devices between which an instruction exchanges; those of a permutation are its pairs."""
    if found := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", rest):
        return [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d, ]+)\}", found[1])]
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        (count, *_), dims = ([int(n) for n in found[i].split(",")] for i in (1, 2))
        order = [int(n) for n in found[3].split(",")] if found[3] else list(range(len(dims)))
        ids = _transposed(dims, order)
        return [ids[i : i + len(ids) // count] for i in range(0, len(ids), len(ids) // count)]
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        named = re.findall(r"'(\w+)'", found[2])
        order = [i for i, axis in enumerate(sizes) if axis not in named] + [list(sizes).index(axis) for axis in named]
        ids, n = _transposed(list(sizes.values()), order), prod(sizes[axis] for axis in named)
        return [ids[i : i + n] for i in range(0, len(ids), n)]
    return [range(devices)]


def _transposed(dims: Sequence[int], order: Sequence[int]) -> list[int]:
    """arange(prod(dims)).reshape(dims).transpose(order), flat."""
    ids = [0]
    for axis in order:
        stride = prod(dims[axis + 1 :])
        ids = [i + stride * j for i in ids for j in range(dims[axis])]
    return ids


def memory_traffic(module: Module) -> int:
    """Bytes that a program reads from and writes to the device's main memory.

    Of each instruction that is scheduled its operands and results that lie there; of an operand that it only slices the
    slice, of a result that it updates in place the update.
    """
    total = 0
    for name, times in scheduled(module).items():
        computation = module.computations[name]
        total += times * sum(_traffic(module, computation, i) for i in computation.values())
    return total


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    if instruction.op in FREE or instruction.op.endswith("-done"):
        return 0
    if instruction.op.endswith("-start"):  # (what is read, what is written, flags): as much there as here
        arrays = [found[0] for found in ARRAY.finditer(instruction.shape)][:2]
        moved = min(map(size, arrays))
        return sum(moved for array in arrays if size(array, True))
    total = 0
    inner = module.computations[called(instruction)[0]] if instruction.op == "fusion" else None
    for i, operand in enumerate(instruction.operands):
        whole = size(computation[operand].shape, True)
        if whole and inner is not None:
            whole = min(whole, _read(module, inner, i))
        elif whole and instruction.op in ("dynamic-slice", "slice", "gather", "dynamic-update-slice") and i == 0:
            whole = 0 if instruction.op == "dynamic-update-slice" else size(instruction.shape)
        total += whole
    written = size(instruction.shape, True)
    if written and inner is not None:
        return total + min(written, _written(module, inner, _root(inner)))
    if instruction.op == "dynamic-update-slice":
        return total + size(computation[instruction.operands[1]].shape)
    return total + written


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _read(module: Module, computation: Computation, number: int) -> int:
    """Bytes that a fusion reads of its operand of this number."""
    parameter = next(i for i in computation.values() if i.op == "parameter" and int(i.argument) == number)
    return _read_of(module, computation, parameter)


def _read_of(module: Module, computation: Computation, value: Instruction) -> int:
    whole, total = size(value.shape), 0
    for user in computation.values():
        for place in (place for place, operand in enumerate(user.operands) if operand == value.name):
            if user.op in ("dynamic-slice", "slice", "gather") and place == 0:
                total += size(user.shape)
            elif user.op == "bitcast":
                total += _read_of(module, computation, user)
            elif user.op == "fusion":
                total += _read(module, module.computations[called(user)[0]], place)
            elif user.op != "dynamic-update-slice" or place:
                total += whole
    return min(whole, total)


def _written(module: Module, computation: Computation, value: Instruction) -> int:
    """Bytes that a fusion writes for this value of its last line."""
    if value.op == "tuple":
        return sum(_written(module, computation, computation[operand]) for operand in value.operands)
    if value.op == "bitcast":
        return _written(module, computation, computation[value.operands[0]])
    if value.op == "dynamic-update-slice":
        return size(computation[value.operands[1]].shape)
    if value.op == "fusion":
        inner = module.computations[called(value)[0]]
        return _written(module, inner, _root(inner))
    return size(value.shape)


def cycles(module: Module) -> int:
    """The cycles that the compiler estimates for the fusions of a program; what else runs, it does not say."""
    total = 0
    for name, times in scheduled(module).items():
        for instruction in module.computations[name].values():
            found = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            total += times * int(found[1]) if found else 0
    return total
