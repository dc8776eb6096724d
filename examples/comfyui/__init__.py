"""fastden in ComfyUI: copy this folder to ``ComfyUI/custom_nodes/fastden``."""

from fastden.integrations.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
