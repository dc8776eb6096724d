"""Words that functions and the command line accept. Importing them costs nothing: the command line starts at once."""

from __future__ import annotations

from typing import Literal

#: Image formats that can be written.
Format = Literal["jpeg", "png", "tiff", "webp", "avif", "heic"]
#: What the command line takes for them, in any case; and the formats of the names that are none.
FormatName = Literal["jpeg", "jpg", "png", "tiff", "tif", "webp", "avif", "heic"]
OTHER_NAMES: dict[str, Format] = {"jpg": "jpeg", "tif": "tiff"}
#: Speed or quality: the work spent on a result.
Quality = Literal["fast", "normal", "best"]
#: Exported files, their precisions, and the layouts of an ONNX file's inputs.
FileFormat = Literal["onnx", "pt2", "aoti", "dtmodel"]
Precision = Literal["fp32", "fp16", "fp16-weights", "bf16", "int8"]
Layout = Literal["separate", "dpir"]
