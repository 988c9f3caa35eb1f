"""Published facts about accelerator chips that `nla plan` counts with. Data only.

`flops`: peak bfloat16 FLOP/s of a chip; `float32`: what is left of it for float32 products, which JAX makes of six
bfloat16 products on TPUs (Precision.HIGHEST) and of CUDA cores on GPUs. `hbm`: bytes of memory that programs can have,
on TPUs as their compiler states it. `hbm_rate`: bytes/s to and from it. `link_rate`: bytes/s that a chip can send to
its neighbours, over all links together and in one direction. `names`: slices, as `nla plan --slice` takes them.

Sources, read in 2026: TPUs: docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, tables of key specifications; where they
give the interconnect in both directions it is halved. H100 SXM and H200 SXM: NVIDIA's data sheets, dense bfloat16;
NVLink's 900 GB/s are of both directions. What a process is left of a GPU's memory is less than the published size,
which stands here.

`KINDS`: what `device_kind` of a JAX device says, in lower case, and the chip that it is. H100s on a PCIe card and in
pairs (NVL) are slower than the SXM ones, and are not here; nor is the GH200.
"""

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")
_NODES = ("1x1x1", "1x1x2", "1x1x4", "1x1x8", "1x2x8", "1x4x8", "1x8x8")

CHIPS = {
    "v4": {
        "flops": 275e12,
        "float32": 275e12 / 6,
        "hbm": 30.75 * 2**30,
        "hbm_rate": 1228e9,
        "link_rate": 300e9,
        "names": _CUBES,
    },
    "v5e": {
        "flops": 197e12,
        "float32": 197e12 / 6,
        "hbm": 15.75 * 2**30,
        "hbm_rate": 819e9,
        "link_rate": 200e9,
        "names": _FLAT,
    },
    "v5p": {
        "flops": 459e12,
        "float32": 459e12 / 6,
        "hbm": 95.74 * 2**30,
        "hbm_rate": 2765e9,
        "link_rate": 600e9,
        "names": _CUBES,
    },
    "v6e": {
        "flops": 918e12,
        "float32": 918e12 / 6,
        "hbm": 31.25 * 2**30,
        "hbm_rate": 1638e9,
        "link_rate": 400e9,
        "names": _FLAT,
    },
    "h100": {
        "flops": 989e12,
        "float32": 67e12,
        "hbm": 80e9,
        "hbm_rate": 3350e9,
        "link_rate": 450e9,
        "names": _NODES,
    },
    "h200": {
        "flops": 989e12,
        "float32": 67e12,
        "hbm": 141e9,
        "hbm_rate": 4800e9,
        "link_rate": 450e9,
        "names": _NODES,
    },
}

KINDS = {
    "tpu v4": "v4",
    "tpu v5e": "v5e",
    "tpu v5 lite": "v5e",
    "tpu v5p": "v5p",
    "tpu v5": "v5p",
    "tpu v6e": "v6e",
    "tpu v6 lite": "v6e",
    "nvidia h100 80gb hbm3": "h100",
    "nvidia h200": "h200",
}
