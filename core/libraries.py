"""Switches off other libraries' warnings and progress bars, which would bury ours. Errors still come through."""

import os
import sys

QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}


def quiet_libraries() -> None:
    """Sets variables that transformers, tokenizers and the hub client read when they are imported.

    Imports none of them, so that a refusal costs no second. What the user has set stays.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)


def quiet_loaded_libraries() -> None:
    """The same for libraries that the process has imported already, for which the variables come too late.

    Only a command does this: a program that calls the Python API has its own settings.
    """
    if "transformers" in sys.modules:
        sys.modules["transformers"].utils.logging.set_verbosity_error()
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    if "huggingface_hub" in sys.modules:
        sys.modules["huggingface_hub"].utils.disable_progress_bars()
