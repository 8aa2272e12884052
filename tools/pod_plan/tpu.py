"""TPU slices by name, and the published figures of their chips."""

import re
from math import prod
from typing import NamedTuple

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import one_of
from diversedit_jax.runtime import flops


class Generation(NamedTuple):
    """A kind of chip. None: we have not found the figure."""

    hbm_gib: float  # for a program on one chip, by messages of libtpu 0.0.42; less than is published
    hbm_gbps: float  # GB/s to and from HBM
    link_gbps: float  # GB/s of one link to a neighbour, in one direction
    links: int  # of a chip
    dcn_gbps: float | None  # GB/s of a chip's share in its host's network
    clock_ghz: float | None  # of a core, by the published peak and number of matrix units
    device_kind: str  # its name in jax
    cores: int = 1  # of a chip, as the names of slices count them


# From Google Cloud's documentation of each (read in 2026: "TPU v5e", ...). It gives the interconnect of all links of a
# chip in both directions: v5e 400, v5p 1200, v6e 800 GB/s. That of v4, 2400 Gbit/s in one direction, is from secondary
# sources, not verified. Network: v5e 6.4 Tbit/s for 256 chips, v5p 50 Gbit/s for a chip.
GENERATIONS = {
    "v4": Generation(30.75, 1200, 50, 6, None, 1.05, "TPU v4", cores=2),
    "v5e": Generation(15.75, 819, 50, 4, 3.125, 1.5, "TPU v5 lite"),
    "v5p": Generation(95.74, 2765, 100, 6, 6.25, 1.75, "TPU v5", cores=2),
    "v6e": Generation(31.25, 1638, 100, 4, None, None, "TPU v6 lite"),
}
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBIC = {4: "2x2x1", 8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8", 512: "8x8x8"}


class Slice(NamedTuple):
    """Chips that are linked with each other. generation: a key of GENERATIONS. topology: such as 4x4."""

    generation: str
    topology: str

    @property
    def chips(self) -> int:
        """The number of chips."""
        return prod(map(int, self.topology.split("x")))

    @property
    def peak(self) -> float:
        """FLOP/s of all chips in bfloat16."""
        return self.chips * flops.peak(GENERATIONS[self.generation].device_kind) * 1e12

    @property
    def hosts(self) -> int:
        """The number of hosts: one for 4 chips; one for a slice of up to 8 chips of v5e or v6e."""
        return 1 if self.chips <= 8 and GENERATIONS[self.generation].links == 4 else -(-self.chips // 4)

    @property
    def named(self) -> str:
        """The name on Google Cloud, by cores."""
        return f"{self.generation}-{self.chips * GENERATIONS[self.generation].cores}"

    @property
    def options(self) -> dict:
        """Options of `jax.experimental.topologies.get_topology_desc` for this slice."""
        options = {"chip_config_name": "megacore"} if self.generation == "v4" else {}  # as on Cloud: a chip is a device
        return options | ({"chips_per_host_bounds": (1, 1, 1)} if self.chips == 1 else {})


def parse(name: str) -> Slice:
    """The slice `v5e:4x4`, a topology, or `v5e-16`, a number of chips (of v4 and v5p: of cores, two per chip)."""
    found = re.fullmatch(r"(\w+?)(?::(\d+(?:x\d+)+)|-(\d+))", name.replace("v5litepod", "v5e"))
    if not found:
        raise ConfigError(f"--topology={name}: wanted a slice such as v5e:4x4 or v5e-16")
    kind, topology, cores = found.groups()
    one_of("--topology", kind, GENERATIONS)
    cubic = GENERATIONS[kind].links == 6
    if topology is None:
        known = {chips * GENERATIONS[kind].cores: shape for chips, shape in (CUBIC if cubic else FLAT).items()}
        if int(cores) not in known:
            raise ConfigError(f"--topology={name}: known: {', '.join(f'{kind}-{n}' for n in known)}; or {kind}:AxB")
        return Slice(kind, known[int(cores)])
    if topology.count("x") != 1 + cubic or 0 in map(int, topology.split("x")):
        raise ConfigError(f"--topology={name}: {kind} has topologies of {2 + cubic} positive numbers")
    return Slice(kind, topology)
