"""The block formats of GGUF files: a block of weights shares its scales, so that a weight has a fraction of a byte.

    bytes of a weight = bytes of a block / weights of a block           Q4_0: 18 / 32, a 16-bit scale and 32 times 4 bits

Source: ggml's ggml-common.h, the structs block_* and their static_asserts.
"""

BLOCK_FORMATS = {  # name -> (weights, bytes) of a block
    "F32": (1, 4), "F16": (1, 2), "BF16": (1, 2),
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_XS": (256, 136), "IQ4_NL": (32, 18),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17),
}  # fmt: skip
