"""Names of files that onecard writes beside the weights, known without loading torch."""

from pathlib import Path

# The record of a run.
RECORD_NAME = "onecard.json"
# Where transformers looks for chat templates with names of their own. No other folder belongs to a checkpoint.
TEMPLATE_FOLDER = "additional_chat_templates"


def is_own_name(name: str) -> bool:
    """Whether a name, as a record or SHA256SUMS has it, is that of a file of the checkpoint's folder or of its
    TEMPLATE_FOLDER, and leads nowhere else."""
    inner = name.removeprefix(f"{TEMPLATE_FOLDER}/")
    return Path(inner).name == inner and inner not in ("", ".", "..")
