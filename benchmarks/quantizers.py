"""What each part of the quantizer is worth on the embedded model: `python benchmarks/quantizers.py`.

Same scheme (routed and shared experts int4, group 128), same bytes, same calibration and evaluation rows; each line
adds one part to the line before. Prints mean KL with its 95 % interval, median, p99, same top-1, the ratio of the mean
to round-to-nearest's (absmax / 8), and seconds. Exits 1 when the shipped recipe leaves more than half of
round-to-nearest's mean KL.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers.utils import logging

from onecard.pipeline import quantize
from onecard.recipe import load_recipe

PLAIN: dict[str, Any] = {
    "scale_search": False,
    "activation_order": False,
    "refine_rounds": 0,
    "reference_correction": False,
    "token_weighting": "none",
    "output_blocks": 0,
}
PARTS: list[tuple[str, tuple[str, ...]]] = [
    ("GPTQ: absmax scales, columns in order", ()),
    ("+ activation order, scale search", ("activation_order", "scale_search")),
    ("+ refined scales and codes", ("refine_rounds",)),
    ("+ reference correction", ("reference_correction",)),
    ("+ tokens weighted by residual", ("token_weighting",)),
    ("+ output metric (the demo's recipe)", ("output_blocks",)),
]


def main() -> int:
    logging.set_verbosity_error()
    demo = load_recipe("demo")
    cases = [("round-to-nearest, absmax / 8", demo.model_copy(update={"method": "rtn"}))]
    update = dict(PLAIN)
    for name, keys in PARTS:
        update |= {key: getattr(demo, key) for key in keys}
        cases.append((name, demo.model_copy(update=dict(update))))
    assert cases[-1][1] == demo, "the last line is the shipped recipe"
    print(f"{'':45s}  mean KL   95 % interval       median   p99     top-1   ratio  seconds")
    base = 0.0
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, recipe) in enumerate(cases):
            record = quantize("demo", Path(folder) / str(i), recipe, device_name="cpu", quiet=True)
            kl = record.kl
            base = base or kl["kl_mean_nats"]
            ratio = kl["kl_mean_nats"] / base
            print(
                f"{name:45s}  {kl['kl_mean_nats']:.5f}  {kl['kl_low_nats']:.5f} to {kl['kl_high_nats']:.5f}  "
                f"{kl['kl_median_nats']:.5f}  {kl['kl_p99_nats']:.4f}  {kl['same_top1']:.2%}  {ratio:.3f}  "
                f"{record.machine['seconds']:.0f}",
                flush=True,
            )
    return int(ratio > 0.5)


if __name__ == "__main__":
    sys.exit(main())
