import torch

_DEBUG_ASSERT = False


def _assert_nonneg_and_invalidate(ids, buffer, indices):
    assert (ids >= 0).all()
    buffer[indices] = -1


# fmt: off
def resolve_forward_inputs(batch, future_map):
    """Materialize input_ids at forward entry. Two sources:

    - Prefill: H2D copy from pinned CPU staging (prefill_input_ids_cpu).
    - Decode/spec_v2: gather from FutureMap (last iter's sampled token).
    """
    if batch.prefill_input_ids_cpu is not None:
        prefill_gpu = batch.prefill_input_ids_cpu.to(batch.device, non_blocking=True)
        if batch.mix_running_indices is not None:
            # Keep mix_running_indices (= the mixed-in running batch's req_pool_indices, freed
            # after merge_batch) alive on the forward stream until this gather completes.
            # CPU has no cross-stream reuse hazard (and record_stream rejects CPU tensors).
            if batch.mix_running_indices.device.type != "cpu":
                batch.mix_running_indices.record_stream(
                    torch.get_device_module(batch.device).current_stream()
                )
            if batch.enable_overlap and not batch.spec_algorithm.is_none():
                future_map.resolve_mixed_spec_tails(batch)
            decode_gpu = future_map.output_tokens_buf[batch.mix_running_indices]
            if _DEBUG_ASSERT:
                _assert_nonneg_and_invalidate(
                    decode_gpu,
                    future_map.output_tokens_buf,
                    batch.mix_running_indices,
                )
            batch.input_ids = torch.cat([prefill_gpu, decode_gpu])
        else:
            batch.input_ids = prefill_gpu
        batch.prefill_input_ids_cpu = None
        batch.mix_running_indices = None
    elif batch.input_ids is None and future_map.spec_algo.is_none():
        batch.input_ids = future_map.output_tokens_buf[batch.req_pool_indices]
        if _DEBUG_ASSERT:
            _assert_nonneg_and_invalidate(
                batch.input_ids, future_map.output_tokens_buf, batch.req_pool_indices
            )

    # Only the overlap path relays spec extras through the future_map; the
    # synchronous (non-overlap) V2 path installs next_draft_input directly.
    if batch.enable_overlap and not batch.spec_algorithm.is_none():
        future_map._resolve_spec_extras(batch)
# fmt: on


class FutureMap:
    def __init__(self, relay, spec_algo):
        self.output_tokens_buf, self.spec_algo, self.extras = relay, spec_algo, 0

    def resolve_mixed_spec_tails(self, batch):
        self.extras += 1

    def _resolve_spec_extras(self, batch):
        self.extras += 1
