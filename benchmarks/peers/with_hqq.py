"""HQQ (half-quadratic quantization, no calibration): HQQLinear on every slice, asymmetric, its own solver's defaults.

hqq's `quantize_model` replaces nn.Linear modules, and fused experts are none. So each weight is given to HQQLinear as a
Linear of its own. The files hold HQQLinear's state: packed codes, scales and zero points in fp16.
"""

from contract import Job, run, save_slices, stored

KEPT = ("W_q", "scale", "zero")


def _layer(weight, group: int, dtype):  # type: ignore[no-untyped-def]
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.float()
    config = BaseQuantizeConfig(nbits=4, group_size=group, axis=1)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")


def quantize(job: Job) -> None:
    import torch

    source = job.source()
    packed = {}
    for name in job.weights:
        state = _layer(source[name], job.group, torch.float16).state_dict()
        packed |= {f"{name.removesuffix('.weight')}.{key}": state[key] for key in KEPT}
    save_slices(job, packed, source)


def dense(job: Job) -> dict[str, object]:
    import torch

    held, source, out = dict(stored(job.checkpoint)), job.source(), {}
    for name in job.weights:
        layer = _layer(torch.ones_like(source[name]), job.group, torch.float32)  # an empty one of the same shape
        module = name.removesuffix(".weight")
        layer.W_q = torch.nn.Parameter(held[f"{module}.W_q"], requires_grad=False)
        layer.meta |= {key: held[f"{module}.{key}"].float() for key in ("scale", "zero")}
        out[name] = layer.dequantize()
    return out


if __name__ == "__main__":
    run(quantize, dense, ("hqq", "torch"))
