"""Chunk sizes for pipeline-parallel prefill: profile, fit, size.

    plan = SamplePlan.spread(base_chunk=8192, context_len=131072)
    profile = share_profile(lambda: profile_prefill(step, plan))  # rank 0 runs, all ranks get
    model = LatencyModel.fit(profile)
    sizer = ChunkSizer(model, base_chunk=8192, context_len=131072)
    sizer.next_chunk(history_len)  # tokens, or None: keep the static size

Knows an engine only as `step(history_len, chunk_len)`. Importing needs torch and NumPy; fitting
needs SciPy (extra `pp`), `pystage.pp.plot` matplotlib (extra `plot`).
"""

from pystage.pp.budget import BudgetSizer, Piece
from pystage.pp.choice import Choice
from pystage.pp.makespan import simulate_pipeline
from pystage.pp.model import FitError, FitReport, LatencyModel, QualityGate
from pystage.pp.profile import (
    ProfileError,
    SamplePlan,
    Step,
    profile_prefill,
    random_token_ids,
)
from pystage.pp.samples import Profile, Sample, Timing
from pystage.pp.share import RemoteProfileError, share_profile
from pystage.pp.sizer import ChunkSizer

__all__ = [
    "BudgetSizer",
    "Choice",
    "ChunkSizer",
    "FitError",
    "FitReport",
    "LatencyModel",
    "Piece",
    "Profile",
    "ProfileError",
    "QualityGate",
    "RemoteProfileError",
    "Sample",
    "SamplePlan",
    "Step",
    "Timing",
    "profile_prefill",
    "random_token_ids",
    "share_profile",
    "simulate_pipeline",
]
