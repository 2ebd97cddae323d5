"""What public functions refuse in common: tensors of a wrong shape, dtype or device."""

from collections.abc import Mapping

from torch import Tensor

from lillama_kernels.dispatch import autocasting

__all__ = ["check_like", "check_shapes"]


def check_like(name: str, tensor: Tensor | None, like: Tensor, of: str, dtype: bool = True) -> None:
    """Refuse a tensor on another device than `like`, which is called `of`, or of another dtype
    unless autocast converts it."""
    if tensor is None:
        return
    if tensor.device != like.device:
        raise ValueError(
            f"{name} must be on the device of {of}, {like.device}, got {tensor.device}"
        )
    if dtype and tensor.dtype != like.dtype and not autocasting(like):
        raise ValueError(f"{name} must have the dtype of {of}, {like.dtype}, got {tensor.dtype}")


def check_shapes(x: Tensor, wanted: Mapping[str, tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Refuse tensors that have not their shape or are not on the device of x."""
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
        check_like(name, tensor, x, "x", dtype=False)
