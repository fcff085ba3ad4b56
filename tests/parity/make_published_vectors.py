"""Runs the program that trained the published vision models at a small size and writes what it computes as numbers.

    python tests/parity/make_published_vectors.py PROGRAM [--output tests/parity/vectors]

PROGRAM is the folder beit/ of a checkout of facebookresearch/data2vec_vision (commit af9a363), with timm 0.3.2 on
PYTHONPATH. Everything is that program's own: its model classes, `train_one_epoch`, `create_optimizer`,
`cosine_scheduler`, its scaler, and timm's ModelEmaV2; here are the sizes, the inputs and the ears. Format:
`published.json` and `published.safetensors` as in ../shared/reference (README there).
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
import types
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

COMMIT = "af9a363"
CONFIG: dict[str, Any] = {
    "img_size": 48,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 3.0,
    "norm_eps": 1e-6,
    "init_values": 1e-4,
    "qkv_bias": True,
    "use_shared_rel_pos_bias": True,
    "target_layers": [1, 2, 3],
    "layer_results": "end",
    "l1_beta": 2.0,
    "loss_scale": -1,
    "target_layer_norm_last": True,
    "post_target_layer_norm": True,
    "num_mask_patches": 22,
    "min_mask_patches_per_block": 6,
    "max_mask_patches_per_block": 36,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
    "ema_decay_init": 0.999,
    "ema_decay": 0.9998,
    "ema_start_at": 0,
    "lr": 2e-3,
    "min_lr": 1e-5,
    "weight_decay": 0.05,
    "opt_eps": 1e-8,
    "clip_grad": 0.5,
    "batch": 4,
    "epochs": 10,
    "steps_per_epoch": 2,
    "warmup_epochs": 2,
    "first_step": 3,
    "steps": 3,
}
"""The README's ViT-B command at a small size. Drop path and attention dropout are 0, and the gradient is clipped at 0.5
instead of 3, which the first two of three steps exceed. `first_step` (from 0) is the warm-up's last."""

OBJECTIVE = ("layer_results", "l1_beta", "loss_scale", "target_layer_norm_last", "post_target_layer_norm")
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "ffn": {"layer_results": "fc"},
    "instance": {"target_instance_norm": True, "target_layer_norm_last": False, "post_target_layer_norm": False},
    "post_instance": {"target_layer_norm_last": False, "post_target_layer_norm": False}
    | {"post_target_instance_norm": True},
    "mse": {"l2_loss": True},
    "variance": {"var_w0": 0.7, "var_margin0": 1.5},
}
"""Arguments of `train_one_epoch` that differ from CONFIG."""


def modern(program: Path) -> types.SimpleNamespace:
    """The program's modules under today's torch and numpy, on a CPU: names that have gone are put back."""
    six = types.ModuleType("torch._six")
    six.inf, six.container_abcs, six.string_classes = math.inf, __import__("collections.abc").abc, (str,)
    sys.modules["torch._six"] = six
    for name, attributes in {
        "tensorboardX": ("SummaryWriter",),
        "modeling_discrete_vae": ("Dalle_VAE", "DiscreteVAE"),
    }.items():
        stub = types.ModuleType(name)  # a log writer and another model's tokenizer, which are not called
        vars(stub).update(dict.fromkeys(attributes))
        sys.modules[name] = stub
    # timm imports torchvision, whose CUDA wheel has no operators beside a CPU torch; none is called here.
    sys.modules["torchvision._meta_registrations"] = types.ModuleType("torchvision._meta_registrations")
    np.int = int  # noqa: NPY001
    torch.cuda.synchronize = lambda *_: None
    sys.path.insert(0, str(program))
    names = ("modeling_cyclical", "engine_for_cyclical", "optim_factory", "utils", "masking_generator")
    modules = types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    modules.ModelEmaV2 = importlib.import_module("timm.utils").ModelEmaV2
    return modules


