"""Sessions, timing and files under Tutel's names."""

from tutelx import env
from tutelx.integrations.tutel.system.affinity import init_affinity_at_program_beginning
from tutelx.integrations.tutel.system.files import apply_rank_size_from_pattern, from_url, load, save
from tutelx.integrations.tutel.system.session import (
    LocalCache,
    cache,
    get_local_session,
    init_data_model_parallel,
    perform,
    record_time,
)

__all__ = [
    "TUTEL_CUDA_SANDBOX",
    "LocalCache",
    "apply_rank_size_from_pattern",
    "cache",
    "from_url",
    "get_local_session",
    "init_affinity_at_program_beginning",
    "init_data_model_parallel",
    "load",
    "perform",
    "record_time",
    "save",
]


def __getattr__(name: str):
    if name == "TUTEL_CUDA_SANDBOX":
        return env.cuda_sandbox()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
