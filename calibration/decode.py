"""Writing token by token with a model that is never whole in memory.

Each token costs one walk over all blocks, for all texts together. There is no key-value cache: every walk computes all
tokens again. That is no waste where it matters. With weights read from disk, 217 GB of Scout at 1 GB/s take 217 s a
token; an H100 computes 512 texts of 750 tokens again in about half a minute of that. Texts are padded on the right to a
common length. No real token sees the padding: attention looks back only, and a router looks at one token.

Shape legend: N texts, T tokens, H hidden size, V vocabulary.
"""

import torch
import torch.nn.functional as F

from ..core.finite import check_finite
from ..core.rows import Row, batches
from ..models.walk import Embedder, Walk

# Lengths are rounded up to this, so that texts of similar length share a batch and its masks.
PADDED_TO = 64


class BlockDecoder:
    """Texts that grow. Their hidden rows are in memory: N x T x H values."""

    def __init__(self, walk: Walk, rows: list[Row]) -> None:
        self.walk = walk
        self.tokens = [row.tokens.tolist() for row in rows]
        self._rows = list(rows)
        # It reads this list whenever it embeds. Images go through the vision tower once, here.
        self._embedder = Embedder(walk, self._rows)
        self._norm = walk.final_norm()
        self._head_VH = walk.head()

    def _padded(self, number: int) -> Row:
        tokens = self.tokens[number]
        length = -(-len(tokens) // PADDED_TO) * PADDED_TO
        fill = 1 if self.walk.adapter.image_token_id == 0 else 0
        ids = torch.tensor(tokens + [fill] * (length - len(tokens)))
        return Row(self._rows[number].document, "growing", ids, self._rows[number].pixels)

    def next_logits(self, numbers: list[int]) -> torch.Tensor:
        """Logits of the next token of each of these texts: fp32 [N, V] on the CPU, in their order."""
        for number in numbers:
            self._rows[number] = self._padded(number)
        groups = batches([self._rows[number] for number in numbers], self.walk.compute.batch_tokens)
        hidden = [self._embedder.batch([numbers[i] for i in group]) for group in groups]
        for index in range(self.walk.adapter.n_blocks):
            self.walk.step.begin("write: walk", index)
            block = self.walk.load(index)
            self.walk.expect((index + 1) % self.walk.adapter.n_blocks)  # the next token begins anew
            for k in range(len(groups)):
                rows_NTH = hidden[k].to(self.walk.device)
                hidden[k] = block.forward(rows_NTH).cpu()
                self.walk.step.advance(rows_NTH.shape[0] * rows_NTH.shape[1])
            del block
        out = torch.empty(len(numbers), self.walk.adapter.vocab_size)
        with torch.inference_mode():
            for group, rows_NTH in zip(groups, hidden, strict=True):
                last = torch.tensor([len(self.tokens[numbers[i]]) - 1 for i in group])
                last_NH = self._norm(rows_NTH[torch.arange(len(group)), last].to(self.walk.device))
                out[group] = F.linear(last_NH, self._head_VH.to(last_NH.dtype)).float().cpu()
        check_finite(self.walk.original, "the logits", out)
        return out
