"""Draw docs/plan.svg, the picture of a plan in docs/sizing.md. update_docs.py calls this.

The plan is for Scout's true shapes, without weights (tests/hollow.py).
"""

import io
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from rich.console import Console

from hollow import published, write_hollow
from onecard.checkpoint.model import open_headers
from onecard.planner.cards import find_card
from onecard.planner.fit import Request
from onecard.planner.sizing import size_up
from onecard.report.fit_card import draw_fit
from onecard.report.plot import draw_plot


def svg() -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "Llama-4-Scout-17B-16E-Instruct"
        write_hollow(folder, published("llama4-scout"))
        _, card = find_card("h100-80gb")
        facts = size_up(open_headers(str(folder)), Request(context=131_072, batch_tokens=2048), card).facts()
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True, markup=False, emoji=False)
    draw_fit(facts, console)
    draw_plot(facts, console)
    # rich would load fonts from the network; the reader's own monospace does as well.
    return re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="onecard plan"), flags=re.DOTALL)
