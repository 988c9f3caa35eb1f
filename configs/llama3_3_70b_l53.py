"""Llama-3.3-70B-Instruct, block 53 of 80: the settings of the released pair, by its authors' account.

Run, with a corpus of 100,000 documents (the reference: half web text, half chats; 10 positions of each):

    export STORE=runs/llama3_3_70b_l53/store TARGET=meta-llama/Llama-3.3-70B-Instruct
    nla extract CORPUS --target $TARGET --layer 53 --per-document 10 --dtype bfloat16 --out $STORE
    nla data split $STORE --fractions 0.248,0.248,0.5        # the rest is held out
    nla teach $STORE anthropic:MODEL --batch --rows av_sft,ar_sft,held_out   # --dry-run says what it costs
    nla build $STORE --target $TARGET --marker ㎡ --injection-scale 30
    nla train ar --config=llama3_3_70b_l53
    nla train av --config=llama3_3_70b_l53
    nla train rl --config=llama3_3_70b_l53

The same command again goes on after an interruption. `--out DIR` puts the run elsewhere.

Hardware it is meant for: five nodes of 8 x H100 80 GB, or 64 TPU v5p chips.
Parameters in float32 with two moments take 12 bytes each: AV 70.6 and AR 47.3 billion make 1414 GB in joint
training; with the KL reference, the gradients of one model and the sampler's copy about 1980 GB, before
activations. (Arithmetic from parameter counts, not a measurement.)

Result to expect. The reference's, on its own data: fve_nrm .80, with 0.9169 as the variance of its training
set, at a learning rate of 5e-6 in joint training where the smaller models used 1.41e-5.
Which tokens stood around its marker is not published; `nla build` finds out for its own prompt.
"""

from ml_collections import ConfigDict

from nla_jax.configs import common


def get_config() -> ConfigDict:
    """Block 53 of meta-llama/Llama-3.3-70B-Instruct."""
    config = common.get_config()
    config.out = "runs/llama3_3_70b_l53"
    config.target = "meta-llama/Llama-3.3-70B-Instruct"
    config.store = "runs/llama3_3_70b_l53/store"
    config.rl.lr = 5e-6
    return config
