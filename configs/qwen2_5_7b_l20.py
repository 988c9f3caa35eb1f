"""Qwen2.5-7B-Instruct, block 20 of 28: the settings of the released pair, by its authors' account.

Run, with a corpus of 100,000 documents (the reference: half web text, half chats; 10 positions of each):

    export STORE=runs/qwen2_5_7b_l20/store TARGET=Qwen/Qwen2.5-7B-Instruct
    nla extract CORPUS --target $TARGET --layer 20 --per-document 10 --dtype bfloat16 --out $STORE
    nla data split $STORE --fractions 0.248,0.248,0.5        # the rest is held out
    nla teach $STORE anthropic:MODEL --batch --rows av_sft,ar_sft,held_out   # --dry-run says what it costs
    nla build $STORE --target $TARGET --marker ㈎ --injection-scale 150
    nla train ar --config=qwen2_5_7b_l20
    nla train av --config=qwen2_5_7b_l20
    nla train rl --config=qwen2_5_7b_l20

The same command again goes on after an interruption. `--out DIR` puts the run elsewhere.

Hardware it is meant for: one node of 8 x H100 80 GB, or 4 TPU v5p chips.
Parameters in float32 with two moments take 12 bytes each: AV 7.6 and AR 5.5 billion make 157 GB in joint
training; with the KL reference, the gradients of one model and the sampler's copy about 220 GB, before
activations. (Arithmetic from parameter counts, not a measurement.)

Result to expect. The reference's, on its own data: fve_nrm .752 on the model card, with 0.7335 as the
variance of its training set.
AR warm start: loss 1.61 at step 0 (identity head), 0.586 after 250,000 pairs; 0.94 is the constant predictor, 0.73
the variance. AV warm start: true vectors end about 0.2 nats of cross-entropy under shuffled ones. Joint training
raises fve_nrm about linearly in the logarithm of the steps, over 2000 to 4000 of them. Speed of the reference: AV warm
start 25.8 samples/s per H100, AR warm start 43, joint training 0.68.
"""

from ml_collections import ConfigDict

from nla_jax.configs import common


def get_config() -> ConfigDict:
    """Block 20 of Qwen/Qwen2.5-7B-Instruct."""
    config = common.get_config()
    config.out = "runs/qwen2_5_7b_l20"
    config.target = "Qwen/Qwen2.5-7B-Instruct"
    config.store = "runs/qwen2_5_7b_l20/store"
    return config
