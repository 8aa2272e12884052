"""TPU slices by name, and what is published of their chips."""

import re
from math import prod
from typing import NamedTuple

from diversedit_jax.errors import ConfigError
from diversedit_jax.registry import suggestion
from diversedit_jax.runtime import flops


class Generation(NamedTuple):
    """A kind of chip.

    hbm_gib: what libtpu 0.0.42 has for a program on one chip, as its messages say; less than is published.
    hbm_gbps: GB/s to and from HBM. link_gbps: GB/s that one link to a neighbour carries in one direction; a chip has
    one for each of `links`. dcn_gbps: GB/s of a chip's share in its host's network. clock_ghz: of a core, what the
    published peak needs with the published number of matrix units. None: we have not found it.
    cores: how many of the cores that a slice is named by a chip has. device_kind: as jax calls it.
    """

    hbm_gib: float
    hbm_gbps: float
    link_gbps: float
    links: int
    dcn_gbps: float | None
    clock_ghz: float | None
    device_kind: str
    cores: int = 1


# From the pages of Google Cloud's documentation on each (read in 2026: "TPU v5e", ...). There the interconnect is that
# of all links of a chip in both directions: 400, 1200 and 800 GB/s of v5e, v5p and v6e. That of v4, 2400 Gbit/s in one
# direction, is from secondary sources, not verified. The network of v5e is 6.4 Tbit/s for 256 chips, that of v5p 50
# Gbit/s for a chip; of v4 and v6e we have not found one.
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
        """How many there are."""
        return prod(map(int, self.topology.split("x")))

    @property
    def peak(self) -> float:
        """FLOP/s of all chips in bfloat16."""
        return self.chips * flops.peak(GENERATIONS[self.generation].device_kind) * 1e12

    @property
    def hosts(self) -> int:
        """Machines that these chips stand in: one has 4, of v5e and v6e up to 8 where they are alone."""
        return 1 if self.chips <= 8 and GENERATIONS[self.generation].links == 4 else -(-self.chips // 4)

    @property
    def named(self) -> str:
        """As Google Cloud calls it, by its cores."""
        return f"{self.generation}-{self.chips * GENERATIONS[self.generation].cores}"

    @property
    def options(self) -> dict:
        """What `jax.experimental.topologies.get_topology_desc` must know beside the name."""
        options = {"chip_config_name": "megacore"} if self.generation == "v4" else {}  # as on Cloud: a chip, a device
        return options | ({"chips_per_host_bounds": (1, 1, 1)} if self.chips == 1 else {})


def parse(name: str) -> Slice:
    """The slice `v5e:4x4` or `v5e-16`: a topology, or a number of chips, of v4 and v5p of cores (two in a chip)."""
    found = re.fullmatch(r"(\w+?)(?::(\d+(?:x\d+)+)|-(\d+))", name.replace("v5litepod", "v5e"))
    if not found:
        raise ConfigError(f"--topology={name}: wanted a slice such as v5e:4x4 or v5e-16")
    kind, topology, cores = found.groups()
    if kind not in GENERATIONS:
        raise ConfigError(f"--topology={name}: {suggestion(kind, GENERATIONS)}")
    cubic = GENERATIONS[kind].links == 6
    if topology is None:
        known = {chips * GENERATIONS[kind].cores: shape for chips, shape in (CUBIC if cubic else FLAT).items()}
        if int(cores) not in known:
            raise ConfigError(f"--topology={name}: known: {', '.join(f'{kind}-{n}' for n in known)}; or {kind}:AxB")
        return Slice(kind, known[int(cores)])
    if topology.count("x") != 1 + cubic or 0 in map(int, topology.split("x")):
        raise ConfigError(f"--topology={name}: {kind} has topologies of {2 + cubic} numbers")
    return Slice(kind, topology)
