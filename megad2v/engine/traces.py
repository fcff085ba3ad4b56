"""ZeRO-3's traces, one for each set of blocks that layer drop leaves in, and for each modality.

DeepSpeed records in which order a pass uses its modules, and then gathers ahead and keeps weights between forward and
backward. It keeps one trace: a pass that leaves a block out breaks it, and the pass after that has to record anew,
gathering everything one by one and twice. With layer drop, and with modalities that take turns, most passes do one or
the other. Here every kind of pass has a trace of its own, recorded once.

What may be let go behind a module follows from the trace. DeepSpeed remembers that by module and place alone, as if
there were one trace: after a validation, whose trace ends where training goes on to the backward, all weights stayed
gathered. So here it is remembered with the trace.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

LIMIT = 1024
"""Traces kept, the least recently used is forgotten first: at a rate of 0.05 that finds one in 98 of 100 steps of 12
blocks, in 89 of 24. A trace of 24 blocks takes some 100 kB of host memory."""


@dataclass(frozen=True)
class _Trace:
    """Modules and parameters in their order; by (module, place), ids of the parameters that may be let go behind it."""

    modules: tuple[Any, ...] = ()
    parameters: tuple[Any, ...] = ()
    releases: dict[tuple[int, int], set[int]] = field(default_factory=dict)


class TraceCache:
    """Stands where DeepSpeed's coordinator starts a pass, and hands it the trace of that pass, or lets it record one.

    Traces are hints: where one does not fit, DeepSpeed notices, does without, and the next pass of that kind records.
    Nothing is sent. DeepSpeed compares a new trace among ranks; `engine.guard` does so for every module of every pass,
    before it runs, and must not wait in a comparison that a rank gone astray makes alone.
    """

    def __init__(self, engine: Any) -> None:
        """`engine` is a DeepSpeed engine at stage 3, with an optimizer or (the teacher's) without one."""
        offload = getattr(engine.optimizer, "parameter_offload", engine.optimizer)
        self._coordinator = offload.get_param_coordinator()
        self._traces: OrderedDict[Hashable, _Trace] = OrderedDict()
        self._current: Hashable = None
        self._next: Hashable = None
        self._reset = self._coordinator.reset_step
        self._coordinator.reset_step = self._start
        self._find_releases = _unremembered(self._get("params_to_release"))
        self._set("params_to_release", self._releases)

    def expect(self, kind: Hashable) -> None:
        """Call before a pass: what its modules and their order depend on."""
        self._next = kind

    def _start(self) -> None:
        """In the place of the coordinator's reset_step, at the start of every pass."""
        from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode

        coordinator = self._coordinator
        if coordinator.is_record_trace():
            coordinator.construct_parameter_trace_from_module_trace()
            self._traces[self._current] = _Trace(tuple(self._get("submodule_order")), tuple(self._get("param_order")))
        elif coordinator.is_invalid_trace():
            self._traces.pop(self._current, None)
        self._current = self._next
        known = self._traces.get(self._current)
        self._set("trace_mode", ZeRoTraceMode.COMPLETE)
        self._set_trace(*((known.modules, known.parameters) if known is not None else ((), ())))
        self._reset()  # of a complete trace it sends nothing
        if known is None:
            self._set("trace_mode", ZeRoTraceMode.RECORD)
            self._set_trace([], [])
        else:
            self._traces.move_to_end(self._current)
        while len(self._traces) > LIMIT:
            self._traces.popitem(last=False)

    def _releases(self, module: Any, place: int) -> set[int]:
        """In the place of the coordinator's params_to_release, which it asks where a trace is complete."""
        releases, key = self._traces[self._current].releases, (module.ds_id, place)
        if key not in releases:
            releases[key] = self._find_releases(self._coordinator, module, place)
        return set(releases[key])  # the coordinator adds to what it gets

    def _set_trace(self, modules: Any, parameters: Any) -> None:
        self._set("submodule_order", modules)
        self._set("param_order", parameters)

    def _get(self, name: str) -> Any:
        return getattr(self._coordinator, f"_PartitionedParameterCoordinator__{name}")

    def _set(self, name: str, value: Any) -> None:
        self._get(name)  # a version of DeepSpeed without it must not go unnoticed
        setattr(self._coordinator, f"_PartitionedParameterCoordinator__{name}", value)


def _unremembered(method: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside of an lru_cache inside of DeepSpeed's profiling decorator, which does not name what it
    wraps."""
    return inspect.getclosurevars(method).nonlocals["func"].__wrapped__
