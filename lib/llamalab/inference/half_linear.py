"""Half-precision products on a CPU, each in the way that is faster there."""

import torch

ROW_BY_ROW_BELOW = 8
"""Rows that PyTorch multiplies faster in float16 than in float32 on a CPU."""

BLOCK_ROWS = 512
"""Rows of a weight that are converted at once: 4 to 22 MB, about what the caches hold."""


class HalfLinear(torch.nn.Linear):
    """A layer held in float16 on the CPU that multiplies many rows in float32.

    Without float16 instructions PyTorch takes one row after the other. For the one row of a step
    that is best, as the weights' bytes are what bounds it; the many rows of a prompt took 3 to 7
    times as long as in float32 (measured).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) < ROW_BY_ROW_BELOW:
            return super().forward(x)
        rows = rows.float()
        product = torch.empty(len(rows), self.out_features)
        # One block for all: memory that is new to the process costs more than the conversion.
        block = torch.empty(min(BLOCK_ROWS, self.out_features), self.in_features)
        for at in range(0, self.out_features, BLOCK_ROWS):
            half = self.weight[at : at + BLOCK_ROWS]
            weight = block[: len(half)].copy_(half)
            product[:, at : at + BLOCK_ROWS] = rows @ weight.T
        return product.to(x.dtype).unflatten(0, x.shape[:-1])


def read_prompts_in_float32(network) -> None:
    if torch.ops.mkldnn._is_mkldnn_fp16_supported():  # this processor has the instructions
        return
    for module in network.modules():
        if type(module) is torch.nn.Linear:  # the layers of a LLaMA have no bias
            module.__class__ = HalfLinear
