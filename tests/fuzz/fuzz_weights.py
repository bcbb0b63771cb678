"""atheris: files of weights that bytes describe. Whatever they hold, the weights load or WeightsError says why not."""

from __future__ import annotations

import copy
import sys
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

if __name__ == "__main__":  # what coverage guides by must be instrumented as it is first imported
    import atheris

    with atheris.instrument_imports(
        include=["fastalex.models", "torch.serialization", "torch._weights_only_unpickler"]
    ):
        import torch
        from torch import nn

        from fastalex.models import WeightsError, load_mean, load_weights
else:
    import torch
    from torch import nn

    from fastalex.models import WeightsError, load_mean, load_weights

#: What the first byte of an input chooses, modulo their number.
SUFFIXES = (".caffemodel", ".pth", ".safetensors", ".binaryproto")

_folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)


def tiny() -> nn.Sequential:
    """Names and ranks as in the real networks, in few numbers."""
    return nn.Sequential(
        OrderedDict(conv1=nn.Conv2d(3, 2, 2), flatten=nn.Flatten(), fc8=nn.Linear(4, 3))
    )


MODEL = tiny()
BEFORE = copy.deepcopy(MODEL.state_dict())


def try_file(data: bytes) -> bool:
    """Whether a file loads; raises where it does anything but load whole or be refused whole."""
    suffix = SUFFIXES[data[0] % len(SUFFIXES)] if data else SUFFIXES[0]
    path = Path(_folder.name) / f"file{suffix}"
    path.write_bytes(data[1:])
    try:
        if suffix == ".binaryproto":
            mean = load_mean(path)
            assert mean.dim() == 3
            assert mean.shape[0] == 3
        else:
            load_weights(MODEL, path)
    except WeightsError:
        for name, value in MODEL.state_dict().items():
            assert torch.equal(value, BEFORE[name]), f"{name} changed though the file was refused"
        return False
    MODEL.load_state_dict(BEFORE)
    return True


def main() -> None:
    warnings.simplefilter("ignore")
    atheris.Setup(sys.argv, lambda data: try_file(data) and None)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
