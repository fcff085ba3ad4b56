"""From a command line to a finished run and an exit code."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megad2v.checkpoint.catalog import step_directory
from megad2v.checkpoint.reader import Checkpoint
from megad2v.checkpoint.writer import CheckpointError
from megad2v.config.deepspeed_json import read_deepspeed_json, refuse_unsupported
from megad2v.config.load import parse_command_line, to_yaml
from megad2v.config.parts import JOINT, modalities
from megad2v.config.schema import Config, TrainConfig
from megad2v.config.validate import validate
from megad2v.data.format import TOKENIZER_FOLDER
from megad2v.data.vocabulary import with_vocabulary
from megad2v.data.workers import WorkerDied
from megad2v.engine import distributed
from megad2v.engine.distributed import World, broadcast_text, together
from megad2v.engine.guard import Disagreement
from megad2v.engine.launcher import find_place
from megad2v.engine.rendezvous import RendezvousError
from megad2v.engine.watchdog import Watchdog, start_watchdog
from megad2v.errors import BadNumericState, Preempted, UserError
from megad2v.metrics.report import peak_memory
from megad2v.modalities.text.tokenizer import Tokenizer
from megad2v.training.loop import Run, finish_or_say, train
from megad2v.training.setup import set_up
from megad2v.training.signals import StopRequests, tell_script
from megad2v.training.state import load

DEMO_CORPORA = {"vision": "image", "speech": "speech", "text": "text"}
"""What `make demo` calls the corpus of each modality; its shards lie in runs/demo/shards."""
INTERRUPTED = 130
"""Exit code after Ctrl-C, as a shell has it."""
SPEAKING_SECONDS = 3.0
"""How long a rank stays for the others to say what is wrong, where they cannot meet in a barrier."""


def main(arguments: Sequence[str] | None = None, requests: StopRequests | None = None) -> int:
    """Run `launch/pretrain.py`; returns the exit code. Wrong input is one line, printed by one rank. `requests` hears
    signals, where the process is ours."""
    rank, first_of_host = 0, True  # so that what its launcher says of a process can be refused, too
    watch, requests = Watchdog(), requests or StopRequests()
    try:
        requests.start_up()
        place = find_place(os.environ)
        rank, first_of_host = place.rank, place.local_rank == 0
        command = parse_command_line(sys.argv[1:] if arguments is None else arguments)
        if command.print_config:
            if rank == 0:
                print(to_yaml(command.config), end="")
            return 0
        ds = read_deepspeed_json(command.deepspeed)
        refuse_unsupported(ds)
        config = with_demo_shards(command.config)
        world = distributed.start(
            command.local_rank,
            tensor_parallel=config.parallel.tensor,
            rendezvous_timeout=config.train.rendezvous_timeout,
            hang_timeout=config.train.hang_timeout,
        )
        output = Path(config.train.output_dir)
        folder = output.with_name(f".check_{output.name}_hang") if command.check else output / "hang"
        watch = start_watchdog(world, folder, config.train.hang_timeout)
        config, extras = with_tokenizer(config)
        if command.check:
            check(config, ds, world, recipe=command.recipe, watch=watch, requests=requests, extras=extras)
        else:
            pretrain(config, ds, world, recipe=command.recipe, watch=watch, requests=requests, extras=extras)
    except (UserError, BadNumericState, CheckpointError) as error:
        # Before the ranks have met, each may be wrong in its own way: a file may be missing on one host alone.
        if rank == 0 or error.on_one_rank or (first_of_host and not distributed.joined()):
            print(f"pretrain: error: {error}", file=sys.stderr, flush=True)
        if isinstance(error, RendezvousError):
            time.sleep(SPEAKING_SECONDS)  # the launcher ends the others once one has left; rank 0 holds their store
        if error.on_one_rank:
            watch.fail(str(error), error.exit_code)
            distributed.leave_now(error.exit_code)
        if not distributed.stop() and rank > 0:
            time.sleep(SPEAKING_SECONDS)  # not joined yet: the launcher ends rank 0 once another rank has left
        return error.exit_code
    except WorkerDied as error:
        print(f"pretrain: error: rank {rank}: {error}", file=sys.stderr, flush=True)
        watch.fail(str(error))
        distributed.leave_now(1)
    except Preempted as stop:
        if rank == 0 or stop.on_one_rank:
            print(f"pretrain: {stop} (exit code {stop.exit_code})", file=sys.stderr, flush=True)
        if stop.on_one_rank:
            watch.fail(str(stop), stop.exit_code)
            distributed.leave_now(stop.exit_code)
        tell_script()
        distributed.stop()
        return stop.exit_code
    except KeyboardInterrupt:
        if rank == 0:
            print("pretrain: interrupted", file=sys.stderr, flush=True)
        watch.fail("interrupted", INTERRUPTED)
        distributed.leave_now(INTERRUPTED)
    except Exception as error:
        # On one rank or on all: they must not wait in the next collective for this one.
        told = None if isinstance(error, Disagreement) else traceback.format_exc()
        watch.fail(f"{type(error).__name__}: {error}", details=told)
        raise
    finally:
        watch.close()
    distributed.stop()
    return 0


def with_demo_shards(config: Config) -> Config:
    """The command without data runs on the demo's shards, where they have been made."""
    if config.data.shards is not None or config.data.mix is not None:
        return config
    folders = {modality: Path("runs/demo/shards", DEMO_CORPORA[modality]) for modality in modalities(config)}
    missing = [folder for folder in folders.values() if not (folder / "train").is_dir()]
    if missing:
        commands = "".join(
            f"python tools/make_demo_data.py runs/demo/data --only {to.name} && "
            f"python tools/make_shards.py {to.name} --input runs/demo/data/{to.name} --output {to}/train && "
            for to in missing
        )
        raise UserError(
            f"data.shards: not given, and the demo's shards are not there. Make them with `make demo`, or: {commands}"
            "repeat the command; for your own data add --data.shards PATH"
            + (", a map modality: pattern" if config.modality == JOINT else "")
        )
    train = {modality: f"{folder}/train" for modality, folder in folders.items()}
    valid = {modality: f"{folder}/valid" for modality, folder in folders.items() if (folder / "valid").is_dir()}
    if config.modality != JOINT:
        shards, held_out = train[config.modality], valid.get(config.modality)
    else:
        shards, held_out = train, valid if len(valid) == len(train) else None
    return replace(config, data=replace(config.data, shards=shards, valid=config.data.valid or held_out))


