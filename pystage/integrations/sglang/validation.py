"""Hooks that refuse a request with ids outside the vocabulary when it arrives."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import process
from .symbols import Function


def handle_request(original: Function, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    process.here.vocab_size = int(scheduler.model_config.vocab_size)
    try:
        return original(scheduler, *args, **kwargs)
    finally:
        process.here.vocab_size = None


def validate_input_length(original: Function, req: Any, *args: Any, **kwargs: Any) -> str | None:
    error: str | None = original(req, *args, **kwargs)
    if error is None and process.here.vocab_size is not None:
        error = bad_id(req, process.here.vocab_size)
        if error is not None:
            # SGLang would queue an embedding request and ignore the error, so end it here.
            req.set_finish_with_abort(error)
    return error


def bad_id(req: Any, vocab_size: int) -> str | None:
    """The error message for ids outside the vocabulary, or None if all are valid.

    Requests with multimodal inputs or embeddings are not checked: pad values of multimodal inputs
    exceed the vocabulary on purpose, and embeddings replace ids.
    """
    if req.multimodal_inputs is not None or req.input_embeds is not None:
        return None
    ids = np.array(req.origin_input_ids, dtype=np.int64)
    bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
    if not bad.size:
        return None
    at = int(bad[0])
    return (
        f"input_ids[{at}] is {int(ids[at])}, outside the vocabulary of {vocab_size} "
        f"({bad.size} of {ids.size} ids are)"
    )
