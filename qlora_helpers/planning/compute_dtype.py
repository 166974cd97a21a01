"""Compute dtype of a run. A GPU's generation decides; on a CPU two candidates are timed, once per machine."""

from qlora_helpers import cpu_speed
from qlora_helpers.config import Config
from qlora_helpers.device import Device, detect, on_cpu, profile
from qlora_helpers.planning import architectures


def device_for(config: Config) -> Device:
    """Return this machine with the compute dtype for the config's model.

    Trained biases need float32 on a CPU: they are float32 themselves, and there is no autocast to mix the two dtypes.
    """
    device = detect("auto" if profile() != "cpu" else "float32")
    if device.kind == "cpu" and config.bias != "none":
        return device.computing_in("float32", "trained biases need float32 on a CPU")
    if config.compute_dtype != "auto":
        return device.computing_in(config.compute_dtype)
    if device.kind == "cuda":
        return device
    shape = architectures.load_or_bundled(config)
    return on_cpu(device, (shape.hidden, shape.intermediate))


def as_begun(device: Device, dtype: str | None) -> Device:
    """Return `device` with the dtype that a run began in, if it has begun. Another dtype would make it another run.

    Prints a line if that dtype is slow here. Raises `UserError` if this GPU only emulates it.
    """
    if dtype is None or dtype == device.dtype:
        return device
    if device.kind == "cpu":
        speed = cpu_speed.lookup(*cpu_speed.USUAL_SIZE)
        if getattr(speed, dtype, 0.0) * cpu_speed.WORTHWHILE < getattr(speed, device.dtype, 0.0):
            print(f"This run began in {dtype} and keeps it, although it is slow here ({speed.reason}).")
    return device.computing_in(dtype, f"the run began in {dtype}")
