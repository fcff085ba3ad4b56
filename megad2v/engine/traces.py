"""ZeRO-3's traces, one for each set of blocks that layer drop leaves in.

DeepSpeed records in which order a pass uses its modules, and then gathers ahead and keeps weights between forward and
backward. It keeps one trace: a pass that leaves a block out breaks it, and the pass after that has to record anew,
gathering everything one by one and twice. With layer drop most passes do one or the other. Here every kind of pass has
a trace of its own, recorded once.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Hashable
from typing import Any

LIMIT = 128
"""Traces kept, the least recently used is forgotten first. 12 blocks at a rate of 0.05 keep one of 79 sets in 98 of 100
steps; a trace of 24 blocks takes some 100 kB."""


class TraceCache:
    """Hands DeepSpeed's coordinator the trace of the pass to come. Traces are hints: where one does not fit, DeepSpeed
    notices and does without. Every rank has to name the same passes in the same order."""

    def __init__(self, engine: Any) -> None:
        """`engine` is a DeepSpeed engine at stage 3."""
        self._coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
        self._traces: OrderedDict[Hashable, tuple[Any, Any]] = OrderedDict()
        self._current: Hashable = None

    def before(self, kind: Hashable) -> None:
        """Call before each pass; equal `kind` means the same modules in the same order. Nothing happens, and nothing is
        sent, while it stays the same; where it changes, ranks compare the lengths of a trace just recorded."""
        from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode

        if kind == self._current:
            return
        coordinator = self._coordinator
        coordinator.reset_step()  # ends the last pass, as the start of this one would
        if coordinator.is_complete_trace():
            self._traces[self._current] = (self._get("submodule_order"), self._get("param_order"))
            self._traces.move_to_end(self._current)
        else:  # it did not fit
            self._traces.pop(self._current, None)
        self._current = kind
        if kind in self._traces:
            modules, parameters = self._traces[kind]
            self._traces.move_to_end(kind)
            self._set("submodule_order", modules)
            self._set("param_order", parameters)
            self._set("param_queue", deque(parameters))
            self._set("trace_mode", ZeRoTraceMode.COMPLETE)
        else:
            coordinator._clear_trace_structures()
            self._set("trace_mode", ZeRoTraceMode.INVALID)  # the pass's own start makes "record" of it
        while len(self._traces) > LIMIT:
            self._traces.popitem(last=False)

    def _get(self, name: str) -> Any:
        return getattr(self._coordinator, f"_PartitionedParameterCoordinator__{name}")

    def _set(self, name: str, value: Any) -> None:
        self._get(name)  # a version of DeepSpeed without it must not go unnoticed
        setattr(self._coordinator, f"_PartitionedParameterCoordinator__{name}", value)
