"""GPUs by name: their memory and their peak rate."""

# name -> (GB, 10^12 FLOPs a second of a dense product of 16-bit numbers, added in float32): NVIDIA's and AMD's data sheets
CARDS = {
    "t4": (16, 65), "v100": (32, 125), "a10": (24, 125), "l4": (24, 121), "rtx3090": (24, 71), "rtx4090": (24, 165),
    "rtx5090": (32, 209), "l40s": (48, 362), "a100": (80, 312), "h100": (80, 989), "h200": (141, 989), "b200": (180, 2250),
    "mi300x": (192, 1307),
}  # fmt: skip
