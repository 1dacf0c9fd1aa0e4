"""lm-evaluation-harness on two models at once: model classes of the harness that the twin walk answers.

The harness hands a model all requests of all tasks in one call. So no model has to be whole in memory: the requests
become rows, both checkpoints are walked block by block, and the second model's answers are kept until the harness asks
for them.

    pair = open_twin("./Llama-4-Scout-17B-16E-Instruct", "./scout-int4")
    before = lm_eval.simple_evaluate(model=pair.reference, tasks=["arc_easy"])
    after = lm_eval.simple_evaluate(model=pair.quantized, tasks=["arc_easy"])

costs one walk: the second call finds every answer. Tasks that let a model write are refused, since every token would
cost a walk. Needs the extra `onecard[lm-eval]`.
"""

import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..calibration.documents import Document
from ..calibration.tokens import Encoder
from ..checkpoint.activations import Activations
from ..checkpoint.model import Model
from ..core.device import choose_compute
from ..core.errors import InputError
from ..models.walk import Walk
from ..recipe import Recipe, load_recipe
from ..report.progress import Progress
from .choice import OptionRequest, Scored, ask, scores
from .lm_eval_tasks import encode_pair
from .sides import compare_sides
from .twin import twin_walk
from .verify import open_pair

Answer = Callable[[Sequence[OptionRequest]], list[Scored]]


class TwinLM(LM):  # type: ignore[misc, unused-ignore]
    """One of the two models, for the harness. Whole texts are scored in windows of `window_tokens`."""

    def __init__(self, twin: "TwinModels", side: Literal["reference", "quantized"], window_tokens: int) -> None:
        super().__init__()
        self._twin, self._side, self._window_tokens = twin, side, window_tokens

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For every (context, continuation): its log-likelihood in nats, and whether each token is the likeliest."""
        asked = [encode_pair(self._twin.encoder, *request.args[:2]) for request in requests]
        return [self._of(scored) for scored in self._twin.scores(asked)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts in nats, in the harness's own windows."""
        asked: list[OptionRequest] = []
        owner: list[int] = []
        for number, request in enumerate(requests):
            tokenizer = self._twin.encoder.tokenizer
            tokens = tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
            first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
            for window in get_rolling_token_windows(tokens, first, self._window_tokens, 1):
                context, continuation = make_disjoint_window(window)
                asked.append(OptionRequest(tuple(context), tuple(continuation)))
                owner.append(number)
        sums = [0.0] * len(requests)
        for number, scored in zip(owner, self._twin.scores(asked), strict=True):
            sums[number] += self._of(scored)[0]
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        raise InputError("the twin walk scores options and texts; it cannot answer tasks that let the model write")

    def _of(self, scored: Scored) -> tuple[float, bool]:
        if self._side == "reference":
            return scored.logp_reference, scored.greedy_reference
        return scored.logp_quantized, scored.greedy_quantized


# The harness's texts are not known beforehand. Two that show another vocabulary, another begin token or template.
PROBES = (
    Document("a plain text", "text", "The answer is 42: 'naïve' café, x_1 = {3.14}\n\tdef f(): return \"日本\"", None),
    Document(
        "a conversation",
        "conversation",
        None,
        [{"role": "user", "content": "What is 6 x 7?"}, {"role": "assistant", "content": "It is 42."}],
    ),
)


class TwinModels:
    """Both models, and every answer found so far: each request is answered for both."""

    def __init__(self, encoder: Encoder, answer: Answer, window_tokens: int) -> None:
        self.encoder = encoder
        self._answer = answer
        self._known: dict[OptionRequest, Scored] = {}
        self.reference = TwinLM(self, "reference", window_tokens)
        self.quantized = TwinLM(self, "quantized", window_tokens)

    def scores(self, requests: Sequence[OptionRequest]) -> list[Scored]:
        """One entry per request; the new ones share one walk."""
        new = [request for request in dict.fromkeys(requests) if request not in self._known]
        if new:
            self._known |= zip(new, self._answer(new), strict=True)
        return [self._known[request] for request in requests]


def open_twin(
    source_name: str, checkpoint: str, recipe: Recipe | None = None, device_name: str = "auto", quiet: bool = True
) -> TwinModels:
    """The original and a checkpoint of it, for the harness. The recipe (by default `rtn-int4`) says how to compute.

    Warns of every config field in which they differ, and where they encode PROBES differently. Raises InputError if the
    second is no version of the first.
    """
    recipe = recipe or load_recipe("rtn-int4")
    source, quantized = open_pair(source_name, checkpoint)
    encoder = Encoder(source.path, source.adapter)
    probes = PROBES if encoder.tokenizer.chat_template else PROBES[:1]
    for line in compare_sides(source, quantized, encoder, probes, ()).warnings:
        warnings.warn(line, stacklevel=2)
    answer = partial(_answer, source, quantized, recipe, device_name, quiet)
    return TwinModels(encoder, answer, recipe.texts.evaluation_row_tokens)


def _answer(
    source: Model, quantized: Model, recipe: Recipe, device_name: str, quiet: bool, requests: Sequence[OptionRequest]
) -> list[Scored]:
    compute = choose_compute(device_name, recipe.compute_dtype, recipe.batch_tokens)
    asking = ask(requests)
    with (
        tempfile.TemporaryDirectory(prefix="onecard-lm-eval-") as folder,
        Progress("onecard lm-eval", source.adapter.n_blocks, None, quiet) as progress,
    ):
        reference = Walk.over(source.adapter, source.source, compute, progress)
        other = reference.beside(quantized.adapter, quantized.source)
        twin = twin_walk(reference, other, [], Activations(Path(folder), compute.device), asked=asking.asked)
    assert twin.answers is not None
    return scores(asking, twin.answers)
