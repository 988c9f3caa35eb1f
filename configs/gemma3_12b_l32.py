"""Gemma-3-12B-IT, block 32 of 48: the settings of the released pair, by its authors' account.

Run, with a corpus of 100,000 documents (the reference: half web text, half chats; 10 positions of each):

    export STORE=runs/gemma3_12b_l32/store TARGET=google/gemma-3-12b-it
    nla extract CORPUS --target $TARGET --layer 32 --per-document 10 --dtype bfloat16 --out $STORE
    nla data split $STORE --fractions 0.248,0.248,0.5        # the rest is held out
    nla teach $STORE anthropic:MODEL --batch --rows av_sft,ar_sft,held_out   # --dry-run says what it costs
    nla build $STORE --target $TARGET --marker ㈜ --injection-scale 80000
    nla train ar --config=gemma3_12b_l32
    nla train av --config=gemma3_12b_l32
    nla train rl --config=gemma3_12b_l32

The same command again goes on after an interruption. `--out DIR` puts the run elsewhere.

Hardware it is meant for: one node of 8 x H100 80 GB, or 8 TPU v5p chips.
Parameters in float32 with two moments take 12 bytes each: AV 11.8 and AR 8.4 billion make 242 GB in joint
training; with the KL reference, the gradients of one model and the sampler's copy about 340 GB, before
activations. (Arithmetic from parameter counts, not a measurement.)

Result to expect. The reference's, on its own data: fve_nrm .768 on the model card, with 0.0302 as the
variance of its training set: Gemma's vectors at this depth all point nearly the same way, so a cosine says little.
Joint training raises fve_nrm about linearly in the logarithm of the steps, over 2000 to 4000 of them.
"""

from ml_collections import ConfigDict

from nla_jax.configs import common


def get_config() -> ConfigDict:
    """Block 32 of google/gemma-3-12b-it."""
    config = common.get_config()
    config.out = "runs/gemma3_12b_l32"
    config.target = "google/gemma-3-12b-it"
    config.store = "runs/gemma3_12b_l32/store"
    return config
