"""Three sets of texts for the comparison. None shares a row with another or with training.

- calibration: demo/data/calibration.jsonl without its pictures (some peers read text only), packed into equal rows;
- choice:      demo/data/evaluation.jsonl without its pictures. Every choice of this project (methods, strengths, rates)
               was made on these, so no figure of the comparison is measured on them;
- test:        held-out.jsonl beside this file: documents of the same held-out modules. No recipe, test or experiment
               had read them before the comparison, and they are used for nothing but measuring.

`python benchmarks/peers/texts.py` wrote held-out.jsonl (Python 3.11.7; another Python has another library).
"""

import random
import sys
from collections import Counter
from pathlib import Path

from onecard.demo import corpus, tokens

HERE = Path(__file__).parent
DEMO = Path(tokens.__file__).parent
HELD_OUT = HERE / "held-out.jsonl"
BUDGET = {"code": 32_000, "conversation": 22_000, "prose": 6_000}  # tokens, about 60 thousand in all
LEAST_TOKENS, MOST_TOKENS = 256, 700  # as in demo/data.py


def main() -> int:
    tokenizer = tokens.load(DEMO / "model")
    taken = {corpus.digest(row) for row in corpus.documents("train")}
    for name in ("calibration", "evaluation"):
        taken |= {corpus.digest(row, DEMO / "data") for row in corpus.read_jsonl(DEMO / "data" / f"{name}.jsonl")}
    rows = corpus.documents("evaluation")
    random.Random("held out for the comparison").shuffle(rows)
    spent: Counter[str] = Counter()
    chosen = []
    for row in rows:
        size, key = len(tokens.ids_of(tokenizer, tokens.text_of(row))), corpus.digest(row)
        if LEAST_TOKENS <= size <= MOST_TOKENS and key not in taken and spent[row["kind"]] < BUDGET[row["kind"]]:
            taken.add(key)
            spent[row["kind"]] += size
            chosen.append(row)
    corpus.write_jsonl(HELD_OUT, sorted(chosen, key=lambda row: row["id"]))
    print(f"{len(chosen)} documents, {dict(spent)} tokens")
    return 0


if __name__ == "__main__":
    sys.exit(main())