def build(program: types.SimpleNamespace, config: dict[str, Any], **more: Any) -> nn.Module:
    """The program's model of CONFIG's size."""
    keys = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "init_values", "qkv_bias")
    arguments = {key: config[key] for key in (*keys, "use_shared_rel_pos_bias")} | {"use_abs_pos_emb": False} | more
    norm = partial(nn.LayerNorm, eps=config["norm_eps"])
    return program.modeling_cyclical.VisionTransformerForCyclicalTraining(norm_layer=norm, **arguments)


@torch.no_grad()
def perturb_(model: nn.Module, seed: int) -> nn.Module:
    """Biases, norms, layer scale, tokens and bias table all matter, and no two parameters are alike."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "gamma" in name:
            parameter.copy_(0.4 + 0.1 * noise)
        else:
            parameter.add_(noise, alpha=0.15 if parameter.dim() == 2 else 0.2)
    return model


def batches(program: types.SimpleNamespace, config: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """(uint8 images, masks) of each step; the masks are the program's own and hide unequal counts."""
    import random

    random.seed(78)
    grid = config["img_size"] // config["patch_size"]
    draw = program.masking_generator.MaskingGenerator(
        (grid, grid),
        num_masking_patches=config["num_mask_patches"],
        max_num_patches=config["max_mask_patches_per_block"],
        min_num_patches=config["min_mask_patches_per_block"],
    )
    generator = torch.Generator().manual_seed(11)
    side = config["img_size"]
    out = []
    for _ in range(config["steps"]):
        images = torch.randint(0, 256, (config["batch"], 3, side, side), generator=generator, dtype=torch.uint8)
        out.append((images, torch.from_numpy(np.stack([draw() for _ in range(config["batch"])])).bool()))
    return out


