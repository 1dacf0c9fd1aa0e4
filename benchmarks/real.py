"""A really trained model, and texts that calibration does not resemble: our methods and other tools.

    python benchmarks/real.py make                                      # model, texts; checked
    python benchmarks/real.py run --method fast --group 64 --choice     # judged on the choice rows
    python benchmarks/real.py run --method balanced --group 64 --set token_weighting=none --choice
    python benchmarks/real.py run --peer auto-round --group 64          # judged on the test rows, for final runs alone
    python benchmarks/real.py run --method fast --group 64 --set damping=0.05 --choice --every 4    # a quick look
    python benchmarks/real.py run --method fast --group 64 --texts broad --choice    # other texts calibrate, too
    python benchmarks/real.py table --choice
    python benchmarks/real.py keep                                      # test rows into docs/results/real.json

The model is SmolLM2-135M-Instruct, from a package on PyPI, read as a mixture of four experts that are all chosen, which
computes the same function (real_model/mixture.py). Texts are Debian's (`make` needs apt-get and dpkg-deb), the standard
library's and the model's own (real_model/documents.py). Other tools need their environments (`make peers-env`).
Everything is kept in build/real. A job that is finished for the same inputs is only judged again, unless `--again`.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]

from real_model import documents, jobs, kept, made  # noqa: E402


def make(build: Path) -> None:
    made.make_model(build)
    facts = made.make_texts(build)
    for form in made.FORMS:
        made.make_inputs(build, form)
    print(json.dumps({"texts": facts, "check": made.check(build)}, indent=1))


def run(build: Path, given: argparse.Namespace) -> int:
    changed: dict[str, Any] = {}
    for item in given.set or ():
        key, _, value = item.partition("=")
        changed[key] = yaml.safe_load(value)
    job = jobs.job_of(given.method, given.peer, given.group, changed, given.rows, given.texts)
    found = jobs.carried_out(job, build, given)
    found["machine"] = {"platform": platform.platform(), "cores": os.cpu_count(), "threads": given.threads}
    jobs.keep(results_of(build, given), found)
    print(jobs.markdown([found]))
    return int("error" in found)


def results_of(build: Path, given: argparse.Namespace) -> Path:
    return build / f"results-{'choice' if given.choice else 'test'}{f'-{given.every}' if given.every > 1 else ''}.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, default=HERE.parent / "build" / "real")
    parser.add_argument("--peers", type=Path, default=HERE.parent / "build" / "peers", help="other tools' environments")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("make", help="model and texts")
    running = verbs.add_parser("run", help="one job, judged")
    which = running.add_mutually_exclusive_group(required=True)
    which.add_argument("--method", help="one of ours")
    which.add_argument("--peer", help="another tool's, by its name in peers/field.py")
    running.add_argument("--group", type=int, choices=jobs.GROUPS, default=jobs.GROUPS[0])
    running.add_argument("--set", action="append", metavar="KEY=VALUE", help="another value of the recipe or the tool")
    running.add_argument("--rows", type=int, help="this many calibration rows, the first ones")
    running.add_argument("--texts", choices=documents.MIXTURES, default="home", help="what calibrates")
    running.add_argument("--again", action="store_true", help="run a job that is finished once more")
    running.add_argument("--threads", type=int, default=1)
    running.add_argument("--timeout", type=float, default=6 * 3600, help="seconds that the job may take")
    table = verbs.add_parser("table", help="all results as markdown")
    verbs.add_parser("keep", help="put the results on test rows where the documents' tables come from")
    for verb in (running, table):
        verb.add_argument("--choice", action="store_true", help="the choice rows, not the test rows")
        verb.add_argument("--every", type=int, default=1, metavar="N", help="judge every N-th row of each kind alone")
    given = parser.parse_args()
    logging.set_verbosity_error()
    build = given.build.resolve()
    if given.verb == "make":
        make(build)
    elif given.verb == "run":
        return run(build, given)
    elif given.verb == "keep":
        kept.keep(build / "results-test.json")
    else:
        print(jobs.markdown(json.loads(results_of(build, given).read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
