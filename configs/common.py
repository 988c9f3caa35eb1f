"""The training settings behind the released pairs, as their authors (kitft/natural_language_autoencoders) report them.

A base for other configs, not a run: `get_config()` here has no target. A config of yours starts like this one,

    from nla_jax.configs import common

    def get_config():
        config = common.get_config()
        config.out, config.target, config.store = "runs/mine", "ORG/MODEL", "runs/mine/store"
        config.rl.lr = 5e-6          # both optimizers of the stage
        return config

and runs with `nla train ar|av|rl --config=mine.py`; any key can be set on the command line, --config.rl.steps=4000.
What every key means stands in train/settings.py. What is not written here has the default that stands there.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Everything but `out`, `target` and `store`."""
    config = ConfigDict()
    config.out = None
    config.target = None
    config.store = None
    config.seed = 0
    config.param_dtype = "float32"
    config.compute_dtype = "bfloat16"
    config.remat = "blocks"
    config.log_every = 10
    config.keep_last = 2
    config.eval_rows = 512
    config.ar = _warm_start(eval_every=200, save_every=200)
    config.av = _warm_start(eval_every=200, save_every=200)
    config.rl = _joint()
    return config


def _warm_start(eval_every: int, save_every: int) -> ConfigDict:
    """One pass over the teacher's pairs: about 1000 steps of 256 for a quarter of a million pairs."""
    stage = ConfigDict()
    stage.epochs = 1
    stage.batch_size = 256
    stage.accumulate = 1
    stage.eval_every = eval_every
    stage.save_every = save_every
    stage.optim = ConfigDict({"name": "adamw", "lr": 2e-5, "schedule": "cosine", "end": 0.1, "warmup": 0.05})
    return stage


def _joint() -> ConfigDict:
    """128 activations x 8 explanations a step, one update of each model, constant learning rates."""
    stage = ConfigDict()
    stage.steps = 3000
    stage.batch_size = 128
    stage.samples = 8
    stage.accumulate = 1
    stage.max_new_tokens = 150
    stage.reward = "neg_mse"
    stage.advantage = "group_std"
    stage.aggregate = "sample"
    stage.clip_ratio = 0.2
    stage.kl = "k2"
    stage.kl_coef = 0.01
    stage.eval_every = 100
    stage.save_every = 100
    for name in ("av_optim", "ar_optim"):
        stage[name] = ConfigDict({"name": "adamw", "lr": 1.41e-5, "schedule": "constant", "warmup": 0.0})
    return stage
