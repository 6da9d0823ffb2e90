import numpy as np
import torch


def flatten_arrays_to_pinned_cpu(parts, pin):
    ids = torch.from_numpy(np.concatenate([np.frombuffer(part, dtype=np.int64) for part in parts]))
    return ids.pin_memory() if pin else ids


def configure_logger(server_args, prefix=""):
    pass
