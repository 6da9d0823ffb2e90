"""Chunk sizes for pipeline-parallel prefill: profile, fit, size.

    plan = SamplePlan.spread(base_chunk=8192, context_len=131072)
    # Rank 0 profiles and fits; every rank gets the model.
    model = share_model(lambda: LatencyModel.fit(profile_prefill(step, plan)))
    sizer = ChunkSizer(model, base_chunk=8192, context_len=131072)
    sizer.choose(prompt_len, ranks)  # the plan with the lowest time to first token, and why
    sizer.for_queue(ranks).next_chunk(left, waiting)  # the size while other prompts wait
    # The largest chunk that keeps the batch within 60 ms:
    BudgetSizer(model, budget_ms=60).next_chunk(history_len, beside)

The package knows nothing about an engine except a function `step(history_len, chunk_len)`.
Importing it needs torch and NumPy, fitting needs SciPy (extra `pp`), and `pystage.pp.plot` needs
matplotlib (extra `plot`).
"""

from pystage.pp.budget import BudgetSizer, Piece
from pystage.pp.choice import Choice, Compared
from pystage.pp.correction import Correction
from pystage.pp.makespan import fit_stages, simulate_pipeline
from pystage.pp.model import FitError, FitReport, LatencyModel, QualityGate
from pystage.pp.profile import (
    ProfileError,
    SamplePlan,
    Step,
    profile_prefill,
    random_token_ids,
    time_chunks,
)
from pystage.pp.queue import QueueSizer
from pystage.pp.samples import Profile, Sample, Timing
from pystage.pp.share import RemoteProfileError, share_json, share_model, share_profile
from pystage.pp.sizer import ChunkSizer

__all__ = [
    "BudgetSizer",
    "Choice",
    "ChunkSizer",
    "Compared",
    "Correction",
    "FitError",
    "FitReport",
    "LatencyModel",
    "Piece",
    "Profile",
    "ProfileError",
    "QualityGate",
    "QueueSizer",
    "RemoteProfileError",
    "Sample",
    "SamplePlan",
    "Step",
    "Timing",
    "fit_stages",
    "profile_prefill",
    "random_token_ids",
    "share_json",
    "share_model",
    "share_profile",
    "simulate_pipeline",
    "time_chunks",
]
