"""The network as a file for other programs: ONNX, torch.export, AOTInductor, darktable and the Hugging Face Hub."""
