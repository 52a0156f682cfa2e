def __getattr__(name: str):
    # Resolved on first use, so that `import ldm.metrics` does not import torch.
    if name in ("load", "match", "score"):
        from ldm import api

        return getattr(api, name)
    raise AttributeError(f"module 'ldm' has no attribute '{name}'")
