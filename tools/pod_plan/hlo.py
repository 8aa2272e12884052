"""Counts in the text of a compiled program: how often each part runs, bytes of memory, bytes between devices.

XLA's own count (`compiled.cost_analysis()`) takes the body of a loop once. Here every turn of a loop counts.
"""

import re
from collections.abc import Iterator, Mapping
from math import prod
from typing import NamedTuple

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SCATTER = "all-reduce-scatter"  # a fusion of an all-reduce and a slice of it, which runs as a reduce-scatter
TRANSFER = re.compile(r'_xla_megascale_transfer_type="(\w+)"')  # marks what is sent to other slices
CONTROL = ("while", "conditional", "call")
SLICING = ("dynamic-slice", "slice", "gather")
# Instructions that move nothing: names for parts of other values, and marks.
FREE = ("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "send", "recv")
FREE += ("partition-id", "replica-id", "after-all", "custom-call")
ARRAY = re.compile(r"([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
CALLED = re.compile(
    r"(?:calls|to_apply|body|true_computation|false_computation)=%([\w.-]+)|branch_computations=\{(.*?)\}"
)


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    argument: str  # the text in parentheses
    rest: str  # the text behind them
    root: bool  # whether it is the computation's result


Computation = dict[str, Instruction]


class Module(NamedTuple):
    """A program."""

    computations: Mapping[str, Computation]
    entry: str  # the name of the first one


class Collective(NamedTuple):
    """An exchange."""

    kind: str
    sent: float  # bytes that each device sends, in a ring, each time
    group: int  # number of devices, or of slices
    times: int  # how often a program runs it
    between: bool  # whether it is between slices


def parse(text: str) -> Module:
    """The module in the text of a compiled program."""
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
    argument = text[op.end() : end]
    operands = tuple(re.findall(r"%([\w.-]+)", argument))
    return Instruction(name, text[: op.start()], op[1], operands, argument, text[end + 1 :], root)


def size(shape: str, memory_only: bool = False) -> int:
    """Bytes of a shape, or of all arrays of a tuple. memory_only: only arrays in the device's main memory (S(0))."""
    total = 0
    for dtype, dims, layout in ARRAY.findall(shape):
        if not (memory_only and re.search(r"S\([1-9]\)", layout)) and dtype != "token":
            each = 1 if dtype == "pred" else max(int(re.search(r"\d+", dtype)[0]) // 8, 1)
            total += each * prod(int(dim.removeprefix("<=")) for dim in dims.split(",") if dim)
    return total


def called(instruction: Instruction) -> list[str]:
    """The computations that an instruction runs; of a loop, its body."""
    names = []
    for one, several in CALLED.findall(instruction.rest):
        names += [one] if one else re.findall(r"%([\w.-]+)", several)
    return names


def turns(module: Module, loop: Instruction) -> int:
    """How often a loop runs its body, if it counts from 0 in steps to a constant; else 1."""
    condition, body = (
        module.computations[re.search(rf"{part}=%([\w.-]+)", loop.rest)[1]] for part in ("condition", "body")
    )
    compared = [condition[operand] for operand in _root(condition).operands]
    bounds = [int(i.argument) for i in compared if i.op == "constant"]
    counters = [int(re.search(r"index=(\d+)", i.rest)[1]) for i in compared if i.op == "get-tuple-element"]
    if _root(condition).op != "compare" or len(bounds) != 1 or len(counters) != 1:
        return 1
    counted = body[_root(body).operands[counters[0]]]
    steps = [int(body[operand].argument) for operand in counted.operands if body[operand].op == "constant"]
    return -(-bounds[0] // (steps[0] if counted.op == "add" and steps else 1))


def _inner(module: Module, name: str) -> Iterator[tuple[str, int]]:
    """The loop bodies and branches in a computation, and how often each runs in one run of the computation."""
    for instruction in module.computations[name].values():
        if instruction.op in CONTROL:
            more = turns(module, instruction) if instruction.op == "while" else 1
            yield from ((inner, more) for inner in called(instruction))


def scheduled(module: Module) -> dict[str, int]:
    """How often each computation runs whose instructions run one by one: the entry, loop bodies, branches."""
    found: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        found[name] = found.get(name, 0) + times
        for inner, more in _inner(module, name):
            visit(inner, times * more)

    visit(module.entry, 1)
    return found


def _exchanges(module: Module) -> Iterator[tuple[str, Instruction, int]]:
    """The collectives of a program: (computation, instruction, how often).

    A collective in the background is spread in pieces over several fusions, and over loops that run meanwhile. So a
    channel counts once, in its outermost computation.
    """

    def within(name: str) -> Iterator[tuple[str, Instruction]]:
        for instruction in module.computations[name].values():
            yield name, instruction
            if instruction.op not in CONTROL:
                for inner in called(instruction):
                    yield from within(inner)

    def visit(name: str, times: int, seen: frozenset[str]) -> Iterator[tuple[str, Instruction, int]]:
        here = set(seen)
        for place, instruction in within(name):
            if instruction.op.removesuffix("-start") in COLLECTIVES or _leaves(instruction):
                channel = re.search(r"channel_id=(\d+)", instruction.rest)
                if channel is None or channel[1] not in here:
                    yield place, instruction, times
                here |= {channel[1]} if channel else set()
        for inner, more in _inner(module, name):
            yield from visit(inner, times * more, frozenset(here))

    return visit(module.entry, 1, frozenset())


def _leaves(instruction: Instruction) -> bool:
    """Whether an instruction sends to other slices."""
    return instruction.op == "send" and TRANSFER.search(instruction.rest) is not None


def collectives(module: Module, devices: int, slices: int = 1) -> list[Collective]:
    """The exchanges of a program for slices of `devices` devices. Between slices it is a `send` to the host."""
    found = []
    for place, instruction, times in _exchanges(module):
        between = TRANSFER.search(instruction.rest)
        kind = between[1].lower().replace("_", "-") if between else instruction.op.removesuffix("-start")
        kind = "reduce-scatter" if place.startswith(SCATTER) else kind
        n = slices if between else _group(instruction.rest, devices)
        given = instruction.operands[:1] if between else instruction.operands  # the second operand of `send` is a token
        held = sum(size(module.computations[place][operand].shape) for operand in given)
        part = (n - 1) / n
        sent = held * {"all-gather": n - 1, "all-reduce": 2 * part, "collective-permute": 1}.get(kind, part)
        found.append(Collective(kind, sent, n, times, bool(between)))
    return found


def _group(rest: str, devices: int) -> int:
    """The number of devices that exchange with each other; two in a permutation."""
    if "source_target_pairs=" in rest:
        return 2
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", rest):
        return int(found[1])
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\([^{]*\))? \{([^}:]*)\}", rest):
        sizes = {name: int(n) for name, n in re.findall(r"'(\w+)'=(\d+)", found[1])}
        return prod(sizes[name] for name in re.findall(r"'(\w+)'", found[2]))
    if found := re.search(r"replica_groups=(?!\{\})(.{1,60})", rest):
        raise ValueError(f"groups of devices have an unknown form: {found[1]}")
    return devices


def memory_traffic(module: Module) -> int:
    """Bytes that a program reads from and writes to the device's main memory.

    These are the operands and results there of each scheduled instruction; only the slice of an operand that is sliced,
    and only the update of a result that is updated in place. A collective counts once.
    """
    total = 0
    for place, instruction, times in _exchanges(module):
        read = sum(size(module.computations[place][o].shape, True) for o in instruction.operands)
        total += times * (read + (0 if place.startswith(SCATTER) else _result(instruction)))
    for name, times in scheduled(module).items():
        computation = module.computations[name]
        total += times * sum(_traffic(module, computation, i) for i in computation.values())
    return total


def _traffic(module: Module, computation: Computation, instruction: Instruction) -> int:
    op = instruction.op
    if op in (*FREE, *CONTROL) or op.endswith("-done") or op.removesuffix("-start") in COLLECTIVES:
        return 0
    if op.endswith("-start"):  # its shape: (source, result, flags); it reads as many bytes as it writes
        arrays = [found[0] for found in ARRAY.finditer(instruction.shape)][:2]
        return min(map(size, arrays)) * sum(size(array, True) > 0 for array in arrays)
    inner = module.computations[called(instruction)[0]] if op == "fusion" else None
    total = 0
    for i, operand in enumerate(instruction.operands):
        whole = size(computation[operand].shape, True)
        if whole:
            total += min(whole, _read(module, inner, i)) if inner else _touched(instruction, i, whole)
    if op == "dynamic-update-slice":
        return total + size(computation[instruction.operands[1]].shape)
    written = size(instruction.shape, True)
    return total + (min(written, _written(module, inner, _root(inner))) if written and inner else written)


def _touched(instruction: Instruction, place: int, whole: int) -> int:
    """Bytes that an instruction reads of its operand at `place`, which has `whole` bytes."""
    if place == 0 and instruction.op in SLICING:
        return size(instruction.shape)
    return 0 if place == 0 and instruction.op == "dynamic-update-slice" else whole


def _result(instruction: Instruction) -> int:
    """Bytes that a collective writes to main memory. From other slices come as many bytes as are sent."""
    if instruction.op == "send":
        return size(ARRAY.search(instruction.shape)[0], True)
    if not instruction.op.endswith("-start") or instruction.op == "all-reduce-start":
        return size(instruction.shape, True)
    return size([found[0] for found in ARRAY.finditer(instruction.shape)][1], True)  # (operand, result)


def _root(computation: Computation) -> Instruction:
    return next(i for i in computation.values() if i.root)


def _read(module: Module, computation: Computation, number: int) -> int:
    """Bytes that a fusion reads of its operand `number`."""
    parameter = next(i for i in computation.values() if i.op == "parameter" and int(i.argument) == number)
    return _read_of(module, computation, parameter)


def _read_of(module: Module, computation: Computation, value: Instruction) -> int:
    whole, total = size(value.shape), 0
    for user in computation.values():
        for place in (place for place, operand in enumerate(user.operands) if operand == value.name):
            if user.op == "bitcast":
                total += _read_of(module, computation, user)
            elif user.op == "fusion":
                total += _read(module, module.computations[called(user)[0]], place)
            elif user.op not in (*FREE, *COLLECTIVES):
                total += _touched(user, place, whole)
    return min(whole, total)


def _written(module: Module, computation: Computation, value: Instruction) -> int:
    """Bytes that a fusion writes for `value`, its root or a part of the root."""
    if value.op in ("parameter", "custom-call", *COLLECTIVES):
        return 0
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
    """The compiler's estimate of the cycles of a program's fusions; it has none for other instructions."""
    return sum(
        times * int(found[1])
        for name, times in scheduled(module).items()
        for instruction in module.computations[name].values()
        if (found := re.search(r'"estimated_cycles":"(\d+)"', instruction.rest))
    )
