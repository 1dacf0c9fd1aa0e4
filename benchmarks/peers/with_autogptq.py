"""auto-gptq's GPTQ class and QuantLinear, in our own loop over transformers' blocks, since it knows neither model.

The loop follows auto-gptq's: block by block, and inside a block q/k/v, o, gates and ups, downs, each on inputs that
have passed the matrices quantized so far. Activation order has static groups, so no order has to be stored. Llama 4's
fused experts are first taken apart into Linears that see their own rows only. transformers 4.57 ignores
`rope_parameters` and `num_local_experts` of newer configs; both are set by hand.
"""

import json
import re

from contract import Job, canonical_modules, modules_of, run

STAGES = (r"self_attn\.[qkv]_proj$", r"self_attn\.o_proj$", r"(gate_proj|up_proj)$", r"down_proj$")
DAMPING = 0.01  # the class's default


def _unfused(experts):  # type: ignore[no-untyped-def]
    """Llama 4's fused experts as Linears. Its input has every row once an expert; rows of other experts are zeros."""
    import torch
    from torch import nn

    class Expert(nn.Module):
        def __init__(self, gate_up, down):  # type: ignore[no-untyped-def]
            super().__init__()
            gate, up = gate_up.chunk(2, dim=1)
            for name, weight in (("gate_proj", gate.T), ("up_proj", up.T), ("down_proj", down.T)):
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
                linear.weight.data = weight.contiguous()
                setattr(self, name, linear)

        def forward(self, x):  # type: ignore[no-untyped-def]
            return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))

    class Experts(nn.ModuleList):
        def forward(self, x):  # type: ignore[no-untyped-def]
            out = torch.zeros_like(x).view(len(self), -1, x.shape[-1])
            for number, (expert, rows) in enumerate(zip(self, x.view(out.shape), strict=True)):
                own = rows.any(dim=-1)
                if own.any():
                    out[number, own] = expert(rows[own])
            return out.view_as(x)

    pairs = zip(experts.gate_up_proj.data, experts.down_proj.data, strict=True)
    return Experts([Expert(gate_up, down) for gate_up, down in pairs])


def _text_model(job: Job):  # type: ignore[no-untyped-def]
    """The text model with plain Linears, fp32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Llama4ForConditionalGeneration

    raw = json.loads((job.model / "config.json").read_text())
    config = AutoConfig.from_pretrained(job.model)
    if "rope_theta" in raw.get("rope_parameters", {}):
        config.rope_theta = raw["rope_parameters"]["rope_theta"]
    if "num_local_experts" in raw:
        config.num_experts = raw["num_local_experts"]
    cls = Llama4ForConditionalGeneration if raw["model_type"] == "llama4" else AutoModelForCausalLM
    model = cls.from_pretrained(job.model, config=config, dtype=torch.float32).eval()
    text = model.language_model.model if raw["model_type"] == "llama4" else model.model
    for layer in text.layers:
        if raw["model_type"] == "llama4" and hasattr(layer.feed_forward, "experts"):
            layer.feed_forward.experts = _unfused(layer.feed_forward.experts)
    return model, text


def _linears(layer, pattern: str):  # type: ignore[no-untyped-def]
    from torch import nn

    return {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear) and re.search(pattern, n)}


def quantize(job: Job) -> None:
    import torch
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear
    from auto_gptq.quantization.gptq import GPTQ
    from safetensors.torch import save_file

    torch.cuda.synchronize = lambda *args: None
    _, text = _text_model(job)
    calls, packed = [], {}
    for layer in text.layers:
        layer.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args[1:], kwargs)), with_kwargs=True)
    with torch.inference_mode():
        text(input_ids=job.rows()[:1], use_cache=False)  # each layer's other arguments, equal for rows of one length
    hidden = [text.embed_tokens(row[None]).detach() for row in job.rows()]
    made = list(calls)
    for number, layer in enumerate(text.layers):
        layer._forward_pre_hooks.clear()
        args, kwargs = made[number]
        kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}

        def forward(h, layer=layer, args=args, kwargs=kwargs):  # type: ignore[no-untyped-def]
            with torch.no_grad():
                out = layer(h, *args, **kwargs)
            return out[0] if isinstance(out, tuple) else out

        for stage in STAGES:
            linears = _linears(layer, stage)
            solvers, hooks = {}, []
            for name, module in linears.items():
                solver = solvers[name] = GPTQ(module)
                solver.quantizer.configure(4, perchannel=True, sym=True, mse=False)
                hooks.append(module.register_forward_hook(lambda m, i, o, s=solver: s.add_batch(i[0].data, o.data)))
            for h in hidden:
                forward(h)
            for hook in hooks:
                hook.remove()
            for name, module in linears.items():
                if not solvers[
                    name
                ].nsamples:  # the class divides by the number of tokens; with H = 1 it rounds to nearest
                    solvers[name].nsamples = 1
                    solvers[name].H.fill_diagonal_(1)
                    print(f"layers.{number}.{name} saw no token: rounded to nearest")
                scale, zero, g_idx = solvers[name].fasterquant(
                    percdamp=DAMPING, group_size=job.group, actorder=True, static_groups=True
                )
                store = QuantLinear(4, job.group, module.in_features, module.out_features, bias=False)
                store.pack(module, scale, zero, g_idx)
                for key in ("qweight", "qzeros", "scales", "g_idx"):
                    packed[f"layers.{number}.{name}.{key}"] = getattr(store, key)
        hidden = [forward(h) for h in hidden]
    known = set(canonical_modules(job))
    assert {name.rpartition(".")[0] for name in packed} == known, sorted(known)[:3]
    job.checkpoint.mkdir()
    kept = {name: tensor for name, tensor in job.source().items() if name not in job.weights}
    save_file({k: v.contiguous() for k, v in (kept | packed).items()}, job.checkpoint / "model.safetensors")


def dense(job: Job) -> dict[str, object]:
    import torch
    from auto_gptq.nn_modules.qlinear.qlinear_cuda_old import QuantLinear

    source, held, out = job.source(), modules_of(job.checkpoint), {}
    for module, name in canonical_modules(job).items():
        outputs, inputs = source[name].shape
        layer = QuantLinear(4, job.group, inputs, outputs, bias=False)
        for key in ("qweight", "qzeros", "scales", "g_idx"):
            setattr(layer, key, held[module][key])
        layer.scales = layer.scales.float()
        out[name] = layer(torch.eye(inputs)).T
    return out


if __name__ == "__main__":
    run(quantize, dense, ("auto-gptq", "transformers", "torch"))
