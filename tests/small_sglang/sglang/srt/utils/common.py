from array import array

import numpy as np
import torch


def flatten_arrays_to_pinned_cpu(parts, pin):
    assert all(type(part) is array for part in parts)  # nothing else is promised to it
    ids = torch.from_numpy(np.concatenate([np.frombuffer(part, dtype=np.int64) for part in parts]))
    return ids.pin_memory() if pin else ids


def configure_logger(server_args, prefix=""):
    pass
