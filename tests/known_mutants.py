"""The breaks that tests/mutants.py makes, one after the other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One break: in `file` the text `old`, which is there exactly once, becomes `new`; `test` must then fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


OBJECTIVE, DATA2VEC, MODELS = (f"tests/unit/test_{name}.py" for name in ("objective", "data2vec", "models"))
LAYOUT = "tests/distributed/test_layouts.py::test_same_step_as_plain_torch"
ORACLE = "tests/distributed/test_layouts.py::test_teacher_equals_float64_oracle"
GUARD = "tests/distributed/test_guard.py"
PARALLEL = "tests/distributed/test_parallel.py"
AUGMENT = "tests/unit/test_augment.py"
UNUSED = "tests/distributed/test_unused.py::test_unused_parameters_have_zero_gradient"
LENGTHS, SPANS = "tests/unit/test_plan_lengths.py", "tests/unit/test_speech_masking.py"
RESUME = "tests/unit/test_make_shards_resume.py::{}"
SPOILT = "tests/distributed/test_skip.py::test_spoilt_on_one_rank_is_refused_by_all"

MUTANTS = (
    # --- the objective
    Mutant(
        "heads of several layers pooled in the variance term",
        "megad2v/models/objective.py",
        "(prediction_nd.float().var(dim=0)",
        "(prediction_nd.float().flatten(0, -2).var(dim=0)",
        f"{OBJECTIVE}::test_variance_term",
    ),
    Mutant(
        "padding in instance norm's variance",
        "megad2v/models/objective.py",
        "(centred_btd.square() * real_bt1).sum",
        "centred_btd.square().sum",
        f"{OBJECTIVE}::test_padding_stays_out_of_instance_norm",
    ),
    Mutant(
        "a position's context one too small",
        "megad2v/models/attention.py",
        "count = max(1, round(fraction * positions))",
        "count = max(1, round(fraction * positions) - 1)",
        f"{MODELS}::test_every_position_has_as_much_context",
    ),
    Mutant(
        "DeepNorm without its factor on the residual stream",
        "megad2v/models/block.py",
        "else self.residual_scale * x_btd",
        "else x_btd",
        f"{MODELS}::test_deep_norm_scales_the_residual_stream",
    ),
    Mutant(
        "DeepNorm scales the keys, not the values",
        "megad2v/models/initialise.py",
        "value.view(heads, 3, -1)[:, 2] *= factor",
        "value.view(heads, 3, -1)[:, 1] *= factor",
        "tests/unit/test_initialise.py::test_deep_norm_starts_smaller",
    ),
    Mutant(
        "the second phase's teacher from the first's teacher",
        "megad2v/training/state.py",
        'if teacher_from == "teacher" else set()',
        "if True else set()",
        "tests/cli/test_resume.py::test_refused_resume_leaves_the_run_as_it_was",
    ),
    Mutant(
        "average before the per-layer norm",
        "megad2v/models/objective.py",
        "normalise(layer_btd.float(), layer_norm, padding_bt) for",
        "layer_btd.float() for",
        f"{OBJECTIVE}::test_targets",
    ),
    Mutant(
        "loss divided by this micro-batch's rows",
        "megad2v/models/objective.py",
        "    return total * ({",
        "    return total / max(1, len(prediction_nd)) * ({",
        f"{OBJECTIVE}::test_loss_is_a_sum_over_rows_of_all_micro_batches",
    ),
    Mutant(
        "scale of the loss missing",
        "megad2v/models/objective.py",
        "    return total * ({",
        "    return total * 1.0 if width else total * ({",
        f"{OBJECTIVE}::test_loss_and_its_gradient",
    ),
    Mutant(
        "targets from one layer too few",
        "megad2v/models/data2vec.py",
        "last=spec.layers,",
        "last=spec.layers - 1,",
        f"{DATA2VEC}::test_targets_are_the_top_layers_without_cls",
    ),
    Mutant(
        "CLS kept in the targets, last patch cut instead",
        "megad2v/models/data2vec.py",
        "layer[:, prefix:] for layer",
        "layer[:, :-prefix] for layer",
        f"{DATA2VEC}::test_targets_are_the_top_layers_without_cls",
    ),
    # --- student and teacher
    Mutant(
        "teacher left in train mode",
        "megad2v/models/data2vec.py",
        "return super().train(False)",
        "return super().train(mode)",
        f"{DATA2VEC}::test_teacher_never_leaves_eval_mode",
    ),
    Mutant(
        "no stop-gradient in the teacher",
        "megad2v/models/data2vec.py",
        "    @torch.no_grad()\n",
        "",
        f"{DATA2VEC}::test_no_gradient_through_the_targets",
    ),
    Mutant(
        "no stop-gradient on the student's clean view",
        "megad2v/models/data2vec.py",
        "targets(inputs, clean_btd.detach(),",
        "targets(inputs, clean_btd,",
        f"{DATA2VEC}::test_no_gradient_through_the_targets",
    ),
    Mutant(
        "mask inverted",
        "megad2v/modalities/vision/front_end.py",
        "torch.where(mask_bt.unsqueeze(-1),",
        "torch.where(~mask_bt.unsqueeze(-1),",
        f"{DATA2VEC}::test_patches_and_tokens",
    ),
    Mutant(
        "relative bias transposed",
        "megad2v/models/attention.py",
        "self.table[:, self.index]",
        "self.table[:, self.index.t()]",
        f"{MODELS}::test_encoder_chains_its_blocks",
    ),
    # --- data
    Mutant(
        "blocks of a mask only lie, never stand",
        "megad2v/modalities/vision/masking.py",
        "math.exp(log_aspect * (1 - 2 * rng.random()))",
        "math.exp(log_aspect * rng.random())",
        "tests/unit/test_masking.py::test_blocks_keep_area_and_aspect",
    ),
    Mutant(
        "order of samples ignores the epoch",
        "megad2v/data/plan.py",
        "self._order.indices(epoch,",
        "self._order.indices(0,",
        "tests/unit/test_plan.py::test_epochs_differ",
    ),
    Mutant(
        "augmentation ignores the epoch",
        "megad2v/modalities/vision/transforms.py",
        'generator(self._seed, epoch, sample_id, "augment")',
        'generator(self._seed, sample_id, "augment")',
        "tests/unit/test_purity.py",
    ),
    Mutant(
        "contrast against the mean gray of the crop",
        "megad2v/modalities/vision/transforms.py",
        'ImageStat.Stat(rgb.convert("L"))',
        'ImageStat.Stat(rgb.crop(cut).convert("L"))',
        f"{AUGMENT}::test_published_operations_byte_for_byte",
    ),
    Mutant(
        "box of a flipped image cut from the other side",
        "megad2v/modalities/vision/transforms.py",
        "(width - last, top, width - first, bottom) if view.flip else view.box",
        "view.box",
        f"{AUGMENT}::test_published_operations_byte_for_byte",
    ),
    Mutant(
        "photos decoded so small that crops lose resolution",
        "megad2v/modalities/vision/transforms.py",
        "return min(box[2] - box[0], box[3] - box[1]) / self._size",
        "return max(box[2] - box[0], box[3] - box[1]) / self._size",
        f"{AUGMENT}::test_draft_decoding_keeps_the_resolution",
    ),
    Mutant(
        "a block may span the grid",
        "megad2v/modalities/vision/masking.py",
        "if height >= grid or width >= grid:",
        "if height > grid or width > grid:",
        "tests/unit/test_masking.py::test_no_block_spans_the_grid",
    ),
    Mutant(
        "buckets meet a window's samples in step",
        "megad2v/data/buckets.py",
        'salt=("bucket", number)',
        "salt=()",
        f"{LENGTHS}::test_buckets_mix_the_same_window_differently",
    ),
    Mutant(
        "each bucket shuffles the shards for itself",
        "megad2v/data/buckets.py",
        "SampleOrder(sizes, seed=seed,",
        "SampleOrder(sizes, seed=seed + number,",
        f"{LENGTHS}::test_reading_stays_near_in_the_shards",
    ),
    Mutant(
        "rows by half of a bucket's length",
        "megad2v/data/buckets.py",
        "budget.rows(end)",
        "budget.rows(end // 2)",
        f"{LENGTHS}::test_budget_and_bucket_hold",
    ),
    Mutant(
        "buckets one after the other",
        "megad2v/data/buckets.py",
        "which, j = self.place(epoch, position)",
        "which, j = sorted(self.place(epoch, p) for p in range(self.epoch_micro_batches))[position]",
        f"{LENGTHS}::test_buckets_are_spread_over_the_epoch",
    ),
    Mutant(
        "spans start with replacement",
        "megad2v/modalities/speech/masking.py",
        "starts = subset(frames - reserve, count, rng)",
        "starts = (rng.random(count) * (frames - reserve)).astype(int)",
        f"{SPANS}::test_distribution_is_the_specs",
    ),
    Mutant(
        "spans reach the last frame",
        "megad2v/modalities/speech/masking.py",
        "reserve = span if",
        "reserve = span - 1 if",
        f"{SPANS}::test_published_setting",
    ),
    Mutant(
        "normalised after the crop",
        "megad2v/modalities/speech/transforms.py",
        "_normalisation(waveform) if",
        "_normalisation(waveform[: len(waveform) // 2]) if",
        "tests/unit/test_speech_transforms.py::test_training_crops_to_the_shortest_after_normalising_the_whole",
    ),
    Mutant(
        "crops of speech ignore the epoch",
        "megad2v/modalities/speech/transforms.py",
        'generator(self._seed, epoch, sample_id, "crop")',
        'generator(self._seed, sample_id, "crop")',
        "tests/unit/test_speech_transforms.py::test_crop_and_mask_each_change",
    ),
    Mutant(
        "padding counts as positions",
        "megad2v/modalities/batch.py",
        "if self.padding_bt is None or not rows:",
        "if True:",
        "tests/unit/test_speech_transforms.py::test_positions_that_count",
    ),
    # --- the step
    Mutant(
        "local instead of global count of masked positions",
        "megad2v/training/step.py",
        "sum_over(world.data, counts.to(world.device)).tolist()",
        "counts.to(world.device).tolist()",
        f"{LAYOUT}[zero1_dp2]",
    ),
    Mutant(
        "decay of the update before",
        "megad2v/training/schedules.py",
        "        updates + 1,\n",
        "        updates,\n",
        "tests/unit/test_schedules.py::test_which_update_has_which_rate",
    ),
    Mutant(
        "the mask token not decayed with the matrices",
        "megad2v/engine/setup.py",
        " or name in vectors",
        "",
        "tests/parity/test_published.py::test_weight_decay_groups",
    ),
    Mutant(
        "the peak only after the warm-up",
        "megad2v/training/schedules.py",
        "if schedule.peak_in_warmup else",
        "if False else",
        "tests/parity/test_published.py::test_learning_rates",
    ),
    Mutant(
        "one fragment of the teacher not averaged",
        "megad2v/teacher/ema.py",
        "                torch._foreach_lerp_(averages, masters, weight)",
        "                torch._foreach_lerp_(averages[:-1], masters[:-1], weight)",
        f"{LAYOUT}[zero1_dp1]",
    ),
    Mutant(
        "teacher's forward weights not refreshed",
        "megad2v/training/step.py",
        "        teacher.refresh()\n",
        "",
        f"{LAYOUT}[zero1_dp1]",
    ),
    Mutant(
        "gathered teacher weights stale under ZeRO-3",
        "megad2v/engine/forward_copy.py",
        "        drop_gathered(self.parameters.values())\n",
        "",
        f"{ORACLE}[zero3_dp2]",
    ),
    Mutant(
        "stale gradients of unused parameters under ZeRO-3",
        "megad2v/engine/fragments.py",
        "        self.optimizer.grad_partitions_flat_buffer.zero_()\n",
        "",
        f"{UNUSED}[zero3]",
    ),
    Mutant(
        "stale offloaded gradients of unused parameters",
        "megad2v/engine/fragments.py",
        "                    partition.grad.zero_()\n",
        "                    pass\n",
        f"{UNUSED}[zero3_offload]",
    ),
    # --- tensor parallelism
    Mutant(
        "attention dropout alike on all tensor-parallel ranks",
        "megad2v/parallel/rng.py",
        "torch.manual_seed(seed + axis.rank)",
        "torch.manual_seed(seed)",
        f"{PARALLEL}::test_dropout[tp2]",
    ),
    Mutant(
        "the replicated stream forgets that others drew",
        "megad2v/parallel/rng.py",
        "    with torch.random.fork_rng(devices=devices):",
        "    with torch.random.fork_rng(devices=devices, enabled=False):",
        f"{PARALLEL}::test_dropout[tp2]",
    ),
    Mutant(
        "a slice of the vocabulary starts with the first rows",
        "megad2v/parallel/layers.py",
        "mark_split(self.weight, vocabulary, self.first)",
        "mark_split(self.weight, vocabulary, 0)",
        f"{PARALLEL}::test_vocabulary_is_split_unequally",
    ),
    Mutant(
        "split parameters counted once in the gradient norm",
        "megad2v/parallel/sharding.py",
        "    parameter.tensor_model_parallel = True",
        "    parameter.tensor_model_parallel_ = True",
        f"{LAYOUT}[zero3_tp2_dp1_sequence]",
    ),
    Mutant(
        "gradients of norms not summed over the sequence",
        "megad2v/parallel/layers.py",
        "return (self._share,) if self.sequence else ()",
        "return ()",
        f"{LAYOUT}[zero3_tp2_dp1_sequence]",
    ),
    # --- the verdict
    Mutant(
        "verdict without the spike",
        "megad2v/training/verdict.py",
        "_not_finite(values) or self._spike(values)",
        "_not_finite(values)",
        f"{SPOILT}[zero3 fp32 tp1]",
    ),
    Mutant(
        "a refused step becomes usual",
        "megad2v/training/verdict.py",
        "            self.bad_in_a_row += 1\n            return False\n",
        "            self.bad_in_a_row += 1\n"
        "            self._histories['loss'].append(loss)\n            return False\n",
        f"{SPOILT}[zero1 fp32 tp1]",
    ),
    Mutant(
        "every rank judges its own loss",
        "megad2v/engine/gradients.py",
        "        dist.all_reduce(agreed)\n",
        "        agreed[1] *= dist.get_world_size()\n",
        "tests/distributed/test_skip.py::test_all_ranks_judge_the_same_numbers[zero2 fp32 tp1]",
    ),
    Mutant(
        "teacher averages a refused step",
        "megad2v/training/step.py",
        '    if taken:\n        watch.at("teacher")',
        '    if True:\n        watch.at("teacher")',
        f"{SPOILT}[zero2 fp32 tp1]",
    ),
    Mutant(
        "bf16 under ZeRO-1 asks nobody",
        "megad2v/engine/gradients.py",
        "        if not self._is_bf16_optimizer:\n            yield",
        "        if True:\n            yield",
        f"{SPOILT}[zero1 bf16 tp1]",
    ),
    Mutant(
        "schedules follow refused steps too",
        "megad2v/training/loop.py",
        "rates_at(run.config, progress.updates)",
        "rates_at(run.config, progress.step)",
        "tests/cli/test_stability.py::test_nan_for_ever_stops_and_an_older_checkpoint_goes_on",
    ),
    Mutant(
        "stopping deletes older checkpoints",
        "megad2v/training/loop.py",
        "save_checkpoint(run, delete_older=False)",
        "save_checkpoint(run)",
        "tests/cli/test_stability.py::test_a_run_that_collapses_stops",
    ),
    # --- guard and watchdog
    Mutant(
        "modules checked only after their weights were gathered",
        "megad2v/engine/guard.py",
        "partial(self._about_to_run, name), prepend=True)",
        "partial(self._about_to_run, name), prepend=False)",
        f"{GUARD}::test_a_rank_that_skips_a_block_stops_before_it_gathers[0]",
    ),
    Mutant(
        "plans of the ranks not compared",
        "megad2v/engine/guard.py",
        "            if own[0] or own[1]:\n",
        "            if own[1]:\n",
        f"{GUARD}::test_every_rank_raises_the_same_words[skips]",
    ),
    Mutant(
        "samples of tensor-parallel ranks not compared",
        "megad2v/engine/guard.py",
        "            if own[0] or own[1]:\n",
        "            if own[0]:\n",
        f"{GUARD}::test_every_rank_raises_the_same_words[other samples]",
    ),
    Mutant(
        "a rank stopped where the others wait goes unnamed",
        "megad2v/engine/hang.py",
        "    return silent(reports, now, MISSED_BEATS * tick) or _hanging(",
        "    return _hanging(",
        "tests/unit/test_hang.py::test_a_rank_stopped_where_the_others_wait",
    ),
    Mutant(
        "layer drop draws the same blocks in every step",
        "megad2v/training/layer_drop.py",
        "layer_drop/{seed}/{step}/{block}",
        "layer_drop/{seed}/{block}",
        "tests/unit/test_guard.py::test_layer_drop_is_a_pure_draw",
    ),
    # --- speech
    Mutant(
        "speech: positions without their norms",
        "megad2v/modalities/speech/positions.py",
        "F.gelu(F.layer_norm(y_btd, y_btd.shape[-1:], eps=EPS).transpose(1, 2))",
        "F.gelu(y_btd.transpose(1, 2))",
        "tests/parity/test_reference.py::test_intermediates",
    ),
    Mutant(
        "speech: the teacher's view is masked too",
        "megad2v/modalities/speech/front_end.py",
        "return torch.where(mask_bt.unsqueeze(-1), self.mask_token.to(clean_btd.dtype), clean_btd), clean_btd",
        "return (torch.where(mask_bt.unsqueeze(-1), self.mask_token.to(clean_btd.dtype), clean_btd),) * 2",
        "tests/unit/test_speech_front_end.py::test_views_and_mask_token",
    ),
    Mutant(
        "speech: padding not zeroed in front of the positions",
        "megad2v/models/encoder.py",
        "x_btd = x_btd.masked_fill(padding_bt.unsqueeze(-1), 0)",
        "pass",
        "tests/parity/test_hugging_face_speech.py::test_every_hidden_state_is_theirs",
    ),
    Mutant(
        "speech: query and key exchanged in an export",
        "megad2v/modalities/speech/hf_keys.py",
        'for part in ("q", "k", "v")',
        'for part in ("k", "q", "v")',
        "tests/cli/test_convert.py::test_speech",
    ),
    Mutant(
        "speech: copied positions averaged",
        "megad2v/teacher/ema.py",
        "(self._copied, 1.0)",
        "(self._copied, 1.0 - decay)",
        ORACLE,
    ),
    Mutant(
        "layer drop under one trace",
        "megad2v/engine/traces.py",
        "self._next = kind",
        "self._next = None",
        "tests/distributed/test_layer_drop.py::test_a_dropped_block_is_not_gathered",
    ),
    # --- resuming
    Mutant(
        "Adam's step not restored",
        "megad2v/training/state.py",
        'entry["step"].fill_(checkpoint.index.state["adam_step"])',
        'entry["step"].fill_(0.0)',
        "tests/cli/test_resume.py::test_resumed_after_a_damaged_checkpoint_equals_uninterrupted[zero1]",
    ),
    # --- launchers and the meeting
    Mutant(
        "shell of an allocation taken for a task of srun",
        "megad2v/engine/launcher.py",
        "        step.isdigit()\n        and int(step) < 2**31\n        and ",
        "        ",
        "tests/unit/test_launcher.py::test_a_shell_inside_an_allocation_is_no_task",
    ),
    Mutant(
        "Slurm's variables win over a launcher inside Slurm",
        "megad2v/engine/launcher.py",
        'if "RANK" in variables:',
        'if "RANK" in variables and "SLURM_STEP_ID" not in variables:',
        "tests/unit/test_launcher.py::test_launchers_inside_slurm_win_over_slurm",
    ),
    Mutant(
        "each rank goes by its own verdict",
        "megad2v/engine/rendezvous.py",
        'return meeting.store.compare_set("verdict", "", MISSING).decode()',
        "return MET",
        "tests/distributed/test_rendezvous.py::test_every_waiting_rank_names_the_missing_ones",
    ),
    # --- speech corpora
    Mutant(
        "first channel instead of the mean",
        "megad2v/modalities/speech/decode.py",
        "sum(samples_tc.T) / np.float32(channels)",
        "samples_tc[:, 0]",
        "tests/unit/test_speech_decode.py::test_channels_are_averaged",
    ),
    Mutant(
        "end of the resampler never flushed",
        "megad2v/modalities/speech/recording.py",
        "        yield stream.resample_chunk(np.zeros(0, dtype=np.float32), last=True)\n",
        "",
        "tests/unit/test_speech_recordings.py::test_blocks_are_resampled_as_one",
    ),
    Mutant(
        "files that libsndfile shortens are taken",
        "megad2v/modalities/speech/recording.py",
        "        _check_whole(path, file)\n",
        "",
        "tests/unit/test_speech_recordings.py::test_truncated_files",
    ),
    Mutant(
        "cut at the loudest point",
        "megad2v/modalities/speech/cutting.py",
        "np.argmin(power[::-1])",
        "np.argmax(power[::-1])",
        "tests/unit/test_speech_recordings.py::test_long_recordings_are_cut_in_pauses",
    ),
    Mutant(
        "last piece may be a splinter",
        "megad2v/modalities/speech/cutting.py",
        "self._cut(min(self._limit, len(self._waiting) - self._reserve))",
        "self._cut(min(self._limit, len(self._waiting) - 801))",
        "tests/unit/test_speech_recordings.py::test_pieces_are_the_whole",
    ),
    Mutant(
        "length of a FLAC not converted to 16 kHz",
        "megad2v/modalities/speech/decode.py",
        "return resampled_length(frames, rate) if rate in RATES else 0",
        "return frames if rate in RATES else 0",
        "tests/unit/test_speech_decode.py::test_length_from_header",
    ),
    # --- make_shards by many processes, and killed
    Mutant(
        "keys begin anew in each chunk",
        "megad2v/data/make.py",
        'key = f"{piece.first + number:09d}"',
        'key = f"{number:09d}"',
        "tests/unit/test_make_shards.py::test_webdataset_reads_the_same_bytes",
    ),
    Mutant(
        "a finished shard kept whatever is in it",
        "megad2v/data/writer.py",
        'fits = record["digest"] == digest and ',
        "fits = ",
        RESUME.format("test_record_is_of_the_same_samples"),
    ),
    Mutant(
        "a half-copied chunk stays in the journal",
        "megad2v/data/chunks.py",
        "file.truncate(whole)",
        "file.flush()",
        RESUME.format("test_damaged_leftovers_are_made_again"),
    ),
    Mutant(
        "data removed while the open shard needs them",
        "megad2v/data/make.py",
        "for number in chunks - self.packer.open_chunks:",
        "for number in chunks:",
        RESUME.format("test_each_file_is_prepared_once"),
    ),
    Mutant(
        "changed sources are not looked at",
        "megad2v/data/chunks.py",
        "if _stamp(folder, file) != before:",
        "if False:",
        RESUME.format("test_changed_input_is_refused"),
    ),
    Mutant(
        "duplicates count among the samples of a chunk",
        "megad2v/data/make.py",
        "            if number in dropped:\n                continue\n",
        "",
        "tests/unit/test_make_shards_text.py::test_clean_and_duplicates",
    ),
    # --- text corpora
    Mutant(
        "texts normalised in silence",
        "megad2v/modalities/text/train.py",
        'normalization_rule_name="identity"',
        'normalization_rule_name="nmt_nfkc"',
        "tests/unit/test_tokenizer.py::test_round_trip_and_specials",
    ),
    Mutant(
        "a text that names <mask> gets its id",
        "megad2v/modalities/text/codecs.py",
        "self.tokenizer.encode_special_tokens = True",
        "self.tokenizer.encode_special_tokens = False",
        "tests/unit/test_tokenizer.py::test_round_trip_and_specials",
    ),
    Mutant(
        "an exported vocabulary finds specials in texts",
        "megad2v/modalities/text/export.py",
        '"split_special_tokens": True',
        '"split_special_tokens": False',
        "tests/unit/test_tokenizer.py::test_export_gives_equal_ids",
    ),
    Mutant(
        "line numbers of a part off by one where it begins with a line",
        "megad2v/modalities/text/lines.py",
        "number += skipped.size > 1",
        "number += 1",
        "tests/unit/test_make_shards_text.py::test_parts_of_a_file_are_the_file",
    ),
    Mutant(
        "a paragraph over a border belongs to both parts",
        "megad2v/modalities/text/lines.py",
        "foreign = start > 0 and not _follows_blank(path, start)",
        "foreign = False",
        "tests/unit/test_make_shards_text.py::test_parts_of_a_file_are_the_file",
    ),
    Mutant(
        "duplicates kept",
        "megad2v/data/packing.py",
        'return not head["fingerprint"] or head["fingerprint"] not in self._seen',
        "return True",
        "tests/unit/test_make_shards_text.py::test_clean_and_duplicates",
    ),
    Mutant(
        "sentences without their ends",
        "megad2v/modalities/text/tokenizer.py",
        "            ids.append(EOS)\n",
        "",
        "tests/unit/test_make_shards_text.py::test_documents_and_sentences",
    ),
)
