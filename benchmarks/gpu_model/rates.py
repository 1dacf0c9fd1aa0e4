"""The rates of the counted model: one H100 80 GB in a machine with a plain disk. Nothing here was measured by us.

What the model is good for is counting, ratios, and finding the line at fault.
"""

import math

from onecard.core.card_rates import H100_80GB
from onecard.core.card_rates import MULTIPROCESSORS as MULTIPROCESSORS

ASSUMED = H100_80GB.rates
# Host seconds of a kernel launch through torch: 4 to 8 us. Python's own work between two launches is taken as a part.
LAUNCH_SECONDS = 1 / ASSUMED.launches
# Host seconds of an operation without a kernel: a view, an allocation.
VIEW_SECONDS = 1e-6
# What any kernel takes on the card.
LEAST_KERNEL_SECONDS = 1 / ASSUMED.kernels
# Operations a second. bf16: 60 % of NVIDIA's 989 TFLOP/s for dense matrices. fp32 without tensor cores: 67 TFLOP/s at
# most. TF32: half of 495. fp64: 34 to 67. Factorisations and triangular solves run at half of the fp32 products.
BF16, FP32, SOLVERS = ASSUMED.bf16_flops, ASSUMED.fp32_flops, ASSUMED.factor_flops
TF32, FP64 = 250e12, 30e12
# Bytes a second: 80 % of 3.35 TB/s.
MEMORY = ASSUMED.card_bytes
# PCIe 5 x16, from pinned and from pageable memory.
PINNED, PAGEABLE = ASSUMED.pinned_bytes, ASSUMED.pageable_bytes
# Bytes a second that the CPU reads and writes in torch's own operations, on some cores.
HOST_MEMORY = 20e9
# The planner's figure for a plain NVMe disk (core/rates.py), for reading and for writing.
DISK = ASSUMED.read_bytes
FSYNC_SECONDS = 1 / ASSUMED.fsyncs
# SHA-256 on one core with its own instructions.
DIGEST = ASSUMED.digest_bytes
# The card: bytes that a program sees; multiprocessors, their schedulers, and cycles a second.
CARD_BYTES = H100_80GB.card_bytes
# Instructions that all schedulers issue.
ISSUED_A_SECOND = ASSUMED.warp_instructions
# A product in Triton that cuts its factors itself, of the rate of a library's: an estimate.
TRITON_PRODUCTS = ASSUMED.tiled_flops / ASSUMED.bf16_flops
# RAM that is free when a run begins, in a machine with one such card.
RAM_BYTES = H100_80GB.ram_bytes
# Of it, what the system keeps of the bytes that it read last: a run leaves far more than that free.
CACHED_BYTES = 16_000_000_000
# The bar of the issue: the device peak that leaves room for the context and for fragments.
MOST_DEVICE_BYTES = 74_000_000_000


def product_rate(dtype: str, tensor_cores: bool) -> float:
    """Operations a second of a matrix product. `tensor_cores`: whether fp32 may be rounded to TF32."""
    match dtype:
        case "bfloat16" | "float16":
            return BF16
        case "float64":
            return FP64
        case _:
            return TF32 if tensor_cores else FP32


def kernel_seconds(nbytes: float, flops: float = 0.0, rate: float = math.inf) -> float:
    return max(LEAST_KERNEL_SECONDS, nbytes / MEMORY, flops / rate)
