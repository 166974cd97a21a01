"""The dtype a run computes in. On a GPU its generation decides; on a CPU two candidates are timed, once per machine."""

from qlora_helpers import cpu_speed
from qlora_helpers.config import Config
from qlora_helpers.device import Device, detect, on_cpu, profile
from qlora_helpers.errors import UserError
from qlora_helpers.planning import architectures


def device_for(config: Config) -> Device:
    """This machine, computing in the dtype that suits the config's model on it.

    Without a GPU, trained biases need float32: they are float32 themselves, and no autocast joins the two.
    """
    device = detect("auto" if profile() != "cpu" else "float32")
    if device.kind == "cpu" and config.bias != "none":
        return device.computing_in("float32", "biases are trained, which a CPU does in float32")
    if config.compute_dtype != "auto":
        return device.computing_in(config.compute_dtype)
    if device.kind == "cuda":
        return device
    return on_cpu(device, product_size(config))


def as_begun(device: Device, dtype: str | None) -> Device:
    """`device`, computing in the dtype in which a run began, if it has begun: another one would make it another run.

    Prints a line if that dtype is slow here. Raises `UserError` if this GPU only emulates it.
    """
    if dtype is None or dtype == device.dtype:
        return device
    if device.kind == "cpu":
        speed = cpu_speed.lookup(*cpu_speed.USUAL_SIZE)
        if getattr(speed, dtype, 0.0) * cpu_speed.WORTHWHILE < getattr(speed, device.dtype, 0.0):
            print(f"This run began in {dtype} and stays in it, which is slow here ({speed.reason}).")
    return device.computing_in(dtype, f"the run began in {dtype}")


def product_size(config: Config) -> tuple[int, int]:
    """Hidden and intermediate size of the config's model; the embedded model's for one whose shape is not known."""
    try:
        shape = architectures.load(config.model, config.revision)
    except UserError:
        return cpu_speed.USUAL_SIZE
    return shape.hidden, shape.intermediate
