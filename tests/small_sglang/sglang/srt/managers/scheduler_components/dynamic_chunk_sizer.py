from types import SimpleNamespace

from sglang.srt.managers.schedule_batch import Req


class DynamicChunkSizer:
    model_config = SimpleNamespace(vocab_size=512)

    def profile_and_fit(self):
        return True

    def predict(self, history_len):
        return 64

    def _profile_prefill_latency(self):
        return [Req(origin_input_ids=[5, n]) for n in (9999, 512, 6)]
