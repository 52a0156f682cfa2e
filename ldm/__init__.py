def __getattr__(name: str):
    # Resolved on first use, so that `import ldm.metrics` does not import torch.
    if name == "load":
        from ldm.api import load

        return load
    raise AttributeError(f"module 'ldm' has no attribute '{name}'")