def with_tokenizer(config: Config) -> tuple[Config, Mapping[str, bytes]]:
    """Text: with the size of the tokenizer's vocabulary, and the tokenizer's files as checkpoints carry them.
    Collective; raises UserError alike on every rank, also where that size breaks a rule of the configuration."""
    if "text" not in modalities(config):
        return config, {}
    found: list[tuple[Config, Tokenizer]] = []

    def look() -> None:
        filled, tokenizer = with_vocabulary(config)
        validate(filled)
        found.append((filled, tokenizer))

    together(look, errors=(UserError,), raises=UserError)
    config, tokenizer = found[0]
    return config, {f"{TOKENIZER_FOLDER}/{name}": content for name, content in tokenizer.core_files.items()}


def pretrain(
    config: Config,
    ds: dict[str, Any],
    world: World,
    *,
    recipe: str,
    watch: Watchdog | None = None,
    requests: StopRequests | None = None,
    extras: Mapping[str, bytes] | None = None,
) -> Run:
    """Set up, resume, train; `extras` are files that every checkpoint carries. Raises UserError and Preempted alike on
    every rank."""
    run = set_up(config, ds, world, recipe=recipe, watch=watch, requests=requests, extras=extras)
    try:
        train(run)
    except (UserError, BadNumericState) as error:
        if not error.on_one_rank:
            finish_or_say(run)
        raise
    except CheckpointError:  # a RuntimeError too, but nothing to explain
        raise
    except RuntimeError as error:  # torch reports a dead worker from a signal handler, anywhere in the step
        reason = run.loader.explain(error)
        if reason is None:
            raise
        raise WorkerDied(reason) from None
    finally:
        run.close()
    if world.is_main:
        skipped = f", {run.progress.skipped} of them not taken" if run.progress.skipped else ""
        print(f"done: {run.progress.step} steps{skipped}; checkpoints in {run.directory / 'checkpoints'}", flush=True)
    return run


def check(
    config: Config,
    ds: dict[str, Any],
    world: World,
    *,
    recipe: str,
    watch: Watchdog | None = None,
    requests: StopRequests | None = None,
    extras: Mapping[str, bytes] | None = None,
) -> None:
    """--check: one step, one validation, one save, one load that must give the same bits; peak memory.

    Everything is written beside the run directory and removed. A rank that fails alone leaves at once, as in a run.
    """
    output = Path(config.train.output_dir)
    parent = output.absolute().parent
    made: list[str] = [""]

    def make() -> None:
        if world.is_main:
            parent.mkdir(parents=True, exist_ok=True)
            made[0] = tempfile.mkdtemp(prefix=f".check_{output.name}_", dir=parent)

    together(make, errors=(OSError,), raises=UserError)
    scratch = broadcast_text(made[0])
    one: TrainConfig = replace(
        config.train, steps=1, save_every=0, eval_every=0, log_every=1, output_dir=scratch, tensorboard=False,
        resume="auto", max_minutes=None, wandb=replace(config.train.wandb, project=None),
    )  # fmt: skip
    # The real decay; no warm-up, whose first learning rate would move no weight.
    decay_steps = config.train.steps if config.teacher.decay_steps is None else config.teacher.decay_steps
    teacher = replace(config.teacher, decay_steps=decay_steps)
    schedule = replace(config.schedule, kind="constant", warmup_steps=0)
    config = replace(config, train=one, teacher=teacher, schedule=schedule)
    try:
        run = pretrain(config, ds, world, recipe=recipe, watch=watch, requests=requests, extras=extras)
        peak, what = peak_memory(world.device)  # before the copies that only this check makes
        together(lambda: _reload(run), errors=(UserError,), raises=UserError)
        if world.is_main:
            print(f"check passed: one step, one save, one load equal to the bit; peak {what} {peak / 2**20:,.0f} MiB")
        distributed.barrier()
    finally:
        if world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)


def _reload(run: Run) -> None:
    """Forget the run's state, load it from its checkpoint, compare. Collective."""
    saved = [memory.to("cpu", copy=True) for memory in run.memory()]
    for memory in run.memory():
        memory.fill_(float("nan"))
    load(Checkpoint(step_directory(run.directory, 1)), run.engine, run.teacher)
    if not all(torch.equal(a, b.cpu()) for a, b in zip(saved, run.memory(), strict=True)):
        raise UserError("--check: what was loaded differs from what was saved; this is a bug, please report it")
