"""Checkpoints as files: a folder of torch.distributed.checkpoint, one .pt file, one .safetensors file."""

from tutelx.checkpoints.conversion import Conversion, convert
from tutelx.checkpoints.formats import Format, format_of

__all__ = ["Conversion", "Format", "convert", "format_of"]
