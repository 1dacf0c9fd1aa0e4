"""What the passes of rows through a block keep a card busy with, batch by batch: the code of models/experts.py,
blocks/sums.py, blocks/tuning.py and calibration/sensitivity.py.

Shape legend: T tokens of a batch, K top-k, S = T K rows of all experts, E experts, H hidden size, M intermediate size,
I inputs of a site, X width of a miss, P = 2 M slopes.
"""

from dataclasses import dataclass
from functools import cached_property

from ..core.method import Method
from ..core.slices import COLUMNS_PER_SLICE, TOKENS_PER_SLICE
from ..models.adapter import Adapter, Half, Role, Site
from .busy import Busy, Card
from .card_solver import FP32_PAIRS, PARTS_BYTES
from .layer_kernels import LayerKernels

# Flags for numbers that are not finite, and the look at them: launches of a pass (models/watched.py, core/finite.py).
FLAGS = 17
# Of a batch's routes: sorted, counted and turned (RoutedExperts.forward).
ROUTING = 16
# Of one expert's pass: its input scaled or its output weighted, two products, silu and times.
OF_AN_EXPERT = 5


@dataclass(frozen=True)
class BatchCosts:
    """One batch of T tokens at block `index`."""

    card: Card
    adapter: Adapter
    index: int
    tokens: int
    layer: LayerKernels

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        return self.adapter.sites(self.index)

    @property
    def hidden(self) -> int:
        return self.adapter.hidden_size

    def rows(self, site: Site) -> int:
        """S, or T for a site without experts."""
        return self.tokens * site.entries_per_token

    @cached_property
    def _expert_width(self) -> int:
        """M, 0 for a block without experts."""
        feeding = [site for site in self.sites if site.role is Role.EXPERT and site.feeds]
        return feeding[0].out_features[0] if feeding else 0

    # --- a pass

    def forward(self, half: Half) -> Busy:
        """A batch through one half, with what is looked at for numbers that are not finite: three times the rows."""
        busy = self.card.kernels(self.layer.forward[half])
        busy += self.card.moved(3 * 2.0 * self.tokens * self.hidden, FLAGS)
        return busy + self._experts() if half is Half.FEED_FORWARD else busy

    def whole(self) -> Busy:
        return self.forward(Half.ATTENTION) + self.forward(Half.FEED_FORWARD)

    def norm(self) -> Busy:
        return self.card.kernels(self.layer.norm)

    def _experts(self) -> Busy:
        h, m, e = self.hidden, self._expert_width, self.adapter.n_experts
        if not m:
            return Busy()
        s = self.tokens * self.adapter.top_k
        busy = self.card.product(s / e, h, 2 * m, e) + self.card.product(s / e, m, h, e)
        # Rows are dispatched, scaled or weighted, joined, and added up slot by slot: 4, 4, 4, and 4 + 6 bytes; silu 4
        # and times 6.
        added = 2 * self.adapter.top_k
        busy += self.card.moved(s * (22.0 * h + 10.0 * m), (OF_AN_EXPERT - 2) * e + added)
        return busy + self.card.moved(40.0 * 8 * s, ROUTING)

    def back(self, half: Half) -> Busy:
        """The way back through a half to its rows, after its pass."""
        busy = self.card.kernels(self.layer.back[half])
        h, m, e = self.hidden, self._expert_width, self.adapter.n_experts
        if half is Half.ATTENTION or not m:
            return busy
        s = self.tokens * self.adapter.top_k
        # Of silu and times: 26 bytes; of dispatching, scaling and adding up: as there, once more.
        busy += self.card.product(s / e, 2 * m, h, e) + self.card.product(s / e, h, m, e)
        return busy + self.card.moved(s * (24.0 * h + 26.0 * m), 9 * e)

    def _back_to_weights(self) -> Busy:
        """The way back through the feed-forward half to its matrices; nothing goes to the rows that entered."""
        busy = self.card.kernels(self.layer.to_weights)
        h, m, e = self.hidden, self._expert_width, self.adapter.n_experts
        if not m:
            return busy
        s = self.tokens * self.adapter.top_k
        busy += self.card.product(s / e, h, m, e) + self.card.product(h, s / e, m, e)
        busy += self.card.product(2 * m, s / e, h, e)
        return busy + self.card.moved(s * (12.0 * h + 26.0 * m), 8 * e)

    # --- statistics

    def moment(self, site: Site, width: int) -> Busy:
        """Second moments or misses of a site: one product of scaled bf16 rows an expert, added to its sum."""
        s, e = self.rows(site), len(site.members)
        return self.card.product(width, s / e, site.in_features, e)

    def statistics(self, site: Site, method: Method) -> Busy:
        """What blocks/sums.py adds for one site. Rows are scaled in fp32 and rounded: 12 bytes a number of bf16, 14 of
        fp32."""
        s, i, h = self.rows(site), site.in_features, self.hidden
        # The token's weight, of the rows that leave the half: a square and a mean.
        busy = self.card.moved(12.0 * self.tokens * h + 12.0 * s * i, 12) + self.moment(site, i)
        if site.role is Role.EXPERT:
            # Rows of all experts are joined; the weights of each are summed.
            busy += self.card.moved(4.0 * s * i, 2) + self.card.moved(0.0, len(site.members))
        if method.reference_correction:
            width = h if site.adds_to_residual else i
            # The miss is taken by token (8), or made of both streams' rows in fp32 (24), which for experts are joined
            # and brought into one order first (8).
            made = 8.0 * h if site.adds_to_residual else 24.0 * i + (8.0 * i if site.role is Role.EXPERT else 0.0)
            busy += self.card.moved(s * (made + 14.0 * width), 14) + self.moment(site, width)
        if method.output_metric and site.feeds:
            busy += self._slopes(site)
        return busy

    def _slopes(self, site: Site) -> Busy:
        """swiglu_slopes and add_slopes, expert by expert: 88 bytes a number of M, and 14 for the scaled slopes."""
        s, h, e = self.rows(site), self.hidden, len(site.members)
        m = site.out_features[0]
        p = 2 * m
        busy = self.card.product(s / e, h, p, e) + self.card.product(p, s / e, p, e)
        return busy + self.card.moved(s * (88.0 * m + 14.0 * p), 20 * e)

    def miss(self) -> Busy:
        """The rows where the half ends, of both streams in fp32, and their difference."""
        return self.card.moved(24.0 * self.tokens * self.hidden, 3)

    # --- tuning

    def tuned(self, parameters: float, matrices: int, method: Method) -> Busy:
        """One step: the half forward and back, its cost, and Adam for every matrix. A weight's gradient becomes fp32
        (6 bytes), Adam reads four numbers and writes three (28), and the held weight is written (6)."""
        t, h = self.tokens, self.hidden
        busy = self.forward(Half.FEED_FORWARD) + self._back_to_weights()
        busy += self.card.moved(60.0 * t * h, 30)
        if method.output_metric:
            busy += self.card.product(t, h, h, parts=FP32_PAIRS)
            busy += self.card.moved(PARTS_BYTES * (1.0 * t * h + h * h), 12)
        return busy + self.card.moved(40.0 * parameters, 8.0 * matrices)

    # --- the walk back

    def walked_back(self) -> Busy:
        """Forward and back with gradients of the activations, and their outer products at the block's end and at the
        attention's matrices."""
        busy = self.whole() + self.back(Half.ATTENTION) + self.back(Half.FEED_FORWARD)
        widths = [self.hidden] + [sum(s.out_features) for s in self.sites if s.role is Role.ATTENTION]
        for width in widths:
            # The gradient in fp32 (6), squared and summed (12), weighted (8), and rounded (6).
            busy += self.card.moved(self.tokens * 32.0 * width, 20)
            busy += self.card.product(width, self.tokens, width)
        return busy


def head(card: Card, adapter: Adapter, tokens: float, products: int, passes: float) -> Busy:
    """Logits of `tokens` in slices: so many bf16 products with the head, and bytes of a logit that follow."""
    v, h = adapter.vocab_size, adapter.hidden_size
    slices, columns = tokens / TOKENS_PER_SLICE, -(-v // COLUMNS_PER_SLICE)
    busy = card.product(TOKENS_PER_SLICE, h, v / columns, products * slices * columns)
    return busy + card.moved(passes * tokens * v, 30 * slices * columns)
