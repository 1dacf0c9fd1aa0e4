"""Other libraries' warnings and progress bars would bury ours: they are switched off before those libraries load."""

import os

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries() -> None:
    """Sets environment variables that transformers, tokenizers and the hub client read when they are imported.

    What the user has set stays. Errors still come through.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
