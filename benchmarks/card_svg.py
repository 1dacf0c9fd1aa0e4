"""Draw the picture of the card in README.md: `python benchmarks/card_svg.py out/demo-int4 docs/card.svg`."""

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from onecard.core.record.reading import read_record
from onecard.report.card import draw_card


def main(out: str, picture: str) -> None:
    record = read_record(Path(out))
    console = Console(record=True, width=100, file=io.StringIO(), force_terminal=True)
    draw_card(record, out, console)
    # rich would load fonts from the network; the reader's own monospace does as well.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="onecard"), flags=re.DOTALL)
    Path(picture).write_text(svg, encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
