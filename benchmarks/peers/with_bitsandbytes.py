"""bitsandbytes NF4 (no calibration): blocks of 64, double quantization, `quantize_4bit` on every slice.

Through transformers it replaces nn.Linear modules only, and fused experts silently stay bf16. A block runs along the
flattened weight; the job's group is the block. The files hold bitsandbytes' own serialisation: codes and its packed
quant state.
"""

from contract import Job, run, save_slices, stored


def quantize(job: Job) -> None:
    from bitsandbytes.functional import quantize_4bit

    source = job.source()
    packed = {}
    for name in job.weights:
        codes, state = quantize_4bit(
            source[name].contiguous(), blocksize=job.group, compress_statistics=True, quant_type="nf4"
        )
        packed[name] = codes
        packed |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_slices(job, packed, source)


def dense(job: Job) -> dict[str, object]:
    import torch
    from bitsandbytes.functional import QuantState, dequantize_4bit

    held, out = dict(stored(job.checkpoint)), {}
    for name in job.weights:
        parts = {key: value for key, value in held.items() if key.startswith(f"{name}.")}
        state = QuantState.from_dict(parts, device=torch.device("cpu"))
        state.dtype = torch.float32
        out[name] = dequantize_4bit(held[name], state)
    return out


if __name__ == "__main__":
    run(quantize, dense, ("bitsandbytes", "torch"))
