"""One file of weights, read tensor by tensor: safetensors, or what `torch.save` writes."""

import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import DamagedFile, LabError, NotFound
from .checkpoint import SAFETENSORS_NAMES, TensorSpec
from .digests import diagnose_bytes


class TensorFile:
    """One file of named tensors, `.safetensors` or a zip archive of `torch.save`, read lazily.

    Raises:
        DamagedFile: the file is something else, or holds more than plain tensors; nothing in
            it is run.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_file():
            raise NotFound(f"{path} is missing.", finding="damaged-file")
        open_file = self._open_safetensors if path.suffix == ".safetensors" else self._open_torch
        open_file()
        for name, spec in self.tensors.items():
            if spec.dtype not in SAFETENSORS_NAMES:
                raise DamagedFile(
                    f"Tensor {name} in {path.name} is of dtype {spec.dtype}.",
                    finding="unexpected-dtype",
                )

    def _open_safetensors(self) -> None:
        try:
            handle = safe_open(str(self.path), framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise self._damaged(error) from None
        self.tensors = {}
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            part = handle.get_slice(name)
            dtype = {v: k for k, v in SAFETENSORS_NAMES.items()}.get(part.get_dtype(), torch.uint8)
            self.tensors[name] = TensorSpec(dtype, tuple(part.get_shape()))
        # Over the handle, not over self: that would keep the file mapped after the last use.
        self._slice = lambda name, start, stop: handle.get_slice(name)[start:stop]

    def _open_torch(self) -> None:
        try:
            loaded = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # a damaged pickle can raise nearly anything
            name = re.search(r"GLOBAL (\S+)", str(error))
            if not isinstance(error, pickle.UnpicklingError) or not name:
                raise self._damaged(error) from None
            raise DamagedFile(
                f"{self.path} was refused: it holds {name[1]}, which is not a plain tensor.",
                "A pickle can run any code when it is read; weights need none, so none was run.",
                "Get the file from a source you trust, and verify it.",
                finding="damaged-file",
            ) from None
        if not isinstance(loaded, dict) or not all(
            isinstance(name, str)
            and isinstance(tensor, torch.Tensor)
            and tensor.dim()
            and (tensor.layout, tensor.device.type) == (torch.strided, "cpu")
            for name, tensor in loaded.items()
        ):
            raise self._damaged(ValueError("it is not a dictionary of tensors"))
        self.tensors = {n: TensorSpec(t.dtype, tuple(t.shape)) for n, t in loaded.items()}
        self._slice = lambda name, start, stop: loaded[name][start:stop]

    def _damaged(self, error: Exception) -> LabError:
        cause = diagnose_bytes(self.path) or str(error).strip().split("\n")[0]
        return DamagedFile(
            f"{self.path} cannot be read as weights.",
            cause[:1].upper() + cause[1:].rstrip(".") + ".",
            finding="damaged-file",
        )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of the tensor `name`."""
        return self._slice(name, start, stop)
