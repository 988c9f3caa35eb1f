"""Gemma-3-27B-IT, block 41 of 62: the settings of the released pair, by its authors' account.

Run, with a corpus of 100,000 documents (the reference: half web text, half chats; 10 positions of each):

    export STORE=runs/gemma3_27b_l41/store TARGET=google/gemma-3-27b-it
    nla extract CORPUS --target $TARGET --layer 41 --per-document 10 --dtype bfloat16 --out $STORE
    nla data split $STORE --fractions 0.248,0.248,0.5        # the rest is held out
    nla teach $STORE anthropic:MODEL --batch --rows av_sft,ar_sft,held_out   # --dry-run says what it costs
    nla build $STORE --target $TARGET --marker ㈜ --injection-scale 60000
    nla train ar --config=gemma3_27b_l41
    nla train av --config=gemma3_27b_l41
    nla train rl --config=gemma3_27b_l41

The same command again goes on after an interruption. `--out DIR` puts the run elsewhere.

Hardware it is meant for: two nodes of 8 x H100 80 GB, or 16 TPU v5p chips.
Parameters in float32 with two moments take 12 bytes each: AV 27.0 and AR 18.8 billion make 550 GB in joint
training; with the KL reference, the gradients of one model and the sampler's copy about 770 GB, before
activations. (Arithmetic from parameter counts, not a measurement.)

Result to expect. The reference's, on its own data: fve_nrm .763 on the model card, with 0.0579 as the
variance of its training set: .38 after the warm start, .75 by step 3000, linear in the logarithm of the steps.
"""

from ml_collections import ConfigDict

from nla_jax.configs import common


def get_config() -> ConfigDict:
    """Block 41 of google/gemma-3-27b-it."""
    config = common.get_config()
    config.out = "runs/gemma3_27b_l41"
    config.target = "google/gemma-3-27b-it"
    config.store = "runs/gemma3_27b_l41/store"
    return config
