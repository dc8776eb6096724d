"""fastden inside other libraries and programs, one module each; each needs the package that it is for.

| module | for | extra |
|---|---|---|
| :mod:`fastden.integrations.deepinv` | inverse problems with deepinv | ``deepinv`` |
| :mod:`fastden.integrations.spandrel` | chaiNNer and others that load models with spandrel | ``spandrel`` |
| :mod:`fastden.integrations.comfyui` | a node of ComfyUI | none |
| :mod:`fastden.integrations.napari` | a dock widget of napari | ``napari`` |
| :mod:`fastden.integrations.transforms` | a transform of torchvision | ``torchvision`` |
| :mod:`fastden.integrations.datasets` | a map function of Hugging Face datasets | ``datasets`` |
"""
