"""Pre-training of large language models in growing stages, on Megatron-Core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_step.engine import cpu

# The only work at import: the hook must exist before any module of megatron-core is imported.
cpu.install_import_hook()

if TYPE_CHECKING:
    from megatron_step.api import (
        RunConfig,
        export_model,
        forecast,
        import_model,
        load_config,
        open_model,
        run,
    )

__all__ = ["RunConfig", "export_model", "forecast", "import_model", "load_config", "open_model", "run"]


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used, so that importing the package is fast and does not need torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("megatron_step.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Return the public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
