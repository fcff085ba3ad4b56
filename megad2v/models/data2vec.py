"""Student and teacher of data2vec, as plain modules.

    raw inputs -> front end -> clean view --------------------> teacher (no gradient, eval) -> targets
                            -> masked view -> encoder -> head -> predictions at masked positions -> loss

The student never sees the teacher's parameters: it gets a callable. Engines wrap the two modules as they like.
What belongs to one modality is a part: a `Student` is one part with an encoder, a `JointStudent` several with one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from megad2v.models.attention import outside_context
from megad2v.models.encoder import Encoder, JointEncoder
from megad2v.models.objective import layer_targets, regression_loss, variance_loss

Targets = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(raw inputs, student's clean view, padding) -> targets (B, T, D), float32, no gradient."""
JointTargets = Callable[..., Tensor]
"""The same, with the modality as `part`."""
Encode = Callable[..., tuple[Tensor, list[Tensor]]]
"""An encoder's forward."""


@dataclass(frozen=True)
class ObjectiveSpec:
    """How layers become targets and errors become a loss; fields as in `targets.*` and `loss.*`."""

    layers: int
    tensor: str
    layer_norm: str
    average_norm: str
    kind: str
    beta: float
    scale: str
    average: bool = True
    padding: str = "exclude"
    shuffle: bool = False
    variance_weight: float = 0.0
    variance_margin: float = 0.5
    context: float = 1.0
    """Fraction of the input that the teacher's positions attend to."""


class FrontEnd(nn.Module):
    """From raw inputs to the encoder's input: what every modality's front end is.

    forward(raw inputs, mask (B, T) or None) -> masked and clean view, each (B, prefix_tokens + T, D); without a mask
    the two are the same tensor.
    """

    prefix_tokens = 0
    """Positions in front of the maskable ones (CLS)."""

    def teacher_padding(self, inputs: Tensor, padding_bt: Tensor | None) -> Tensor | None:
        """bool (B, T): True where the teacher's clean view holds nothing; the student's padding, as a rule."""
        return padding_bt


class _Averaged(nn.Module):
    """No gradients, and always in eval mode: no dropout, no drop path."""

    def train(self, mode: bool = True) -> _Averaged:
        """Stays in eval mode (an engine may call train() on all it wraps)."""
        return super().train(False)

    def freeze(self) -> None:
        """To be called when all parameters are there."""
        self.requires_grad_(False)
        self.eval()


class TeacherPart(_Averaged):
    """What a teacher has for one modality: how layers become targets, and its own front end where the recipe averages
    that too (`scope` "model")."""

    def __init__(
        self, front_end: FrontEnd | None, spec: ObjectiveSpec, prefix_tokens: int, grid: int | None = None
    ) -> None:
        """`grid`: side of the square that the positions form, None for a sequence."""
        super().__init__()
        self.front_end, self.spec, self.prefix_tokens, self.grid = front_end, spec, prefix_tokens, grid

    @torch.no_grad()
    def targets(self, encode: Encode, inputs: Tensor, clean_btd: Tensor, padding_bt: Tensor | None = None) -> Tensor:
        """See `Teacher.forward`; `encode` is the teacher's encoder."""
        spec, prefix = self.spec, self.prefix_tokens
        if self.front_end is not None:
            clean_btd = self.front_end(inputs, None)[1]
        hidden_tt = None
        if spec.context < 1.0:
            positions = clean_btd.shape[1] - prefix
            hidden_tt = outside_context(positions, spec.context, grid=self.grid, prefix=prefix, device=clean_btd.device)
        _, layers = encode(clean_btd, padding_bt, last=spec.layers, tensor=spec.tensor, hidden_tt=hidden_tt)
        left_out = padding_bt[:, prefix:] if padding_bt is not None and spec.padding == "exclude" else None
        return layer_targets(
            [layer[:, prefix:] for layer in layers],
            layer_norm=spec.layer_norm,
            average_norm=spec.average_norm,
            average=spec.average,
            padding_bt=left_out,
        )


class Teacher(TeacherPart):
    """The averaged copy: an encoder, and its own front end where the recipe averages that too."""

    def __init__(
        self,
        encoder: Encoder,
        front_end: FrontEnd | None,
        spec: ObjectiveSpec,
        prefix_tokens: int,
        grid: int | None = None,
    ) -> None:
        super().__init__(front_end, spec, prefix_tokens, grid)
        self.encoder = encoder
        self.freeze()

    def forward(self, inputs: Tensor, clean_btd: Tensor, padding_bt: Tensor | None = None) -> Tensor:
        """Targets (B, T, D), or (B, T, K, D) where each layer is a target, float32, without the prefix tokens.

        `clean_btd` is the student's unmasked view, used where the front end is shared; `padding_bt` with prefix tokens.
        """
        return self.targets(self.encoder, inputs, clean_btd, padding_bt)


