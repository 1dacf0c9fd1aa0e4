"""auto-gptq's `GPTQ` class on given weights and rows. Runs in auto-gptq's environment: `gptq_reference.py FOLDER`.

FOLDER holds `problems.safetensors`, with `NAME.weight` [out, in] and `NAME.rows` [n, in] in fp32, and `settings.json`,
a list of group_size, damping, act_order, static_groups. Writes `reference.safetensors`: for problem NAME and setting
number I, the quantized weight `NAME.I.weight` and `NAME.I.scales` [out, groups]. Symmetric, 4 bits, their class from
end to end.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def main() -> int:
    from auto_gptq.quantization.gptq import GPTQ

    torch.cuda.synchronize = lambda *args: None  # it calls it on any machine
    folder = Path(sys.argv[1])
    tensors, out = load_file(folder / "problems.safetensors"), {}
    for number, setting in enumerate(json.loads((folder / "settings.json").read_text())):
        for name in sorted({key.rpartition(".")[0] for key in tensors}):
            weight, rows = tensors[f"{name}.weight"], tensors[f"{name}.rows"]
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight.data = weight.clone()
            solver = GPTQ(linear)
            solver.quantizer.configure(4, perchannel=True, sym=True, mse=False)
            solver.add_batch(rows[None], None)
            scales, _, _ = solver.fasterquant(
                percdamp=setting["damping"],
                group_size=setting["group_size"],
                actorder=setting["act_order"],
                static_groups=setting["static_groups"],
            )
            out[f"{name}.{number}.weight"], out[f"{name}.{number}.scales"] = linear.weight.data, scales.contiguous()
    save_file({key: tensor.contiguous() for key, tensor in out.items()}, folder / "reference.safetensors")
    return 0


if __name__ == "__main__":
    sys.exit(main())
