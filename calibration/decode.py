"""Writing token by token with a model that is never whole in memory.

A token costs one walk over all blocks, for all texts at once. No key-value cache is kept: every walk computes every
token again. That is no waste where it matters. With weights read from disk, 217 GB of Scout at 1 GB/s take 217 s a
token; computing 512 texts of 750 tokens again takes an H100 about half a minute of them. Texts are padded on the
right to a common length, which nothing to the left of it can see: attention looks back only, and a router looks at one
token.

Shape legend: N texts, T tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F

from ..core.rows import Row, Step, batches
from ..core.tensors import TensorSource
from ..models.adapter import Adapter, read
from ..models.walk import Calls, Embedder, final_norm, load_block, run_block

# Lengths are rounded up to this, so that texts of about one length share a batch and masks are made once.
PADDED_TO = 64


class BlockDecoder:
    """Texts that grow. Their hidden rows are in memory: N x T x H values."""

    def __init__(
        self,
        adapter: Adapter,
        source: TensorSource,
        rows: list[Row],
        batch_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.adapter, self.source, self.batch_tokens = adapter, source, batch_tokens
        self.device, self.dtype = device, dtype
        self.tokens = [row.tokens.tolist() for row in rows]
        self._rows = list(rows)
        # It looks at this list whenever it embeds; pictures go through the vision tower once.
        self._embedder = Embedder(adapter, source, self._rows, device, dtype)
        self._calls = Calls(adapter, device, dtype)
        self._norm = final_norm(adapter, source, device, dtype)
        self._head_VH = read(adapter, source, adapter.head_name).to(device)

    def _padded(self, number: int) -> Row:
        tokens = self.tokens[number]
        length = -(-len(tokens) // PADDED_TO) * PADDED_TO
        fill = 1 if self.adapter.image_token_id == 0 else 0
        ids = torch.tensor(tokens + [fill] * (length - len(tokens)))
        return Row(self._rows[number].document, "growing", ids, self._rows[number].pixels)

    def next_logits(self, numbers: list[int], step: Step) -> torch.Tensor:
        """What would follow each of these texts: fp32 [N, V] on the CPU, in their order."""
        for number in numbers:
            self._rows[number] = self._padded(number)
        groups = batches([self._rows[number] for number in numbers], self.batch_tokens)
        hidden = [self._embedder.batch([numbers[i] for i in group]) for group in groups]
        for index in range(self.adapter.n_blocks):
            step.begin("write: walk", index)
            block = load_block(self.adapter, self.source, index, self.device, self.dtype)
            for k in range(len(groups)):
                rows_NTH = hidden[k].to(self.device)
                hidden[k] = run_block(block, rows_NTH, self._calls.of(rows_NTH.shape[1])[index]).cpu()
                step.advance(rows_NTH.shape[0] * rows_NTH.shape[1])
            del block
        out = torch.empty(len(numbers), self.adapter.vocab_size)
        with torch.inference_mode():
            for group, rows_NTH in zip(groups, hidden, strict=True):
                last = torch.tensor([len(self.tokens[numbers[i]]) - 1 for i in group])
                last_NH = self._norm(rows_NTH[torch.arange(len(group)), last].to(self.device))
                out[group] = F.linear(last_NH, self._head_VH.to(last_NH.dtype)).float().cpu()
        return out
