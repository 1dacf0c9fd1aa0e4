"""The seconds of each stage of a run on a GPU: a model, which no GPU has confirmed.

Kernels are counted from what the code launches (card_passes.py, card_solver.py, layer_kernels.py). A batch takes as
long as the card or as its host, whichever is longer, since the host waits at the end of each pass. Disk and computation
overlap: the next block is read, and a shard written and read back, while one computes. So a block takes as long as its
computation, or as the disk has work for, whichever is longer.
"""

from dataclasses import dataclass, replace
from functools import cached_property

from ..core.card_rates import CardRates
from ..core.rows import spacing
from ..models.adapter import Half, Role, Site
from .busy import Busy, Card
from .card_passes import BatchCosts, head
from .card_solver import SolvedSite, aimed, packed, quantized, stacked
from .layer_kernels import layer_kernels
from .memory import STORED_BYTES
from .rows import COMMITTED_STREAMS
from .times import Parts, StageTimes, WalkTimes
from .work import RunWork

# Bytes that a load and its checks move on the card for each byte of a block: put into place (2), its copy (2), looked
# at for NaN (2), and two sums over its bits, before and after (3).
LOADED = 9.0
# Bytes of a logit that a comparison of two models moves, and those of the walk back at the head.
COMPARED_BYTES, DRAWN_BYTES = 76.0, 90.0
# Bytes of an expert's weight in both versions that their comparison moves, fp32.
ERRORS_BYTES = 60.0


def card_times(work: RunWork, rates: CardRates, batch_tokens: int, in_files: float = 0.0) -> StageTimes:
    """`in_files`: the share of the rows that memory has no room for."""
    model = _Model(work, Card(rates), batch_tokens, in_files)
    blocks = range(work.adapter.n_blocks)
    outside = work.plan.source_bytes - sum(block.parameters for block in work.blocks) * STORED_BYTES
    read = {"disk": outside / rates.read_bytes}
    return StageTimes(
        check=read,
        copy={"disk": outside / rates.write_bytes},  # what was checked lies in RAM
        embed={},
        walk=model.walk() if work.method.statistics and work.method.walk_back is not None else None,
        blocks=tuple(model.block(index) for index in blocks),
        verified=tuple(model.verified(index) for index in blocks),
        head=model.head(),
    )


