"""Collapse statistics and retrieval accuracy of predictions against targets."""

from __future__ import annotations

import torch
from torch import Tensor


class StepStatistics:
    """Sums over the masked positions of one optimizer step, kept on the device until one all-reduce reads them."""

    def __init__(self, width: int, device: torch.device) -> None:
        self.width = width
        # [loss sum, rows, prediction sums (D), squares (D), target sums (D), squares (D)]
        self.sums = torch.zeros(2 + 4 * width, dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss_sum: Tensor, prediction_nd: Tensor, target_nd: Tensor) -> None:
        """Take in one micro-batch: its summed loss, and (n, D) predictions and targets."""
        parts = [loss_sum.detach().double().view(1), self.sums.new_tensor([len(prediction_nd)])]
        for rows in (prediction_nd.double(), target_nd.double()):
            parts += [rows.sum(0), (rows * rows).sum(0)]
        self.sums += torch.cat(parts)

    def read(self) -> dict[str, float]:
        """`loss` per masked position, `pred_std`, `target_std`; call after the sums were added over ranks.

        std = mean over channels of sqrt(unbiased variance over rows + 1e-6), fairseq's collapse guard (spec 6.3).
        """
        loss, rows = self.sums[:2].tolist()
        if rows < 1:
            return {"loss": 0.0, "pred_std": 0.0, "target_std": 0.0}
        total, square, target_total, target_square = self.sums[2:].view(4, self.width)

        def std(total: Tensor, square: Tensor) -> float:
            variance = (square - total * total / rows) / max(1.0, rows - 1)
            return float((variance.clamp_min(0) + 1e-6).sqrt().mean())

        return {
            "loss": loss / rows,
            "pred_std": std(total, square),
            "target_std": std(target_total, target_square),
        }


@torch.no_grad()
def retrieval_hits(prediction_nd: Tensor, target_nd: Tensor, *, chunk: int = 1024) -> Tensor:
    """How many of n predictions are nearer (Euclidean) to their own target than to any other row's; int64 scalar.

    Chance is one hit per micro-batch, 1/n of the rows. Memory chunk x n.
    """
    hits = torch.zeros((), dtype=torch.int64, device=prediction_nd.device)
    half_norms_n = target_nd.square().sum(1) / 2
    for start in range(0, len(prediction_nd), chunk):
        scores = prediction_nd[start : start + chunk] @ target_nd.t() - half_norms_n
        own = torch.arange(start, start + len(scores), device=scores.device)
        hits += (scores.argmax(1) == own).sum()
    return hits
