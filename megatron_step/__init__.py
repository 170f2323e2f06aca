"""Pre-training of large language models in growing stages, on Megatron-Core."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_step.engine import cpu

# The one thing done at import: megatron-core must meet the hook before any of its modules is loaded.
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
    """A public name, loaded when it is first used: importing the package takes no second and no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module("megatron_step.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, for completion in a notebook."""
    return sorted({*globals(), *__all__})
