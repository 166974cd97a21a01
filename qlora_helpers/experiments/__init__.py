"""Many runs: those of a comparison or a batch, and the notebook series."""

from qlora_helpers._lazy import lazy

__all__ = [
    "plan_runs",  # the runs that a comparison needs
    "run_batch",  # one run for each sample count, setting and seed
    "run_series",  # notebooks 01-07, headless
    "train_missing",  # train the planned runs that are not finished
]

__getattr__ = lazy(
    __name__, {"plan_runs": "matrix", "train_missing": "matrix", "run_series": "series", "run_batch": "series"}
)
