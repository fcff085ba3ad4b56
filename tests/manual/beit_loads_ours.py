"""The BEiT fork, the program behind the published vision models, loads what we export and computes what we compute.

    python tests/manual/beit_loads_ours.py PROGRAM [--site FOLDER]...

PROGRAM is the folder beit/ of a checkout of facebookresearch/data2vec_vision (commit af9a363); README.md beside this
file says what else it needs. With random weights: our checkpoint, `tools/convert_checkpoint.py --to beit`, the fork's
own classes with `load_state_dict` (strict), and its predictions at hidden patches and its teacher's last layers beside
ours; then its fine-tuning model with the fork's own loader. Exit code 1 where one differs by more than TOLERANCE.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import sys
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from megad2v.config.load import load_config
from megad2v.config.schema import Config
from megad2v.convert.fairseq import BEIT_FILE, export_beit
from megad2v.convert.load import open_checkpoint
from megad2v.modalities.build import build_student, build_teacher
from tests.checkpoints import perturb_, small_config, write_small_checkpoint
from tests.parity.make_published_vectors import COMMIT, build, modern

TOLERANCE = 1e-5
"""Largest difference over max(1, largest value)."""


def configs() -> dict[str, Config]:
    """A small model and the released base."""
    small = small_config(scope="model", head_layers=1, norm_eps=1e-6, init="beit")
    return {
        "small": replace(small, targets=replace(small.targets, layer_norm="layer")),
        "base": load_config("vision_base"),
    }


@torch.no_grad()
def compare(name: str, config: Config, program: object, folder: Path) -> bool:
    """One line: largest differences. True where they agree."""
    size = 0.1 if name == "small" else 0.01
    student, teacher = perturb_(build_student(config), 1, size), perturb_(build_teacher(config), 2, size)
    state = {kind: dict(model.named_parameters()) for kind, model in (("student", student), ("teacher", teacher))}
    write_small_checkpoint(folder / "run", config, state)
    export_beit(open_checkpoint(folder / "run"), folder / "export")
    file = torch.load(folder / "export" / BEIT_FILE, weights_only=True)  # noqa: TID251 - ours, and restricted
    model, vision = config.model, config.vision
    shape = {
        "img_size": vision.image_size,
        "patch_size": vision.patch_size,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.heads,
        "mlp_ratio": model.mlp_ratio,
        "init_values": 1e-4,
        "qkv_bias": True,
        "use_shared_rel_pos_bias": True,
        "norm_eps": 1e-6,
    }
    theirs = {part: build(program, shape).eval() for part in ("model", "model_ema")}
    for part, module in theirs.items():
        module.load_state_dict(file[part], strict=True)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator)
    mask_bt = torch.rand(2, (vision.image_size // vision.patch_size) ** 2, generator=generator) < 0.6
    ours_masked = student.head(student.encoder(student.front_end(images, mask_bt)[0])[0][:, 1:][mask_bt])
    layers = teacher.encoder(teacher.front_end(images, None)[1], last=config.targets.layers, tensor="block")[1]
    their_layers = theirs["model_ema"](images, bool_masked_pos=None, layer_results="end")[-config.targets.layers :]
    pairs = [(ours_masked, theirs["model"](images, bool_masked_pos=mask_bt))]
    pairs += [(ours[:, 1:], other) for ours, other in zip(layers, their_layers, strict=True)]
    worst = max(float((a - b).abs().max()) / max(1.0, float(a.abs().max())) for a, b in pairs)
    left = fine_tuning(file["model"], shape)
    print(
        f"{name:6s} {sum(p.numel() for p in student.parameters()):11,d} parameters  predictions and the teacher's last "
        f"{config.targets.layers} layers: {worst:.1e} relative  fine-tuning model lacks: {left}",
        flush=True,
    )
    return worst <= TOLERANCE


def fine_tuning(state: dict[str, torch.Tensor], shape: dict[str, object]) -> str:
    """What the fork's own loader says of its fine-tuning model and our file."""
    classes = importlib.import_module("modeling_finetune")
    arguments = {key: value for key, value in shape.items() if key not in ("norm_eps", "use_shared_rel_pos_bias")}
    model = classes.VisionTransformer(
        **arguments,
        num_classes=10,
        use_abs_pos_emb=False,
        use_rel_pos_bias=False,
        use_shared_rel_pos_bias=True,
        use_mean_pooling=True,
    )
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        importlib.import_module("utils").load_state_dict(model, state)
    return "; ".join(line.strip() for line in said.getvalue().splitlines() if line.strip())


def main() -> int:
    """Exit code 0 where all agree."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("program", type=Path, help="folder beit/ of facebookresearch/data2vec_vision")
    top.add_argument("--site", type=Path, action="append", default=[], help="folder of packages for it alone")
    arguments = top.parse_args()
    sys.path[:0] = [str(path.resolve()) for path in arguments.site]
    warnings.filterwarnings("ignore")  # of 2022's code under today's torch
    program = modern(arguments.program.resolve())
    print(
        f"BEiT fork {COMMIT}, Python {sys.version.split()[0]}, torch {torch.__version__}; float32 on a CPU, eval mode"
    )
    agree = []
    for name, config in configs().items():
        with tempfile.TemporaryDirectory() as folder:
            agree.append(compare(name, config, program, Path(folder)))
    print("all agree" if all(agree) else "NOT ALL AGREE")
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
