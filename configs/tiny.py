"""A small model on a laptop, from text to an NLA: to see every step work before paying for a larger one.

Run, with a corpus of a few thousand documents of at least 60 tokens and the directory of any tokenizer:

    nla train lm --config=tiny --config.lm.corpus=docs.jsonl --config.lm.tokenizer=TOKENIZER
    nla extract docs.jsonl --target runs/tiny/lm/export/target --layer 2 --out runs/tiny/store
    nla data split runs/tiny/store --fractions 0.24,0.24,0.48      # the rest is held out
    nla teach runs/tiny/store lexical --rows av_sft,ar_sft,held_out
    nla build runs/tiny/store --target runs/tiny/lm/export/target
    nla train ar --config=tiny
    nla train av --config=tiny
    nla train rl --config=tiny

Hardware it is meant for: a CPU with two cores. The model has 4 blocks of width 128, 0.8 million parameters beside the
tokens' embeddings, which are most of it with a tokenizer of a large vocabulary.

Result to expect: everything runs and losses fall. A model this small, trained this briefly, holds little that could
be explained; no number is claimed for it.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All four stages, in float32."""
    config = ConfigDict()
    config.out = "runs/tiny"
    config.target = "runs/tiny/lm/export/target"
    config.store = "runs/tiny/store"
    config.seed = 0
    config.mesh = {"data": 1}  # one device, whatever the machine has: the batches are small
    config.param_dtype = "float32"
    config.compute_dtype = "float32"
    config.remat = "none"
    config.logit_chunk = 512
    config.log_every = 10
    config.eval_rows = 128
    config.lm = ConfigDict(
        {
            "corpus": None,
            "tokenizer": None,
            "steps": 300,
            "batch_size": 32,
            "length": 128,
            "save_every": 100,
            "optim": {"name": "adamw", "lr": 3e-3, "warmup": 20.0},
            "model": {  # a config.json; vocab_size is the tokenizer's
                "model_type": "qwen2",
                "hidden_size": 128,
                "intermediate_size": 384,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 2048,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "tie_word_embeddings": True,
            },
        }
    )
    for stage in ("ar", "av"):
        config[stage] = ConfigDict(
            {
                "steps": 150,
                "epochs": None,
                "batch_size": 64,
                "eval_every": 75,
                "save_every": 50,
                "optim": {"name": "adamw", "lr": 1e-3, "warmup": 10.0},
            }
        )
    config.rl = ConfigDict(
        {
            "steps": 50,
            "batch_size": 16,
            "samples": 8,
            "max_new_tokens": 64,
            "eval_every": 25,
            "save_every": 25,
            "av_optim": {"name": "adamw", "lr": 2e-4, "schedule": "constant", "warmup": 5.0},
            "ar_optim": {"name": "adamw", "lr": 5e-4, "schedule": "constant", "warmup": 5.0},
        }
    )
    return config
