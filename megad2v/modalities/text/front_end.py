"""From token ids to the encoder's input: token and position embeddings."""

from __future__ import annotations

from torch import Tensor

from megad2v.config.modalities import TextConfig
from megad2v.modalities.text.codecs import PAD
from megad2v.models.data2vec import FrontEnd
from megad2v.models.initialise import FAIRSEQ, InitScheme, zero_rows
from megad2v.models.layers import Embedding, Layers, VanillaLayers


class TextFrontEnd(FrontEnd):
    """Token embedding plus learned position embedding (spec 2.3); the norm behind them is the encoder's first one.

    What the student and the teacher see is drawn by the worker side (`TextTransform`): inputs hold a row of ids for
    each, `<pad>` where there is nothing. Positions count what is not padding, from PAD + 1: so a teacher that sees the
    chosen tokens alone finds them closed up, and the table has PAD + 1 rows more than a row has tokens.
    The table of tokens is split by vocabulary under tensor parallelism.
    """

    def __init__(
        self, config: TextConfig, width: int, scheme: InitScheme = FAIRSEQ, layers: Layers | None = None
    ) -> None:
        """`config.vocabulary` must be known."""
        super().__init__()
        assert config.vocabulary is not None  # modalities.build
        self.teacher_sees = config.teacher_sees
        layers = layers or VanillaLayers()
        self.tokens = layers.embedding(config.vocabulary, width, weight=zero_rows(scheme.encoder, PAD))
        self.positions = Embedding(config.max_tokens + PAD + 1, width, weight=zero_rows(scheme.encoder, PAD))

    def forward(self, ids_bvt: Tensor, mask_bt: Tensor | None) -> tuple[Tensor, Tensor]:
        """int64 (B, V, T): what the teacher sees, and with V = 2 what the student sees -> masked and clean view, each
        (B, T, D). Without a mask the two are the same tensor.

        Raises ValueError for a mask without a view for the student.
        """
        if mask_bt is not None and ids_bvt.shape[1] != 2:
            raise ValueError(f"a mask needs ids for teacher and student, got {ids_bvt.shape[1]} row(s) of ids")
        if mask_bt is None:
            ids_bvt = ids_bvt[:, :1]
        real_bvt = ids_bvt != PAD
        places_bvt = real_bvt.cumsum(-1) * real_bvt + PAD
        # One lookup for both views: it is one gather of the table under ZeRO-3, one all-reduce if it is split.
        x_bvtd = self.tokens(ids_bvt.flatten(0, 1)) + self.positions(places_bvt.flatten(0, 1))
        x_bvtd = x_bvtd.unflatten(0, ids_bvt.shape[:2])
        return x_bvtd[:, -1], x_bvtd[:, 0]

    def teacher_padding(self, ids_bvt: Tensor, padding_bt: Tensor | None) -> Tensor | None:
        """bool (B, T): True where the teacher sees nothing. It sees something of every row: all of those of which
        nothing was chosen (else its attention would be over nothing, which is NaN)."""
        return ids_bvt[:, 0] == PAD if self.teacher_sees == "masked_only" else padding_bt
