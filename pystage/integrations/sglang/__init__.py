"""The SGLang plugin (entry point group ``sglang.srt.plugins``): prefills go through a pool.

Installed beside SGLang, it is found by ``load_plugins()`` in each of its processes and hooks, with
SGLang's own ``HookRegistry``:

==================================  ==============================================================
``ScheduleBatch.prepare_for_extend``  opens the pool of the batch's device on first use
``Req.get_fill_ids``                within it: a view, in place of a copy of the whole history
``flatten_arrays_to_pinned_cpu``    within it: one gather from the requests' arrays into a slot
``resolve_forward_inputs``          one kernel on the forward stream, mixed batches included
``ForwardBatch.init_new``           resolves an extend batch that its caller forgot to resolve
``ScheduleBatch.merge_batch``       resolves two batches whose staged ids it would lose
==================================  ==============================================================

and, if they exist, the profiler of pipeline-parallel prefill, the check of request lengths (for
ids), and the scheduler's metrics. What is hooked is decided by looking for these symbols, what they
take and what they do (``known_code.py``), never by a version number:

- If one of them is missing or takes other arguments, nothing is hooked; ``get_fill_ids`` and
  ``merge_batch`` are left alone then.
- Views of the history are given only if ``get_fill_ids`` does what a view does, and no other
  plugin's hook could meet one.
- Only a known ``resolve_forward_inputs`` is preempted. With any other, SGLang's code takes the
  :class:`pystage.StagedTokens` for the tensor they stand for, and resolves mixed batches itself.

Everything else stays SGLang's: decode, idle and prebuilt batches, mixed batches under speculative
decoding, devices other than CUDA, and staged tensors outside ``prepare_for_extend``. A batch that
the pool cannot stage is staged by SGLang's code, and counted. Whatever reads the staged ids in
between (``encoder_swa_replay``, ``merge_batch``, ``record_batch_in_overlap``) finds a
:class:`pystage.StagedTokens`, which reads as the CPU tensor it replaces.

SGLang logs failures of hooks and goes on, so :func:`plugin` looks afterwards whether each hook is
reached, and logs the result in one line. ``docs/sglang.md`` has the settings.
"""

from __future__ import annotations

from .entry import main, plugin, status
from .process import pool_stats
from .settings import ENVIRONMENT, Settings

__all__ = ["ENVIRONMENT", "Settings", "main", "plugin", "pool_stats", "status"]
