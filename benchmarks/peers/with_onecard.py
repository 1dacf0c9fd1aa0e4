"""onecard itself, through its pipeline in a process of its own: quantize, emit, verify."""

import json

from contract import Job, run

RECIPE = {
    "description": "benchmark",
    "bits": 4,
    "calibration_row_tokens": 512,
    "evaluation_rows": 100_000,
    "evaluation_row_tokens": 512,
    "warn_below_expert_rows": 0,
}


def quantize(job: Job) -> None:
    from onecard.pipeline import Options
    from onecard.pipeline import quantize as pipeline
    from onecard.recipe import Recipe

    plan = json.loads((job.folder / "job.json").read_text())
    recipe = Recipe.model_validate(
        RECIPE
        | {"name": job.options["method"], "group_size": job.group, "quantize_roles": tuple(plan["roles"])}
        | {"calibration_rows": plan["rows"]}
        | job.options
    )
    pipeline(
        str(job.model),
        job.checkpoint,
        recipe,
        Options(
            "cpu",
            work=job.folder / "work",
            calibration=job.inputs / "calibration.jsonl",
            evaluation=job.inputs / "choice.jsonl",
        ),
        quiet=True,
    )


def dense(job: Job) -> dict[str, object]:
    import torch

    from onecard.checkpoint.model import open_model

    model = open_model(str(job.checkpoint))
    out = {}
    for name in job.weights:
        # fp32, so that the product is not rounded to bf16 again.
        out[name] = model.source.dense(name, torch.float32) if name in model.packed else model.source.get(name)
    return out


if __name__ == "__main__":
    run(quantize, dense, ("onecard", "torch", "transformers", "compressed-tensors"))
