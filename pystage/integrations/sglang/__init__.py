"""The SGLang plugin (entry point group ``sglang.srt.plugins``): it stages prefills in a pool.

If pystage is installed beside SGLang, ``load_plugins()`` finds the plugin in each SGLang process.
The plugin hooks these functions with SGLang's own ``HookRegistry``:

==================================  ==============================================================
``ScheduleBatch.prepare_for_extend``  opens the pool of the batch's device on first use
``Req.get_fill_ids``                inside it: gives a view instead of a copy of the whole history
``flatten_arrays_to_pinned_cpu``    inside it: gathers the requests' arrays into a slot, in one step
``resolve_forward_inputs``          launches a kernel on the forward stream, also for mixed batches
``ForwardBatch.init_new``           resolves an extend batch that its caller forgot to resolve
``ScheduleBatch.merge_batch``       first resolves two batches if it would lose their staged ids
==================================  ==============================================================

If they exist, it also hooks the writing of KV rows, the profiler of pipeline-parallel prefill, the
check of request lengths (to validate ids), and the scheduler's metrics. Settings turn on more: the
hooks for chunk sizes, for the time budget, and for the correction of the model.

The plugin never looks at a version number. It looks at the functions: whether they exist, what
arguments they take, and what their code does (``known_code.py``):

- If one of the first five functions is missing or takes other arguments, the plugin hooks nothing.
  If only ``merge_batch`` is, the plugin leaves that function alone.
- It gives views of the history only if ``get_fill_ids`` does what a view does, and no hook of
  another plugin could receive one.
- It resolves a batch itself only if SGLang's ``resolve_forward_inputs`` is known code. Otherwise
  SGLang's code uses the :class:`pystage.StagedTokens` like the tensor that they replace, and
  resolves mixed batches itself.

SGLang's own code handles everything else: decode, idle and prebuilt batches, mixed batches under
speculative decoding, devices other than CUDA, and staged tensors outside ``prepare_for_extend``. It
also stages a batch that the pool cannot stage, and the plugin counts such batches. Code that reads
the staged ids before they are resolved (``encoder_swa_replay``, ``merge_batch``,
``record_batch_in_overlap``) finds a :class:`pystage.StagedTokens`, which can be used like the CPU
tensor that it replaces.

SGLang logs a failed hook and continues. So after SGLang has applied the hooks, the plugin checks
that calls reach each one, and logs the result in one line. ``docs/sglang.md`` has the settings.
"""

from __future__ import annotations

from .entry import main, plugin, status
from .process import pool_stats
from .settings import ENVIRONMENT, Settings

__all__ = ["ENVIRONMENT", "Settings", "main", "plugin", "pool_stats", "status"]
