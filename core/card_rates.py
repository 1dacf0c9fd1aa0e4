"""How fast a GPU and its machine are at what a run's work consists of; and what is assumed of an H100.

A run on a GPU is a stream of kernels. Large products take the tensor cores' rate, others that of fp32; factorisations
are slower; the solver's own kernels (quantize/kernels.py) are bound by the instructions that a card issues; all the
rest by its memory. The host takes some microseconds for each launch, whatever the kernel. planner/card_work.py counts
these amounts, and benchmarks/gpu_cost.py counts them in the real code; both cost what is assumed here.
"""

from dataclasses import dataclass, replace

from .rates import Rates


@dataclass(frozen=True)
class CardRates:
    """Amounts a second. A multiply-add is two operations."""

    # Operations of matrix products: of bf16 on the tensor cores, and of fp32.
    bf16_flops: float
    fp32_flops: float
    # Of bf16 in the solver's own product, which cuts fp32 numbers into parts on the way.
    tiled_flops: float
    # Operations of Cholesky factorisations and of triangular solves, fp32.
    factor_flops: float
    # Instructions that all schedulers issue to warps, in kernels whose steps depend on one another.
    warp_instructions: float
    # Bytes between the card's memory and its multiprocessors.
    card_bytes: float
    # Kernels that the host launches, and that the card ends one after the other where each has next to nothing to do.
    launches: float
    kernels: float
    # Bytes of copies between RAM and the card: pinned memory, and memory that the system may move.
    pinned_bytes: float
    pageable_bytes: float
    # Bytes of the disk, and of SHA-256 on one core.
    read_bytes: float
    write_bytes: float
    digest_bytes: float
    # Files that are forced to the disk.
    fsyncs: float

    def at(self, bf16_flops: float) -> "CardRates":
        """A card that multiplies bf16 so fast, and is as much faster or slower at all that it computes."""
        factor = bf16_flops / self.bf16_flops
        names = ("bf16_flops", "fp32_flops", "tiled_flops", "factor_flops", "warp_instructions", "card_bytes")
        return replace(self, **{name: factor * getattr(self, name) for name in names})

    @property
    def by_kind_of_work(self) -> Rates:
        """For estimates that know no kernels (planner/pricing_cost.py)."""
        flops = (self.bf16_flops, self.bf16_flops, self.fp32_flops, self.bf16_flops)
        return Rates(*flops, self.read_bytes, self.write_bytes)


@dataclass(frozen=True)
class AssumedCard:
    """A machine with one GPU that is not at hand. Nothing of it was measured by us."""

    rates: CardRates
    # Memory of the card as programs see it, and RAM of the machine that is free.
    card_bytes: int
    ram_bytes: int


# Multiprocessors of an H100 SXM, their schedulers, and cycles a second under load (NVIDIA, H100 architecture, 2022).
MULTIPROCESSORS, SCHEDULERS, CLOCK = 132, 4, 1.7e9
# Instructions a cycle that a scheduler issues in a loop of dependent steps, of the one that it could: an estimate.
ISSUED = 0.5

H100_80GB = AssumedCard(
    rates=CardRates(
        # 60 % of NVIDIA's 989 TFLOP/s for dense matrices, which is what large products reach.
        bf16_flops=593e12,
        # fp32 without tensor cores: 67 TFLOP/s at most.
        fp32_flops=50e12,
        # Half of a library's: an estimate.
        tiled_flops=296.5e12,
        # Half of the fp32 products.
        factor_flops=25e12,
        warp_instructions=MULTIPROCESSORS * SCHEDULERS * CLOCK * ISSUED,
        # 80 % of 3.35 TB/s.
        card_bytes=2.7e12,
        # Through torch a launch takes 4 to 8 microseconds; Python's work between two launches is a part of it.
        launches=200e3,
        kernels=400e3,
        # PCIe 5 x16.
        pinned_bytes=50e9,
        pageable_bytes=10e9,
        # A plain NVMe disk.
        read_bytes=1e9,
        write_bytes=1e9,
        # One core with its own instructions for it.
        digest_bytes=1.5e9,
        fsyncs=1e3,
    ),
    card_bytes=84_900_000_000,
    ram_bytes=200_000_000_000,
)
# Instructions that a warp of each of the solver's kernels issues, from code assembled for sm_90
# (benchmarks/kernels.py), and the rows of a warp (quantize/launch.py).
GPTQ_COLUMN, GPTQ_ROWS = 548, 8
REFIT_COLUMN, SWEEP_COLUMN, REFINE_ROWS = 125, 382, 4
RESTART_COLUMN, TRY_COLUMN, TRY_ROUND, RESTART_ROWS = 79, 413, 277, 2
TABU_MOVE, TABU_COLUMN, TABU_ROWS = 356, 71, 2
# For each multiple of the scale, of a group of 128 columns.
SCALE_MULTIPLE, SCALE_ROWS = 510, 4
ASSUMED = {"h100-80gb": H100_80GB}
