"""Published autoencoders as parameters of `models.vae`, and ours in the published layout.

A folder of diffusers holds config.json and diffusion_pytorch_model.safetensors. A file alone may also be the .ckpt of
latent diffusion's authors, with the autoencoder below `first_stage_model`. The arrays of a file show its layout and the
widths. Only config.json has the scale of the latents and the number of groups.
"""

from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax

from diversedit_jax.api import Params
from diversedit_jax.errors import ConfigError, WeightsError
from diversedit_jax.models import vae
from diversedit_jax.models.vae import Architecture
from diversedit_jax.runtime.files import write_json
from diversedit_jax.weights import hub, mapping
from diversedit_jax.weights.dit_names import CONV, LINEAR, Entry, Place, Turn, linear, norm
from diversedit_jax.weights.formats import NamedArrays, weights_folder
from diversedit_jax.weights.formats.weights_file import write_safetensors
from diversedit_jax.weights.formats.weights_folder import CONFIG
from diversedit_jax.weights.mapping import Arrays, Shapes

WEIGHTS = "diffusion_pytorch_model"
HALVES = ("encoder", "decoder")
MOST = 16  # levels, and residual blocks of a level, that are looked for


# A Linear over channels that is stored as a 1 x 1 convolution: torch's [out, in, 1, 1] and our [in, out].
POINTWISE = Turn(lambda x: x.reshape(x.shape[:2]).T, lambda x: x.T.reshape(*x.shape[::-1], 1, 1))
conv = partial(linear, kernel=CONV)


class Layout(NamedTuple):
    """The names of a kind of file, below `encoder.` or `decoder.`. {i} is a level, {j} a residual block in it.

    up_reversed: the decoder's levels are counted from its output.
    """

    down: str
    up: str
    shortcut: str
    halve: str
    double: str
    middle: tuple[str, str]
    attention: str
    norm: str
    qkv_out: tuple[str, str, str, str]
    norm_out: str
    up_reversed: bool = False


DIFFUSERS = Layout(
    down="down_blocks.{i}.resnets.{j}",
    up="up_blocks.{i}.resnets.{j}",
    shortcut="conv_shortcut",
    halve="down_blocks.{i}.downsamplers.0.conv",
    double="up_blocks.{i}.upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.resnets.1"),
    attention="mid_block.attentions.0",
    norm="group_norm",
    qkv_out=("to_q", "to_k", "to_v", "to_out.0"),
    norm_out="conv_norm_out",
)
LAYOUTS = {
    "diffusers": DIFFUSERS,
    "diffusers_old": DIFFUSERS._replace(qkv_out=("query", "key", "value", "proj_attn")),  # sd-vae-ft-mse, -ema
    "latent_diffusion": Layout(  # its authors'
        down="down.{i}.block.{j}",
        up="up.{i}.block.{j}",
        shortcut="nin_shortcut",
        halve="down.{i}.downsample.conv",
        double="up.{i}.upsample.conv",
        middle=("mid.block_1", "mid.block_2"),
        attention="mid.attn_1",
        norm="norm",
        qkv_out=("q", "k", "v", "proj_out"),
        norm_out="norm_out",
        up_reversed=True,
    ),
}
ENTRY = "first_stage_model"  # of the autoencoder in a file of latent diffusion
# Prefixes of other arrays in such files, from training the autoencoder or a wrapper of it.
IGNORED = ("loss.", "model_ema.", "encoder_ema.", "decoder_ema.")


class Release(NamedTuple):
    """An autoencoder in a file.

    scale, shift: the network's latents are (latents - shift) * scale; None without a config.json.
    name:         of its folder or file.
    digest:       sha256 of the weight file, in hex.
    read:         (halves) -> {"encoder": params, "decoder": params} on the host; by default both halves.
    """

    arch: Architecture
    scale: float | None
    shift: float | None
    name: str
    digest: str
    read: Callable[..., Params]


def open_vae(path: str | Path) -> Release:
    """The autoencoder in a folder as diffusers writes it, in a folder above (its subfolder `vae`), or in a file.

    path: also a name on the hub, see `weights.hub`.
    Names and shapes are checked now; parameters are read at `read()`. Raises WeightsError for what is no weight file
    and ConfigError, with the array's or key's name, for what does not fit.
    """
    found = weights_folder.folder_of(hub.local(path), "vae")
    config = weights_folder.config(found)
    if config and (kind := config.get("_class_name")) != "AutoencoderKL":
        raise WeightsError(f"{found}: wanted an AutoencoderKL, its {CONFIG} is of {kind}")
    with weights_folder.opened(found) as weights:
        shapes = _below(weights).shapes
    what = f"vae: {found}"
    layout, arch = _recognised(what, shapes, config.get("norm_num_groups", Architecture().groups))
    _check_config(what, arch, config)
    four = len(shapes[_attention(layout)]) == 4
    target = _shapes(arch)

    def wanted(halves: tuple[str, ...]) -> list[Entry]:
        return [entry for half in halves for entry in entries(layout, arch, half, four)]

    mapping.check(what, wanted(HALVES), shapes, target, IGNORED)

    def read(halves: tuple[str, ...] = HALVES) -> Params:
        with weights_folder.opened(found) as weights:
            return mapping.fill(what, wanted(halves), _below(weights), {half: target[half] for half in halves})

    scale, shift = (config.get(key) for key in ("scaling_factor", "shift_factor"))
    return Release(arch, scale, shift or 0.0 if config else None, hub.title(path), weights_folder.digest(found), read)


