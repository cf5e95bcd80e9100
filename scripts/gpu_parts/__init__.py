"""The parts of gpu_check.py: what each measures on a device, with torch, transformers, numpy and safetensors only."""