class JointTeacher(_Averaged):
    """The averaged copy of a `JointStudent`: one encoder, and a part for each modality."""

    def __init__(self, encoder: JointEncoder, parts: Mapping[str, TeacherPart]) -> None:
        super().__init__()
        self.encoder, self.parts = encoder, nn.ModuleDict(parts)
        self.freeze()

    def forward(self, inputs: Tensor, clean_btd: Tensor, padding_bt: Tensor | None, part: str) -> Tensor:
        """As `Teacher.forward`, of modality `part`."""
        return self.parts[part].targets(partial(self.encoder, part=part), inputs, clean_btd, padding_bt)


class StudentPart(nn.Module):
    """What a student has for one modality: front end and head, and the loss that they are trained by."""

    def __init__(self, front_end: FrontEnd, head: nn.Module, spec: ObjectiveSpec) -> None:
        super().__init__()
        self.front_end, self.head, self.spec = front_end, head, spec
        self.prefix_tokens: int = front_end.prefix_tokens

    def regress(
        self,
        encode: Encode,
        inputs: Tensor,
        mask_bmt: Tensor,
        targets: Targets,
        padding_bt: Tensor | None = None,
        run: Collection[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `Student.forward`; `encode` is the student's encoder."""
        if mask_bmt.shape[1] != 1:
            raise ValueError(f"data2vec 1 draws one mask per sample, got {mask_bmt.shape[1]}")
        mask_bt = mask_bmt[:, 0]
        masked_btd, clean_btd = self.front_end(inputs, mask_bt)
        unseen_bt = self.front_end.teacher_padding(inputs, padding_bt)
        target_btd = targets(inputs, clean_btd.detach(), self._with_prefix(unseen_bt))
        encoded_btd, _ = encode(masked_btd, self._with_prefix(padding_bt), run=run)
        prediction_nd = self.head(encoded_btd[:, self.prefix_tokens :][mask_bt])
        target_nd = target_btd[mask_bt]
        spec = self.spec
        if spec.shuffle and self.training:  # what was learned is still validated against the true targets
            target_nd = target_nd[torch.randperm(len(target_nd), device=target_nd.device)]
        loss = regression_loss(prediction_nd, target_nd, kind=spec.kind, beta=spec.beta, scale=spec.scale)
        if spec.variance_weight > 0 and self.training:
            # Times n, since the sum of the step is divided by its count: the mean over micro-batches, by their counts.
            loss = loss + spec.variance_weight * len(prediction_nd) * variance_loss(prediction_nd, spec.variance_margin)
        if not spec.average:  # statistics are of (n, D)
            prediction_nd, target_nd = prediction_nd.mean(dim=1), target_nd.mean(dim=1)
        return loss, prediction_nd.detach().float(), target_nd.detach()

    def _with_prefix(self, padding_bt: Tensor | None) -> Tensor | None:
        if padding_bt is None or self.prefix_tokens == 0:
            return padding_bt
        return torch.nn.functional.pad(padding_bt, (self.prefix_tokens, 0), value=False)


class Student(StudentPart):
    """Front end, encoder and head, with the loss: one forward per micro-batch."""

    def __init__(self, front_end: FrontEnd, encoder: Encoder, head: nn.Module, spec: ObjectiveSpec) -> None:
        super().__init__(front_end, head, spec)
        self.encoder = encoder

    def forward(
        self,
        inputs: Tensor,
        mask_bmt: Tensor,
        targets: Targets,
        padding_bt: Tensor | None = None,
        run: Collection[int] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One micro-batch.

        `inputs` raw, as the front end takes them; `mask_bmt` bool (B, M, T), True where hidden; `targets` the
        teacher; `padding_bt` bool (B, T); `run` the encoder's blocks that layer drop left in, None for all (the teacher
        always runs all of its own).
        Returns the loss summed over the n masked positions (scalar), and predictions and targets there, each
        (n, D), detached, for statistics. n may be 0: the loss is then 0 and so is every gradient.
        """
        return self.regress(self.encoder, inputs, mask_bmt, targets, padding_bt, run)

    def features(self, inputs: Tensor, padding_bt: Tensor | None = None) -> Tensor:
        """Encoder output for unmasked inputs, prefix tokens included: (B, prefix + T, D)."""
        clean_btd = self.front_end(inputs, None)[1]
        return self.encoder(clean_btd, self._with_prefix(padding_bt))[0]


class JointStudent(nn.Module):
    """One encoder, and front end and head for each modality. A forward is of one of them: the parameters of the others
    take no part in it."""

    def __init__(self, encoder: JointEncoder, parts: Mapping[str, StudentPart]) -> None:
        super().__init__()
        self.encoder, self.parts = encoder, nn.ModuleDict(parts)

    def forward(
        self,
        inputs: Tensor,
        mask_bmt: Tensor,
        targets: JointTargets,
        padding_bt: Tensor | None = None,
        run: Collection[int] | None = None,
        part: str = "",
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `Student.forward`, of modality `part`."""
        encode = partial(self.encoder, part=part)
        return self.parts[part].regress(encode, inputs, mask_bmt, partial(targets, part=part), padding_bt, run)
