from types import SimpleNamespace

from sglang.srt.managers.overlap_utils import resolve_forward_inputs
from sglang.srt.managers.utils import validate_input_length


class Scheduler:
    model_config = SimpleNamespace(vocab_size=512)

    def handle_generate_request(self, req):
        return validate_input_length(req, 1000)

    def handle_embedding_request(self, req):
        return validate_input_length(req, 1000)

    def forward(self, batch, future_map):
        resolve_forward_inputs(batch, future_map)
        return batch.input_ids