def export(params: Params, arch: Architecture, folder: str | Path, *, scale: float = 0.18215, shift: float = 0.0):
    """Write an autoencoder as a folder of diffusers, with the names that its current versions write."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    every = [entry for half in HALVES for entry in entries("diffusers", arch, half)]
    write_safetensors(folder / f"{WEIGHTS}.safetensors", mapping.written(every, jax.device_get(params)))
    levels = len(arch.widths)
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": list(arch.widths),
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "in_channels": arch.channels,
        "latent_channels": arch.latent_channels,
        "layers_per_block": arch.layers,
        "norm_num_groups": arch.groups,
        "out_channels": arch.channels,
        "scaling_factor": scale,
        "shift_factor": shift or None,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "use_post_quant_conv": arch.quant,
        "use_quant_conv": arch.quant,
    }
    write_json(folder / CONFIG, config)


def entries(layout: str, arch: Architecture, half: str, four: bool = False) -> list[Entry]:
    """The arrays of one half in a layout. four: attention stores its Linears as 1 x 1 convolutions, with four axes."""
    names = LAYOUTS[layout]
    levels = len(arch.widths)
    widths = arch.widths if half == "encoder" else arch.widths[::-1]
    residuals, resize = (names.down, names.halve) if half == "encoder" else (names.up, names.double)
    found = conv((half, "conv_in"), f"{half}.conv_in") + conv((half, "conv_out"), f"{half}.conv_out")
    found += norm((half, "norm"), f"{half}.{names.norm_out}")
    if arch.quant:
        found += linear((half, "quant"), "quant_conv" if half == "encoder" else "post_quant_conv", kernel=POINTWISE)
    for place, name in zip(("first", "second"), names.middle, strict=True):
        found += _residual((half, "middle", place), f"{half}.{name}", names, shortcut=False)
    attention, place = f"{half}.{names.attention}", (half, "middle", "attention")
    found += norm((*place, "norm"), f"{attention}.{names.norm}")
    for ours, theirs in zip(("q", "k", "v", "out"), names.qkv_out, strict=True):
        found += linear((*place, ours), f"{attention}.{theirs}", kernel=POINTWISE if four else LINEAR)
    for i, (before, width, more) in enumerate(vae.levels(widths)):
        number = levels - 1 - i if half == "decoder" and names.up_reversed else i
        level = (half, "levels", i)
        for j in range(arch.layers + (half == "decoder")):
            name = f"{half}.{residuals.format(i=number, j=j)}"
            found += _residual((*level, "residuals", j), name, names, shortcut=j == 0 and before != width)
        if more:
            found += conv((*level, "resize"), f"{half}.{resize.format(i=number)}")
    return found


def _residual(place: Place, name: str, names: Layout, shortcut: bool) -> list[Entry]:
    found = norm((*place, "norm1"), f"{name}.norm1") + norm((*place, "norm2"), f"{name}.norm2")
    found += conv((*place, "conv1"), f"{name}.conv1") + conv((*place, "conv2"), f"{name}.conv2")
    shortcuts = linear((*place, "shortcut"), f"{name}.{names.shortcut}", kernel=POINTWISE) if shortcut else []
    return found + shortcuts


@cache
def _shapes(arch: Architecture) -> Params:
    return jax.eval_shape(vae.network(arch).init, jax.random.key(0))


def _attention(layout: str) -> str:
    """The name of the encoder's kernel for q."""
    names = LAYOUTS[layout]
    return f"encoder.{names.attention}.{names.qkv_out[0]}.weight"


def _below(weights: NamedArrays) -> Arrays:
    """The autoencoder's arrays: at the top of the file, below `first_stage_model`, or below `state_dict` of either."""
    bare = Arrays(weights)
    for prefix in (f"state_dict.{ENTRY}", ENTRY, "state_dict"):
        if bare.names(prefix):
            return Arrays(bare, prefix)
    return bare


def _recognised(what: str, shapes: Shapes, groups: int) -> tuple[str, Architecture]:
    """The layout of a file and the architecture that its shapes show."""
    layout = next((layout for layout in LAYOUTS if _attention(layout) in shapes), None)
    if layout is None:
        wanted = " or ".join(map(_attention, LAYOUTS))
        raise ConfigError(
            f"{what}: these are not the arrays of an autoencoder ({mapping.few(shapes)}): wanted {wanted}"
        )
    axes = partial(mapping.axes, what, shapes, count=4)

    def residual(i: int, j: int) -> str:
        return f"encoder.{LAYOUTS[layout].down.format(i=i, j=j)}.conv1.weight"

    axes(residual(0, 0))  # raises if there is no level
    levels = [i for i in range(MOST) if residual(i, 0) in shapes]
    arch = Architecture(
        channels=axes("encoder.conv_in.weight")[1],
        latent_channels=axes("encoder.conv_out.weight")[0] // 2,
        widths=tuple(axes(residual(i, 0))[0] for i in levels),
        layers=sum(residual(0, j) in shapes for j in range(MOST)),
        groups=groups,
        quant="quant_conv.weight" in shapes,
    )
    return layout, arch


def _check_config(what: str, arch: Architecture, config: Mapping[str, Any]) -> None:
    """Raise ConfigError if config.json and the arrays are not of the same autoencoder."""
    expected = {
        "block_out_channels": list(arch.widths),
        "layers_per_block": arch.layers,
        "latent_channels": arch.latent_channels,
        "in_channels": arch.channels,
        "act_fn": "silu",
    }
    for key, value in expected.items():
        if config.get(key, value) != value:
            raise ConfigError(f"{what}: config.json says {key} = {config[key]}, the arrays {value}")
