from array import array
from dataclasses import dataclass, field
from typing import Any

import torch
from sglang.srt.utils.common import flatten_arrays_to_pinned_cpu


class SpecAlgorithm:
    def __init__(self, none=True):
        self._none = none

    def is_none(self):
        return self._none


class Req:
    def __init__(self, ids=(), prefix_len=0, origin_input_ids=None):
        ids = ids if origin_input_ids is None else origin_input_ids
        self.origin_input_ids = self.full_untruncated_fill_ids = array("q", ids)
        self.prefix_len, self.extend_end = prefix_len, len(ids)
        self.multimodal_inputs = self.input_embeds = self.to_finish = None

    def get_fill_ids(self):
        return self.full_untruncated_fill_ids[: self.extend_end]

    def set_finish_with_abort(self, message):
        self.to_finish = message


@dataclass
class ScheduleBatch:
    reqs: list
    device: str = "cpu"
    input_ids: Any = None
    prefill_input_ids_cpu: Any = None
    mix_running_indices: Any = None
    req_pool_indices: Any = None
    spec_algorithm: Any = field(default_factory=SpecAlgorithm)
    enable_overlap: bool = True

    def prepare_for_extend(self):
        input_ids = [r.get_fill_ids()[r.prefix_len :] for r in self.reqs]
        pin = torch.device(self.device).type == "cuda"
        self.prefill_input_ids_cpu = flatten_arrays_to_pinned_cpu(input_ids, pin)
        self.input_ids = None
        self.fill_ids = [r.get_fill_ids() for r in self.reqs]  # later reads need arrays

    def merge_batch(self, other):
        both = self.input_ids is not None and other.input_ids is not None
        self.input_ids = torch.cat([self.input_ids, other.input_ids]) if both else None
        self.reqs = self.reqs + other.reqs
