"""torchao int4 weight-only (no calibration): asymmetric, scales and zero points in bf16, one Linear a slice.

Its stable formats want CUDA or XPU. The format that runs on a CPU is a prototype (Int4OpaqueTensor, packed for the
tinygemm kernel). It refuses 3-D experts (`Expecting 2D tensor`), so `quantize_` gets each slice as an nn.Linear. HQQ
chooses the scales; torchao calls it the more accurate of its two algorithms. Read back by sending the identity through
its kernel in fp32, which multiplies each code by 1 or by 0.
"""

from contract import Job, run, save_slices, stored


def _quantized(weight, group: int):  # type: ignore[no-untyped-def]
    import torch
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import quantize_
    from torchao.quantization.quantize_.workflows import Int4ChooseQParamsAlgorithm

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
    linear.weight.data = weight.clone()
    holder = torch.nn.Sequential(linear)
    quantize_(holder, PrototypeInt4WeightOnlyConfig(group, Int4ChooseQParamsAlgorithm.HQQ, set_inductor_config=False))
    return holder[0].weight


def quantize(job: Job) -> None:
    source = job.source()
    packed = {}
    for name in job.weights:
        tensor = _quantized(source[name], job.group)
        packed |= {f"{name}.qdata": tensor.qdata, f"{name}.scale_and_zero": tensor.scale_and_zero}
    save_slices(job, packed, source)


def dense(job: Job) -> dict[str, object]:
    import torch

    held, source, out = dict(stored(job.checkpoint)), job.source(), {}
    for name in job.weights:
        outputs, inputs = source[name].shape
        columns = torch.ops.aten._weight_int4pack_mm_for_cpu(
            torch.eye(inputs), held[f"{name}.qdata"], job.group, held[f"{name}.scale_and_zero"].float()
        )
        out[name] = columns[:, :outputs].T
    return out


if __name__ == "__main__":
    run(quantize, dense, ("torchao", "torch"))