def normalised(images: Tensor, config: dict[str, Any]) -> Tensor:
    """torchvision's ToTensor and Normalize, which the program uses."""
    mean, std = (torch.tensor(config[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    return images.float().div(255).sub(mean).div(std)


class Ears:
    """Notes what `train_one_epoch` computes on its way, by standing around what it calls."""

    def __init__(self, program: types.SimpleNamespace, model: nn.Module, ema: nn.Module) -> None:
        self.losses: list[float] = []
        self.calls: list[tuple[Tensor, Tensor]] = []
        self.norms: list[float] = []
        self.rates: list[float] = []
        self.gradients: dict[str, Tensor] = {}
        self.decays: list[float] = []
        self.kept: dict[str, Tensor] = {}
        self.model, self.ema = model, ema
        update = ema._update
        ema._update = lambda m, update_fn: (self.decays.append(update_fn(1.0, 0.0)), update(m, update_fn))[1]
        self.scaler = self._scaler(program.utils.NativeScalerWithGradNormCount)

    def _scaler(self, base: type) -> Any:
        ears = self

        class Scaler(base):
            """On a CPU torch's GradScaler passes everything through, and has no "scale" to log."""

            def __call__(self, loss: Tensor, optimizer: Any, **words: Any) -> Tensor:
                ears.losses.append(loss.item())
                hooks = [p.register_post_accumulate_grad_hook(ears._note(n)) for n, p in ears.model.named_parameters()]
                norm = super().__call__(loss, optimizer, **words)
                for hook in hooks:
                    hook.remove()
                ears.norms.append(float(norm))
                ears.rates.append(float(optimizer.param_groups[0]["lr"]))
                return norm

            def state_dict(self) -> dict[str, float]:
                return {"scale": 1.0}

        return Scaler()

    def _note(self, name: str) -> Callable[[Tensor], None]:
        def note(parameter: Tensor) -> None:
            self.gradients.setdefault(name, parameter.grad.clone())

        return note

    def _keep(self, name: str, value: Tensor) -> None:
        self.kept.setdefault(name, value.detach().clone())

    def listen(self, run: Callable[[], None]) -> None:
        """`run` with the losses and module outputs noted (the first of each)."""
        originals = {name: getattr(F, name) for name in ("smooth_l1_loss", "mse_loss")}

        def noted(name: str) -> Callable[..., Tensor]:
            def loss(prediction: Tensor, target: Tensor, **words: Any) -> Tensor:
                self.calls.append((prediction.detach().clone(), target.clone()))
                return originals[name](prediction, target, **words)

            return loss

        teacher = self.ema.module
        places = [("patch_embed", self.model.patch_embed, 0), ("teacher_patch_embed", teacher.patch_embed, 0)]
        places += [(f"teacher_block{n}_end", block, None) for n, block in enumerate(teacher.blocks)]
        places += [("student_encoder_out", self.model.norm, 1)]
        hooks = [
            module.register_forward_hook(
                lambda m, i, o, name=name, cut=cut: self._keep(name, o[0] if cut is None else o[:, cut:])
            )
            for name, module, cut in places
        ]
        for name in originals:
            setattr(F, name, noted(name))
        try:
            run()
        finally:
            for name, original in originals.items():
                setattr(F, name, original)
            for hook in hooks:
                hook.remove()


def train(
    program: types.SimpleNamespace, config: dict[str, Any], model: nn.Module, ema: nn.Module, steps: list, **more: Any
) -> tuple[Ears, Any]:
    """`train_one_epoch` of the program over `steps`, with its optimizer and schedules."""
    arguments = types.SimpleNamespace(opt="adamw", opt_betas=None, momentum=0.9, **config)
    optimizer = program.optim_factory.create_optimizer(arguments, model)
    schedule = partial(program.utils.cosine_scheduler, epochs=config["epochs"], niter_per_ep=config["steps_per_epoch"])
    ears = Ears(program, model, ema)
    objective = {key: config[key] for key in OBJECTIVE} | more
    loader = [((normalised(images, config), mask), 0) for images, mask in steps]
    ears.listen(
        lambda: program.engine_for_cyclical.train_one_epoch(
            model,
            ema,
            config["ema_start_at"],
            config["ema_decay_init"],
            config["ema_decay"],
            config["target_layers"],
            loader,
            optimizer,
            torch.device("cpu"),
            0,
            ears.scaler,
            config["clip_grad"],
            start_steps=config["first_step"],
            lr_schedule_values=schedule(config["lr"], config["min_lr"], warmup_epochs=config["warmup_epochs"]),
            wd_schedule_values=schedule(config["weight_decay"], config["weight_decay"]),
            **objective,
        )
    )
    return ears, optimizer


class Writer:
    """Numbers go to the description, tensors to the file, with a pointer where they were."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def tensor(self, path: str, value: Tensor) -> dict[str, Any]:
        """Store; what to write in its place."""
        self.tensors[path] = value.detach().contiguous().clone()
        return {"tensor": path, "shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}

    def state(self, prefix: str, model: nn.Module) -> dict[str, Any]:
        """A module's parameters, without its buffers."""
        return {name: self.tensor(f"{prefix}.{name}", p) for name, p in model.named_parameters()}


def schedules(program: types.SimpleNamespace) -> list[dict[str, Any]]:
    """Learning rates of the two published runs (ImageNet's 1,281,167 images) and of degenerate warm-ups, at steps that
    tell the shape."""
    runs = []
    for lr, epochs, per_epoch, warm in ((2e-3, 800, 625, 10), (1e-3, 800, 312, 80), (1e-3, 4, 5, 0), (1e-3, 6, 1, 1)):
        values = program.utils.cosine_scheduler(lr, 1e-5, epochs, per_epoch, warmup_epochs=warm)
        steps, warmup = len(values), warm * per_epoch
        at = {0, 1, warmup // 2, warmup - 1, warmup, warmup + 1, (warmup + steps) // 2, steps - 2, steps - 1}
        chosen = sorted(step for step in at if 0 <= step < steps)
        run = {"lr": lr, "min_lr": 1e-5, "steps": steps, "warmup_steps": warmup}
        runs.append(run | {"values": {str(step): float(values[step]) for step in chosen}})
    return runs


def decays(program: types.SimpleNamespace, config: dict[str, Any], inputs: list) -> dict[str, Any]:
    """The decay that each update of a ramp really used, from step 0 on."""
    ramp = config | {"ema_start_at": 4, "ema_decay_init": 0.5, "ema_decay": 0.9, "first_step": 0}
    model = build(program, config)
    ears, _ = train(program, ramp, model, program.ModelEmaV2(model), (inputs * 2)[:6])
    return {"start": 0.5, "end": 0.9, "steps": 4, "used": ears.decays}


def initial(program: types.SimpleNamespace, config: dict[str, Any]) -> dict[str, Any]:
    """Deviation and largest absolute value of each parameter of a wide model as the program starts it."""
    torch.manual_seed(0)
    size = {"embed_dim": 384, "depth": 2, "mlp_ratio": 4.0}
    model = build(program, config | size)
    values = {n: [p.std().item(), p.abs().max().item()] for n, p in model.named_parameters()}
    return size | {"std_and_largest": values}


def main() -> None:
    """Make both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=Path)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "vectors")
    options = parser.parse_args()
    torch.set_num_threads(1)
    program, config, writer = modern(options.program), CONFIG, Writer()
    torch.manual_seed(3)
    student = perturb_(build(program, config), 1)
    teacher = program.ModelEmaV2(student)
    perturb_(teacher.module, 2)
    inputs = batches(program, config)

    cases = {}
    for name, more in CASES.items():
        model, ema = deepcopy(student), deepcopy(teacher)
        ears, _ = train(program, config, model, ema, inputs[:1], **more)
        prediction, target = ears.calls[0]
        path = f"cases.{name}"
        cases[name] = {
            "arguments": more,
            "loss": ears.losses[0],
            "sample_size": len(prediction),
            "grad_norms": {n: float(g.double().norm()) for n, g in ears.gradients.items()},
            "grad_norm": ears.norms[0],
        }
        if name == "plain":
            kept = {f"{k}_BTC": writer.tensor(f"{path}.intermediates.{k}_BTC", v) for k, v in ears.kept.items()}
            cases[name]["intermediates"] = kept
            cases[name]["preds"] = writer.tensor(f"{path}.preds", prediction)
        if name not in ("mse", "variance"):  # these change the loss alone
            cases[name]["targets"] = writer.tensor(f"{path}.targets", target)

    model, ema = deepcopy(student), deepcopy(teacher)
    ears, optimizer = train(program, config, model, ema, inputs)
    names = {id(p): n for n, p in model.named_parameters()}
    description = {
        "kind": "published vision",
        "source": f"facebookresearch/data2vec_vision {COMMIT}, timm 0.3.2",
        "config": config,
        "student": writer.state("student", student),
        "teacher": writer.state("teacher", teacher.module),
        "position_index": writer.tensor("position_index", student.rel_pos_bias.relative_position_index),
        "inputs": {
            f"{step}.{key}": writer.tensor(f"inputs.{step}.{key}", value)
            for step, pair in enumerate(inputs)
            for key, value in zip(("images", "mask"), pair, strict=True)
        },
        "cases": cases,
        "training": {
            "losses": ears.losses,
            "grad_norms": ears.norms,
            "rates": ears.rates,
            "decays": ears.decays,
            "decayed": [names[id(p)] for g in optimizer.param_groups for p in g["params"] if g["weight_decay"] > 0],
            "teacher_in_train_mode": any(module.training for module in ema.module.modules()),
            "student_after": writer.state("student_after", model),
            "teacher_after": writer.state("teacher_after", ema.module),
        },
        "learning_rates": schedules(program),
        "ramp": decays(program, config, inputs),
        "initial": initial(program, config),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    save_file(writer.tensors, options.output / "published.safetensors")
    (options.output / "published.json").write_text(json.dumps(description, indent=1) + "\n")


if __name__ == "__main__":
    main()
