"""Every key of a run, once. Other configs are this one plus their differences; `slot` lists all options of a name.

SiT-B/2 on ImageNet latents at 256 pixels, as the paper trains it (arXiv 2603.04239, Table A1): not run by itself.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from diversedit_jax.config import options, slot
from diversedit_jax.data import pipeline
from diversedit_jax.sampling import sampler
from diversedit_jax.training import optimizer


def get_config() -> ConfigDict:
    """The base of all configs."""
    config = ConfigDict()

    config.seed = 0  # of parameters, data order, noise, times, conditions dropped
    config.total_steps = 400_000  # at the end of which the run is done
    config.batch_size = 256  # over all devices
    config.accumulate = 1  # parts of a batch, computed one after another, for less memory

    config.data = slot("data", "latents")  # what is stored: --config.data.data_dir=LATENTS
    config.input = options(pipeline.batches)  # how it is read: threads, worker processes, bad records
    config.codec = slot("codecs", "vae")  # from there to the network's space, on device
    config.text_encoder = placeholder(ConfigDict)  # frozen, for token ids: slot("encoders", "clip_text", file=...)
    config.encoders = ConfigDict()  # frozen, for losses that align to them: label -> slot("encoders", name, file=...)
    config.model = slot("models", "dit", size="B", patch=2)
    config.objective = slot("objectives", "flow_matching")
    config.init_from = ConfigDict(  # a trained network to start from; see configs/finetuning.md
        {
            "file": placeholder(str),  # of a release, or the folder of a run; long residuals that it lacks are new
            "family": placeholder(str),  # of a release whose arrays do not tell; see tools/convert_checkpoint.py
            "weights": placeholder(str),  # entry of a training file, or ema or online of a run: by default the EMA
            "heads": placeholder(int),  # of a release with a width that no published size has
            "fresh": (),  # parts that start anew, such as label_embed for other classes that are as many
            "trust": False,  # run code outside this package that the config of that run names
        }
    )
    config.losses = ConfigDict()  # auxiliary losses, label -> slot("losses", name)

    config.optim = options(optimizer.make)
    config.groups = ConfigDict()  # parameters with an optimizer of their own: label -> optimizer.group(PATTERN, ...)
    config.ema_decay = 0.9999  # of the weights that are sampled from; they start as a copy

    config.mesh = ConfigDict(  # -1: all devices that are left
        {
            "data": -1,  # copies of the parameters, each with its part of the batch; of several slices a multiple
            "fsdp": 1,  # parts that parameters, EMA and moments are split into, each with its part of the batch, too
            "tensor": 1,  # parts of the heads and hidden units, that work on the same examples
            "rules": (),  # ((pattern of names, axes), ...) before those of sharding.RULES
        }
    )
    config.max_skipped = 0  # batches with a loss or gradient that is not finite, which leave no trace; one more: an end
    config.log_every = 100  # steps between two lines of metrics
    config.loggers = ""  # metrics and images also go to: wandb, mlflow, or wandb,mlflow; see runtime/loggers.py
    config.profile = ""  # steps to look at in XProf: 100:105, or 100:105,5000:5005
    config.watchdog = 1_800.0  # seconds without a step after which a run that hangs ends with its stacks; 0: never
    config.checkpoint = ConfigDict(
        {
            "every": 5_000,  # steps between two; 0: only at the end
            "keep": 3,  # the newest so many
            "keep_every": 50_000,  # and every such step
            "best": 0,  # and the best so many by the metric of an evaluator; it is saved whenever that has run
            "metric": placeholder(str),  # LABEL/NAME, such as scores/fid
            "lower": True,  # whether lower values of it are better
        }
    )
    config.sampler = options(sampler.make)  # of the images below, of evaluators, and the default of sample.py
    config.samples = ConfigDict(  # a grid of images
        {
            "every": 10_000,  # steps between two; 0: only at the end
            "num": 64,  # of images in it; 0: no grid
        }
    )
    config.evaluators = ConfigDict()  # label -> slot("evaluators", name), each with its own `every`
    return config