@dataclass(frozen=True)
class _Model:
    work: RunWork
    card: Card
    batch_tokens: int
    in_files: float

    @cached_property
    def _layers(self) -> dict[bool, BatchCosts]:
        """By whether a block has experts: a batch at the last of its kind."""
        return self._costs_of(max(1, self.batch_tokens // self.work.tokens.row))

    @cached_property
    def _tuned_layers(self) -> dict[bool, BatchCosts]:
        """As `_layers`: the part of a batch that one step of tuning takes."""
        rows = max(1, self.batch_tokens // self.work.tokens.row)
        return self._costs_of(-(-rows // self._tuned_parts))

    @property
    def _tuned_parts(self) -> int:
        return self.work.method.quantizer.tuned_parts(self._batches(self.work.tokens.calibration))

    def _costs_of(self, rows: int) -> dict[bool, BatchCosts]:
        """So many rows at the last block of each kind. Its kernels are counted anew, which takes a while."""
        adapter, row = self.work.adapter, self.work.tokens.row
        kinds = {adapter.is_moe(index): index for index in range(adapter.n_blocks)}
        return {
            moe: BatchCosts(self.card, adapter, index, rows * row, layer_kernels(adapter, index, rows, row))
            for moe, index in kinds.items()
        }

    def _at(self, index: int) -> BatchCosts:
        return self._layers[self.work.adapter.is_moe(index)]

    @property
    def _rates(self) -> CardRates:
        return self.card.rates

    def _batches(self, tokens: int) -> float:
        return tokens / next(iter(self._layers.values())).tokens

    def _moved_rows(self, streams: float) -> float:
        """Seconds of the copies between card and RAM of so many streams of rows, as if none lay on the card."""
        return streams * self.work.stream_bytes / self._rates.pinned_bytes

    def _file_seconds(self, written: float, read: float) -> float:
        """Of the disk, for the share of so many streams that is in files."""
        moved = self.in_files * self.work.stream_bytes
        return moved * (written / self._rates.write_bytes + read / self._rates.read_bytes)

    def _block_bytes(self, index: int) -> int:
        return self.work.blocks[index].parameters * STORED_BYTES

    def _written_bytes(self, index: int) -> int:
        return sum(shard.data_bytes for shard in self.work.plan.pieces if shard.part == index)

    # --- a block's own way

    def block(self, index: int) -> Parts:
        """Computing, and what the disk still works for when all else is done. A shard is written while its tensors are
        quantized."""
        parts = self._computed(index)
        written, rates = self._written_bytes(index), self._rates
        on_disk = self._block_bytes(index) / rates.read_bytes + written / rates.write_bytes + self._commit_seconds()
        on_disk += written / rates.read_bytes  # read back
        if self.work.method.statistics:
            on_disk += self._file_seconds(*self._streams(index))
        busy = sum(parts.values()) + sum(self.verified(index).values())
        parts["disk"] = max(0.0, on_disk - busy)
        return parts

    def _streams(self, index: int) -> tuple[float, float]:
        """How many streams a block writes and reads: each pass reads one and most write one; statistics read where the
        reference stream ends."""
        passes = _Passes(self._at(index), self._aimed_sites(index), self.work)
        tuned = 2 * self.work.method.quantizer.tune_epochs
        return 5.0, 4.0 + 2 * passes.turns + tuned

    def _commit_seconds(self) -> float:
        calibration = self.work.stream_bytes if self.work.method.statistics else 0
        return COMMITTED_STREAMS * (calibration + self.work.evaluation_bytes) / self._rates.write_bytes / 10

    def _computed(self, index: int) -> Parts:
        loaded = self._block_bytes(index)
        parts = {"load": loaded / self._rates.pinned_bytes + LOADED * loaded / self._rates.card_bytes}
        quantizer = self.work.method.quantizer
        if not self.work.method.statistics:
            parts["quantize"] = self._rounded(index)
            return parts
        passes = _Passes(self._at(index), self._aimed_sites(index), self.work)
        batches = self._batches(self.work.tokens.calibration)
        last = index + 1 == self.work.adapter.n_blocks
        if quantizer.tune_epochs:
            step = replace(passes, at=self._tuned_layers[self.work.adapter.is_moe(index)])
            parts["tune"] = batches * self._tuned_parts * quantizer.tune_epochs * step.tuning()
        # A batch is fetched when the one before has been put back, so that copies do not overlap with computing.
        parts["statistics"] = batches * passes.statistics() + self._moved_rows(1 + 2 * passes.turns)
        parts["propagate"] = batches * passes.propagated(last) + self._moved_rows(4)
        parts["quantize"] = self._solved(index)
        return parts

    def _aimed_sites(self, index: int) -> tuple[Site, ...]:
        """The sites that statistics are taken of: the quantized ones, and those that are only aimed."""
        adapter, quantizer = self.work.adapter, self.work.method.quantizer
        router = adapter.router_site(index)
        every = (*adapter.sites(index), *([router] if router is not None else []))
        aims = quantizer.reference_correction and quantizer.aim_kept
        return tuple(
            site for site in every if self._is_quantized(site) or (aims and site.role in (Role.ATTENTION, Role.ROUTER))
        )

    def _is_quantized(self, site: Site) -> bool:
        return site.first_module in self.work.plan.schemes

    def _rounded(self, index: int) -> float:
        """Round-to-nearest: scales and codes, 40 bytes a weight, and the error that is left."""
        busy = Busy()
        for site in self.work.adapter.sites(index):
            if self._is_quantized(site):
                solved = SolvedSite(len(site.members), sum(site.out_features), site.in_features, 0, False)
                weights = 1.0 * solved.matrices * solved.outputs * solved.inputs
                busy += stacked(self.card, solved) + packed(self.card, solved) + self.card.moved(65.0 * weights, 30)
        return self.card.seconds(busy) + self._taken(index)

    def _taken(self, index: int) -> float:
        """The packed tensors are copied into memory that is not pinned."""
        return self._written_bytes(index) / self._rates.pageable_bytes

    def _solved(self, index: int) -> float:
        method, hidden, busy = self.work.method.quantizer, self.work.adapter.hidden_size, Busy()
        for site in self._aimed_sites(index):
            metric = method.output_metric and (bool(site.feeds) or site.adds_to_residual)
            solved = SolvedSite(
                matrices=len(site.members),
                outputs=sum(site.out_features),
                inputs=site.in_features,
                miss=(hidden if site.adds_to_residual else site.in_features) * method.reference_correction,
                miss_at_inputs=not site.adds_to_residual,
                metric=metric or (method.output_metric and site.role is Role.ATTENTION),
                shared=not site.feeds,
            )
            if method.tune_epochs and site.half is Half.FEED_FORWARD and not site.adds_to_residual:
                solved = replace(solved, miss=solved.miss if not self._is_quantized(site) else 0)
            if self._is_quantized(site):
                busy += quantized(self.card, solved, method)
            else:
                busy += stacked(self.card, solved) + aimed(self.card, solved)
        return self.card.seconds(busy) + self._taken(index)

    # --- before and after

    def walk(self) -> WalkTimes:
        batches, adapter, tokens = self._batches(self.work.tokens.calibration), self.work.adapter, self.work.tokens
        forward, back, n = [], [], adapter.n_blocks
        # What a resumed walk goes on from: the rows between its stretches, and where each begins the gradient.
        kept = 2 * -(-n // spacing(n)) / n * self.work.stream_bytes / self._rates.write_bytes
        for index in range(n):
            at, loaded = self._at(index), self._block_bytes(index)
            read = loaded / self._rates.read_bytes
            load = loaded / self._rates.pinned_bytes
            there = load + max(batches * self.card.seconds(at.whole()), self._moved_rows(2))
            again = load + max(batches * self.card.seconds(at.walked_back()), self._moved_rows(3))
            back_read = read + kept + self._file_seconds(1, 2)
            forward.append({"walk back": there, "disk": max(0.0, read - there)})
            back.append({"walk back": again, "disk": max(0.0, back_read - again)})
        drawn = head(self.card, adapter, tokens.calibration, 3, DRAWN_BYTES)
        return WalkTimes(tuple(forward), {"walk back": self.card.seconds(drawn)}, tuple(back))

    def verified(self, index: int) -> Parts:
        """Both models' rows; the shard is read back and its digest taken behind them."""
        at, rates = self._at(index), self._rates
        batches = self._batches(self.work.tokens.evaluation)
        written, loaded = self._written_bytes(index), self._block_bytes(index)
        passed = batches * self.card.seconds(at.whole())
        unpacked = written / rates.pageable_bytes + 30.0 * self.work.blocks[index].parameters / rates.card_bytes
        errors = batches * self.card.seconds(self.card.moved(26.0 * at.tokens * at.hidden, 12))
        errors += self.card.seconds(
            self.card.moved(ERRORS_BYTES * loaded / STORED_BYTES, 60.0 * self.work.adapter.n_experts)
        )
        return {"verify": passed + unpacked + passed + errors}

    def head(self) -> Parts:
        adapter, tokens = self.work.adapter, self.work.tokens.evaluation
        heads = 2 * STORED_BYTES * adapter.vocab_size * adapter.hidden_size
        compared = head(self.card, adapter, tokens, 2, COMPARED_BYTES)
        plan, rates = self.work.plan, self._rates
        # Shards have the digests of their reading back, but where they are joined.
        again = 0 if plan.shards == plan.pieces else plan.emitted_bytes
        digests = again / rates.read_bytes + again / rates.digest_bytes
        return {
            "checksums": digests,
            "verify": self.card.seconds(compared) + heads / self._rates.pageable_bytes,
            "disk": heads / self._rates.read_bytes,
        }


@dataclass(frozen=True)
class _Passes:
    """The passes of one batch of the calibration rows through a block, half by half and turn by turn (as
    blocks/quantize.py takes them)."""

    at: BatchCosts
    sites: tuple[Site, ...]
    work: RunWork

    @property
    def turns(self) -> int:
        return sum(len(self._turns(half)) for half in Half)

    def _turns(self, half: Half) -> list[list[Site]]:
        sites = [site for site in self.sites if site.half is half]
        if half is Half.FEED_FORWARD and not self.work.method.by_turn:
            return [sites]
        return [[site for site in sites if site.turn == turn] for turn in sorted({site.turn for site in sites})]

    def statistics(self) -> float:
        """Seconds of one batch."""
        method, card, seconds = self.work.method.quantizer, self.at.card, 0.0
        for half in Half:
            known = not method.reference_correction
            for present in self._turns(half):
                runs = card.seconds(self.at.forward(half))
                own = self._own(present)
                inside = any(site.reads_norm is None for site in own)
                inner = [site for site in own if not site.adds_to_residual]
                # The reference stream runs once in a half, and again for sites that read inside it.
                again = any(site.reads_norm is None for site in inner) and method.reference_correction
                seconds += runs * ((not known or again) + (inside or not method.reference_correction))
                busy = self.at.miss() + self.at.norm() * (2 * sum(site.reads_norm is not None for site in own))
                for site in own:
                    busy += self.at.statistics(site, method)
                seconds += card.seconds(busy)
                known = True
        return seconds

    def _own(self, present: list[Site]) -> list[Site]:
        """Sites that read one norm share their statistics, unless each site's gradients weight the tokens."""
        if self.work.method.token_gradients:
            return present
        seen: dict[str, Site] = {}
        for site in present:
            seen.setdefault(site.reads_norm or site.key, site)
        return list(seen.values())

    def propagated(self, last: bool) -> float:
        """Seconds of one batch: o alone once it is quantized, and the quantized stream through the other half."""
        at, card = self.at, self.at.card
        writes = next((s for s in self.sites if s.half is Half.ATTENTION and s.adds_to_residual), None)
        if writes is None:
            seconds = card.seconds(at.forward(Half.ATTENTION))
        else:
            out = card.product(at.tokens, writes.in_features, sum(writes.out_features))
            seconds = card.seconds(out + card.moved(10.0 * at.tokens * at.hidden, 8))
        return seconds if last else seconds + card.seconds(at.forward(Half.FEED_FORWARD))

    def tuning(self) -> float:
        """Seconds of one step in all turns before which is tuned."""
        method, seconds = self.work.method.quantizer, 0.0
        chosen = [s for s in self.sites if s.half is Half.FEED_FORWARD and s.first_module in self.work.plan.schemes]
        for turn in sorted({site.turn for site in chosen if not site.adds_to_residual}):
            left = [site for site in chosen if site.turn >= turn]
            parameters = sum(1.0 * sum(s.out_features) * s.in_features * len(s.members) for s in left)
            matrices = sum(len(s.members) * len(s.out_features) for s in left)
            seconds += self.at.card.seconds(self.at.tuned(parameters, matrices, method))
        return seconds
