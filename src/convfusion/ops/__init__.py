"""The token-mixing middle of the ΔConvBlock as one operation, and its kernels for CUDA.

`reference` is what it means, in plain PyTorch; `library` is the operation that PyTorch sees, and
the rule that decides who computes it; `kernels` and `launch` are how a GPU does. `library` imports
Triton only when the operation runs.
"""
