"""Prefill, mixed and decode batches whose ids stay on the host until the forward needs them."""

from __future__ import annotations

import warnings

import torch

from pystage import ForgottenResolveWarning, StagingPool, batch

pool = StagingPool(device=None)
device = pool.device

# --8<-- [start:prefill]
prompts = [[11, 12, 13, 14], [21, 22]]
prefill = batch.PrefillBatch(device)
batch.prepare_for_extend(prefill, prompts, pool=pool, starts=[2, 0])  # [13, 14] and [21, 22]
assert prefill.input_ids is None  # still on the host

batch.resolve_forward_inputs(prefill)  # on the stream that runs the forward
assert prefill.input_ids is not None
assert prefill.input_ids.tolist() == [13, 14, 21, 22]
# --8<-- [end:prefill]

# --8<-- [start:mixed]
relay = torch.tensor([0, 500, 600, 700], device=device)  # the ids that the last forward sampled
running = torch.tensor([1, 3], device=device)  # positions of the running requests' ids in it

mixed = batch.PrefillBatch(device)
batch.prepare_for_extend(mixed, prompts, pool=pool)
batch.mix_with_running(mixed, running)
batch.resolve_forward_inputs(mixed, relay)  # one kernel for both kinds of request
assert mixed.input_ids is not None
assert mixed.input_ids.tolist() == [11, 12, 13, 14, 21, 22, 500, 700]
# --8<-- [end:mixed]

# --8<-- [start:decode]
decode = batch.PrefillBatch(device, req_pool_indices=torch.tensor([2, 3], device=device))
batch.resolve_forward_inputs(decode, relay)
assert decode.input_ids is not None and decode.input_ids.tolist() == [600, 700]
# --8<-- [end:decode]

# --8<-- [start:change]
one, two = batch.PrefillBatch(device), batch.PrefillBatch(device)
batch.prepare_for_extend(one, prompts, pool=pool)
batch.prepare_for_extend(two, [[31, 32, 33]], pool=pool)
batch.merge(one, two)  # three requests, two slots, nothing copied
batch.filter(one, keep_indices=[1, 2])  # drops the first request
batch.resolve_forward_inputs(one)
assert one.input_ids is not None and one.input_ids.tolist() == [21, 22, 31, 32, 33]
# --8<-- [end:change]

# --8<-- [start:guard]
forgotten = batch.PrefillBatch(device)
batch.prepare_for_extend(forgotten, prompts, pool=pool)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    batch.ensure_resolved(forgotten)  # in the code that builds the forward
assert forgotten.input_ids is not None
assert caught[0].category is ForgottenResolveWarning  # names the line that forgot to resolve
# --8<-- [end:guard]

pool.close()
