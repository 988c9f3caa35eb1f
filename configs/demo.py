"""The miniature NLA of `nla demo`: a language model of a small story world, and the pair that explains it.

`nla demo --out demo` runs it all; by hand, after `nla demo` has written demo/world:

    nla train lm --config=demo
    nla extract demo/world/stories.jsonl --target demo/lm/export/target --layer 2 --out demo/store \
        --per-document 8 --min-position 16
    nla teach demo/store file:demo/world/notes.jsonl --rows av_sft,ar_sft,held_out
    nla data split demo/store --fractions 0.24,0.24,0.48        # the rest is held out
    nla build demo/store --target demo/lm/export/target --template-from demo/world/templates.yaml
    nla train ar --config=demo
    nla train av --config=demo
    nla train rl --config=demo

Hardware it is meant for: a laptop CPU with two cores. Result to expect: the README's table.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """All four stages, in float32."""
    config = ConfigDict()
    config.out = "demo"
    config.target = "demo/lm/export/target"
    config.store = "demo/store"
    config.seed = 0
    config.mesh = {"data": 1}  # one device, whatever the machine has: the batches are small
    config.param_dtype = "float32"
    config.compute_dtype = "float32"
    config.logit_chunk = 4096
    config.log_every = 10
    config.eval_rows = 512
    config.lm = ConfigDict(
        {
            "corpus": "demo/world/lm.jsonl",
            "tokenizer": "demo/world/tokenizer",
            "steps": 350,
            "batch_size": 16,
            "length": 256,
            "optim": {"name": "muon", "lr": 0.02, "adam_lr": 5e-3, "schedule": "linear", "end": 0.1},
            "model": {  # a config.json; ids and vocab_size are the tokenizer's
                "model_type": "mistral",
                "architectures": ["MistralForCausalLM"],
                "hidden_act": "silu",
                "hidden_size": 64,
                "intermediate_size": 192,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 4,
                "head_dim": 16,
                "max_position_embeddings": 1024,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "sliding_window": None,
                "tie_word_embeddings": False,
                "attention_dropout": 0.0,
            },
        }
    )
    for stage in ("ar", "av"):
        config[stage] = ConfigDict(
            {
                "steps": 450 if stage == "av" else 250,
                "epochs": None,
                "batch_size": 128,
                "buckets": (32, 40),
                "optim": {"name": "muon", "lr": 0.01, "adam_lr": 2e-3, "schedule": "linear", "end": 0.1},
            }
        )
    config.rl = ConfigDict(
        {
            "steps": 250,
            "batch_size": 16,
            "samples": 8,
            "max_new_tokens": 32,
            "eval_every": 50,
            # Texts lose their order in half of the groups and their quotes in half: an AR that has to do without
            # cannot make them a code.
            "transforms": (("shuffle", 0.5), ("drop_quotes", 0.5)),
            "replay_av": 0.1,
            "kl": "k3",
            "kl_coef": 0.01,
            "av_optim": {"name": "adamw", "lr": 5e-4, "schedule": "linear", "end": 0.2, "warmup": 10.0},
            "ar_optim": {"name": "adamw", "lr": 1e-3, "schedule": "linear", "end": 0.2, "warmup": 10.0},
        }
    )
    return config
